"""What the container tests share: an engine, and an image that is built anew only when its context has changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from container_engine import ARCHIVE_LIMIT_S, REPOSITORY, Engine, context_digest, docker_works, start

IMAGE = "samcancer-test"  # used as IMAGE:latest, as graders do
CONTEXT_LABEL = "samcancer.context"
ARCHIVE_ROOM_GB = 12  # the archive, the engine's own copy of it, and layers that are unpacked from it
ASK = "the image takes minutes to build and gigabytes to keep: CONTAINER_TESTS=1 (or CI=1) has it built and run"


@pytest.fixture(scope="session")
def engine() -> Engine:
    """A container engine; skips where nobody asked for one, or where the machine has none."""
    if not os.environ.get("CI") and os.environ.get("CONTAINER_TESTS") != "1":
        pytest.skip(ASK)
    script = Path(os.environ.get("CONTAINER_ENGINE", REPOSITORY.parent / "shared" / "container" / "engine.sh"))
    if script.is_file():  # first: a shell that has sourced it also has a docker that answers, but one that cannot build
        return start(script)
    if docker_works():
        return Engine(dict(os.environ), None)
    pytest.skip("no container engine: `docker version` fails, and CONTAINER_ENGINE names no script that brings one up")


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The name of an image built from this checkout, without its tag."""
    digest = context_digest()
    if engine.label(f"{IMAGE}:latest", CONTEXT_LABEL) != digest:
        # The target is named, or docker's older builder would also make the one that is not asked for.
        engine.build(f"{IMAGE}:latest", REPOSITORY, f"{CONTEXT_LABEL}={digest}", target="slim")
    return IMAGE


@pytest.fixture(scope="session")
def archive(engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`docker save` of the image, once: 3 GB, and as many again while it is made; gzip would add minutes only."""
    path = tmp_path_factory.mktemp("archive") / f"{image}.tar"
    free_gb = shutil.disk_usage(path.parent).free / 1e9
    if free_gb < ARCHIVE_ROOM_GB:
        pytest.skip(f"saving and loading the image takes {ARCHIVE_ROOM_GB} GB of disk: {path.parent} has {free_gb:.0f}")
    try:
        engine.docker("save", f"{image}:latest", "-o", str(path), limit_s=ARCHIVE_LIMIT_S)
        yield path
    finally:
        path.unlink(missing_ok=True)
