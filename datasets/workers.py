"""Processes that share a piece of work."""

import os
import signal


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ignore_interrupts() -> None:
    """Ctrl-C reaches every process; the one that started the others stops them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
