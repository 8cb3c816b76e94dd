"""Command line: every CT scan of a folder, or one file, to lesion masks.

    python -m inference [INPUTS] [OUTPUTS]

Exit code 0: all done; 1: some case failed (the others are done); 2: wrong usage. stderr tells of each case in one line.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tqdm import tqdm

from .atomic import write_whole
from .devices import Engine, choose_device, first_line
from .files import MAX_VOXELS
from .limits import give_back
from .log import Lines
from .stopwatch import Stopwatch
from .volume import SCAN_SUFFIXES, MaskError, Volume, case_name, is_scan, output_names, read_volume

if TYPE_CHECKING:
    from .pipeline import Pipeline, Report

DONE, FAILED, USAGE = 0, 1, 2
MEND_OF_CLASH = "rename one of them, or give another folder for outputs"
DECISIVE = ("torch", "onnxruntime-gpu", "numpy", "nibabel", "connected-components-3d")  # for the masks


class UsageError(Exception):
    """One sentence for stderr; exit code 2."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="predict.sh", description="Segments the lesions in CT scans.")
    parser.add_argument("inputs", nargs="?", type=Path, default=Path("/workspace/inputs"), help="folder or one scan")
    parser.add_argument("outputs", nargs="?", type=Path, default=Path("/workspace/outputs"), help="folder for masks")
    parser.add_argument("--weights", default="small", help="name under weights/, or a folder with a manifest.json")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--engine", choices=get_args(Engine), default=get_args(Engine)[0], help="of the hybrid; default %(default)s"
    )
    parser.add_argument("--gpu-memory-mib", type=positive, default=4096, help="of the GPU, in all; default %(default)s")
    parser.add_argument("--skip-existing", action="store_true", help="leave cases alone that have a mask already")
    parser.add_argument("--follow-links", action="store_true", help="read scans that are links out of the inputs, too")
    parser.add_argument("--save-probabilities", action="store_true", help="write X_probability.nii.gz beside the masks")
    parser.add_argument("--max-voxels", type=positive, default=MAX_VOXELS, help="of a scan; default %(default)s")
    parser.add_argument("--report", type=Path, help="write what was found and how long it took as JSON to this file")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def find_scans(inputs: Path) -> list[Path]:
    """The scans to segment, sorted. UsageError where there is none, or where the folder cannot be read."""
    try:
        if inputs.is_file():
            return [inputs]
        if not inputs.is_dir():
            raise UsageError(f"{inputs}: no such folder: name the folder with the CT scans, or one scan")
        scans = sorted(path for path in inputs.iterdir() if is_scan(path))
    except OSError as error:
        raise UsageError(f"{inputs}: cannot be read ({error.strerror}): give this user access to it") from error
    if not scans:
        raise UsageError(f"{inputs}: holds no scan: put X_0000.nii.gz there ({', '.join(SCAN_SUFFIXES)} are read)")
    return scans


def wanted(scan: Path, outputs: Path, save_probabilities: bool) -> list[Path]:
    """What is to be written of a scan."""
    return [outputs / name for name in output_names(case_name(scan))[: 1 + save_probabilities]]


def place(path: Path) -> tuple[int, int] | str:
    """The same for all names of one file, whatever links and mounts lead to it."""
    try:
        there = path.stat()
    except OSError:
        return os.path.realpath(path)  # unlike `resolve`, it bears links that go in circles
    return there.st_dev, there.st_ino


def replacing(scans: list[Path], outputs: Path, save_probabilities: bool) -> dict[Path, str]:
    """Scans whose output would replace a scan, with the sentence that says so."""
    taken = {place(scan): scan for scan in scans}
    return {
        scan: f"{scan}: would replace the scan {taken[place(path)].name}: {MEND_OF_CLASH}"
        for scan in scans
        for path in wanted(scan, outputs, save_probabilities)
        if place(path) in taken
    }


def doubled(scans: list[Path], outputs: Path, save_probabilities: bool) -> dict[Path, str]:
    """Scans whose output would replace that of a scan before them, with the sentence that says so."""
    taken: dict[str, Path] = {}  # by path: masks that are alike may be hard links, and are replaced one by one
    found = {}
    for scan in scans:
        places = [os.path.realpath(path) for path in wanted(scan, outputs, save_probabilities)]
        other = next((taken[one] for one in places if one in taken), None)
        if other is None:
            taken |= dict.fromkeys(places, scan)
        else:
            found[scan] = f"{scan}: would write the same mask as {other.name}: {MEND_OF_CLASH}"
    return found


