"""The official command, and local commands that behave and misbehave, run for real."""

from __future__ import annotations

import csv
import json
import logging
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from eval.containers import Container, LocalCommand, container, run_case
from eval.docker_client import with_tag
from eval.efficiency import CaseEfficiency, Measurement, Settings, image_name
from eval.machine import Gpu
from eval.sampler import system_readers
from tests.eval.processes import assert_all_gone, script, write_scans

OFFICIAL_COLUMNS = "Name,Time,MaxGPU_Mem,AUC_GPU_Time,MaxCPU_Utilization,AUC_CPU_Time,MaxRAM,AUC_RAM_Time"


COPY = 'for scan in "$1"/*_0000.nii.gz; do name=$(basename "$scan" _0000.nii.gz); cp "$scan" "$2/$name.nii.gz"; done\n'


def measure(tmp_path: Path, text: str, *cases: str, **settings: Any) -> tuple[int, dict[str, Any]]:
    """Exit code and efficiency.json of a script on cases."""
    inputs = write_scans(tmp_path / "inputs", *cases)
    chosen = {"cpu_only": True, **settings}
    code = Settings(inputs, tmp_path / "out", command=script(tmp_path, text), **chosen).run()
    return code, json.loads((tmp_path / "out" / "efficiency.json").read_text())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_official_command() -> None:
    # as in the organisers' script, with GPU 0 and our name and folders
    official = (
        'docker container run --shm-size=28gb -m 28G --gpus="device=0" --name N --rm -v /w/inputs/:/workspace/inputs/ '
        '-v /w/outputs/:/workspace/outputs/ team:latest /bin/bash -c "sh predict.sh"'
    )
    inputs, outputs = Path("/w/inputs"), Path("/w/outputs")
    assert Container("team:latest", 0).argv(inputs, outputs, "N") == shlex.split(official)
    without_gpu = official.replace('--gpus="device=0" ', "")
    assert Container("team:latest", None).argv(inputs, outputs, "N") == shlex.split(without_gpu)
    later = without_gpu.replace("--shm-size=28gb ", "")
    assert Container("team:latest", None, shared_memory=None).argv(inputs, outputs, "N") == shlex.split(later)


def test_a_folder_that_docker_cannot_mount(tmp_path: Path) -> None:
    inputs, out = write_scans(tmp_path / "inputs", "a"), tmp_path / "a:b"
    with pytest.raises(ValueError, match=r"a:b: docker cannot mount .*--out"):
        Measurement("team", Container("team:latest", None), inputs, out, None, 60).run()
    assert not out.exists()


def test_names_of_images() -> None:
    assert [with_tag(image) for image in ("a", "a:1", "host:5000/a", "host:5000/b/a:1")] == [
        "a:latest",
        "a:1",
        "host:5000/a:latest",
        "host:5000/b/a:1",
    ]
    assert [image_name(image) for image in ("a", "a:1", "host:5000/b/a:1", "b/a@sha256:0")] == ["a"] * 4


