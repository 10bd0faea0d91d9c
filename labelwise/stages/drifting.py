"""`pretrain --init RUN`: whether the images are like those that RUN was made with."""

import torch

from labelwise import seeding, terminal
from labelwise.images.source import ImageSet
from labelwise.rundir import RunDirectory
from labelwise.stages.oracle import load_oracle
from labelwise.stages.pooling import Pool

_LISTED = 3
_SAMPLED = 2000
_UNLIKE = 0.03  # of the images; 0.01 of RUN's own are as far


def say_how_new(before: RunDirectory, images: ImageSet, pool: Pool, device: torch.device) -> None:
    """Say how many of the images are less like those of an earlier run than 99 % of these are, if its classifier can tell."""
    if not before.familiar.exists():
        return
    oracle = load_oracle(before, None, device)
    evaluations = pool.cache.evaluations
    if evaluations.shape[1] != oracle.spec.image_size:
        return
    order = seeding.generator(0, "drift").permutation(len(pool.rows))
    rows = pool.rows[order[:_SAMPLED]]
    names = [images.names[row] for row in rows.tolist()]
    far = oracle.tell(names, evaluations[rows])["far"]
    if far is None:
        terminal.say(
            f"new        how many are new to {before.path.name} is not known: its classifier is distilled, or knows too few images"
        )
        return
    share, which = (
        float(far.mean()),
        f"of {len(rows):,} images are less like those of {before.path.name} than 99% of these are",
    )
    if share <= _UNLIKE:
        terminal.say(f"new        {share:.1%} {which}, which is as it should be")
        return
    examples = ", ".join([name for name, is_far in zip(names, far, strict=True) if is_far][:_LISTED])
    terminal.warn(
        f"your images differ from those that {before.path.name} was made with: {share:.0%} {which} (1% would be usual), e.g. {examples}. "
        "What its classifier says of these means little: label some of them, and some to test on."
    )
