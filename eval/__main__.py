"""Command line of the evaluation harness: accuracy, efficiency, rank, report, submission.

    python -m eval COMMAND --help

Exit code 0: done, nothing amiss; 1: done, but some case failed or costs points; 2: wrong usage or input; 130:
interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

from tyro.extras import subcommand_cli_from_dict

from . import accuracy, efficiency, ranking, report, submission

COMMANDS: dict[str, Callable[..., Any]] = {
    "accuracy": accuracy.Settings,
    "efficiency": efficiency.Settings,
    "rank": ranking.Settings,
    "report": report.Settings,
    "submission": submission.Settings,
}
INTERRUPTED = 130  # as a shell has it


def main() -> int:
    settings = subcommand_cli_from_dict(COMMANDS, prog="python -m eval", description=__doc__)
    try:
        return settings.run()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started ends with it
    code = main()
    if code == INTERRUPTED:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # all has ended: a second one has nothing to say
    sys.exit(code)
