"""Arrays of each case, made once and memory-mapped from then on, so that a set need not fit into memory."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from training.data import Case, Entry, load_case, refuse

Arrays = dict[str, NDArray[Any]]


def prepare(
    entries: list[Entry], cache: Path, make: Callable[[Case], Arrays], jobs: int = 1
) -> Iterator[tuple[Entry, Arrays]]:
    """Each case with the arrays that `make` gave, by name; `cache` is for this `make` alone.

    ValueError that lists every case that cannot be read, once all the others are in the cache.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [entry for entry in entries if not place(cache, entry).exists()]
    problems = _fill(missing, cache, make, jobs)
    refuse([problem for problem in problems if problem])
    for entry in entries:
        files = sorted(place(cache, entry).glob("*.npy"))
        yield entry, {path.stem: np.load(path, mmap_mode="r") for path in files}


def place(cache: Path, entry: Entry) -> Path:
    """Folder of a case's arrays; another one as soon as one of its files or its row changes."""
    files = [path for path in (entry.scan, entry.label, entry.organs) if path]
    state = [repr((entry.healthy, entry.annotated, entry.pseudo))]
    state += [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return cache / f"{entry.name}-{hashlib.sha256(' '.join(state).encode()).hexdigest()[:12]}"


def _fill(entries: list[Entry], cache: Path, make: Callable[[Case], Arrays], jobs: int) -> list[str]:
    """What was wrong with each case, "" where nothing was."""
    work = [(entry, place(cache, entry), make) for entry in entries]
    bar: dict[str, Any] = {"total": len(work), "desc": "cache", "unit": "case", "disable": not work}
    if jobs < 2:
        return list(tqdm(map(_make, work), **bar))
    try:
        with ProcessPoolExecutor(jobs) as pool:
            return list(tqdm(pool.map(_make, work), **bar))
    except BrokenProcessPool as error:
        raise OSError(f"{cache}: a process that filled it was killed, as for want of memory: give --jobs 1") from error


def _make(job: tuple[Entry, Path, Callable[[Case], Arrays]]) -> str:
    """Write one case's arrays, all or none, whoever else may be writing them."""
    entry, folder, make = job
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with threadpool_limits(1):  # products of small matrices: threads only wait for each other, eight times as long
            arrays = make(load_case(entry))
    except (ValueError, OSError) as error:
        return f"{entry.name}: {error}"
    try:
        temporary.mkdir()
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        why = error.strerror or error  # numpy's own has none
        raise OSError(f"{folder.parent}: cannot be written ({why}): make room there, and call again") from error
    try:
        temporary.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(temporary)
    return ""
