"""Errors a user can cause, and the exit code each one ends with.

    LabelwiseError          1  the command failed
    ├── UsageError          2  an option, setting or recipe key is wrong
    ├── DataError           3  the images or labels cannot be used as asked
    ├── CheckpointError     4  a run folder or checkpoint is damaged or not ours
    ├── ResourceError       5  memory or disk ran out
    ├── LostRankError       6  one of several processes that train together is gone
    └── Interrupted   130, ...  Ctrl-C (130), SIGTERM (143) or a lost terminal (129), after saving

Each carries one short block of text: what is wrong, where, what to do.
A bug is never wrapped in one of these; it keeps its traceback.
"""


class LabelwiseError(Exception):
    """Tell the user what is wrong, where, and what to do about it."""

    exit_code = 1


class UsageError(LabelwiseError):
    """An option, setting or recipe key cannot be used as given."""

    exit_code = 2


class DataError(LabelwiseError):
    """The images or labels cannot be used as asked."""

    exit_code = 3


class CheckpointError(LabelwiseError):
    """A run folder or checkpoint is damaged, incomplete or not ours."""

    exit_code = 4


class ResourceError(LabelwiseError):
    """Memory or disk ran out."""

    exit_code = 5


class LostRankError(LabelwiseError):
    """Another of the processes that train together ended, or stopped answering."""

    exit_code = 6


class Interrupted(LabelwiseError):
    """A signal asked us to stop, and everything worth keeping is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU; torch says so in words and types of its own."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return named or any(each in str(error).lower() for each in words)
