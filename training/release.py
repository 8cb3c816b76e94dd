"""Put trained networks together as a folder of weights that `inference/` loads.

python -m training release --hybrid RUN/hybrid.safetensors --unet RUN/unet.onnx --out weights/NAME
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from inference.atomic import write_whole
from inference.fusion import FusionThresholds
from inference.hybrid.config import HybridConfig
from inference.slices import SLICE_MM, TISSUE_WINDOW_HU, Plane, Resize
from inference.unet import UNetConfig
from inference.weights import FORMAT, MANIFEST, Gate
from training.graph import export_graph
from training.unet import CONFIG


@dataclass(frozen=True)
class Recipe:
    """What the manifest says beside the files' checksums."""

    name: str
    hybrid: HybridConfig
    plane: Plane = "axial"
    resize: Resize = "square"
    slice_mm: float = SLICE_MM
    unet: UNetConfig = field(default_factory=UNetConfig)
    gate: Gate = field(default_factory=lambda: Gate(0.5))
    fusion: FusionThresholds = field(default_factory=FusionThresholds)
    training: dict[str, Any] = field(default_factory=dict)


def release(hybrid: dict[str, torch.Tensor], unet: bytes, recipe: Recipe, out: Path) -> None:
    """Write `out`/{hybrid.safetensors, hybrid.onnx, unet.onnx, manifest.json}.

    The hybrid's weights in float16, but for what is no matrix: that takes no room, and float16 cannot hold every
    variance. Its graph holds none.
    """
    out.mkdir(parents=True, exist_ok=True)
    half = {name: (value.half() if value.ndim > 1 else value).contiguous() for name, value in hybrid.items()}
    graph = export_graph(half, recipe.hybrid)
    parts = {"hybrid.safetensors": save(half), "hybrid.onnx": graph.content, "unet.onnx": unet}
    for name, content in parts.items():
        write_whole(out / name, content)
    sums = {name: {"file": name, "sha256": hashlib.sha256(content).hexdigest()} for name, content in parts.items()}
    look = {
        "plane": recipe.plane,
        "resize": recipe.resize,
        "window_hu": TISSUE_WINDOW_HU,
        "slice_mm": recipe.slice_mm,
    }
    manifest = {
        "format": FORMAT,
        "name": recipe.name,
        "hybrid": {**sums["hybrid.safetensors"], "config": recipe.hybrid.to_dict(), **look},
        "graph": {**sums["hybrid.onnx"], "unused": graph.unused},
        "unet": {**sums["unet.onnx"], "config": recipe.unet.to_dict()},
        "gate": asdict(recipe.gate),
        "fusion": recipe.fusion.to_dict(),
        "training": recipe.training,
    }
    write_manifest(out, manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / MANIFEST, (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode())


def metadata(path: Path) -> dict[str, Any]:
    """What a safetensors or an ONNX file of a run says of its network. ValueError where it says nothing."""
    said: dict[str, Any] = {}
    try:
        if path.suffix == ".onnx":
            said = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
        else:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
    except (SafetensorError, DecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}): name a file of a run") from error
    if CONFIG not in said:
        raise ValueError(f"{path}: says nothing of its network: name a run's unet.onnx, or its hybrid.safetensors")
    return said


@dataclass(frozen=True)
class Settings:
    """Of one release; thresholds are the defaults until `calibrate` sets them."""

    hybrid: Path  # hybrid.safetensors of a hybrid run
    unet: Path  # unet.onnx of a UNet run
    out: Path  # folder to write; its name is the weights' name
    how: str = ""  # how they were trained, in words


def main(settings: Settings) -> None:
    """Put trained networks together as a folder of weights; what they are is told by their files."""
    if settings.hybrid.suffix != ".safetensors" or settings.unet.suffix != ".onnx":
        raise ValueError(f"--hybrid {settings.hybrid}, --unet {settings.unet}: name hybrid.safetensors and unet.onnx")
    hybrid, unet = metadata(settings.hybrid), metadata(settings.unet)
    if (settings.out / MANIFEST).exists():
        print(f"{settings.out}: written anew, with the default thresholds: calibrate it", file=sys.stderr)
    recipe = Recipe(
        settings.out.name,
        HybridConfig.from_dict(json.loads(hybrid[CONFIG])),
        hybrid["plane"],
        hybrid["resize"],
        float(hybrid.get("slice_mm", SLICE_MM)),  # which weights of before do not tell
        unet=UNetConfig.from_dict(json.loads(unet[CONFIG])),
        training={"how": settings.how},
    )
    release(load_file(settings.hybrid), settings.unet.read_bytes(), recipe, settings.out)
