"""What tests of several packages share: real scans where they are there, and small random weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real CT scans."""
    folder = Path(os.environ.get("DATA_DIR", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real scans: {folder} is not there (DATA_DIR names another folder)")
    return folder


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights that run in a blink and know nothing."""
    import torch

    from inference.hybrid.config import HybridConfig
    from inference.hybrid.model import Hybrid
    from inference.unet import UNetConfig
    from inference.weights import Gate
    from training.release import Recipe, release
    from training.unet import build_unet, export_onnx

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("random")
    hybrid, unet = HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16), UNetConfig(4, patch=(16, 32, 32))
    export_onnx(build_unet(unet), unet, folder / "unet.onnx")
    recipe = Recipe("random", hybrid, unet=unet, gate=Gate(0.0))
    release(Hybrid(hybrid).state_dict(), (folder / "unet.onnx").read_bytes(), recipe, folder)
    return folder
