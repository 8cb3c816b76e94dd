"""Damaged headers by the thousand: each is read, or refused in one sentence, in little memory and time.

python -m benchmarks.fuzz --count 100000
"""

from __future__ import annotations

import faulthandler
import gzip
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK
from tqdm import tqdm

from benchmarks.command_line import run_main
from inference.files import HEADER_BYTES
from inference.volume import read_volume
from training.settings import refuse_less

SUFFIXES = (".nii", ".nii.gz", ".mha", ".nrrd")
TEXT_HEADER = 400  # bytes of MHA and NRRD that are damaged
WORDS = (
    *(b"-1", b"0", b"nan", b"1e308", b"99999999999", b"LIST", b"../../etc/passwd", b"gzip", b"raw", b"\n\n", b"3 3"),
    *(b"\nCompressedData = True\n", b"\nCompressedDataSize = 99999999999999\n", b"\nencoding: gzip\n"),
    *(b"\nbyte skip: -1\n", b"\nHeaderSize = -1\n", b"\nElementNumberOfChannels = 99999\n"),
    b"\nsizes: 9999999 9999999 9999999\n",
)
MAX_VOXELS = 10**6  # few enough that what is accepted costs little
SLOW_S, HANGING_S = 5.0, 60.0
GROWTH_MIB = 64  # of the whole process, whatever the headers claim


@dataclass(frozen=True)
class Settings:
    count: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_less(self, {"count": 1, "seed": 0})


def healthy(folder: Path) -> dict[str, bytes]:
    """A sound small scan in each format."""
    hu = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.int16)
    sound = {".nii": nib.Nifti1Image(hu, np.diag([0.8, 0.8, 3.0, 1.0])).to_bytes()}
    sound[".nii.gz"] = sound[".nii"]  # packed after it is damaged
    for suffix in (".mha", ".nrrd"):
        path = folder / f"sound{suffix}"
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(hu.T), str(path))
        sound[suffix] = path.read_bytes()
    return sound


def damaged(rng: np.random.Generator, content: bytes, suffix: str) -> bytes:
    """Bytes, numbers or words of the header changed, parts cut out or doubled; at times all is cut short."""
    changed = bytearray(content)
    header = HEADER_BYTES if suffix.startswith(".nii") else min(TEXT_HEADER, len(content))
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(header))
        kind = rng.integers(5)
        if kind == 0:
            changed[at] = int(rng.integers(256))
        elif kind == 1:
            number = rng.choice([0, -1, 2**31 - 1, 2**15 - 1, 1, 7]).astype("<i4").tobytes()
            changed[at : at + 4] = number
        elif kind == 2:
            changed[at : at + 4] = np.float32(rng.choice([0, -1, np.nan, np.inf, 1e38, 1e-38])).tobytes()
        elif kind == 3 and not suffix.startswith(".nii"):
            word = WORDS[rng.integers(len(WORDS))]
            changed[at : at + len(word)] = word
        else:
            changed[at : at + 8] = changed[at : at + int(rng.integers(16))]
    if rng.random() < 0.1:
        changed = changed[: int(rng.integers(len(changed)))]
    packed = gzip.compress(bytes(changed), 1) if suffix == ".nii.gz" else bytes(changed)
    return packed[: int(rng.integers(len(packed)))] if rng.random() < 0.05 else packed


def look(path: Path) -> str:
    """Whether it was "read" or "refused". RuntimeError where that took long, or was not told in one sentence."""
    start, said = time.perf_counter(), "read"
    faulthandler.dump_traceback_later(
        HANGING_S, exit=True, file=sys.__stderr__
    )  # a library that hangs cannot be interrupted otherwise
    try:
        with warnings.catch_warnings(action="error"):  # what a library prints is no sentence
            voxels = read_volume(path, MAX_VOXELS).hu.size
        if voxels > MAX_VOXELS:
            raise RuntimeError(f"{path}: more voxels than allowed")
    except ValueError as error:
        said = "refused"
        if path.name not in str(error) or "\n" in str(error):
            raise RuntimeError(f"{path}: not told in one sentence: {error}") from error
    faulthandler.cancel_dump_traceback_later()
    if time.perf_counter() - start > SLOW_S:
        raise RuntimeError(f"{path}: took more than {SLOW_S} s")
    return said


def run(count: int, seed: int, folder: Path) -> Counter[tuple[str, str]]:
    """How many of each format were read and refused."""
    sound, seen, most = healthy(folder), Counter[tuple[str, str]](), peak_mib() + GROWTH_MIB
    for index in tqdm(range(count), unit="file", disable=None):
        suffix = SUFFIXES[index % len(SUFFIXES)]
        path = folder / f"damaged{suffix}"
        path.write_bytes(damaged(np.random.default_rng((seed, index)), sound[suffix], suffix))
        seen[suffix, look(path)] += 1
        if peak_mib() > most:
            raise RuntimeError(f"{path}: took more than {GROWTH_MIB} MiB")
    return seen


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for (suffix, said), times in sorted(run(settings.count, settings.seed, Path(folder)).items()):
            print(f"{suffix} {said}: {times}")


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
