"""What the settings of several commands are checked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def refuse_less(settings: object, least: Mapping[str, float]) -> None:
    """ValueError where a setting, or one of its numbers, is less than it can be.

    least: by the settings' names.
    """
    for name, value in least.items():
        given = getattr(settings, name)
        numbers = given if isinstance(given, tuple) else (given,)
        if not numbers or not all(number >= value for number in numbers):
            option = " ".join(("--" + name.replace("_", "-"), *map(str, numbers)))
            raise ValueError(f"{option}: give {value} or more")


def refuse_beyond(settings: object, shares: Iterable[str]) -> None:
    """ValueError where one of these settings is no share, from 0 to 1."""
    for name in shares:
        given = getattr(settings, name)
        if not 0 <= given <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {given}: give a share from 0 to 1")
