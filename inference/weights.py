"""A folder of weights: a manifest, and the files it names with their checksums; safetensors and ONNX, never pickle.

`manifest.json` holds everything that belongs to the weights and not to the program: network settings, plane,
resizing, window, thresholds of gate and fusion, and how they were made.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from .fusion import FusionThresholds
from .hybrid.config import HybridConfig
from .slices import Plane, Resize
from .unet import UNetConfig

MANIFEST = "manifest.json"
FORMAT = 2
SUFFIXES = {"hybrid": ".safetensors", "graph": ".onnx", "unet": ".onnx"}
WEIGHTS_FOLDER = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class Gate:
    """Verdicts on slices and on a whole scan.

    slice_threshold: a slice whose probability of holding a lesion lies below gets no positive prompts.
    scan_threshold: a scan whose score (see `pipeline.scan_score`) lies below is judged healthy.
    skip_unet: do not even run the UNet on a scan judged healthy.
    """

    scan_threshold: float
    skip_unet: bool = False
    slice_threshold: float = 0.5


@dataclass(frozen=True)
class Manifest:
    """`folder`/manifest.json, checked. slice_mm: slices closer than that are put together for the hybrid."""

    folder: Path
    name: str
    hybrid: HybridConfig
    plane: Plane
    resize: Resize
    window_hu: tuple[float, float]
    slice_mm: float
    unet: UNetConfig
    gate: Gate
    fusion: FusionThresholds
    files: dict[str, dict[str, str]]
    unused: tuple[str, ...]  # the hybrid's weights that its graph does not ask for

    def read(self, part: str) -> bytes:
        """The bytes of "hybrid", "graph" or "unet", after their checksum was compared."""
        entry = self.files[part]
        path = self.folder / entry["file"]
        if path.suffix != SUFFIXES[part] or path.name != entry["file"]:
            raise ValueError(f"{path}: weights must be a {SUFFIXES[part]} file beside the manifest")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}): copy the weights again") from error
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise ValueError(f"{path}: the checksum differs from {MANIFEST}'s: copy the weights again")
        return content


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json. ValueError with the mend where something is missing or unknown."""
    path = folder / MANIFEST
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): name a folder of weights") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error}): copy the weights again") from error
    try:
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']} is unknown to this program, which reads {FORMAT}: use its own")
        return _parse(folder, values)
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing: copy the weights again") from error
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: is no manifest of weights ({error}): copy the weights again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(folder: Path, values: dict[str, Any]) -> Manifest:
    hybrid, unet = values["hybrid"], values["unet"]
    for name, numbers in (("gate", values["gate"]), ("fusion", values["fusion"])):
        wrong = [key for key, value in numbers.items() if not isinstance(value, int | float)]
        if wrong:
            raise TypeError(f"{name}: {wrong[0]} is no number")
    low, high = hybrid["window_hu"]
    if not low < high:
        raise ValueError(f"the window {low} to {high} HU is empty: copy the weights again")
    for name, known in (("plane", get_args(Plane)), ("resize", get_args(Resize))):
        if hybrid[name] not in known:
            raise ValueError(f"{name} {hybrid[name]!r} is none of {', '.join(known)}: copy the weights again")
    return Manifest(
        folder=folder,
        name=values["name"],
        hybrid=HybridConfig.from_dict(hybrid["config"]),
        plane=hybrid["plane"],
        resize=hybrid["resize"],
        window_hu=(low, high),
        slice_mm=float(hybrid["slice_mm"]),
        unet=UNetConfig.from_dict(unet["config"]),
        gate=Gate(**values["gate"]),
        fusion=FusionThresholds.from_dict(values["fusion"]),
        files={part: {key: str(values[part][key]) for key in ("file", "sha256")} for part in SUFFIXES},
        unused=tuple(values["graph"]["unused"]),
    )


def find_weights(name_or_folder: str) -> Path:
    """A folder of weights by its name under weights/, or by its path.

    A bare name is looked up in weights/ first: what happens to lie in the caller's folder must not pass for it.
    """
    bare = Path(name_or_folder).name == name_or_folder
    for folder in (*([WEIGHTS_FOLDER / name_or_folder] if bare else []), Path(name_or_folder)):
        if os.path.isfile(folder / MANIFEST):  # noqa: PTH113  # `Path.is_file` fails where a name is too long
            return folder
    known = sorted(path.parent.name for path in WEIGHTS_FOLDER.glob(f"*/{MANIFEST}"))
    raise ValueError(f"{name_or_folder}: no weights there; name a folder with a {MANIFEST}, or one of {known}")