def strays(scans: list[Path], inputs: Path) -> dict[Path, str]:
    """Links in a folder of inputs that lead out of it, with the sentence that says so."""
    if not inputs.is_dir():
        return {}
    home = Path(os.path.realpath(inputs))
    return {
        scan: f"{scan}: is a link that leads out of {inputs}: put the scan itself there, or give --follow-links"
        for scan in scans
        if not Path(os.path.realpath(scan)).is_relative_to(home)
    }


def nameless(scans: list[Path]) -> dict[Path, str]:
    """Scans whose masks would be hidden files, with the sentence that says so."""
    return {scan: f"{scan}: has no name before its ending: give it one" for scan in scans if not case_name(scan)}


def missing(scan: Path, outputs: Path, save_probabilities: bool) -> bool:
    """Whether anything that is wanted of a scan is not there, or is no file, or an empty one."""
    # `Path.is_file` fails where a name is too long
    return not all(
        os.path.isfile(path) and os.path.getsize(path)  # noqa: PTH113, PTH202
        for path in wanted(scan, outputs, save_probabilities)
    )


def check_writable(folder: Path) -> None:
    """Make the folder and try it, before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}): give a folder with write access") from error


def check_report(path: Path, others: list[Path]) -> None:
    """UsageError where the report could not be written, or would replace one of these."""
    check_writable(path.parent)
    if path.is_dir():
        raise UsageError(f"--report {path}: is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"--report {path}: is no ordinary file: name another")
    if place(path) in {place(other) for other in others}:
        raise UsageError(f"--report {path}: would replace a scan or its mask: name another file")


class Warned(logging.Handler):
    """Keeps what was warned of, until it is taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def take(self) -> list[str]:
        taken, self.messages = self.messages, []
        return taken


class Reader:
    """Reads scans; the first one in a thread, from here on: while frameworks are imported and weights are loaded."""

    def __init__(self, first: Path | None = None, max_voxels: int = MAX_VOXELS, stopwatch: Stopwatch | None = None):
        """max_voxels: a scan of more is refused before memory is taken for it."""
        self.first, self.max_voxels = first, max_voxels
        self.stopwatch = stopwatch or Stopwatch()
        self.ahead = ThreadPoolExecutor(1).submit(self._read_first, first) if first else None

    def _read_first(self, path: Path) -> Volume:
        with self.stopwatch.stage("read ahead"):
            return read_volume(path, self.max_voxels)

    def __call__(self, path: Path) -> Volume:
        ahead, self.ahead = self.ahead, None  # which would keep the scan
        return ahead.result() if ahead and path == self.first else read_volume(path, self.max_voxels)


@dataclass
class Run:
    """All cases of one call."""

    pipeline: Pipeline
    outputs: Path
    save_probabilities: bool
    read: Reader = field(default_factory=Reader)
    warned: Warned = field(default_factory=Warned)
    reports: list[Report] = field(default_factory=list)
    warnings_at_start: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.warnings_at_start = self.warned.take()

    def case(self, source: Path) -> None:
        name = printable(case_name(source))
        with tqdm(desc=name, leave=False, disable=None) as bar:

            def progress(stage: str, done: int, total: int) -> None:
                bar.set_description(f"{name} {stage}")
                bar.total, bar.n = total, done
                bar.refresh()

            try:
                report = self.pipeline.run(source, self.outputs, self.save_probabilities, progress, self.read)
            except Exception as error:  # whatever it is, it costs this case only; ONNX Runtime's have no common class
                self.fail(source, one_line(source, error))
                return
        self.add(report)

    def add(self, report: Report) -> None:
        report.warnings = self.warned.take()
        self.reports.append(report)
        give_back()
        try:
            tqdm.write(str(report), file=sys.stderr)  # above the progress bars
        except OSError:  # a log that is full costs no mask, and no exit code either
            sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115

    def fail(self, source: Path, sentence: str) -> None:
        from .pipeline import Report

        self.add(Report(case=case_name(source), input=source.name, error=sentence))

    def to_dict(self) -> dict[str, Any]:
        manifest = self.pipeline.manifest
        return {
            "versions": versions(),
            "weights": {"name": manifest.name, **{part: entry["sha256"] for part, entry in manifest.files.items()}},
            "device": self.pipeline.device,
            "engine": self.pipeline.engine,
            "start": {**asdict(self.read.stopwatch), "warnings": self.warnings_at_start},
            "cases": [report.to_dict() for report in self.reports],
        }


