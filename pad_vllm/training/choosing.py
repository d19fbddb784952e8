"""``pad-vllm fit --next``: which pair of answers a user should compare next.

After some choices the weights over heads, attributes or adapters are known as far as their posterior says
(:mod:`pad_vllm.training.posterior`). A choice tells much where the user's answer is open (the draws differ on it)
because the weights are open, and little where it is open because the two answers are as good: the mutual information of
choice and weights (Bayesian active learning by disagreement, arXiv 1112.5745),

    I = H(E[p]) - E[H(p)],   p = (1 - 2 e) sigmoid(margin) + e

with H the entropy of a coin and e the share of choices that are mistakes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pad_vllm.training.data import Comparison, DataError, PairExample, encode, prompt_ids, read_comparisons
from pad_vllm.training.fit import Basis, head_basis
from pad_vllm.training.mixture import adapter_basis
from pad_vllm.training.posterior import MISTAKES, draw_normals, probabilities, weights_of
from pad_vllm.training.sliders import attribute_basis


def information(pairs: torch.Tensor, weights: torch.Tensor, mistakes: float = MISTAKES) -> torch.Tensor:
    """Nats that the choice in each pair is expected to tell of the weights: (..., num_pairs) float64, at least 0.

    Args:
        pairs: (..., num_pairs, num_features) float64, one answer minus the other; which is which changes nothing.
        weights: (..., num_draws, num_features) float64, draws from what is known of them.
    """
    p = probabilities(pairs, weights, mistakes)
    return (_entropy(p.mean(-2)) - _entropy(p).mean(-2)).clamp_min(0)


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
    # As for the fit: one scale for all features.
    scale = torch.cat([chosen, pairs]).square().mean().sqrt().clamp_min(1e-9)
    weights = weights_of(draw_normals(chosen / scale, mistakes=mistakes))
    told = information(pairs / scale, weights, mistakes)
    best = int(told.argmax())
    return best, told[best].item() / math.log(2)


def choose(
    reward_model: str,
    data: str | Path,
    pool: str | Path,
    *,
    attributes: str | Path | None = None,
    adapters: Mapping[str, str] | None = None,
    heads: str | None = None,
    prompt_template: str | None = None,
    insert_after: str | None = None,
    columns: dict[str, str] | None = None,
    split: str = "train",
) -> tuple[Comparison, float]:
    """The pair of ``pool`` that tells most of a user's weights over attributes, adapters, or else heads, and the bits
    that it is expected to tell.

    Args:
        data: the user's choices so far; a file that is empty, or not there yet, has none.
        pool: pairs of answers in the same format; which of the two stands under ``chosen`` means nothing. What the user
            has compared already is not asked again.
        attributes, adapters: as for :func:`~pad_vllm.training.sliders.fit_sliders`,
            :func:`~pad_vllm.training.mixture.fit_adapters`. None: heads, as for :func:`~pad_vllm.training.fit.fit`.
        reward_model, heads, prompt_template, insert_after, columns, split: as for these.

    Raises:
        ValueError: data that cannot be used, no basis, no pair that is left, or none in which the basis tells the
            answers apart.
    """
    file = Path(data)
    has_none = not file.exists() or (file.is_file() and file.stat().st_size == 0)
    made = [] if has_none else read_comparisons(data, columns, split)
    reading = {"heads": heads, "prompt_template": prompt_template, "insert_after": insert_after}
    if attributes is not None:
        basis = attribute_basis(reward_model, attributes, **reading)
    elif adapters:
        basis = adapter_basis(reward_model, adapters, **reading)
    else:
        basis = head_basis(reward_model, **reading)

    def told(one: Comparison) -> tuple[Any, ...]:
        """What a choice in it is about, whichever answer was chosen."""
        read = one.preference if basis.reads_preference else None
        return str(one.prompt), read, frozenset((one.chosen, one.rejected))

    known = set(map(told, made))
    left = [one for one in read_comparisons(pool, columns, split) if told(one) not in known]
    choices, pairs = _encoded(made, basis), _encoded(left, basis)
    if not pairs:
        raise DataError(f"{pool}: the user has compared every pair of at most {basis.max_length} tokens")
    features = basis.features([pair for _, pair in [*choices, *pairs]])
    if not features[len(choices) :].any():
        raise DataError(f"{pool}: {basis.what}s tell no two of these answers apart: nothing can be learned from them")
    best, bits = next_pair(features[: len(choices)], features[len(choices) :])
    return pairs[best][0], bits


def _encoded(comparisons: list[Comparison], basis: Basis) -> list[tuple[Comparison, PairExample]]:
    """Those that fit into the model."""
    found = []
    for one in comparisons:
        read, tokenizer = one if basis.reads_preference else replace(one, preference=None), basis.template.tokenizer
        prompt_ids(one.prompt, tokenizer, one.where)  # one that is refused is an error, one that is too long is not
        with contextlib.suppress(DataError):
            found += [(one, pair) for pair in encode([read], tokenizer, basis.template, basis.max_length)]
    return found
