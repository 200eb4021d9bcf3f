"""Ctrl-C in long work. The first Ctrl-C stops after saving, the second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_byte
from typing import Any

Flag = c_byte
"""Whether to stop, 0 or 1. A `multiprocessing.RawValue("b")` is shared with other processes."""


@contextmanager
def ignored() -> Iterator[None]:
    """Ignore Ctrl-C here, and for ever in processes that are started here.

    The process that starts them tells them when to stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def patient(flag: Flag, when: str) -> Iterator[None]:
    """The first Ctrl-C sets the flag, and prints `when` the work will stop.

    The second one raises KeyboardInterrupt. Outside of the main thread the first one does.

    >>> flag = Flag()
    >>> with patient(flag, "after this step"):
    ...     signal.raise_signal(signal.SIGINT)
    >>> flag.value
    1
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        flag.value = 1
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"\nmsa: stops {when}; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
