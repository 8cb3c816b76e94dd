"""The stages one after another, as the README has them, on a small folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from benchmarks import ablation
from inference.hybrid.config import PRESETS, HybridConfig
from inference.hybrid.model import Hybrid
from inference.pipeline import Pipeline
from training import hybrid_training
from training.__main__ import main
from training.data import Entry, link, read_folder
from training.loop import save_weights

REPOSITORY = Path(__file__).resolve().parents[2]
BUDGET = ["--steps", "2", "--validation", "1", "--validations", "1", "--device", "cpu"]


@pytest.fixture
def command(monkeypatch):
    """Runs `python -m training …`; its exit code."""
    monkeypatch.setitem(PRESETS, "small", HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16, norm="batch"))

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
        return main()

    return run


def test_from_a_folder_of_scans_to_calibrated_weights(folder, tmp_path, command) -> None:
    data, out, weights = ("--data", folder), tmp_path / "runs", tmp_path / "mine"
    assert command("unet", *data, "--out", out / "unet", "--features", 4, "--patch", 16, 32, 32, *BUDGET) == 0
    assert command("hybrid", *data, "--out", out / "hybrid", "--slices", 1, "--plane", "coronal", *BUDGET) == 0
    parts = ("--hybrid", out / "hybrid" / "hybrid.safetensors", "--unet", out / "unet" / "unet.onnx")
    assert command("release", *parts, "--out", weights, "--how", "in two steps") == 0
    assert command("calibrate", *data, "--weights", weights) == 0
    manifest = json.loads((weights / "manifest.json").read_text())
    assert manifest["hybrid"]["config"]["slices"] == 1
    assert (manifest["hybrid"]["plane"], manifest["unet"]["config"]["features"]) == ("coronal", 4)
    assert manifest["training"]["how"] == "in two steps"
    assert manifest["training"]["calibration"]["cases"] == 6
    report = Pipeline(weights).run(folder / "imagesTr" / "c0_0000.nii.gz", tmp_path)
    assert (tmp_path / "c0.nii.gz").exists()
    assert report.size == (20, 50, 50)
    lines = [json.loads(line) for line in (out / "unet" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["parameters_m"] > 0.05
    assert lines[0]["gmac"] > 1
    assert lines[-1]["kwh"] >= lines[-1]["co2eq_kg"] >= 0
    assert list((out / "unet").glob("events.out.tfevents.*"))


def test_users_mistakes_are_told_in_a_line(folder, tmp_path, command, capsys) -> None:
    assert command("unet", "--data", tmp_path, "--out", tmp_path / "run") == 1
    assert "FLARE layout" in capsys.readouterr().err
    stranger = tmp_path / "unet.onnx"
    stranger.write_bytes(b"not a network")
    assert command("release", "--hybrid", stranger, "--unet", stranger, "--out", tmp_path / "mine") == 1
    assert str(stranger) in capsys.readouterr().err
    assert not Path(tmp_path / "mine").exists()


def test_a_command_says_nothing_of_others_packages() -> None:
    """Warnings of what is imported, that is."""
    done = subprocess.run(
        [sys.executable, "-m", "training", "--help"], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert done.stderr == ""


def test_ablation_compares_variants_and_does_none_twice(folder, tmp_path, command, monkeypatch) -> None:
    assert command("unet", "--data", folder, "--out", tmp_path, "--features", 4, "--patch", 16, 32, 32, *BUDGET) == 0
    settings = ablation.Settings(
        (folder,), (folder,), tmp_path / "unet.onnx", tmp_path / "work", tmp_path / "ablation.json",
        steps=1, validation=1, seeds=(0,), variants=("one slice",),
    )  # fmt: skip
    ablation.main(settings)
    told = json.loads((tmp_path / "ablation.json").read_text())
    assert (told["judged_cases"], list(told["variants"])) == (6, ["full", "one slice"])
    full = told["variants"]["full"][folder.name]["fused"]
    assert (full["difference"], full["low"], full["high"]) == (0, 0, 0)
    assert 0 <= full["healthy_false_positives"] <= 1
    assert (tmp_path / "ablation.png").stat().st_size > 1000
    monkeypatch.setattr(hybrid_training, "main", None)
    ablation.main(settings)
    assert json.loads((tmp_path / "ablation.json").read_text())["variants"] == told["variants"]
    trained = tmp_path / "work" / "full 0" / "hybrid.safetensors"
    mistakes = (
        ({"shares": (1.0, 2.0)}, ValueError, "--shares"),
        ({"weights": trained, "variants": ("layer norm",)}, ValueError, "no start for 'layer norm'"),
        ({"unet": tmp_path / "gone.onnx"}, OSError, "gone.onnx"),
        ({"partial": tmp_path / "gone"}, ValueError, "gone: no scan"),
        ({"held_out": (one_patient(folder, tmp_path),)}, ValueError, "one: one patient at most"),
    )
    for change, kind, told_of in mistakes:  # before anything is trained
        with pytest.raises(kind, match=told_of):
            ablation.main(replace(settings, work=tmp_path / "new", **change))
    for change in ({"steps": 2}, {"weights": trained}, {"held_out": (folder, copy_of(folder, tmp_path))}):
        with pytest.raises(ValueError, match="of other settings or held-out cases"):
            ablation.main(replace(settings, **change))


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True))


def test_ablation_chooses_on_one_half_what_it_judges_on_the_other(folder, tmp_path, monkeypatch) -> None:
    """And asks the UNet once a case, and for the gate only of what the training kept out."""
    entries, asked, chosen = read_folder(folder), [], []
    monkeypatch.setattr(ablation, "load_case", lambda entry: entry)
    monkeypatch.setattr(ablation, "predict_unet", lambda _, entry: asked.append(entry.name) or np.zeros(1))

    def predict(_pipeline: object, entry: Entry, _unet: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(name=entry.name, label=np.ones(1), dice=lambda names, _: float(entry.name in names))

    def calibrate_all(cases: list, gate: list[Entry]) -> dict:
        assert gate == entries[:2]
        chosen.append([case.name for case in cases])
        return dict.fromkeys(ablation.NETWORKS, (chosen[-1], 0.0))

    monkeypatch.setattr(ablation, "predict", predict)
    monkeypatch.setattr(ablation, "choose_slice_gate", lambda _, cases: list(cases))
    monkeypatch.setattr(ablation, "calibrate_all", calibrate_all)
    for _ in range(2):
        judged = ablation.judge(None, entries[:2], entries, tmp_path)
        assert judged["fused"] == {f"{folder.name}/{entry.name}": 0.0 for entry in entries}  # chosen on none of itself
    assert chosen == 2 * [["c0", "c2", "c4"], ["c1", "c3", "c5"]]
    assert asked == [entry.name for entry in entries]


def test_ablation_goes_on_from_weights(folder, tmp_path, command) -> None:
    """At a rate of zero, what a variant ends with is what it started from."""
    assert command("unet", "--data", folder, "--out", tmp_path, "--features", 4, "--patch", 16, 32, 32, *BUDGET) == 0
    weights = tmp_path / "trained.safetensors"
    save_weights(Hybrid(PRESETS["small"]), weights)
    settings = ablation.Settings(
        (folder,), (folder,), tmp_path / "unet.onnx", tmp_path / "work", tmp_path / "ablation.json",
        steps=1, validation=1, seeds=(0,), variants=("one slice",), weights=weights, learning_rate=0, crop_share=0,
    )  # fmt: skip
    ablation.main(settings)
    assert json.loads((tmp_path / "ablation.json").read_text())["goes_on_from"] == str(weights)
    before = load_file(weights)
    after, one = (load_file(tmp_path / "work" / name / "hybrid.safetensors") for name in ("full 0", "one slice 0"))
    across = "cnn.downs.0.convs.0.0.weight"
    np.testing.assert_array_equal(after[across], before[across])
    np.testing.assert_allclose(one[across], before[across].sum(axis=2, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_one_slice_by_itself_as_five_times_the_same(norm) -> None:
    torch.manual_seed(0)
    config = HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16, norm=norm)
    five, one = Hybrid(config).eval(), Hybrid(replace(config, slices=1)).eval()
    state = ablation.one_slice({name: value.numpy() for name, value in five.state_dict().items()})
    one.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    image = torch.rand(1, 1, 256, 256)
    with torch.inference_mode():
        torch.testing.assert_close(one(image), five(image.expand(1, 5, 256, 256)), rtol=1e-4, atol=1e-4)


def one_patient(folder: Path, tmp_path: Path) -> Path:
    entries = [replace(entry, patient="P") for entry in read_folder(folder)]
    link(entries, tmp_path / "one")
    return tmp_path / "one"


def test_ablation_row_by_hand() -> None:
    """Two seeds, three cases, the last healthy: above the full method by 0.1 and 0.2 in one case each; one false."""
    full = {network: np.array([[0.5, 0.5, 1.0], [0.5, 0.5, 1.0]]) for network in ("hybrid", "unet", "fused")}
    ours = {network: np.array([[0.6, 0.5, 1.0], [0.5, 0.7, 0.0]]) for network in full}
    full[ablation.HEALTHY] = ours[ablation.HEALTHY] = np.array([[0, 0, 1.0], [0, 0, 1.0]])
    row = ablation.row(ours, full)["hybrid"]
    assert row["dice"] == pytest.approx((0.6 + 0.5 + 1.0 + 0.5 + 0.7 + 0.0) / 6)
    assert row["difference"] == pytest.approx((0.1 + 0.2 - 1.0) / 6)
    assert row["low"] < row["difference"] < row["high"]
    assert row["healthy_false_positives"] == 0.5


def test_ablation_judges_other_patients_than_it_chooses_on() -> None:
    """In each folder by itself; both scans of a patient are in one half."""
    names = [("a", "1", ""), ("a", "2", "P"), ("a", "3", "P"), ("a", "4", "Q"), ("b", "1", ""), ("b", "2", "")]
    entries = [
        Entry(name, Path(folder) / "imagesTr" / name, None, None, patient=patient) for folder, name, patient in names
    ]
    assert ablation.halves(entries) == ([0, 3, 4], [1, 2, 5])


def test_ablation_tells_folders_apart() -> None:
    def figures(dice: float) -> dict:
        said = {"some/a": dice, "some/b": dice, "other/a": 1.0}
        return {**dict.fromkeys(("hybrid", "unet", "fused"), said), ablation.HEALTHY: dict.fromkeys(said, 0.0)}

    told = ablation.rows([figures(0.5), figures(0.7)], [figures(0.4), figures(0.5)])
    assert list(told) == ["some", "other"]
    some, other = (told[folder]["fused"] for folder in ("some", "other"))
    assert (some["dice"], some["difference"]) == (pytest.approx(0.6), pytest.approx(0.15))
    assert (other["dice"], other["difference"], other["low"]) == (1, 0, 0)


def test_crops_without_the_cnn_are_refused(folder, tmp_path, command, capsys) -> None:
    assert command("hybrid", "--data", folder, "--out", tmp_path / "x", "--crop-share", 0.5, "--no-cnn", *BUDGET) == 1
    assert "--crop-share trains the CNN alone" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
