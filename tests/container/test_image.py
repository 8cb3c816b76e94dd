"""The image as graders meet it: built, run with their command, saved and loaded.

What the masks say is judged elsewhere; here, that they come, whole and alone, however the container is started.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tomllib
import uuid
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from container_engine import ARCHIVE_LIMIT_S, REPOSITORY, Engine, Finished

GRADERS_MEMORY = ("--shm-size=28gb", "-m", "28G")
GRADERS_COMMAND = ("/bin/bash", "-c", "sh predict.sh")
READ_ONLY = (  # everywhere: podman would otherwise lay writable folders over these three, which docker does not
    "--read-only",
    *(part for folder in ("/tmp", "/var/tmp", "/run") for part in ("--tmpfs", f"{folder}:ro")),
)
SHAPE = (96, 96, 24)  # i, j, k
SPACING_MM = (0.9, 0.8, 5.0)


def oblique_affine() -> np.ndarray:
    """Voxel indices (i, j, k) → RAS millimetres, 4×4: anisotropic, tilted about x, then turned about z."""
    tilt, turn = np.deg2rad(12.0), np.deg2rad(7.0)
    about_x = [[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]]
    about_z = [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    affine = np.eye(4)
    affine[:3, :3] = np.array(about_z) @ np.array(about_x) @ np.diag(SPACING_MM)
    affine[:3, 3] = (-120.5, 33.25, -410.0)
    return affine


def write_ct(folder: Path, case: str, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> None:
    """Writes `case`_0000.nii.gz: a noisy ellipsoid of soft tissue in air, int16 HU, axes (i, j, k)."""
    axes = [np.linspace(-1, 1, size) for size in shape]
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")))
    noise_hu = np.random.default_rng(seed).normal(0, 15, shape)
    hu = np.where(radius < 0.85, 40.0, -1000.0) + noise_hu
    nib.save(nib.Nifti1Image(hu.astype(np.int16), oblique_affine()), folder / f"{case}_0000.nii.gz")


def names(folder: Path) -> list[str]:
    """Everything below `folder`, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_mask(outputs: Path, inputs: Path, case: str) -> None:
    """`case`.nii.gz is a uint8 mask of {0, 1} on its scan's own grid."""
    mask = nib.Nifti1Image.from_filename(outputs / f"{case}.nii.gz")
    scan = nib.Nifti1Image.from_filename(inputs / f"{case}_0000.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    assert set(np.unique(np.asanyarray(mask.dataobj))) <= {0, 1}
    assert mask.shape == scan.shape
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)
    np.testing.assert_allclose(mask.header.get_zooms(), scan.header.get_zooms(), rtol=1e-5)


def assert_archive_is_whole(archive: Path, image: str) -> None:
    """The archive names `image` as docker does and holds every layer: a load may find some still in store."""
    with tarfile.open(archive) as tar:
        members = set(tar.getnames())
        (manifest,) = _json(tar, "manifest.json")
        layers = _json(tar, manifest["Config"])["rootfs"]["diff_ids"]
    assert [tag.removeprefix("docker.io/library/") for tag in manifest["RepoTags"]] == [f"{image}:latest"]
    assert len(manifest["Layers"]) == len(layers)
    assert set(manifest["Layers"]) <= members


def _json(tar: tarfile.TarFile, member: str) -> Any:
    file = tar.extractfile(member)
    assert file is not None, f"{member} is no file"
    return json.load(file)


def gpu_flags(engine: Engine) -> list[str]:
    """The graders' `--gpus="device=1"`, or the nearest that this machine's docker can give."""
    if engine.script is not None:
        return ["--gpus=device=1"]  # accepted and ignored there
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    devices = listing.stdout.count("GPU ")
    return [f"--gpus=device={min(devices, 2) - 1}"] if devices else []


class Bench:
    """An inputs and an outputs folder, and one container run on them."""

    def __init__(self, engine: Engine, image: str, folder: Path) -> None:
        self.engine, self.image = engine, image
        self.inputs, self.outputs = folder / "inputs", folder / "outputs"
        for made in (self.inputs, self.outputs):
            made.mkdir()
            made.chmod(0o755)  # as the organisers' script leaves it, whatever the umask here

    def run(self, *options: str, command: tuple[str, ...] = GRADERS_COMMAND) -> Finished:
        """`docker run` with the graders' mounts; the process is returned, whatever its exit code.

        Removed afterwards, not by `--rm`: with that, podman before 4.6 tells the docker client 0 for every run.
        """
        mounts = ["-v", f"{self.inputs}/:/workspace/inputs/", "-v", f"{self.outputs}/:/workspace/outputs/"]
        name = f"{self.image}-{uuid.uuid4().hex[:8]}"
        try:
            return self.engine.docker(
                "run", *options, "--name", name, *mounts, f"{self.image}:latest", *command, check=False
            )
        finally:
            self.engine.docker("rm", "-f", name, check=False)

    def assert_done(self, ran: Finished, *cases: str) -> None:
        """The run succeeded and left the masks of `cases`, and nothing else."""
        assert ran.returncode == 0, ran.stderr
        assert names(self.outputs) == sorted(f"{case}.nii.gz" for case in cases)
        for case in cases:
            assert_mask(self.outputs, self.inputs, case)


