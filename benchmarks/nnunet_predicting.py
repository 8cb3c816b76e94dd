"""nnU-Net v2's own predictor on a folder of scans, with the plan of the FLARE 2024 winner's class and random weights.

    python benchmarks/nnunet_predicting.py DEVICE INPUTS OUTPUTS

Runs where nnU-Net is installed. Four levels, 32 features, 3×2×2 mm, patches 96×128×128, half-overlapping tiles, not
mirrored: what the fastest entries do. Nothing else is changed, but that it predicts in one process.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

SPACING_MM, PATCH = [3.0, 2.0, 2.0], [96, 128, 128]  # (z, y, x)
FEATURES = [32, 64, 128, 256]  # of each level
DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}


def resampling(order: int, labels: bool) -> dict[str, Any]:
    return {"is_seg": labels, "order": order, "order_z": 0, "force_separate_z": None}


def architecture() -> dict[str, Any]:
    levels = len(FEATURES)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": FEATURES,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * levels,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (levels - 1),
            "n_conv_per_stage": [2] * levels,
            "n_conv_per_stage_decoder": [2] * (levels - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def plans() -> dict[str, Any]:
    """nnUNetPlans.json, as nnU-Net's planner would write it for this network."""
    resample = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": PATCH,
        "median_image_size_in_voxels": [120, 200, 200],
        "spacing": SPACING_MM,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": resample,
        "resampling_fn_data_kwargs": resampling(3, labels=False),
        "resampling_fn_seg": resample,
        "resampling_fn_seg_kwargs": resampling(1, labels=True),
        "resampling_fn_probabilities": resample,
        "resampling_fn_probabilities_kwargs": resampling(1, labels=False),
        "architecture": architecture(),
        "batch_dice": True,
    }
    levels = {"mean": 50.0, "median": 60.0, "std": 100.0, "min": -200.0, "max": 300.0}
    percentiles = {"percentile_00_5": -150.0, "percentile_99_5": 250.0}
    return {
        "dataset_name": "Dataset001_Peer",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": SPACING_MM,
        "original_median_shape_after_transp": [120, 200, 200],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": levels | percentiles},
    }


def main(device: str, inputs: str, outputs: str) -> None:
    torch.manual_seed(0)
    manager, built = PlansManager(plans()), architecture()
    configuration = manager.get_configuration("3d_fullres")
    network = get_network_from_plans(
        built["network_class_name"], built["arch_kwargs"], built["_kw_requires_import"], 1, 2, deep_supervision=False
    )
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=device != "cpu", device=torch.device(device), allow_tqdm=False
    )
    predictor.manual_initialization(
        network, manager, configuration, [network.state_dict()], DATASET, "nnUNetTrainer", None
    )
    predictor.predict_from_files_sequential(inputs, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
