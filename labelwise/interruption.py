"""Stop between two steps, not inside one: the first signal is remembered, a second Ctrl-C acts at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from labelwise.errors import Interrupted


class StopRequest:
    """Whether somebody asked the process to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

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

    def remember(number: int, frame: FrameType | None) -> None:
        if not request:
            request.signal_number = number
        elif number == signal.SIGINT:  # others come twice when a terminal closes or a scheduler insists
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, remember) for number in asking_to_end()}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
