"""The locks that the images are built from hold what requirements*.txt pin, each with hashes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def pins(text: str) -> dict[str, str]:
    """Package, as indexes normalise it, → version; only exact pins are understood."""
    found = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


@pytest.mark.parametrize("name", ["requirements", "requirements-torch"])
def test_the_lock_follows_the_requirements(name: str) -> None:
    requirements = (REPOSITORY / f"{name}.txt").read_text()
    if "-r requirements.txt\n" in requirements:
        requirements = requirements.replace("-r requirements.txt\n", (REPOSITORY / "requirements.txt").read_text())
    lock = (REPOSITORY / f"{name}.lock").read_text()
    wanted, locked = pins(requirements), pins(lock)
    named = [line for line in requirements.splitlines() if line and not line.startswith("#")]
    assert len(wanted) == len(named)
    assert {package: locked.get(package) for package in wanted} == wanted
    assert ("torch" in locked) == (name == "requirements-torch")


@pytest.mark.parametrize("name", ["requirements", "requirements-torch"])
def test_every_package_of_the_lock_is_pinned_with_hashes(name: str) -> None:
    lock = (REPOSITORY / f"{name}.lock").read_text()
    entries = re.split(r"\n(?=\S)", lock.strip())
    assert len(entries) == len(pins(lock)) > 15
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
