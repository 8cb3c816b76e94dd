"""`python -m inference`: from its first moment on, a signal ends it, and what is printed goes where it was meant to."""

import os
import signal
import sys


def stop_at_signals() -> None:
    """At once, wherever the program is: masks are whole or not there.

    SIGTERM's default does not stop a container's first process, and Python's for SIGINT is an exception, which looks
    like a mistake while modules are being imported.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell sets it for jobs in the background
            signal.signal(number, lambda number, _: os._exit(128 + number))


def open_closed_streams() -> None:
    """Where whoever started the program closed stderr, its lines must not end in the next file that is opened."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")


if __name__ == "__main__":
    stop_at_signals()
    open_closed_streams()
    from .command_line import main

    sys.exit(main())
