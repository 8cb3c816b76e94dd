"""Would whole numbers of eight bits pay on a CPU? The UNet in float32 beside what ONNX Runtime's own tool makes of it.

    python -m benchmarks.int8 --out benchmarks/results/int8.json

The tool looks at one phantom to choose its scales: one a channel for weights, seven of eight bits, as a CPU without
VNNI needs it. Time and agreement are those of another phantom, by turns.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from tqdm import tqdm

from benchmarks.command_line import run_main
from benchmarks.results_file import check_out, write_results
from inference.onnx_session import Session
from inference.unet import GridProbability, UNet
from inference.weights import find_weights, read_manifest
from training.losses import dice
from training.phantom import Phantom, Scanner, make_phantom
from training.settings import refuse_less

SEEN, JUDGED = 3004, 3005  # seeds of the phantoms; no weights were trained on either
LIKELY = 0.5  # from here on, a voxel counts as lesion
Shown = list[dict[str, NDArray[np.float32]]]


@dataclass(frozen=True)
class Settings:
    weights: str = "small"  # name under weights/, or a folder
    out: Path = Path("benchmarks/results/int8.json")
    rounds: int = 3

    def __post_init__(self) -> None:
        refuse_less(self, {"rounds": 1})


class Listening(Session):
    """A session that keeps what it is shown."""

    def __init__(self, content: bytes) -> None:
        super().__init__("UNet", content)
        self.shown: Shown = []

    def run(self, inputs: dict[str, NDArray[Any]], last: bool = False) -> list[NDArray[Any]]:
        self.shown.append(inputs)
        return super().run(inputs, last)


class Reader(CalibrationDataReader):
    """What ONNX Runtime's tool looks at."""

    def __init__(self, shown: Shown) -> None:
        self.rest: Iterator[dict[str, NDArray[np.float32]]] = iter(shown)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self.rest, None)


def phantom(seed: int) -> Phantom:
    return make_phantom(seed, healthy=False, scanner=Scanner.training(np.random.default_rng(seed)))


def ask(unet: UNet, scan: Phantom) -> GridProbability:
    return unet.probabilities(scan.hu, scan.spacing_mm)


def in_eight_bits(content: bytes, shown: Shown) -> bytes:
    """The same network, all its convolutions in whole numbers of eight bits."""
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(content)
        quantize_static(
            source,
            made,
            Reader(shown),
            op_types_to_quantize=["Conv", "ConvTranspose"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
        return made.read_bytes()


def compare(unets: dict[str, UNet], scan: Phantom, rounds: int) -> dict[str, Any]:
    """Least seconds of a scan by each of two, and how far the second's probabilities agree with the first's."""
    seconds: dict[str, list[float]] = {name: [] for name in unets}
    grids = {}
    for name in tqdm([*unets] * rounds, unit="scan"):
        start = time.perf_counter()
        grids[name] = ask(unets[name], scan).grid
        seconds[name].append(time.perf_counter() - start)
    plain, other = grids.values()
    least = {name: round(min(took), 3) for name, took in seconds.items()}
    first, second = least.values()
    return {
        "seconds": least,
        "times_faster": round(first / second, 3),
        "dice": round(dice((other >= LIKELY).astype(np.uint8), (plain >= LIKELY).astype(np.uint8)), 4),
        "largest_difference": round(float(np.abs(other - plain).max()), 4),
    }


def main(settings: Settings) -> None:
    check_out(settings.out)
    manifest = read_manifest(find_weights(settings.weights))
    content = manifest.read("unet")
    unet, eight = UNet(content, manifest.unet), UNet(content, manifest.unet)
    listening = eight.session = Listening(content)
    ask(eight, phantom(SEEN))
    eight.session = Session("UNet in int8", in_eight_bits(content, listening.shown))
    told = {
        "command": "python -m benchmarks.int8",
        **compare({"float32": unet, "int8": eight}, phantom(JUDGED), settings.rounds),
    }
    write_results(settings.out, told)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
