"""The command line of every benchmark: its options, and what becomes of a user's mistakes and of an interrupt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path

import tyro

from training.command_line import exit_code


def run_main(main: Callable[..., int | None], description: str | None) -> int:
    """Call `main` with what the command line says. What it returns, or 0; 130 if interrupted.

    2 and a line on stderr where the user has something to mend.
    """
    prog = f"python -m benchmarks.{Path(sys.argv[0]).stem}"
    command = partial(tyro.cli, main, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,))
    return exit_code(command, 2, "interrupted")


def refuse_unknown(option: str, named: Iterable[str], known: Collection[str]) -> None:
    """ValueError where an option names something else than what is known."""
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ValueError(f"--{option} {' '.join(unknown)}: unknown: use some of {', '.join(known)}")
