"""Command line: every CT scan of a folder, or one file, to lesion masks.

    python -m inference [INPUTS] [OUTPUTS]

Exit code 0: all done; 1: some case failed (one line each on stderr, the others are done); 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .volume import SCAN_SUFFIXES, case_name, is_scan

if TYPE_CHECKING:
    from .pipeline import Pipeline, Report

DONE, FAILED, USAGE = 0, 1, 2


class UsageError(Exception):
    """One sentence for stderr; exit code 2."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="predict.sh", description="Segments the lesions in CT scans.")
    parser.add_argument("inputs", nargs="?", type=Path, default=Path("/workspace/inputs"), help="folder or one scan")
    parser.add_argument("outputs", nargs="?", type=Path, default=Path("/workspace/outputs"), help="folder for masks")
    parser.add_argument("--weights", default="small", help="name under weights/, or a folder with a manifest.json")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda or cuda:N")
    parser.add_argument("--gpu-memory-mib", type=int, default=4096, help="of the GPU, in all; default %(default)s")
    parser.add_argument("--skip-existing", action="store_true", help="leave cases alone that have a mask already")
    parser.add_argument("--save-probabilities", action="store_true", help="write X_probability.nii.gz beside the masks")
    parser.add_argument("--report", type=Path, help="write what was found and how long it took as JSON to this file")
    return parser.parse_args(arguments)


def find_scans(inputs: Path) -> list[Path]:
    """The scans to segment, sorted. UsageError where there is none, or where two would write the same mask."""
    if inputs.is_file():
        return [inputs]
    if not inputs.is_dir():
        raise UsageError(f"{inputs}: no such folder: name the folder with the CT scans, or one scan")
    scans = sorted(path for path in inputs.iterdir() if is_scan(path))
    if not scans:
        raise UsageError(f"{inputs}: holds no scan: put X_0000.nii.gz there ({', '.join(SCAN_SUFFIXES)} are read)")
    seen: dict[str, Path] = {}
    for path in scans:
        other = seen.setdefault(case_name(path), path)
        if other != path:
            raise UsageError(f"{path}: would write the same mask as {other.name}: rename one of them")
    return scans


def check_outputs(outputs: Path) -> None:
    """Make the folder and try it, before any work."""
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=outputs):
            pass
    except OSError as error:
        raise UsageError(f"{outputs}: cannot be written ({error.strerror}): give a folder with write access") from error


def choose_device(wanted: str) -> str:
    """ "cpu" or "cuda:N"."""
    import torch

    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    kind, _, index = wanted.replace("auto", "cuda").partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise UsageError(f"--device {wanted}: unknown: use auto, cpu, cuda or cuda:N")
    if int(index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {wanted}: {torch.cuda.device_count()} GPUs are visible here: use auto or cpu")
    return f"cuda:{int(index or 0)}"


@dataclass
class Run:
    """All cases of one call."""

    pipeline: Pipeline
    outputs: Path
    save_probabilities: bool
    reports: list[Report] = field(default_factory=list)

    def case(self, source: Path) -> None:
        from .pipeline import Report

        with tqdm(desc=case_name(source), leave=False, disable=None) as bar:

            def progress(stage: str, done: int, total: int) -> None:
                bar.set_description(f"{case_name(source)} {stage}")
                bar.total, bar.n = total, done
                bar.refresh()

            try:
                report = self.pipeline.run(source, self.outputs, self.save_probabilities, progress)
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                report = Report(case_name(source), source.name, error=one_line(source, error))
        self.reports.append(report)
        print(report.error or report, file=sys.stderr if report.error else sys.stdout, flush=True)

    def to_dict(self) -> dict[str, Any]:
        return {
            "weights": self.pipeline.manifest.name,
            "device": self.pipeline.device,
            "cases": [report.to_dict() for report in self.reports],
        }


def one_line(source: Path, error: BaseException) -> str:
    """One sentence that names the file."""
    if isinstance(error, MemoryError):
        return f"{source}: not enough memory: give the container more, or crop the scan"
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return first if source.name in first else f"{source}: {first}"


def run(options: argparse.Namespace) -> int:
    scans = find_scans(options.inputs)
    check_outputs(options.outputs)
    if options.skip_existing:
        scans = [path for path in scans if not (options.outputs / f"{case_name(path)}.nii.gz").exists()]
    from .pipeline import Pipeline  # torch and ONNX Runtime: not needed to refuse
    from .weights import find_weights

    device = choose_device(options.device)
    try:
        pipeline = Pipeline(find_weights(options.weights), device, options.gpu_memory_mib)
    except ValueError as error:
        raise UsageError(str(error)) from error
    done = Run(pipeline, options.outputs, options.save_probabilities)
    for source in tqdm(scans, unit="case", disable=None if len(scans) > 1 else True):
        done.case(source)
    if options.report:
        options.report.write_text(json.dumps(done.to_dict(), indent=2) + "\n")
    return FAILED if any(report.error for report in done.reports) else DONE


def main() -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return run(parse(sys.argv[1:]))
    except UsageError as error:
        print(error, file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
