"""Keeps what an encoder knew already from getting lost while SimCLR trains it on. No label is looked at."""

from torch import Tensor

from labelwise.errors import CheckpointError
from labelwise.learning.checkpoint import Position, load_checkpoint, save_checkpoint
from labelwise.learning.simclr import Learner
from labelwise.measures import health
from labelwise.rundir import RunDirectory


class Guard:
    """What an encoder of other weights was at the start, and its state at the last look at which it was sound.

    Args:
        run: Where that state is kept until training is over.
        learner: At its start.
        start: Features of some images at the start, (N, F).
    """

    def __init__(self, run: RunDirectory, learner: Learner, start: Tensor) -> None:
        self._folder, self._learner, self._start = run.sound, learner, start
        self._start_rank = health.effective_rank(start)
        if not any(self._folder.glob("step-*")):
            self.keep(Position(0, 0, 0))

    def check(self, features: Tensor, rank: float) -> tuple[float, str | None]:
        """Compare with the start: the share of nearest neighbours kept, and in words what got lost, if anything did.

        Args:
            features: Of the same images, now, (N, F).
            rank: Their effective rank.
        """
        kept = health.kept_neighbours(self._start, features)
        return kept, health.diagnose_start(rank, self._start_rank, kept)

    def keep(self, at: Position) -> None:
        """Remember the learner as it is: it is sound."""
        save_checkpoint(self._folder, at, self._learner.modules, self._learner.optimizer)

    def roll_back(self) -> Position:
        """Give the learner the state that was kept last.

        Raises:
            CheckpointError: It is gone, or damaged.
        """
        at = load_checkpoint(self._folder, self._learner.modules, self._learner.optimizer)
        if at is None:
            raise CheckpointError(f"{self._folder}: missing, and training went wrong; start a new run.")
        return at
