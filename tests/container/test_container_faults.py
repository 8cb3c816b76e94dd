"""The image where it lacks something: room on the disk, memory, rights, cores, or the time to finish."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from container_engine import Engine
from test_image import GRADERS_COMMAND, READ_ONLY, Bench, assert_mask, names, write_ct

CASES = ("a", "b", "c")


@pytest.fixture
def bench(engine: Engine, image: str, tmp_path: Path) -> Bench:
    """Three scans, and the image to run on them."""
    bench = Bench(engine, image, tmp_path)
    for seed, case in enumerate(CASES):
        write_ct(bench.inputs, case, seed=seed)
    return bench


def masks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_costs_what_does_not_fit_and_nothing_else(bench: Bench) -> None:
    """Room for two pages: the masks of two cases."""
    script = "sh predict.sh inputs /small; code=$?; ls -A /small; cp /small/* outputs; exit $code"
    ran = bench.run("--tmpfs", "/small:size=8k", command=("sh", "-c", script))
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.split() == ["a.nii.gz", "b.nii.gz"]
    (told,) = [line for line in ran.stderr.splitlines() if "status=failed" in line]
    assert 'error="/small/c.nii.gz: cannot be written (No space left on device): make room' in told
    for case in ("a", "b"):
        assert_mask(bench.outputs, bench.inputs, case)


def test_little_memory_is_enough_and_too_little_is_told(bench: Bench) -> None:
    """96×96×24 voxels need 551 MiB; the masks are those of a machine with plenty."""
    asked = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null"
    if bench.run("-m", "560m", command=("sh", "-c", asked)).stdout.strip() != str(560 * 2**20):
        pytest.skip("this engine does not limit memory")
    bench.assert_done(bench.run(), *CASES)
    plenty = {case: np.asarray(nib.load(bench.outputs / f"{case}.nii.gz").dataobj) for case in CASES}
    for path in bench.outputs.iterdir():
        path.unlink()
    bench.assert_done(bench.run("-m", "560m"), *CASES)
    for case in CASES:
        found = np.asarray(nib.load(bench.outputs / f"{case}.nii.gz").dataobj)
        assert (found != plenty[case]).mean() < 1e-3
        (bench.outputs / f"{case}.nii.gz").unlink()
    ran = bench.run("-m", "540m")
    assert ran.returncode == 1, ran.stderr
    assert names(bench.outputs) == []
    for case, told in zip(CASES, ran.stderr.splitlines(), strict=True):
        assert f"{case}_0000.nii.gz: its 96×96×24 voxels need 551 MiB of memory, 540 are there: give the" in told


def test_with_hardly_any_rights(bench: Bench) -> None:
    """Inputs that cannot be written, no capability, half a core, 64 processes and threads, no home, no /tmp."""
    bench.outputs.chmod(0o777)  # without capabilities root has no more rights than others
    ran = bench.run(
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "64", "--cpus", "0.5"),
        *("--network", "none", "-e", "HOME=", *READ_ONLY, "-v", f"{bench.inputs}:/scans:ro"),
        command=("sh", "predict.sh", "/scans", "outputs"),
    )
    bench.assert_done(ran, *CASES)


def test_stopping_leaves_whole_masks_at_once(bench: Bench) -> None:
    for more in range(20):  # so that there is something left to do
        write_ct(bench.inputs, f"more{more}", seed=more)
    name = f"{bench.image}-stopped"
    mounts = ["-v", f"{bench.inputs}/:/workspace/inputs/", "-v", f"{bench.outputs}/:/workspace/outputs/"]
    bench.engine.docker("rm", "-f", name, check=False)
    bench.engine.docker("run", "-d", "--name", name, *mounts, f"{bench.image}:latest", *GRADERS_COMMAND)
    try:
        while "status=done" not in bench.engine.docker("logs", name).stderr:
            assert bench.engine.docker("inspect", "-f", "{{.State.Running}}", name).stdout.strip() == "true"
            time.sleep(0.2)
        began = time.monotonic()
        bench.engine.docker("stop", "-t", "60", name)
        assert time.monotonic() - began < 30
        assert bench.engine.docker("inspect", "-f", "{{.State.ExitCode}}", name).stdout.strip() == "143"
    finally:
        bench.engine.docker("rm", "-f", name, check=False)
    written = names(bench.outputs)
    assert "a.nii.gz" in written
    assert len(written) < 23
    for path in written:
        assert_mask(bench.outputs, bench.inputs, path.removesuffix(".nii.gz"))


def test_two_at_once_write_what_one_writes(bench: Bench, engine: Engine, image: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Bench(engine, image, tmp_path / "other")
    for seed, case in enumerate(CASES):
        write_ct(other.inputs, case, seed=seed)
    with ThreadPoolExecutor(2) as pool:
        for running in [pool.submit(one.run) for one in (bench, other)]:
            assert running.result().returncode == 0, running.result().stderr
    assert masks(bench.outputs) == masks(other.outputs)
    bench.assert_done(bench.run(), *CASES)
    assert masks(bench.outputs) == masks(other.outputs)
