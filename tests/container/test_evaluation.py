"""`efficiency` and `submission` on real containers: small ones made to behave or misbehave, and our own image."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from container_engine import ARCHIVE_LIMIT_S, RUN_LIMIT_S, Engine
from test_image import assert_mask, names, write_ct

from eval import efficiency, submission

PREFIX = "eval-test"
# Writes a mask of label {label} on the scan's own grid with what the standard library has.
WRITE_MASKS = """
import gzip, math, pathlib, struct
for scan in pathlib.Path("inputs").glob("*_0000.nii.gz"):
    header = bytearray(gzip.open(scan).read(352))
    shape = struct.unpack_from("<3h", header, 42)
    struct.pack_into("<hh", header, 70, 2, 8)  # uint8
    struct.pack_into("<fff", header, 108, 352, 1, 0)  # offset of the voxels, slope, intercept
    mask = gzip.compress(bytes(header) + bytes([{label}]) * math.prod(shape), 1)
    pathlib.Path("outputs", scan.name.replace("_0000", "")).write_bytes(mask)
"""
WRITE_STRAYS = """
pathlib.Path("outputs/log.txt").write_text("done")
pathlib.Path("outputs/parts").mkdir()
"""
NEED_NETWORK_AND_SHARED_MEMORY = """
import shutil, sys
if len(open("/proc/net/dev").readlines()) == 3:  # two lines of headings, and lo
    sys.exit("no network")
if shutil.disk_usage("/dev/shm").total < 2**30:
    sys.exit("too little shared memory")
"""
# name → lines of the Dockerfile, predict.sh, predict.py
IMAGES = {
    "tidy": ("", "python predict.py", WRITE_MASKS.format(label=1)),
    "messy": (
        "ENV CUDA_VISIBLE_DEVICES=0",
        "export CUDA_VISIBLE_DEVICES=0; echo said; python predict.py",
        NEED_NETWORK_AND_SHARED_MEMORY + WRITE_MASKS.format(label=2) + WRITE_STRAYS,
    ),
    "hanging": ("", "echo waiting; sleep 600", ""),
    "outsider": ("USER 12345", "python predict.py", WRITE_MASKS.format(label=1)),
}
DOCKERFILE = "FROM docker.io/library/python:3.11-slim\nWORKDIR /workspace\nCOPY predict.sh predict.py ./\n"

Image = Callable[[str], str]


@pytest.fixture(scope="module")
def built(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Builds a small image of IMAGES when it is first asked for; all are removed afterwards."""
    made: dict[str, str] = {}

    def build(kind: str) -> str:
        if kind not in made:
            context, name = tmp_path_factory.mktemp(kind), f"{PREFIX}-{kind}"
            lines, shell, python = IMAGES[kind]
            (context / "Dockerfile").write_text(f"{DOCKERFILE}{lines}\n")
            (context / "predict.sh").write_text(f"{shell}\n")
            (context / "predict.py").write_text(python)
            engine.build(f"{name}:latest", context, f"kind={kind}")
            made[kind] = name
        return made[kind]

    yield build
    for name in made.values():
        engine.docker("rmi", "-f", f"{name}:latest", check=False)


