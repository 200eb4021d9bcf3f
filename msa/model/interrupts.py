"""Ctrl-C in long work: the first asks to stop where it can go on, the second stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_byte
from typing import Any

Flag = c_byte
"""Whether to stop, 0 or 1; `multiprocessing.RawValue("b")` is one that other processes see."""


@contextmanager
def deaf() -> Iterator[None]:
    """Ctrl-C does nothing here, nor ever in processes that are started here: their first one is
    to tell them when to stop.
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
    """Let the first Ctrl-C set the flag and say when that will be looked at.

    A second one raises KeyboardInterrupt, as does the first outside of the main thread.

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
