"""One case through a container or a local command: started, sampled, watched, and ended when its time is over."""

from __future__ import annotations

import logging
import os
import select
import shlex
import shutil
import signal
import stat
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from .cases import MASK_SUFFIX, case_of, printable
from .docker_client import check_docker, docker, image_config, with_tag
from .interrupts import held
from .sampler import Readers, Sample, Sampler

logger = logging.getLogger(__name__)

GRADERS_SHARED_MEMORY = "28gb"
GRADERS_COMMAND = ("/bin/bash", "-c", "sh predict.sh")
OUTPUT_LIMIT_BYTES = 1 << 20  # kept of what a case prints: the first and the last half
LOOK_UP_S = 0.5  # a signal that another thread took does not end the main one's wait: Python handles it afterwards
CLOSING_LIMIT_S = 10.0  # for the output's pipe, which a process that fled its group may hold open


class Runner(Protocol):
    """What can be started on a folder of inputs and a folder of outputs."""

    def argv(self, inputs: Path, outputs: Path, name: str) -> list[str]: ...
    def environment(self) -> Mapping[str, str]: ...
    def stop(self, name: str) -> None:
        """End what the death of the started process itself would leave running."""


@dataclass(frozen=True)
class Container:
    """The official `docker container run`; gpu None leaves `--gpus` out, as do None for the other options.

    image: NAME:TAG. Later years' graders run it without `--shm-size`: shared_memory=None.
    """

    image: str
    gpu: int | None
    shared_memory: str | None = GRADERS_SHARED_MEMORY
    network: str | None = None

    def argv(self, inputs: Path, outputs: Path, name: str) -> list[str]:
        options = [f"--shm-size={self.shared_memory}"] if self.shared_memory else []
        options += ["-m", "28G"]
        options += [f"--gpus=device={self.gpu}"] if self.gpu is not None else []
        options += [f"--network={self.network}"] if self.network else []
        mounts = ["-v", f"{inputs}/:/workspace/inputs/", "-v", f"{outputs}/:/workspace/outputs/"]
        return [
            *["docker", "container", "run"],
            *options,
            "--name",
            name,
            "--rm",
            *mounts,
            self.image,
            *GRADERS_COMMAND,
        ]

    def environment(self) -> Mapping[str, str]:
        return os.environ

    def stop(self, name: str) -> None:
        for command in (("kill", name), ("rm", "-f", name)):
            try:
                docker(*command)
            except OSError as error:
                logger.warning("%s: container %s may still run: docker rm -f it", error, name)