@pytest.fixture(autouse=True)
def docker_settings(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The docker that `eval` calls is the engine's."""
    for name, value in engine.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Two small scans."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for seed, case in enumerate(("a", "b.1")):
        write_ct(folder, case, (16 + seed, 12, 8), seed)
    return folder


def measure(image: str, inputs: Path, out: Path, timeout_s: float = RUN_LIMIT_S) -> tuple[int, dict[str, Any]]:
    """Exit code and efficiency.json."""
    code = efficiency.Settings(inputs, out, image=image, cpu_only=True, timeout_s=timeout_s).run()
    return code, json.loads((out / "efficiency.json").read_text())


def check(archive: Path, inputs: Path, out: Path, timeout_s: float = RUN_LIMIT_S) -> tuple[int, dict[str, str]]:
    """Exit code, and the verdict of each check."""
    code = submission.Settings(archive, inputs, out=out, cpu_only=True, timeout_s=timeout_s).run()
    findings = json.loads((out / "submission.json").read_text())["findings"]
    return code, {finding["check"]: finding["verdict"] for finding in findings}


def archive_of(engine: Engine, image: str, archive: Path) -> Path:
    """As a team uploads it: docker save | gzip."""
    plain = archive.with_name("plain.tar")
    engine.docker("save", f"{image}:latest", "-o", str(plain), limit_s=ARCHIVE_LIMIT_S)
    with gzip.open(archive, "wb", compresslevel=1) as file:
        file.write(plain.read_bytes())
    plain.unlink()
    return archive


def bad(verdicts: dict[str, str]) -> set[str]:
    return {name for name, verdict in verdicts.items() if verdict == "COSTS POINTS"}


def assert_nothing_left(engine: Engine) -> None:
    """No container that eval started is there any more."""
    listed = engine.docker("ps", "-a", "--filter", "name=eval-", "--format", "{{.Names}}").stdout.split()
    assert listed == []


def test_efficiency_of_a_tidy_image(engine: Engine, built: Image, inputs: Path, tmp_path: Path) -> None:
    name, out = built("tidy"), tmp_path / "out"
    code, result = measure(name, inputs, out)
    assert code == 0
    assert [(case["case"], case["status"], case["stray"]) for case in result["cases"]] == [
        ("a", "done", []),
        ("b.1", "done", []),
    ]
    for case in ("a", "b.1"):
        assert_mask(out / "masks", inputs, case)
    assert all(0 < case["mask_s"] <= case["time_s"] for case in result["cases"])
    with (out / f"{name}_Efficiency.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["Name"] for row in rows] == ["a_0000.nii.gz", "b.1_0000.nii.gz"]
    assert all(float(row["Time"]) > 0 and float(row["MaxRAM"]) > 0 and row["MaxGPU_Mem"] == "" for row in rows)
    assert_nothing_left(engine)


def test_efficiency_of_a_messy_image(built: Image, inputs: Path, tmp_path: Path) -> None:
    _, result = measure(built("messy"), inputs, tmp_path / "out")
    assert [case["stray"] for case in result["cases"]] == [["log.txt", "parts"]] * 2
    assert names(tmp_path / "out" / "masks") == ["a.nii.gz", "b.1.nii.gz"]
    assert "said" in (tmp_path / "out" / "logs" / "a.txt").read_text()


def test_efficiency_of_a_hanging_image(engine: Engine, built: Image, inputs: Path, tmp_path: Path) -> None:
    code, result = measure(built("hanging"), inputs, tmp_path / "out", timeout_s=5)
    assert code == 1
    assert [(case["status"], case["exit_code"]) for case in result["cases"]] == [("timeout", None)] * 2
    assert all(5 <= case["time_s"] < 60 for case in result["cases"])
    assert "waiting" in (tmp_path / "out" / "logs" / "a.txt").read_text()
    assert_nothing_left(engine)


def test_an_image_that_is_not_there(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-such-image:latest: no such image here"):
        measure("no-such-image", inputs, tmp_path / "out")


def test_submission_of_a_tidy_image(
    engine: Engine, built: Image, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loaded from the archive, not found from before; the GPU is all that cannot be judged."""
    name = built("tidy")
    archive = archive_of(engine, name, tmp_path / f"{name.title()}.v1.tar.gz")
    engine.docker("rmi", f"{name}:latest")
    code, verdicts = check(archive, inputs, tmp_path / "out")
    assert (code, bad(verdicts)) == (0, set())
    assert [name for name, verdict in verdicts.items() if verdict == "NOT CHECKED"] == [
        "a case takes at most 4096 MiB of GPU memory"
    ]
    assert f"PASS          the archive holds {name}:latest" in capsys.readouterr().out
    assert_nothing_left(engine)


def test_submission_of_a_messy_image_under_a_wrong_name(
    engine: Engine, built: Image, inputs: Path, tmp_path: Path
) -> None:
    archive = archive_of(engine, built("messy"), tmp_path / "another.tar.gz")
    code, verdicts = check(archive, inputs, tmp_path / "out")
    assert code == 1
    assert bad(verdicts) == {
        "the archive holds another:latest",
        "CUDA_VISIBLE_DEVICES is left alone",
        "nothing but the masks is left in outputs/",
        "labels are 0 and 1",
        "it runs without network",
        "it runs with 64 MB of shared memory",
    }
    values = json.loads((tmp_path / "out" / "submission.json").read_text())
    devices = next(finding for finding in values["findings"] if finding["check"].startswith("CUDA"))
    assert devices["faults"] == ["the image sets CUDA_VISIBLE_DEVICES=0", "line 1 of predict.sh sets it"]


def test_submission_of_a_hanging_image(engine: Engine, built: Image, inputs: Path, tmp_path: Path) -> None:
    name = built("hanging")
    code, verdicts = check(archive_of(engine, name, tmp_path / f"{name}.tar.gz"), inputs, tmp_path / "out", timeout_s=3)
    assert code == 1
    limits = {"a case takes at most 45 s", "a case takes at most 60 s"}
    assert bad(verdicts) == {"every case has its mask", *limits}
    assert_nothing_left(engine)


def test_submission_of_an_image_whose_user_is_not_root(
    engine: Engine, built: Image, inputs: Path, tmp_path: Path
) -> None:
    name = built("outsider")
    _, verdicts = check(archive_of(engine, name, tmp_path / f"{name}.tar.gz"), inputs, tmp_path / "out")
    assert "the default user is root" in bad(verdicts)
    if os.geteuid() == 0:  # then root owns outputs/, as it does at the graders'
        assert "every case has its mask" in bad(verdicts)


def test_as_a_command(engine: Engine, built: Image, inputs: Path, tmp_path: Path) -> None:
    """The command lines of the manual, exit codes included."""
    name = built("tidy")
    archive, out = archive_of(engine, name, tmp_path / f"{name}.tar.gz"), tmp_path / "out"
    folders = ("--inputs", str(inputs), "--out", str(out), "--cpu-only")
    for command, code in (
        (("efficiency", "--image", name, *folders), 0),
        (("submission", str(archive), *folders), 0),
        (("efficiency", "--image", "no-such-image", *folders), 2),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "eval", *command],
            env=engine.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_our_own_image(engine: Engine, image: str, archive: Path, tmp_path: Path) -> None:
    """Nothing of it costs points, but for the time, which is this machine's."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    write_ct(folder, "case_0001")
    code, result = measure(image, folder, tmp_path / "measured")
    assert (code, result["cases"][0]["stray"]) == (0, [])
    assert_mask(tmp_path / "measured" / "masks", folder, "case_0001")
    _, verdicts = check(archive, folder, tmp_path / "checked")
    assert {name for name in bad(verdicts) if not name.startswith("a case takes at most")} == set()
    assert_nothing_left(engine)