@pytest.fixture
def bench(engine: Engine, image: str, tmp_path: Path) -> Bench:
    """Empty folders, and the image to run on them."""
    return Bench(engine, image, tmp_path)


def test_graders_command(bench: Bench) -> None:
    write_ct(bench.inputs, "case_0001")
    ran = bench.run(*GRADERS_MEMORY, *gpu_flags(bench.engine), "--rm")
    bench.assert_done(ran, "case_0001")


def test_graders_outputs_folder_stays_roots(bench: Bench) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder that root owns")
    write_ct(bench.inputs, "case_0001")
    bench.assert_done(bench.run(), "case_0001")
    status = bench.outputs.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (0, 0o755)


def test_several_cases_at_once(bench: Bench) -> None:
    cases = ["FLARE_a", "with.dots", "small"]
    for seed, case in enumerate(cases):
        write_ct(bench.inputs, case, (96 - 16 * seed, 80 + 8 * seed, 24 - 8 * seed), seed)
    bench.assert_done(bench.run(), *cases)


def test_default_command(bench: Bench) -> None:
    write_ct(bench.inputs, "case_0001")
    bench.assert_done(bench.run(command=()), "case_0001")


def test_without_network_shared_memory_or_a_writable_root(bench: Bench) -> None:
    write_ct(bench.inputs, "case_0001")
    ran = bench.run("--network", "none", *READ_ONLY, "--shm-size", "64m")
    bench.assert_done(ran, "case_0001")


def test_as_a_user_that_the_image_does_not_know(bench: Bench, tmp_path: Path) -> None:
    write_ct(bench.inputs, "case_0001")
    bench.outputs.chmod(0o777)
    passwd = tmp_path / "passwd"  # podman would otherwise add the user to the container's, which docker does not
    passwd.write_text("root:x:0:0:root:/root:/bin/bash\n")
    passwd.chmod(0o644)
    ran = bench.run("--user", "12345:12345", "-v", f"{passwd}:/etc/passwd:ro", "--network", "none", *READ_ONLY)
    bench.assert_done(ran, "case_0001")
    if os.geteuid() == 0:  # a rootless engine maps the number to another one
        assert (bench.outputs / "case_0001.nii.gz").stat().st_uid == 12345


def test_a_broken_input_costs_only_itself(bench: Bench) -> None:
    write_ct(bench.inputs, "good_1")
    (bench.inputs / "broken_0000.nii.gz").write_bytes(b"not a scan")
    write_ct(bench.inputs, "good_2", seed=1)
    ran = bench.run()
    assert ran.returncode == 1, ran.stderr
    assert names(bench.outputs) == ["good_1.nii.gz", "good_2.nii.gz"]
    assert len([line for line in ran.stderr.splitlines() if "broken_0000.nii.gz" in line]) == 1, ran.stderr
    assert "Traceback" not in ran.stderr


def test_no_source_is_compiled_at_start(bench: Bench) -> None:
    missing = (
        "import importlib.util as u, pathlib; "
        "print([str(p) for p in pathlib.Path('inference').rglob('*.py')"
        " if not pathlib.Path(u.cache_from_source(str(p))).exists()])"
    )
    ran = bench.run(command=("python", "-c", missing))
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


def test_image_holds_what_inference_needs_and_nothing_else(bench: Bench) -> None:
    listed = bench.engine.docker("run", "--rm", f"{bench.image}:latest", "ls", "-A", "/workspace").stdout.split()
    assert sorted(listed) == ["inference", "inputs", "outputs", "predict.sh", "requirements.lock", "weights"]


def test_the_other_engine_is_refused_where_torch_is_not_installed(bench: Bench) -> None:
    write_ct(bench.inputs, "case_0001")
    ran = bench.run(command=("sh", "predict.sh", "--engine", "torch"))
    assert ran.returncode == 2
    assert ran.stderr.splitlines() == ["--engine torch: torch is not installed: use --engine onnx, or install it"]
    assert bench.run(command=("python", "-c", "import torch")).returncode == 1


def test_labels_say_what_the_project_says(engine: Engine, image: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names_asked = ("title", "licenses", "version")
    said = {name: engine.label(f"{image}:latest", f"org.opencontainers.image.{name}") for name in names_asked}
    assert said == {"title": project["name"], "licenses": project["license"], "version": project["version"]}


def test_saved_removed_and_loaded_it_still_runs(bench: Bench, archive: Path) -> None:
    """Last in the file: the image is away for a while."""
    assert_archive_is_whole(archive, bench.image)
    bench.engine.docker("rmi", f"{bench.image}:latest")
    assert bench.engine.docker("image", "inspect", f"{bench.image}:latest", check=False).returncode != 0
    bench.engine.docker("load", "-i", str(archive), limit_s=ARCHIVE_LIMIT_S)
    write_ct(bench.inputs, "case_0001")
    bench.assert_done(bench.run(), "case_0001")
