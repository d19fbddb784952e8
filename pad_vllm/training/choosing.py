"""``pad-vllm fit --next``: which pair of answers a user should compare next.

After some choices the weights over heads, attributes or adapters are known as far as the posterior of the logistic
regression says (:mod:`pad_vllm.training.fit`): about its mode a Gaussian, whose inverse covariance is the penalty and
what each choice adds to it (Laplace). A pair's margin under it is a Gaussian too. A choice tells much where the user's
answer is open (the margin may be above 0 or below) because the weights are open, and little where it is open because
the two answers are as good: the mutual information of choice and weights (Bayesian active learning by disagreement,
arXiv 1112.5745),

    I = H(E[p]) - E[H(p)],   p = (1 - 2 e) sigmoid(margin) + e

with H the entropy of a coin and e the share of choices that are mistakes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pad_vllm.training.data import Comparison, DataError, PairExample, encode, read_comparisons
from pad_vllm.training.fit import load_reward_model, solve
from pad_vllm.training.sliders import differentials, read_attributes, scorer_of

PRIOR_SPREAD = 3.0
"""Nats. The standard deviation of a pair's margin before the first choice: nothing is known of the user yet, and
nearly every choice may go either way."""
MISTAKES = 0.1
"""Share of choices that are mistakes."""
NUM_NODES = 32
"""Nodes of the quadrature over a margin."""


class Posterior(NamedTuple):
    """What is known of the weights from the choices: ``mean`` (num_features,), ``covariance`` (num_features,
    num_features), float64."""

    mean: torch.Tensor
    covariance: torch.Tensor


def posterior(features: torch.Tensor, penalty: float) -> Posterior:
    """Laplace's, of the logistic regression on choices.

    Args:
        features: (num_choices, num_features) float64, chosen minus rejected; there may be none.
        penalty: inverse variance of each weight before any choice.
    """
    mean = solve(features, penalty)
    p = torch.sigmoid(features @ mean)
    precision = penalty * torch.eye(features.shape[1], dtype=features.dtype)
    precision += (features * (p * (1 - p)).unsqueeze(1)).T @ features
    return Posterior(mean, torch.linalg.inv(precision))


def information(pairs: torch.Tensor, known: Posterior, mistakes: float = MISTAKES) -> torch.Tensor:
    """Nats that the choice in each pair is expected to tell of the weights: (num_pairs,) float64, at least 0.

    Args:
        pairs: (num_pairs, num_features) float64, one answer minus the other; which is which changes nothing.
    """
    nodes, weights = (torch.from_numpy(one) for one in np.polynomial.hermite_e.hermegauss(NUM_NODES))
    weights = weights / weights.sum()
    spread = torch.einsum("ij,jk,ik->i", pairs, known.covariance, pairs).clamp_min(0).sqrt()
    margins = (pairs @ known.mean).unsqueeze(1) + spread.unsqueeze(1) * nodes
    p = (1 - 2 * mistakes) * torch.sigmoid(margins) + mistakes
    return (_entropy(p @ weights) - _entropy(p) @ weights).clamp_min(0)


def _entropy(p: torch.Tensor) -> torch.Tensor:
    """Of a coin, in nats."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


def next_pair(chosen: torch.Tensor, pairs: torch.Tensor, mistakes: float = MISTAKES) -> tuple[int, float]:
    """The pair whose comparison would tell most, and the bits that it is expected to tell.

    Args:
        chosen: (num_choices, num_features), in nats, of the choices that there are, chosen minus rejected.
        pairs: (num_pairs, num_features), in nats, of those that could be made, one answer minus the other.
    """
    chosen, pairs = chosen.double(), pairs.double()
    # As for the fit: one scale for all features, whose penalty says how far a typical pair's margin may be from 0.
    scale = torch.cat([chosen, pairs]).square().mean().sqrt().clamp_min(1e-9)
    penalty = pairs.shape[1] / PRIOR_SPREAD**2
    told = information(pairs / scale, posterior(chosen / scale, penalty), mistakes)
    best = int(told.argmax())
    return best, told[best].item() / math.log(2)


def choose(
    reward_model: str,
    data: str | Path,
    pool: str | Path,
    attributes: str | Path,
    *,
    heads: str | None = None,
    prompt_template: str | None = None,
    insert_after: str | None = None,
    columns: dict[str, str] | None = None,
    split: str = "train",
) -> tuple[Comparison, float]:
    """The pair of ``pool`` that tells most of a user's weights over ``attributes``, and the bits that it is expected to
    tell.

    Args:
        data: the user's choices so far; a file that is not there yet has none.
        pool: pairs of answers in the same format; which of the two stands under ``chosen`` means nothing. What the user
            has compared already is not asked again.
        reward_model, attributes, heads, prompt_template, insert_after, columns, split: as for
            :func:`~pad_vllm.training.sliders.fit_sliders`.

    Raises:
        ValueError: data that cannot be used, or no pair that is left.
    """
    texts = read_attributes(attributes)
    made = read_comparisons(data, columns, split) if Path(data).exists() else []
    known = {(str(one.prompt), frozenset((one.chosen, one.rejected))) for one in made}
    left = [
        one
        for one in read_comparisons(pool, columns, split)
        if (str(one.prompt), frozenset((one.chosen, one.rejected))) not in known
    ]
    model, template = load_reward_model(reward_model, prompt_template, insert_after)
    room = max(map(template.num_added_tokens, texts)) + template.num_seam_tokens
    max_length = model.config.get_text_config().max_position_embeddings - room

    def encoded(comparisons: list[Comparison]) -> list[tuple[Comparison, PairExample]]:
        """Those that fit into the model."""
        found = []
        for one in comparisons:
            found += [
                (one, pair)
                for pair in encode([replace(one, preference=None)], template.tokenizer, template, max_length)
            ]
        return found

    choices, pairs = encoded(made), encoded(left)
    if not pairs:
        raise DataError(f"{pool}: the user has compared every pair of at most {max_length} tokens")
    scorer = scorer_of(model, reward_model, heads)
    features = differentials(scorer, template, [pair for _, pair in [*choices, *pairs]], texts)
    best, bits = next_pair(features[: len(choices)], features[len(choices) :])
    return pairs[best][0], bits
