"""Whether samples have a distribution."""

from __future__ import annotations

import torch


def chi_squared(sampled: list[int], probabilities: torch.Tensor) -> float:
    """The p-value of token ids against [vocab] probabilities; 0 where a token came that cannot."""
    expected = probabilities.double() * len(sampled)
    counts = torch.bincount(torch.tensor(sampled), minlength=len(expected)).double()
    if counts[expected == 0].sum() > 0:
        return 0.0
    likely = expected > 5  # the usual least count of a chi-squared cell; the rest is one cell
    assert likely.sum() >= 3
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    wanted = torch.cat([expected[likely], expected[~likely].sum()[None]])
    keep = wanted > 0
    statistic = ((observed - wanted)[keep] ** 2 / wanted[keep]).sum()
    degrees = keep.sum().double() - 1
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))