def test_a_local_command_sees_the_measured_gpu_only() -> None:
    assert LocalCommand(("true",), None).environment()["CUDA_VISIBLE_DEVICES"] == "-1"
    second = LocalCommand(("true",), 1).environment()
    assert (second["CUDA_VISIBLE_DEVICES"], second["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


def test_a_command_that_works(tmp_path: Path) -> None:
    code, result = measure(tmp_path, f"{COPY} echo said; echo complained >&2; sleep 1", "b", "a.1", name="team")
    assert code == 0
    out = tmp_path / "out"
    assert (out / "team_Efficiency.csv").read_text().splitlines()[0] == OFFICIAL_COLUMNS
    rows = table(out / "team_Efficiency.csv")
    assert [row["Name"] for row in rows] == ["a.1_0000.nii.gz", "b_0000.nii.gz"]
    assert all(row["MaxGPU_Mem"] == row["AUC_GPU_Time"] == "" for row in rows)
    assert [(out / "masks" / f"{case}.nii.gz").read_text() for case in ("a.1", "b")] == ["scan a.1", "scan b"]
    log = (out / "logs" / "b.txt").read_text().splitlines()
    assert log[0].startswith("$ sh ")
    assert sorted(log[1:]) == ["complained", "said"]
    first = result["cases"][0]
    assert (first["case"], first["name"], first["status"]) == ("a.1", "a.1_0000.nii.gz", "done")
    assert (first["exit_code"], first["stray"], first["max_gpu_mib"]) == (0, [], None)
    assert 0 < first["mask_s"] < first["time_s"] - 0.3  # it was there long before the end
    assert first["over_time_s"] == 0
    assert [len(point) for point in first["curve"]] == [4] * len(first["curve"])
    assert len(first["curve"]) >= 3  # of 1 s
    assert first["max_ram_mib"] == pytest.approx(max(point[2] for point in first["curve"]))
    assert (result["name"], result["gpu"], result["period_s"], result["timeout_s"]) == ("team", None, 0.1, 60)
    assert (result["memory_limit_mib"], result["time_limit_s"]) == (4096, 45)
    assert [row["case"] for row in table(out / "efficiency_details.csv")] == ["a.1", "b"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_the_scan_given_away_is_a_copy(tmp_path: Path) -> None:
    spoil = 'test "$(stat -c %a "$1"/*)" = 644 && test "$(stat -c %a "$2")" = 755 && echo spoilt > "$1"/a_0000.nii.gz\n'
    before = os.umask(0o077)
    try:
        code, _ = measure(tmp_path, spoil + COPY, "a")
    finally:
        os.umask(before)
    assert code == 0
    assert (tmp_path / "out" / "masks" / "a.nii.gz").read_text() == "spoilt\n"
    assert (tmp_path / "inputs" / "a_0000.nii.gz").read_text() == "scan a"


def test_a_command_that_fails_for_one_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = measure(tmp_path, f'test -e "$1"/bad_0000.nii.gz && exit 7\n{COPY}', "bad", "good")
    assert code == 1
    assert [(case["status"], case["exit_code"]) for case in result["cases"]] == [("failed", 7), ("done", 0)]
    assert result["cases"][0]["mask_s"] is None
    assert "bad_0000.nii.gz: failed with exit code 7" in capsys.readouterr().err


def test_the_mask_counts_whatever_the_exit_code(tmp_path: Path) -> None:
    code, result = measure(tmp_path, f"{COPY} exit 3", "a")
    assert (code, result["cases"][0]["status"], result["cases"][0]["exit_code"]) == (0, "done", 3)


def test_a_command_that_writes_nothing(tmp_path: Path) -> None:
    code, result = measure(tmp_path, "exit 0", "a")
    assert (code, result["cases"][0]["status"]) == (1, "no mask")
    assert len(table(tmp_path / "out" / "local_Efficiency.csv")) == 1


def test_stray_outputs_are_named_and_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strays = (
        'touch "$2/.hidden" "$2/a_prob.nii.gz" "$2/x$(printf "\\377")"; mkdir "$2/folder"; touch "$2/folder/inside"\n'
    )
    _, result = measure(tmp_path, COPY + strays, "a")
    assert result["cases"][0]["stray"] == [".hidden", "a_prob.nii.gz", "folder", "x\ufffd"]
    assert [path.name for path in (tmp_path / "out" / "masks").iterdir()] == ["a.nii.gz"]
    assert "a_prob.nii.gz" in capsys.readouterr().err


def test_a_link_is_no_mask(tmp_path: Path) -> None:
    code, result = measure(tmp_path, 'ln -s /etc/hostname "$2/a.nii.gz"', "a")
    assert (code, result["cases"][0]["status"], result["cases"][0]["stray"]) == (1, "no mask", ["a.nii.gz"])


def test_outputs_that_were_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code, result = measure(tmp_path, 'rmdir "$2"', "a")
    assert (code, result["cases"][0]["status"]) == (1, "no mask")
    assert "cannot be listed" in caplog.text


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hang = f'echo started; (trap "" TERM INT HUP; echo $$ > "{tmp_path}/group"; sleep 600) & wait'
    code, result = measure(tmp_path, hang, "a", timeout_s=1.0)
    (case,) = result["cases"]
    assert (code, case["status"], case["exit_code"]) == (1, "timeout", None)
    assert 1.0 <= case["time_s"] < 60
    assert "ran over 1 s and was killed" in capsys.readouterr().err
    assert "started" in (tmp_path / "out" / "logs" / "a.txt").read_text()
    assert_all_gone(int((tmp_path / "group").read_text()))


def test_a_mask_of_a_killed_run_does_not_count(tmp_path: Path) -> None:
    """It may be half of one."""
    code, result = measure(tmp_path, f"{COPY} sleep 600", "a", timeout_s=1.0)
    (case,) = result["cases"]
    assert (code, case["status"], case["mask_s"], case["stray"]) == (1, "timeout", None, [])
    assert list((tmp_path / "out" / "masks").iterdir()) == []


def test_a_child_left_behind_does_not_hold_the_case_up(tmp_path: Path) -> None:
    code, result = measure(tmp_path, f"sleep 600 &\n{COPY}", "a")
    assert (code, result["cases"][0]["status"]) == (0, "done")
    assert result["cases"][0]["time_s"] < 60


def test_long_output_is_cut_in_the_middle(tmp_path: Path) -> None:
    measure(tmp_path, f"echo first; head -c 3000000 /dev/zero | tr '\\0' x; echo; echo last\n{COPY}", "a")
    log = (tmp_path / "out" / "logs" / "a.txt").read_text()
    assert len(log) < 1_100_000
    assert "first" in log[:1000]
    assert log.endswith("last\n")
    assert f"[{len('first') + 1 + 3000000 + 1 + len('last') + 1 - 2**20} bytes left out]" in log


def test_results_are_there_after_every_case(tmp_path: Path) -> None:
    """As a kill between two cases would leave them."""
    inputs, out = write_scans(tmp_path / "inputs", "a", "b"), tmp_path / "out"
    runner = LocalCommand(tuple(shlex.split(script(tmp_path, COPY))), None)
    measurement = Measurement("team", runner, inputs, out, None, 60)

    class KilledError(Exception):
        pass

    def measure_one(scan: Path) -> CaseEfficiency:
        if scan.name.startswith("b"):
            raise KilledError
        return Measurement.measure(measurement, scan)

    measurement.measure = measure_one  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        measurement.run()
    assert [row["Name"] for row in table(out / "team_Efficiency.csv")] == ["a_0000.nii.gz"]
    assert [case["case"] for case in json.loads((out / "efficiency.json").read_text())["cases"]] == ["a"]


def test_what_an_earlier_run_left_does_not_pass_for_this_ones(tmp_path: Path) -> None:
    measure(tmp_path, COPY, "a")
    out = tmp_path / "out"
    left = [out / name for name in ("masks/a.nii.gz", "logs/a.txt", "local_Efficiency.csv", "efficiency.json")]
    assert all(path.is_file() for path in left)
    Measurement("local", LocalCommand(("true",), None), tmp_path / "inputs", out, None, 60).prepare(["a"])
    assert not any(path.exists() for path in left)


def test_a_gpu_is_sampled_and_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recorded device: this needs no GPU."""
    monkeypatch.setattr(Gpu, "used_mib", lambda _: 700.25)
    inputs, gpu = write_scans(tmp_path / "inputs", "a"), Gpu(1, object(), "a GPU", "a driver", 16384)
    command = script(tmp_path, f'{COPY} test "$CUDA_VISIBLE_DEVICES" = 1 || exit 5')
    runner = LocalCommand(tuple(shlex.split(command)), gpu.index)
    (case,) = Measurement("team", runner, inputs, tmp_path / "out", gpu, 60).run()
    assert case.run.exit_code == 0
    count = len(case.run.samples)
    (row,) = table(tmp_path / "out" / "team_Efficiency.csv")
    assert (row["MaxGPU_Mem"], row["AUC_GPU_Time"]) == ("700", str(round(sum([700.25] * count) * 0.1)))
    result = json.loads((tmp_path / "out" / "efficiency.json").read_text())
    assert (result["gpu"], result["machine"]["gpu"], result["cases"][0]["idle_gpu_mib"]) == (1, "a GPU", 700.25)
    assert result["cases"][0]["first_gpu_s"] is None


def test_no_gpu_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        code, result = measure(tmp_path, COPY, "a", "b", "c", cpu_only=False)
    if result["gpu"] is not None:
        pytest.skip("this machine has a GPU")
    assert code == 0
    assert len([record for record in caplog.records if "no GPU is measured" in record.message]) == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "either an --image or a --command"),
        ({"command": "true", "image": "a"}, "either an --image or a --command"),
        ({"command": "no-such-program-here --x"}, "no such program"),
        ({"command": ""}, "no such program"),
        ({"command": "sh 'unclosed"}, "quote"),
        ({"command": "true", "gpu": 4711, "cpu_only": False}, "GPU 4711"),
        ({"command": "true", "gpu": 0, "cpu_only": True}, "leave one of them out"),
        ({"command": "true", "timeout_s": 0.0}, "above 0"),
        ({"command": "true", "name": "a/b"}, "without a slash"),
    ],
)
def test_wrong_usage(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    inputs = write_scans(tmp_path / "inputs", "a")
    with pytest.raises(ValueError, match=sentence) as raised:
        Settings(inputs, tmp_path / "out", **{"cpu_only": True, **settings}).run()
    assert "\n" not in str(raised.value)


def test_empty_and_missing_inputs(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match=str(folder)):
            Settings(folder, tmp_path / "out", command="true", cpu_only=True).run()


def test_another_runs_results_are_not_mixed_in(tmp_path: Path) -> None:
    measure(tmp_path, COPY, "a", name="one")
    with pytest.raises(ValueError, match=r"another run's one_Efficiency\.csv"):
        Settings(tmp_path / "inputs", tmp_path / "out", command="true", name="two", cpu_only=True).run()
    (tmp_path / "out" / "masks" / "._a.nii.gz").touch()  # as a Mac leaves it
    fewer = write_scans(tmp_path / "fewer", "b")
    with pytest.raises(ValueError, match=r"another run's masks/a\.nii\.gz: give another --out"):
        Settings(fewer, tmp_path / "out", command="true", name="one", cpu_only=True).run()
    assert (tmp_path / "out" / "masks" / "a.nii.gz").exists()


def test_docker_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="docker: no such program"):
        container("team", None)


def test_docker_has_no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tmp_path / "docker"
    client.write_text("#!/bin/sh\necho Cannot connect to the Docker daemon. >&2; exit 1\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"no daemon answers \(Cannot connect to the Docker daemon\.\)"):
        container("team", None)


def test_run_case_keeps_its_folders_apart(tmp_path: Path) -> None:
    """One scan is all that a start sees, whatever else lies beside it."""
    inputs = write_scans(tmp_path / "inputs", "a", "b")
    runner = LocalCommand(("ls",), None)
    work = tmp_path / "work"
    work.mkdir()
    run = run_case(runner, inputs / "a_0000.nii.gz", work, system_readers(None), 60)
    listed = [line for line in run.output.splitlines() if line.endswith(".nii.gz")]
    assert (listed, run.stray, run.mask) == (["a_0000.nii.gz"], (), None)
