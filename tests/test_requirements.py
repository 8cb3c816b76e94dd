"""The lock that the image is built from holds what requirements.txt pins, each with hashes."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def pins(text: str) -> dict[str, str]:
    """Package, as indexes normalise it, → version; only exact pins are understood."""
    found = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_lock_follows_the_requirements() -> None:
    requirements = (REPOSITORY / "requirements.txt").read_text()
    lock = (REPOSITORY / "requirements.lock").read_text()
    wanted, locked = pins(requirements), pins(lock)
    named = [line for line in requirements.splitlines() if line and not line.startswith("#")]
    assert len(wanted) == len(named)
    assert {name: locked.get(name) for name in wanted} == wanted


def test_every_package_of_the_lock_is_pinned_with_hashes() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text()
    entries = re.split(r"\n(?=\S)", lock.strip())
    assert len(entries) == len(pins(lock)) > 30
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
