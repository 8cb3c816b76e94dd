"""Command line of the evaluation harness: accuracy, efficiency, rank, report, submission.

    python -m eval COMMAND --help

Exit code 0: done, nothing amiss; 1: done, but some case failed or costs points; 2: wrong usage or input; 130:
interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .interrupts import ignore, raise_once

INTERRUPTED = 130  # as a shell has it


def settings() -> Any:
    """Of the command that was given, ready to run. Importing all of them takes as long as a short run does."""
    from tyro.extras import subcommand_cli_from_dict

    from . import accuracy, efficiency, ranking, report, submission

    commands: dict[str, Callable[..., Any]] = {
        "accuracy": accuracy.Settings,
        "efficiency": efficiency.Settings,
        "rank": ranking.Settings,
        "report": report.Settings,
        "submission": submission.Settings,
    }
    return subcommand_cli_from_dict(commands, prog="python -m eval", description=__doc__)


def main() -> int:
    try:
        return int(settings().run())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    raise_once()
    code = main()
    if code == INTERRUPTED:
        ignore()  # all has ended: another one has nothing to say
    sys.exit(code)
