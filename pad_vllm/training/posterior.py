"""What a user's choices say of the weights over heads, attributes or adapters: draws from their posterior.

Before any choice a weight is ``scale * g * exp(SPREAD * h)`` with standard normal g and h: most are small and a few are
large, since to most users few things matter, and nobody says how much. A user with weights w chooses an answer over
another by sigmoid(margin), the margin being w times the difference of their features, and the other way in a share of
choices, which are mistakes: no single choice is proof.

A map of normals is drawn from by elliptical slice sampling (arXiv 1001.0175), which has no step size to tune.
"""

from __future__ import annotations

import math

import torch

TYPICAL_MARGIN = 5.0
"""Nats, of a pair whose features are 1 by weights of their typical size (g and h of 1 and 0)."""
SPREAD = 1.5
MISTAKES = 0.1
"""Share of choices that are mistakes."""
NUM_DRAWS = 256
NUM_STEPS = 150
MAX_SHRINKS = 15
"""Of a slice, after which a draw stays where it was for a step: 2 pi / 2^15 is next to nothing."""


def draw_normals(
    features: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    num_draws: int = NUM_DRAWS,
    num_steps: int = NUM_STEPS,
    mistakes: float = MISTAKES,
    seed: int = 0,
) -> torch.Tensor:
    """Draws from the posterior, as normals that :func:`weights_of` maps: (..., num_draws, 2 * num_features) float64.

    Args:
        features: (..., num_choices, num_features) float64, chosen minus rejected, of about 1; there may be no choices.
        start: what this gave for fewer choices of the same users, from where fewer steps suffice.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype)

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=features.dtype)

    normals = normal((*features.shape[:-2], num_draws, 2 * features.shape[-1])) if start is None else start
    if not features.shape[-2]:
        return normals
    known = log_likelihood(features, weights_of(normals), mistakes)
    for _ in range(num_steps):
        other, least = normal(tuple(normals.shape)), known + uniform(known).log()
        angle = 2 * math.pi * uniform(known)
        low, high = angle - 2 * math.pi, angle.clone()
        moved, done = normals.clone(), torch.zeros_like(known, dtype=torch.bool)
        for _ in range(MAX_SHRINKS):
            proposed = normals * angle.cos().unsqueeze(-1) + other * angle.sin().unsqueeze(-1)
            found = log_likelihood(features, weights_of(proposed), mistakes)
            accepted = (found > least) & ~done
            moved[accepted], known[accepted] = proposed[accepted], found[accepted]
            done |= accepted
            if done.all():
                break
            low, high = torch.where(angle < 0, angle, low), torch.where(angle < 0, high, angle)
            angle = low + uniform(known) * (high - low)
        normals = moved
    return normals


def weights_of(normals: torch.Tensor) -> torch.Tensor:
    """Weights (..., num_draws, num_features), one for each two of ``normals``."""
    sign, size = normals.chunk(2, -1)
    return TYPICAL_MARGIN / math.sqrt(sign.shape[-1]) * sign * (SPREAD * size).exp()


def log_likelihood(features: torch.Tensor, weights: torch.Tensor, mistakes: float = MISTAKES) -> torch.Tensor:
    """Of the choices in ``features`` (..., num_choices, num_features) by each of ``weights`` (..., num_draws,
    num_features): (..., num_draws), in nats."""
    return probabilities(features, weights, mistakes).log().sum(-1)


def probabilities(features: torch.Tensor, weights: torch.Tensor, mistakes: float = MISTAKES) -> torch.Tensor:
    """That a pair's first answer is chosen, by each of ``weights``: (..., num_draws, num_pairs)."""
    return (1 - 2 * mistakes) * torch.sigmoid(weights @ features.mT) + mistakes


def mean_direction(weights: torch.Tensor) -> torch.Tensor:
    """The mean of draws (..., num_draws, num_features), each of length 1: (..., num_features). How large weights are is
    what choices do not tell where they are all explained, and the largest draws would outweigh the others."""
    return torch.nn.functional.normalize(weights, dim=-1).mean(-2)
