"""A container engine for the tests: one client, whether the machine has docker or a script brings it up."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
IN_CONTEXT = (
    "Dockerfile", ".dockerignore", "requirements.lock", "requirements-torch.lock", "predict.sh", "inference", "weights",
)  # fmt: skip
BUILD_LIMIT_S = 3600
RUN_LIMIT_S = 600
ARCHIVE_LIMIT_S = 1200  # one save or one load of several GB

Finished = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Engine:
    """A docker client that works: the environment it works in, and the script that brought it up, if one did."""

    environment: dict[str, str]
    script: Path | None

    def docker(self, *arguments: str, limit_s: float = RUN_LIMIT_S, check: bool = True) -> Finished:
        """Runs `docker ARGUMENTS`; with `check`, a failure shows what docker said."""
        return self._call(["docker", *arguments], limit_s, check)

    def build(self, image: str, context: Path, label: str, target: str | None = None) -> None:
        """Builds `context`/Dockerfile, or one target of it, as `image`; layers are kept, and with them the packages."""
        options = ["--label", label, *(["--target", target] if target else [])]
        if self.script is None:
            self.docker("build", *options, "-t", image, str(context), limit_s=BUILD_LIMIT_S)
            return
        build = 'source "$0" && container_build "$@"'  # `docker build` has no network in the script's engine
        full_name = f"docker.io/library/{image}"  # what docker means by `image`; buildah would make it localhost/…
        command = ["bash", "-c", build, str(self.script), full_name, str(context), "--layers", *options]
        self._call(command, BUILD_LIMIT_S, check=True)

    def label(self, image: str, name: str) -> str:
        """The value of a label of `image`; empty where either does not exist."""
        template = f'{{{{index .Config.Labels "{name}"}}}}'
        asked = self.docker("image", "inspect", "--format", template, image, check=False)
        return asked.stdout.strip() if asked.returncode == 0 else ""

    def _call(self, command: Sequence[str], limit_s: float, check: bool) -> Finished:
        done = subprocess.run(
            command, env=self.environment, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=limit_s
        )
        if check and done.returncode != 0:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            pytest.fail(f"{' '.join(command)}: exit code {done.returncode}\n{said}")
        return done


def docker_works() -> bool:
    """Whether a docker client is installed and a daemon answers it."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0


def start(script: Path) -> Engine:
    """Sources the engine's script once and keeps the environment that it leaves behind."""
    done = subprocess.run(["bash", "-c", 'source "$0" >&2 && env -0', str(script)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{script} started no container engine:\n{done.stderr.decode(errors='replace')[-4000:]}")
    pairs = (entry.partition("=") for entry in done.stdout.decode().split("\0") if entry)
    return Engine({name: value for name, _, value in pairs}, script)


def context_digest() -> str:
    """A digest of everything that the build sees: two equal digests build the same image."""
    digest = hashlib.sha256()
    for name in IN_CONTEXT:
        path = REPOSITORY / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(
                    f"{file.relative_to(REPOSITORY)}\0{file.stat().st_mode:o}\0{file.stat().st_size}\0".encode()
                )
                digest.update(file.read_bytes())
    return digest.hexdigest()
