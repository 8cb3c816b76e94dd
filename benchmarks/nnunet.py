"""nnU-Net v2, trained on the sarcoma training scans for a given time, on the validation scans.

    make peers && python -m benchmarks.nnunet --data DATA --work runs/nnunet --minutes 86

Both configurations train at once, each with its share of the cores. nnU-Net runs from its own package, in an
environment of its own (`benchmarks/nnunet_training.py`); what it planned and predicted stays in the work folder, and a
configuration that has predicted is only judged again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.command_line import refuse_unknown, run_main
from benchmarks.demo import REPOSITORY
from benchmarks.results_file import check_out, write_results
from eval import accuracy
from inference.devices import choose_device
from training.loop import fast_precision
from training.splits import scans_of

DATASET, NUMBER = "Dataset001_Sarcoma", "1"
PEERS = REPOSITORY / "build" / "peers" / "bin"
TOLD = "training.json"
CONFIGURATIONS = ("2d", "3d_fullres")


@dataclass(frozen=True)
class Settings:
    data: Path  # folder with splits.json and sts
    work: Path  # folder for nnU-Net's own
    minutes: float = 86.0  # a configuration
    configurations: tuple[str, ...] = CONFIGURATIONS
    device: Literal["cpu", "cuda"] = "cpu"
    out: Path = Path("benchmarks/results/nnunet.json")

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"--minutes {self.minutes:g}: give more than 0")
        refuse_unknown("configurations", self.configurations, CONFIGURATIONS)
        if not self.configurations:
            raise ValueError("--configurations: name one at least")
        choose_device(self.device)


def peers_python() -> Path:
    """The interpreter of the environment with other teams' networks. ValueError where it is not installed."""
    path = PEERS / "python"
    if not path.exists():
        raise ValueError(f"{path} is not there: run `make peers`, which installs nnU-Net in an environment of its own")
    return path


def write_dataset(data: Path, raw: Path) -> None:
    """nnU-Net's layout, of links to the scans; the validation split's labels apart, which nnU-Net does not read."""
    names = {split: scans_of(data, "sts", split) for split in ("train", "val")}
    for split, folder in (("train", "imagesTr"), ("val", "imagesTs")):
        for name in names[split]:
            link(data / "sts" / "images" / f"{name}_0000.nii.gz", raw / folder)
            link(data / "sts" / "labels" / f"{name}.nii.gz", raw / ("labelsTr" if split == "train" else "labelsTs"))
    told = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": len(names["train"]),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(told))


def link(path: Path, folder: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path}: no such file, but splits.json names it: copy the data again")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / path.name).unlink(missing_ok=True)
    (folder / path.name).symlink_to(path.resolve())


def environment(work: Path, threads: int) -> dict[str, str]:
    """What nnU-Net reads: its three folders, one process for augmentation, so many threads."""
    folders = {f"nnUNet_{name}": str((work / name).resolve()) for name in ("raw", "preprocessed", "results")}
    few = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **folders, **few}


def train_and_predict(settings: Settings, configurations: list[str]) -> None:
    """All at once. RuntimeError with the log's name where one fails."""
    threads = max(1, len(os.sched_getaffinity(0)) // len(configurations))
    running = [start(settings, configuration, threads) for configuration in configurations]
    failed = [log for log, process in running if process.wait()]
    if failed:
        raise RuntimeError(f"nnU-Net failed: {failed[0]} tells why")


def start(settings: Settings, configuration: str, threads: int) -> tuple[Path, subprocess.Popen[bytes]]:
    """The file that its process writes to, and the process."""
    out = settings.work / configuration
    out.mkdir(parents=True, exist_ok=True)
    command = [str(peers_python()), str(REPOSITORY / "benchmarks" / "nnunet_training.py"), configuration]
    command += [DATASET, str(settings.minutes), settings.device, fast_precision(settings.device), str(out)]
    log = out / "log.txt"
    with log.open("w") as file:
        told = environment(settings.work, threads)
        return log, subprocess.Popen(command, env=told, stdout=file, stderr=subprocess.STDOUT)


def figures(settings: Settings, configuration: str) -> dict[str, Any]:
    """DSC and NSD of each case as `eval accuracy` says, their means, and how far the training came."""
    out = settings.work / configuration
    references = settings.work / "raw" / DATASET / "labelsTs"
    accuracy.Settings(out / "masks", references, out=out / "accuracy").run()
    rows = json.loads((out / "accuracy" / "accuracy.json").read_text())["cases"]
    means = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in ("dsc", "nsd")}
    cases = {row["case"]: {"dsc": row["dsc"], "nsd": row["nsd"]} for row in rows}
    return {**json.loads((out / TOLD).read_text()), **means, "cases": cases}


def main(settings: Settings) -> None:
    check_out(settings.out)
    peers_python()
    raw = settings.work / "raw" / DATASET
    planned = settings.work / "planned"  # made last, so that preprocessing that broke off is done again
    if not planned.exists():
        write_dataset(settings.data, raw)
        plan = [str(PEERS / "nnUNetv2_plan_and_preprocess"), "-d", NUMBER, "-c", *settings.configurations, "-np", "1"]
        subprocess.run(plan, env=environment(settings.work, 1), check=True)
        planned.touch()
    wanted = [name for name in settings.configurations if not (settings.work / name / TOLD).exists()]
    if wanted:
        train_and_predict(settings, wanted)
    told = {
        "command": f"python -m benchmarks.nnunet --data DATA --work WORK --minutes {settings.minutes:g}",
        **{name: figures(settings, name) for name in settings.configurations},
    }
    write_results(settings.out, told, settings.device)
    for name in settings.configurations:
        print(name, {key: value for key, value in told[name].items() if key != "cases"})


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
