"""``pad-vllm fit``: fit a new user's weights to a few comparisons.

The reward of a user is a weighted sum of the heads' rewards, R = sum_i w_i R_i. The user prefers the chosen answer with
probability sigmoid(R(chosen) - R(rejected)). So the weights are fitted by logistic regression on the heads' rewards;
from few comparisons they are the mean direction of their posterior (:mod:`pad_vllm.training.posterior`).
This is the low-rank factorization of LoRe (arXiv 2504.14439) and PReF (arXiv 2503.06358) with the heads as the basis.
Attributes in words are another basis: :mod:`pad_vllm.training.sliders`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from pad_vllm.config import PADConfig
from pad_vllm.reward.heads import load_heads, locate_heads
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import Comparison, DataError, PairExample, encode, read_comparisons
from pad_vllm.training.heads import BACKBONE_HEAD, HeadedModel
from pad_vllm.training.loading import load_source, load_tokenizer
from pad_vllm.training.posterior import draw_normals, mean_direction, weights_of
from pad_vllm.training.trainer import answers_of, score_answers

PENALTIES = tuple(10.0**exponent for exponent in (-3, -2, -1, 0, 1, 2))
NUM_FOLDS = 5
NUM_ENOUGH = 20
"""Comparisons with which a penalty is chosen by cross-validation. Fewer are too few to choose one."""
NUM_FEW_DRAWS = 1024
"""From the posterior, to average weights: of which each is then known to about a hundredth."""


class FittedWeights(NamedTuple):
    """A user's weights, one per head (or attribute) in the order of ``names``, and how often they predict the chosen
    answer: on comparisons that the fit has not seen (``held_out_accuracy``, cross-validated), and on all
    (``accuracy``). ``penalty``: None where there were too few to choose one."""

    names: tuple[str, ...]
    weights: list[float]
    held_out_accuracy: float
    accuracy: float
    penalty: float | None
    num_comparisons: int


@dataclass(frozen=True)
class Basis:
    """What a user's weights are over.

    Attributes:
        what: one of them is called.
        max_length: tokens of a prompt and an answer that the model can read.
        features: of pairs, what each adds at weight 1 to the reward of the chosen answer over the rejected one, in
            nats: (num_pairs, num_features) float32.
        reads_preference: whether what comparisons say under ``preference`` counts.
    """

    what: str
    names: tuple[str, ...]
    template: PromptTemplate
    max_length: int
    features: Callable[[Sequence[PairExample]], torch.Tensor]
    reads_preference: bool = False

    def encode(self, comparisons: Sequence[Comparison]) -> list[PairExample]:
        """Those of a user's comparisons that fit into the model.

        Raises:
            ValueError: they are fewer than folds.
        """
        if not self.reads_preference:
            comparisons = [replace(comparison, preference=None) for comparison in comparisons]
        pairs = encode(comparisons, self.template.tokenizer, self.template, self.max_length)
        if len(pairs) < NUM_FOLDS:
            few = f"{len(pairs)} comparisons of at most {self.max_length} tokens"
            raise DataError(f"{few}; a fit takes at least {NUM_FOLDS}, better 20 to 100")
        return pairs


def fit(
    reward_model: str,
    data: str | Path,
    *,
    heads: str | None = None,
    prompt_template: str | None = None,
    insert_after: str | None = None,
    columns: dict[str, str] | None = None,
    split: str = "train",
    seed: int = 0,
) -> FittedWeights:
    """Fit weights of heads to the comparisons in ``data``, which one user made.

    The largest weight is scaled to 1, the strength at which heads are trained; ``beta`` sets the strength of guidance.

    Args:
        reward_model: folder of a reward model, or of an adapter, with named heads, as ``pad-vllm train`` writes it.
        data: the user's comparisons; see :mod:`pad_vllm.training.data`.
        heads: a file of heads, if it is not beside the model.
        prompt_template, insert_after: override the reward model's ``pad.json``.

    Raises:
        ValueError: there are no heads, or fewer comparisons than folds.
    """
    basis = head_basis(reward_model, heads, prompt_template, insert_after)
    pairs = basis.encode(read_comparisons(data, columns, split))
    return fit_weights(basis.features(pairs), basis.names, seed)


def head_basis(reward_model: str, heads: str | None, prompt_template: str | None, insert_after: str | None) -> Basis:
    """The heads of a reward model; see :func:`fit`.

    Raises:
        ValueError: there are fewer than two.
    """
    path = locate_heads(heads, reward_model, None)
    if path is None:
        raise ValueError(
            f"{reward_model}: no value heads beside it, to which weights could be fitted; train heads with pad-vllm "
            "train, or fit weights of attributes in words (--attributes)"
        )
    model, template = load_reward_model(reward_model, prompt_template, insert_after)
    value_heads = load_heads(path, model.get_output_embeddings().weight.shape[1])
    if len(value_heads.names) < 2:
        raise ValueError(f"{path}: has only the head {value_heads.names[0]!r}; fitting weights takes at least two")
    headed = HeadedModel.of(model, value_heads)
    return Basis("head", headed.names, template, max_positions(model), lambda pairs: head_rewards(headed, pairs), True)


def load_reward_model(
    reward_model: str, prompt_template: str | None, insert_after: str | None
) -> tuple[PreTrainedModel, PromptTemplate]:
    """A reward model, and how a preference enters its prompts: as its ``pad.json`` says, or the arguments."""
    given = {"reward_model": reward_model, "prompt_template": prompt_template, "insert_after": insert_after}
    pad = PADConfig.from_pad({key: value for key, value in given.items() if value is not None})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_source("reward_model", pad.source).eval().to(device)
    tokenizer = load_tokenizer("reward_model", pad.source.tokenizer[0])
    return model, PromptTemplate(tokenizer, pad.prompt_template, pad.insert_after)


def max_positions(model: PreTrainedModel) -> int:
    """Tokens that it can read."""
    return model.config.get_text_config().max_position_embeddings


def head_rewards(model: HeadedModel, pairs: Sequence[PairExample]) -> torch.Tensor:
    """What each head at weight 1 adds to the reward of a pair's chosen answer over its rejected one, in nats.

    Where there is an identity head for the backbone, the others are added to it, and it has nothing to add.

    Returns:
        (num_pairs, num_heads) float32.
    """

    def margins(weights: torch.Tensor) -> torch.Tensor:
        chosen, rejected = score_answers(model, answers_of(pairs), weights.repeat(2 * len(pairs), 1)).chunk(2)
        return chosen - rejected

    none = torch.zeros(len(model.names))
    backbone = margins(none)
    one_each = torch.eye(len(model.names))
    return torch.stack([margins(one_each[i]) - backbone for i in range(len(model.names))], dim=1)


def fit_weights(rewards: torch.Tensor, names: Sequence[str], seed: int = 0) -> FittedWeights:
    """Logistic regression on ``rewards`` (num_pairs, num_heads) in nats, its penalty chosen by cross-validation. The
    weights are those of nats, as they are served; the largest is 1."""
    free = [i for i, name in enumerate(names) if name != BACKBONE_HEAD]
    rewards = rewards[:, free].double()
    # One scale for all: the weights are served on rewards as the heads give them.
    found = regress(rewards / rewards.square().mean().sqrt().clamp_min(1e-9), seed)
    scaled = found.solution / found.solution.abs().max().clamp_min(1e-9)
    weights = dict(zip(free, scaled.tolist(), strict=True))
    return FittedWeights(
        tuple(names),
        [round(weights.get(i, 1.0), 3) for i in range(len(names))],
        found.held_out_accuracy,
        found.accuracy,
        found.penalty,
        len(rewards),
    )


class Regression(NamedTuple):
    """``solution`` (num_features,) float64, its accuracy on comparisons left out in turn, and on all."""

    solution: torch.Tensor
    held_out_accuracy: float
    accuracy: float
    penalty: float | None


def regress(features: torch.Tensor, seed: int = 0, max_nonzero: int | None = None) -> Regression:
    """Logistic regression without an intercept, its penalty chosen by cross-validation; of fewer comparisons than
    :data:`NUM_ENOUGH` the posterior's mean direction, which takes no penalty.

    Args:
        features: (num_pairs, num_features) float64, chosen minus rejected; of about 1, which the penalties suit.
        seed: of the folds.
        max_nonzero: keep as many features, those that move the result most, and fit them again. The choice is made in
            every fold anew, so what is left out of a fit has no part in its choice either.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    folds = order.tensor_split(NUM_FOLDS)

    def solved(rows: torch.Tensor, penalty: float | None) -> torch.Tensor:
        """With at most ``max_nonzero`` weights that are not 0."""
        solution = average(rows) if penalty is None else solve(rows, penalty)
        if max_nonzero is None or len(solution) <= max_nonzero:
            return solution
        kept = (solution.abs() * rows.square().mean(0).sqrt()).topk(max_nonzero).indices
        again = average(rows[:, kept]) if penalty is None else solve(rows[:, kept], penalty)
        return torch.zeros_like(solution).index_copy(0, kept, again)

    def held_out(penalty: float | None) -> tuple[float, float]:
        """Loss and accuracy over the folds, each left out in turn."""
        loss, correct = 0.0, 0
        for fold in folds:
            rest = torch.ones(len(features), dtype=torch.bool)
            rest[fold] = False
            margins = features[fold] @ solved(features[rest], penalty)
            loss -= F.logsigmoid(margins).sum().item()
            correct += (margins > 0).sum().item()
        return loss / len(features), correct / len(features)

    penalties: tuple[float | None, ...] = PENALTIES if len(features) >= NUM_ENOUGH else (None,)
    scores = {penalty: held_out(penalty) for penalty in penalties}
    penalty = min(penalties, key=lambda p: scores[p][0])
    solution = solved(features, penalty)
    accuracy = (features @ solution > 0).double().mean().item()
    return Regression(solution, scores[penalty][1], accuracy, penalty)


def average(features: torch.Tensor) -> torch.Tensor:
    """The mean direction of a user's weights after choices (num_choices, num_features): (num_features,). A feature in
    which no two answers differed weighs 0."""
    seen = features.any(0).nonzero()[:, 0]
    if not len(seen):
        return torch.zeros_like(features[0])
    mean = mean_direction(weights_of(draw_normals(features[:, seen], num_draws=NUM_FEW_DRAWS)))
    return torch.zeros_like(features[0]).index_copy(0, seen, mean)


def solve(features: torch.Tensor, penalty: float) -> torch.Tensor:
    """argmin_w of sum -log sigmoid(features w) + penalty / 2 |w|^2, convex: (num_features,)."""
    weights = torch.zeros(features.shape[1], dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = -F.logsigmoid(features @ weights).sum() + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
