"""The docker client: what is asked of it besides running a case.

It is found on PATH and takes its settings (DOCKER_HOST and the like) from the environment.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import shutil
import subprocess
import tarfile
import uuid
import zlib
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

ANSWER_LIMIT_S = 60.0  # for questions that need no work
WORK_LIMIT_S = 900.0  # for what may copy an image of several GB
CHUNK_BYTES = 1 << 20
DEFAULT_REGISTRY = ("docker.io/library/", "docker.io/")  # what the client leaves out of a name, and podman does not

Finished = subprocess.CompletedProcess[bytes]


def check_docker() -> None:
    """ValueError where there is no docker client, or no daemon answers it."""
    if shutil.which("docker") is None:
        raise ValueError("docker: no such program: install Docker, or measure a local command with --command")
    asked = docker("version")
    if asked.returncode != 0:
        raise ValueError(f"docker: no daemon answers ({last_line(asked.stderr)}): start it, or set DOCKER_HOST")


def docker(*arguments: str, limit_s: float | None = ANSWER_LIMIT_S) -> Finished:
    """Run `docker ARGUMENTS`, whatever its exit code. OSError where it does not come back within `limit_s`.

    Ctrl-C in a terminal does not reach it: it may be what ends a container.
    """
    command = ["docker", *arguments]
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"docker {arguments[0]}: no answer in {limit_s:g} s: start its daemon again") from error


def last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def with_tag(image: str) -> str:
    """`NAME` → `NAME:latest`; a tag, a digest or an image's number stays."""
    tagged = ":" in image.rpartition("/")[2] or "@" in image
    return image if tagged else f"{image}:latest"


def image_config(reference: str) -> dict[str, Any]:
    """The image's `Config` (User, Env, WorkingDir …). ValueError where there is no such image here."""
    asked = docker("image", "inspect", reference)
    if asked.returncode != 0:
        raise ValueError(f"{reference}: no such image here: build it, or load its archive with docker load -i")
    (found,) = json.loads(asked.stdout)
    return found["Config"] or {}


def file_in_image(reference: str, path: str) -> str | None:
    """The text of a file in an image, links followed; None where it holds no such file. Starts nothing."""
    name = f"eval-look-{uuid.uuid4().hex[:8]}"
    made = docker("create", "--name", name, reference, "true", limit_s=WORK_LIMIT_S)
    if made.returncode != 0:
        raise ValueError(f"{reference}: no container can be made of it ({last_line(made.stderr)}): build it again")
    try:
        copied = docker("cp", "-L", f"{name}:{path}", "-")
    finally:
        docker("rm", "-f", name)
    if copied.returncode != 0:
        return None
    with tarfile.open(fileobj=io.BytesIO(copied.stdout)) as tar:
        member = next((member for member in tar if member.isfile()), None)
        file = tar.extractfile(member) if member else None
        return file.read().decode(errors="replace") if file else None


def load_archive(archive: Path) -> list[str]:
    """`docker load` it; the names, as NAME:TAG, of the images that it held. ValueError where it does not load.

    An engine that takes no gzip gets the archive unpacked.
    """
    loaded = docker("load", "-i", str(archive), limit_s=None)
    if loaded.returncode != 0 and _is_gzip(archive):
        logger.info("%s: refused as it is, unpacked on the way", archive)
        loaded = _load_unpacked(archive)
    if loaded.returncode != 0:
        raise ValueError(f"{archive}: docker load fails ({last_line(loaded.stderr)}): save the image again")
    return loaded_names(loaded.stdout.decode(errors="replace"))


def _is_gzip(archive: Path) -> bool:
    with archive.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _load_unpacked(archive: Path) -> Finished:
    process = subprocess.Popen(
        ["docker", "load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    try:
        with gzip.open(archive) as file:
            _copy(file, process.stdin)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        process.kill()
        process.communicate()
        raise ValueError(f"{archive}: its gzip data are damaged or cut short: compress the image again") from error
    said, complained = process.communicate()
    return Finished(process.args, process.returncode, said, complained)


def _copy(source: gzip.GzipFile, target: IO[bytes]) -> None:
    """Copy all; a client that stops listening says why itself."""
    try:
        shutil.copyfileobj(source, target, CHUNK_BYTES)
    except BrokenPipeError:
        logger.info("docker load stopped reading")


def loaded_names(said: str) -> list[str]:
    """The images named by `docker load`: lines of `Loaded image: NAME:TAG` or `Loaded image ID: sha256:…`."""
    names = []
    for line in said.splitlines():
        if line.startswith(("Loaded image:", "Loaded image ID:")):
            names += [_short(name.strip()) for name in line.partition(": ")[2].split(",")]
    return names


def _short(name: str) -> str:
    for registry in DEFAULT_REGISTRY:
        name = name.removeprefix(registry)
    return name