@dataclass(frozen=True)
class LocalCommand:
    """A command line that takes INPUTS and OUTPUTS as its last two arguments, started in the current folder.

    It sees the measured GPU only, as a container would; gpu None: no GPU.
    """

    command: tuple[str, ...]
    gpu: int | None

    def argv(self, inputs: Path, outputs: Path, name: str) -> list[str]:  # noqa: ARG002
        return [*self.command, str(inputs), str(outputs)]

    def environment(self) -> Mapping[str, str]:
        device = "-1" if self.gpu is None else str(self.gpu)
        return {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": device}

    def stop(self, name: str) -> None:
        """Nothing: its whole process group is killed."""


def container(image: str, gpu: int | None) -> Container:
    """The official container of an image that is here. ValueError where docker or the image is missing."""
    check_docker()
    reference = with_tag(image)
    image_config(reference)
    return Container(reference, gpu)


def local_command(line: str, gpu: int | None) -> LocalCommand:
    """A local command from its line. ValueError where it is empty, badly quoted, or its program is missing."""
    try:
        command = tuple(shlex.split(line))
    except ValueError as error:
        raise ValueError(f"--command {line!r}: {error}: quote it as for a shell") from error
    if not command or shutil.which(command[0]) is None:
        raise ValueError(f"--command {line!r}: no such program: give one that takes INPUTS and OUTPUTS")
    return LocalCommand(command, gpu)


@dataclass(frozen=True)
class Run:
    """What one start left. time_s: wall time around it; mask_s: from the start until the mask was there.

    exit_code is for information (the graders ignore it, and podman tells docker's client 0 for every `--rm` run); None
    where the run was killed. stray: what else lies in outputs. mask: None where none was written, or where the run was
    killed: it may be half of one.
    """

    command: str
    exit_code: int | None
    time_s: float
    mask: Path | None
    mask_s: float | None
    stray: tuple[str, ...]
    samples: tuple[Sample, ...]
    idle_gpu_mib: float | None
    output: str

    @property
    def timed_out(self) -> bool:
        return self.exit_code is None

    @property
    def status(self) -> str:
        """done, failed, timeout or no mask. A mask counts whatever the exit code."""
        if self.timed_out:
            return "timeout"
        if self.mask is not None:
            return "done"
        return "failed" if self.exit_code else "no mask"


def run_case(runner: Runner, scan: Path, work: Path, readers: Readers, timeout_s: float) -> Run:
    """Run `runner` on one scan in the empty folder `work`, and kill it after `timeout_s`.

    The scan is a copy: a container may write into its inputs.
    """
    inputs, outputs = _folders(work.resolve(), scan)
    mask = outputs / f"{case_of(scan.name)}{MASK_SUFFIX}"
    seen_s: list[float] = []
    name = f"eval-{uuid.uuid4().hex[:12]}"

    def watch(t_s: float) -> None:
        if not seen_s and _is_file(mask):
            seen_s.append(t_s)

    with Sampler(readers, watch=watch) as sampler:
        exit_code, time_s, output = _execute(runner, runner.argv(inputs, outputs, name), name, timeout_s)
    left, killed = _is_file(mask), exit_code is None
    written = left and not killed
    return Run(
        command=shlex.join(runner.argv(inputs, outputs, name)),
        exit_code=exit_code,
        time_s=time_s,
        mask=mask if written else None,
        mask_s=min([*seen_s, time_s]) if written else None,
        stray=tuple(name for name in _names(outputs) if not (left and name == mask.name)),
        samples=tuple(sampler.samples),
        idle_gpu_mib=sampler.idle_gpu_mib,
        output=output,
    )


def _folders(work: Path, scan: Path) -> tuple[Path, Path]:
    """inputs/ with a copy of the scan, and outputs/: mode 0755 whatever the umask, as graders' outputs/ has it."""
    inputs, outputs = work / "inputs", work / "outputs"
    for folder in (inputs, outputs):
        folder.mkdir()
        folder.chmod(0o755)
    shutil.copyfile(scan, inputs / scan.name)
    (inputs / scan.name).chmod(0o644)
    return inputs, outputs


def _is_file(path: Path) -> bool:
    """Whether it is an ordinary file: no link, which may lead anywhere on this machine."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _names(outputs: Path) -> list[str]:
    try:
        return sorted(printable(path.name) for path in outputs.iterdir())
    except OSError as error:  # removed, or taken away from us, by what ran
        logger.warning("%s: cannot be listed after the run (%s)", outputs, error.strerror)
        return []


def _execute(runner: Runner, argv: Sequence[str], name: str, timeout_s: float) -> tuple[int | None, float, str]:
    """Exit code (None: killed), wall time, and what it printed. The wait blocks: polling would round the time up."""
    expired, start_s = threading.Event(), time.monotonic()
    process: subprocess.Popen[bytes] | None = None

    def end() -> None:
        if process is not None:
            _end(process, runner, name)

    def expire() -> None:
        expired.set()
        end()

    try:
        with held():  # until the process is known, an interrupt would leave it behind
            process = _start(runner, argv)
        assert process.stdout is not None
        output = _Output(process.stdout)
        time_s = _wait(process, timeout_s, expire) - start_s
    finally:
        end()
    return None if expired.is_set() else process.returncode, time_s, output.text()


def _start(runner: Runner, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """The process, in a group of its own."""
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=runner.environment(),
        start_new_session=True,
    )


def _wait(process: subprocess.Popen[bytes], timeout_s: float, expire: Callable[[], None]) -> float:
    """The moment at which the process has ended; `expire` is called where that takes too long."""
    timer, ending = threading.Timer(timeout_s, expire), os.pidfd_open(process.pid)
    try:
        timer.start()
        while not select.select([ending], [], [], LOOK_UP_S)[0]:
            pass
        ended_s = time.monotonic()
        process.wait()
        return ended_s
    finally:
        os.close(ending)
        timer.cancel()
        if timer.is_alive():
            timer.join()


def _end(process: subprocess.Popen[bytes], runner: Runner, name: str) -> None:
    """What runs of it is stopped: by the runner where the process has not ended by itself, and then its group."""
    try:
        if process.poll() is None:
            runner.stop(name)
    finally:
        _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The process and every child that stayed in its group; they hold the device's memory otherwise."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all gone


class _Output(threading.Thread):
    """Reads a pipe to its end, and keeps the first and the last part of it."""

    def __init__(self, pipe: IO[bytes], limit_bytes: int = OUTPUT_LIMIT_BYTES) -> None:
        super().__init__(name="output", daemon=True)
        self.pipe, self.half = pipe, limit_bytes // 2
        self.head, self.tail, self.total = bytearray(), bytearray(), 0
        self.start()

    def run(self) -> None:
        while chunk := os.read(self.pipe.fileno(), 1 << 16):
            self.total += len(chunk)
            room = self.half - len(self.head)
            self.head += chunk[:room]
            self.tail += chunk[room:]
            del self.tail[: -self.half]

    def text(self) -> str:
        """What was kept, once the pipe is closed; a line tells of what was left out."""
        self.join(CLOSING_LIMIT_S)
        if not self.is_alive():
            self.pipe.close()
        left_out = self.total - len(self.head) - len(self.tail)
        gap = f"\n[{left_out} bytes left out]\n".encode() if left_out else b""
        return bytes(self.head + gap + self.tail).decode(errors="replace")
