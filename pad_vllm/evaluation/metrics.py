"""What is measured of a method's answers, with bootstrap intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def apart_from(self, other: Estimate) -> bool:
        """Whether the intervals do not touch."""
        return self.low > other.high or self.high < other.low


def bootstrap(values: Sequence[float], groups: Sequence[str], seed: int = 0) -> Estimate:
    """The mean of ``values`` and the percentile interval of it when groups are drawn anew, and values within them.

    Args:
        groups: of each value, what makes it depend on others: answers for one user are more alike than others.
    """
    by_group = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        by_group[group].append(value)
    rng = np.random.default_rng(seed)
    # Sums of each group under resampling, then the mean over resampled groups, in which each value counts alike.
    inner = np.stack([rng.choice(v, (NUM_RESAMPLES, len(v))).sum(1) for v in map(np.asarray, by_group.values())], 1)
    picked = rng.integers(len(by_group), size=inner.shape)
    sizes = np.array([len(v) for v in by_group.values()])
    means = np.take_along_axis(inner, picked, 1).sum(1) / sizes[picked].sum(1)
    low, high = (float(np.quantile(means, share)) for share in (0.025, 0.975))
    return Estimate(float(np.mean(values)), low, high)


def win_shares(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """1 where a value is above the base's, 0 where below, a half where equal."""
    return [0.5 * ((ours > theirs) + (ours >= theirs)) for ours, theirs in zip(values, base, strict=True)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of ``texts`` (Li et al., 2016)."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
