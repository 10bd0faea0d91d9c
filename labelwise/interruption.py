"""Stop between two steps, not inside one: the first signal is remembered, a second Ctrl-C acts at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from labelwise.errors import Interrupted

_FORWARDED_SECONDS = 2.0  # torch's launcher sends its ranks the Ctrl-C that they got from the terminal too


class StopRequest:
    """Whether somebody asked the process to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def ask(self, signal_number: int) -> None:
        """Ask to stop, as if this signal had come; the first one counts."""
        if self.signal_number is None:
            self.signal_number = signal_number

    def check(self, words: str) -> None:
        """Raise Interrupted with these words if somebody did."""
        if self.signal_number is not None:
            raise Interrupted(words, self.signal_number)


def asking_to_end() -> list[signal.Signals]:
    """Signals by which somebody asks for an end: SIGHUP only where `nohup` has not set it to be ignored."""
    is_asked = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if is_asked else [])]


@contextmanager
def stop_between_steps() -> Iterator[StopRequest]:
    """Within this block a signal that asks for an end sets a flag; Ctrl-C after that raises KeyboardInterrupt.

    Those are SIGINT, SIGTERM, and SIGHUP of a terminal that is gone, unless `nohup` has it ignored.

    Off the main thread, where Python allows no signal handlers, the flag stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    is_launched, first_at = "TORCHELASTIC_RUN_ID" in os.environ, 0.0

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal first_at
        if not request:
            request.ask(number)
            first_at = time.monotonic()
            return
        is_repeated = not is_launched or time.monotonic() - first_at > _FORWARDED_SECONDS
        if (
            number == signal.SIGINT and is_repeated
        ):  # others come twice when a terminal closes or a scheduler insists
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, remember) for number in asking_to_end()}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
