"""Ctrl-C, a request to end and a closed terminal end a command, which ends what it started."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 30.0  # for what was started to end


def raise_once() -> None:
    """Let each of them raise KeyboardInterrupt, but those that soon follow nothing: they would break off its work.

    One that was ignored before, as nohup and a shell's background jobs have it, stays so.
    """
    last_s: list[float] = []

    def end(_number: int, _frame: Any) -> None:
        now_s = time.monotonic()
        if not last_s or now_s - last_s[-1] > GRACE_S:
            last_s.append(now_s)
            raise KeyboardInterrupt

    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def ignore() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """One that comes meanwhile is handled at the end.

    Their handlers are replaced, not the signals blocked: another thread would take that, and a child would inherit it.
    Only the main thread can, and only there would the handler raise anything.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in ENDING if callable(signal.getsignal(number))]
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for held_back in came:
            signal.raise_signal(held_back)


def leave_to_parent() -> None:
    """In a process of a pool: Ctrl-C in a terminal reaches it too, and it would take that for its work's result."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
