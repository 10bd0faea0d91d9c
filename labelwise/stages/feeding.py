"""What each step of pretraining trains on: images of the pool in an order of the epoch, or what a stream brings."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from labelwise import seeding
from labelwise.config import PretrainSettings
from labelwise.images import decoding
from labelwise.images.decoded import DecodedShards
from labelwise.images.streaming import Batch, Rows, Stream, own_shards
from labelwise.learning.checkpoint import Position
from labelwise.learning.ranks import Ranks
from labelwise.stages.planning import Plan
from labelwise.stages.pooling import Pool

_PATIENCE_SECONDS = 1.0
Draw = Callable[[Position], tuple[Pool | Batch, Rows] | None]


@contextmanager
def feed(
    pool: Pool, settings: PretrainSettings, plan: Plan, lock: dict[str, Any], ranks: Ranks, step: int
) -> Iterator[tuple[Draw, dict[str, str]]]:
    """Open what images come from, from a step on.

    Yields:
        Position to images and members of its batch, (B,), or None where a stream has not brought them yet; and names of images
        that the stream has left out, with reasons.
    """
    if pool.shards is None:

        @functools.lru_cache(1)
        def order(epoch: int) -> Rows:
            return seeding.permutation(settings.seed, epoch, len(pool.rows))

        def draw(at: Position) -> tuple[Pool, Rows]:
            return pool, order(at.epoch)[at.batch * plan.batch_size : (at.batch + 1) * plan.batch_size]

        yield draw, {}
        return
    each = plan.lanes // ranks.count
    own = range(ranks.number * each, (ranks.number + 1) * each)
    form: dict[str, Any] = {
        "side": plan.cache_side,
        "intensity_range": pool.cache.intensity_range,
        "shortest": decoding.shortest_for(plan.cache_side, plan.image_size),
    }
    first = (ranks.number - ranks.local) * each  # of the lanes of this machine
    machine = range(first, first + ranks.local_count * each)
    shards = itertools.chain.from_iterable(own_shards(pool.shards, lane, plan.lanes) for lane in machine)
    with (
        DecodedShards(pool.shards, shards, **form) if settings.keep_decoded else nullcontext() as kept,
        Stream(
            pool.shards,
            lanes=plan.lanes,
            own=own,
            batch_size=plan.batch_size,
            part_size=plan.micro_batch_size,
            buffer=settings.shuffle_buffer,
            seed=settings.seed,
            **form,
            locked=frozenset((*lock["keys"], *lock["excluded_groups_keys"], *lock["earlier_keys"])),
            step=step,
            kept=kept,
        ) as stream,
    ):
        members = np.arange(plan.batch_size)

        def wait(at: Position) -> tuple[Batch, Rows] | None:
            batch = stream.draw(at.step, _PATIENCE_SECONDS)
            return None if batch is None else (batch, members)

        yield wait, stream.left_out
