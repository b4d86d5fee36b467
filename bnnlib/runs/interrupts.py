"""Ctrl-C and a cluster's SIGTERM, answered at the next safe point instead of in the middle."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bnnlib.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ON_REQUEST = 1000  # beside the numbers of signals


@contextmanager
def deferred_interrupts(
    stop: Callable[[], bool] = lambda: False, agree: Callable[[int], int] = int
) -> Iterator[Callable[[], None]]:
    """Inside the `with` block a first SIGINT or SIGTERM waits; SIGINT after it stops at once.

    It raises KeyboardInterrupt. SIGTERM does not: clusters repeat it, and a parent may pass it on.
    Yields a function that raises Interrupted where a signal is waiting, or where `stop` says so;
    to be called wherever it is safe to stop. A signal that still waits at the end of the block is
    delivered then. One that the process ignores stays ignored. Outside the main thread, where
    Python delivers no signals, only `stop` is asked.
    `agree` makes one number of those of all processes that must stop together, where each gives 0
    or the number of its reason: `Ranks.most`.
    """
    waiting: list[int] = []
    answered = False

    def receive(number: int, frame: object) -> None:
        if waiting and number == signal.SIGINT:
            raise KeyboardInterrupt
        waiting.append(number)

    def check() -> None:
        nonlocal answered
        reason = agree(waiting[0] if waiting else ON_REQUEST if stop() else 0)
        if reason:
            answered = bool(waiting)
            named = reason != ON_REQUEST
            by = f"by {signal.Signals(reason).name}" if named else "on request"
            raise Interrupted(f"stopped {by}")

    with signals_to(receive):
        yield check
    if waiting and not answered:
        signal.raise_signal(waiting[0])


@contextmanager
def signals_to(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside the `with` block SIGINT and SIGTERM go to `handler`, but for one that is ignored.

    Outside the main thread, where Python delivers no signals, nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {n: h for n, h in before.items() if h not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
