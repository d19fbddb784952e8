"""``pad-vllm fit --attributes``: fit a new user's weights of attributes in words to a few comparisons.

As in Drift (arXiv 2502.14289), an attribute such as "be brief" scores an answer by the reward model's differential
log-likelihood

    D_a(answer) = log p(answer | prompt with the attribute as preference) - log p(answer | prompt)

and the user's reward is a weighted sum of these scores, R = sum_a w_a D_a. The user prefers the chosen answer with
probability sigmoid(R(chosen) - R(rejected)), so the weights are fitted by logistic regression, like those of heads in
:mod:`pad_vllm.training.fit`. No model is trained, and any causal language model with the base's tokenizer will do.

In serving, the attributes are a list of preferences with these weights. Each is read in its own context and compared
with the neutral reference, the context without a preference. Summed over tokens, that is R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from pad_vllm.checks import check_text, shown
from pad_vllm.config import read_file
from pad_vllm.params import MAX_PREFERENCES
from pad_vllm.reward.heads import load_heads, locate_heads
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import PairExample, read_comparisons
from pad_vllm.training.fit import Basis, FittedWeights, load_reward_model, max_positions, regress
from pad_vllm.training.heads import HeadedModel
from pad_vllm.training.trainer import answers_of, score_answers

MAX_ATTRIBUTES = 64
NUM_DIGITS = 2
"""Of a weight. An attribute whose weight is 0 with these is left out: each costs a context of the reward model."""


def fit_sliders(
    reward_model: str,
    data: str | Path,
    attributes: str | Path,
    *,
    heads: str | None = None,
    prompt_template: str | None = None,
    insert_after: str | None = None,
    columns: dict[str, str] | None = None,
    split: str = "train",
    seed: int = 0,
) -> FittedWeights:
    """Fit weights of ``attributes`` to the comparisons in ``data``, which one user made. At most
    :data:`MAX_PREFERENCES` weights are not 0.

    Args:
        reward_model: folder of a causal language model. If one head stands beside it, the head applies, as in serving;
            several heads are ignored.
        data: the user's comparisons; see :mod:`pad_vllm.training.data`. Their ``preference`` is ignored, because the
            attributes take its place.
        attributes: a file that :func:`read_attributes` reads.
        heads: a file of heads, if it is not beside the model.
        prompt_template, insert_after: override the reward model's ``pad.json``.

    Raises:
        ValueError: attributes or comparisons cannot be used, there are fewer comparisons than folds, or no attribute
            tells this user's answers apart.
    """
    basis = attribute_basis(reward_model, attributes, heads, prompt_template, insert_after)
    pairs = basis.encode(read_comparisons(data, columns, split))
    return fit_slider_weights(basis.features(pairs), basis.names, seed)


def attribute_basis(
    reward_model: str,
    attributes: str | Path,
    heads: str | None,
    prompt_template: str | None,
    insert_after: str | None,
) -> Basis:
    """The attributes of a file, as a reward model reads them; see :func:`fit_sliders`."""
    texts = read_attributes(attributes)
    model, template = load_reward_model(reward_model, prompt_template, insert_after)
    room = max(map(template.num_added_tokens, texts)) + template.num_seam_tokens
    scorer = scorer_of(model, reward_model, heads)
    return Basis(
        "attribute",
        tuple(texts),
        template,
        max_positions(model) - room,
        lambda pairs: differentials(scorer, template, pairs, texts),
    )


def scorer_of(model: PreTrainedModel, reward_model: str, heads: str | None) -> nn.Module:
    """A reward model as it scores where no weights are given: with its head, where it has a single one.

    Args:
        reward_model: the folder that it is from.
        heads: a file of heads, where it is not beside the model.
    """
    path = locate_heads(heads, reward_model, None)
    if path is None:
        return model
    value_heads = load_heads(path, model.get_output_embeddings().weight.shape[1])
    return model if value_heads.default_weights is None else HeadedModel.of(model, value_heads)


def read_attributes(path: str | Path) -> list[str]:
    """The attributes of a JSON or YAML file: a list of texts, or an object whose ``attributes`` are one.

    Raises:
        ValueError: with the file and the attribute.
    """
    read: Any = read_file("--attributes", str(path))
    if isinstance(read, dict):
        if set(read) != {"attributes"}:
            raise ValueError(f"{path}: {shown(list(read))}: expected a list of texts, or one under 'attributes'")
        read = read["attributes"]
    if not isinstance(read, list) or not read:
        raise ValueError(f"{path}: {shown(read)}: expected a list of texts, or one under 'attributes'")
    texts = [check_text(f"{path}: attribute {i}", text).strip() for i, text in enumerate(read, 1)]
    if twice := next((text for i, text in enumerate(texts) if text in texts[:i]), None):
        raise ValueError(f"{path}: {shown(twice)} is given twice")
    if len(texts) > MAX_ATTRIBUTES:
        raise ValueError(f"{path}: {len(texts)} attributes, at most {MAX_ATTRIBUTES} are allowed")
    return texts


def differentials(
    model: nn.Module, template: PromptTemplate, pairs: Sequence[PairExample], attributes: Sequence[str]
) -> torch.Tensor:
    """By how much more each attribute favors a pair's chosen answer than its rejected one, D(chosen) - D(rejected), in
    nats: (num_pairs, num_attributes) float32.

    Args:
        model: a causal language model, or a :class:`HeadedModel` of one head, which applies.
        pairs: read with their plain prompts; the answers end with EOS, whose probability counts.
    """
    neutral = margins(model, [pair._replace(prompt=pair.ref_prompt) for pair in pairs])
    columns = []
    for attribute in tqdm(attributes, desc="attributes", disable=None):
        asked = [pair._replace(prompt=template.compose(pair.ref_prompt, attribute)) for pair in pairs]
        columns.append(margins(model, asked) - neutral)
    return torch.stack(columns, dim=1)


def margins(model: nn.Module, pairs: Sequence[PairExample]) -> torch.Tensor:
    """log p(chosen) - log p(rejected) of each pair, (num_pairs,) float32; by a model, or one with a head, which
    applies."""
    weights = torch.ones(2 * len(pairs), 1) if isinstance(model, HeadedModel) else None
    chosen, rejected = score_answers(model, answers_of(pairs), weights).chunk(2)
    return chosen - rejected


def fit_slider_weights(
    differences: torch.Tensor, attributes: Sequence[str], seed: int = 0, what: str = "attribute"
) -> FittedWeights:
    """Logistic regression on ``differences`` (num_pairs, num_attributes) in nats, its penalty chosen by
    cross-validation. Of more than :data:`MAX_PREFERENCES` attributes those that move these rewards most are fitted
    again by themselves, in every fold too.

    The weights are those of nats, as they are served. Their size is what few comparisons do not tell: where the
    attributes explain all of them, larger is always likelier. So they are scaled until all together move these rewards
    as much as that attribute does by itself which moves them most, or the largest is 1: as strong as one preference.
    How strongly to guide is for ``beta`` to say. (With the largest as 1 always, attributes that say the same add up,
    and with a sum of 1 those that say different things are faint: of four users of the synthetic world the one left an
    answer in three well formed, the other 83% satisfied where their own words satisfied all.)

    Raises:
        ValueError: no attribute makes a difference, or what one comparison says another takes back.
    """
    differences = differences.double()
    # One scale for all: all are nats, and an attribute that the model hardly reads should stay as small as it is.
    scale = differences.square().mean().sqrt().item()
    if not scale:
        raise ValueError(
            f"no {what} makes a difference: whichever the reward model reads, it scores all these answers alike"
        )
    found = regress(differences / scale, seed, MAX_PREFERENCES)
    if not found.solution.any():
        raise ValueError(f"the choices contradict each other: no {what} has a weight")
    together, alone = differences @ found.solution, differences[:, found.solution != 0]
    effect = (together.square().mean() / alone.square().mean(0).max()).sqrt()
    size = max(effect.item(), found.solution.abs().max().item())
    return FittedWeights(
        tuple(attributes),
        [round(weight / size, NUM_DIGITS) + 0.0 for weight in found.solution.tolist()],  # no -0.0
        found.held_out_accuracy,
        found.accuracy,
        found.penalty,
        len(differences),
    )


def sliders_of(found: FittedWeights) -> dict[str, float]:
    """Attribute -> weight of those that are not 0, the heaviest first."""
    kept = {name: weight for name, weight in zip(found.names, found.weights, strict=True) if weight}
    return dict(sorted(kept.items(), key=lambda slider: -abs(slider[1])))


def persona_of(sliders: Mapping[str, float]) -> dict[str, Any]:
    """A request's arguments by which sliders are served."""
    return {
        "pad_preference": list(sliders),
        "pad_preference_weights": list(sliders.values()),
        "pad_reference": "neutral",
    }
