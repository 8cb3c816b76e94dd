"""What the container tests share: an engine, and an image that is built anew only when its context has changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from container_engine import REPOSITORY, Engine, context_digest, docker_works, start

IMAGE = "samcancer-test"  # used as IMAGE:latest, as graders do
CONTEXT_LABEL = "samcancer.context"
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
        engine.build(f"{IMAGE}:latest", REPOSITORY, f"{CONTEXT_LABEL}={digest}")
    return IMAGE