def versions() -> dict[str, str]:
    """Of Python, and of what is installed of the packages that decide the masks."""
    from importlib.metadata import PackageNotFoundError, version  # late: 12 ms of every start, for the few who ask

    found = {"python": sys.version.split()[0]}
    for name in DECISIVE:
        with suppress(PackageNotFoundError):  # torch is needed by its own engine alone
            found[name] = version(name)
    return found


def printable(name: str) -> str:
    """A file's name for a terminal: what would move its cursor is shown escaped."""
    return name if name.isprintable() else ascii(name)


def one_line(source: Path, error: BaseException) -> str:
    """One sentence that names the file and the mend."""
    if isinstance(error, MemoryError):
        return f"{source}: not enough memory: give the container more, or crop the scan"
    whole = str(error)
    if isinstance(error, ValueError) and whole.startswith(f"{source}: "):  # a name may hold a line break
        return whole
    first = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    if isinstance(error, MaskError) or (": " in first and source.name in first):
        return first
    return f"{source}: failed unexpectedly ({first}): run it alone with --device cpu"


def load(options: argparse.Namespace, stopwatch: Stopwatch) -> Pipeline:
    with stopwatch.stage("imports"):  # ONNX Runtime: not needed to refuse; torch comes with its engine
        from .pipeline import Pipeline
        from .weights import find_weights
    with stopwatch.stage("weights"):
        try:
            device = choose_device(options.device)
            return Pipeline(find_weights(options.weights), device, options.gpu_memory_mib, options.engine)
        except ValueError as error:
            raise UsageError(str(error)) from error


def write_report(path: Path, told: dict[str, Any]) -> bool:
    """Whether it could be written; it could be when the work began."""
    try:
        write_whole(path, (json.dumps(told, indent=2) + "\n").encode())
    except OSError as error:
        print(f"--report {path}: cannot be written ({error.strerror}): make room there", file=sys.stderr)
        return False
    return True


def run(options: argparse.Namespace) -> int:
    scans = find_scans(options.inputs)
    check_writable(options.outputs)
    written = [path for scan in scans for path in wanted(scan, options.outputs, options.save_probabilities)]
    if options.report:
        check_report(options.report, [*scans, *written])
    lost = replacing(scans, options.outputs, options.save_probabilities)
    twice = doubled([scan for scan in scans if scan not in lost], options.outputs, options.save_probabilities)
    refused = lost | twice | nameless(scans)
    if not options.follow_links:
        refused |= strays(scans, options.inputs)
    if options.skip_existing:  # but what an earlier call refused for another's mask has none of its own
        scans = [s for s in scans if s in twice or missing(s, options.outputs, options.save_probabilities)]
    stopwatch = Stopwatch()
    read = Reader(next((scan for scan in scans if scan not in refused), None), options.max_voxels, stopwatch)
    warned = Warned()
    logging.getLogger(__package__).addHandler(warned)
    done = Run(load(options, stopwatch), options.outputs, options.save_probabilities, read, warned)
    for source in tqdm(scans, unit="case", disable=None if len(scans) > 1 else True):
        if source in refused:
            done.fail(source, refused[source])
        else:
            done.case(source)
    told = not options.report or write_report(options.report, done.to_dict())
    return DONE if told and not any(report.error for report in done.reports) else FAILED


def log_to_stderr() -> None:
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="replace")  # a terminal that knows no × must not cost a case
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


def main() -> int:
    """Exit code of what the command line asks for."""
    log_to_stderr()
    try:
        return run(parse(sys.argv[1:]))
    except UsageError as error:
        print(error, file=sys.stderr)
        return USAGE
