"""What a command's exit code says, and what is told where it fails."""

from __future__ import annotations

import sys
from collections.abc import Callable

INTERRUPTED = 130  # as a shell has it


def exit_code(command: Callable[[], int | None], mistake: int, interrupted: str) -> int:
    """What `command` returns, or 0; `mistake` and a line on stderr where the user has something to mend.

    `INTERRUPTED` where that is what it was, and `interrupted` on stderr.
    """
    try:
        return command() or 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return mistake
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
