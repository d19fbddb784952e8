"""``pad-vllm fit``: a new user's weights from a few comparisons.

The user's reward is a sum of the heads' rewards, R = sum_i w_i R_i, and the chosen answer is preferred with probability
sigmoid(R(chosen) - R(rejected)): logistic regression on what each head makes of a comparison, the low-rank
factorization of LoRe (arXiv 2504.14439) and PReF (arXiv 2503.06358) with the heads as the basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from pad_vllm.config import PADConfig
from pad_vllm.reward.heads import load_heads, locate_heads
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import DataError, PairExample, encode, read_comparisons
from pad_vllm.training.heads import BACKBONE_HEAD, HeadedModel
from pad_vllm.training.trainer import answers_of, score_answers

PENALTIES = tuple(10.0**exponent for exponent in (-3, -2, -1, 0, 1, 2))
NUM_FOLDS = 5


class Fit(NamedTuple):
    """A user's weights, one per head in the order of ``names``, and how often they say which answer was chosen: on
    comparisons left out of the fit in turn (``held_out_accuracy``), and on all (``accuracy``)."""

    names: tuple[str, ...]
    weights: list[float]
    held_out_accuracy: float
    accuracy: float
    penalty: float
    num_comparisons: int


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
) -> Fit:
    """Weights for the user who made the comparisons in ``data``.

    The largest weight is scaled to 1, the strength at which heads are trained; how strongly to guide is for ``beta`` to
    say.

    Args:
        reward_model: folder of a reward model with named heads, as ``pad-vllm train`` writes it.
        data: the user's comparisons; see :mod:`pad_vllm.training.data`.
        heads: a file of heads, where it is not beside the model.
        prompt_template, insert_after: where other than the reward model's ``pad.json`` says.

    Raises:
        ValueError: no heads to weigh, or fewer comparisons than folds.
    """
    path = locate_heads(heads, reward_model, None)
    if path is None:
        raise ValueError(f"{reward_model}: no heads beside it, and a user is a mix of heads; see pad-vllm train")
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = AutoModelForCausalLM.from_pretrained(reward_model)
    value_heads = load_heads(path, model.get_output_embeddings().weight.shape[1])
    if len(value_heads.names) < 2:
        raise ValueError(f"{path}: a single head, {value_heads.names[0]!r}; there is nothing to mix")
    given = {"reward_model": reward_model, "prompt_template": prompt_template, "insert_after": insert_after}
    pad = PADConfig.from_additional_config({"pad": {key: value for key, value in given.items() if value is not None}})
    template = PromptTemplate(tokenizer, pad.prompt_template, pad.insert_after)
    max_length = model.config.get_text_config().max_position_embeddings
    pairs = encode(read_comparisons(data, columns, split), tokenizer, template, max_length)
    if len(pairs) < NUM_FOLDS:
        raise DataError(f"{data}: {len(pairs)} comparisons; a fit takes at least {NUM_FOLDS}, better 20 to 100")
    return fit_weights(head_rewards(HeadedModel.of(model, value_heads), pairs), value_heads.names, seed)


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


def fit_weights(rewards: torch.Tensor, names: Sequence[str], seed: int = 0) -> Fit:
    """Logistic regression on ``rewards`` (num_pairs, num_heads), its penalty chosen by cross-validation."""
    free = [i for i, name in enumerate(names) if name != BACKBONE_HEAD]
    rewards = rewards[:, free].double()
    rewards = rewards / rewards.std(0, correction=0).clamp_min(1e-6)  # one penalty for all heads
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    folds = order.tensor_split(NUM_FOLDS)

    def held_out(penalty: float) -> tuple[float, float]:
        """Loss and accuracy over the folds, each left out in turn."""
        loss, correct = 0.0, 0
        for fold in folds:
            rest = torch.ones(len(rewards), dtype=torch.bool)
            rest[fold] = False
            margins = rewards[fold] @ _solve(rewards[rest], penalty)
            loss -= F.logsigmoid(margins).sum().item()
            correct += (margins > 0).sum().item()
        return loss / len(rewards), correct / len(rewards)

    scores = {penalty: held_out(penalty) for penalty in PENALTIES}
    penalty = min(PENALTIES, key=lambda p: scores[p][0])
    solution = _solve(rewards, penalty)
    weights = dict(zip(free, (solution / solution.abs().max().clamp_min(1e-9)).tolist(), strict=True))
    return Fit(
        tuple(names),
        [round(weights.get(i, 1.0), 3) for i in range(len(names))],
        scores[penalty][1],
        (rewards @ solution > 0).double().mean().item(),
        penalty,
        len(rewards),
    )


def _solve(rewards: torch.Tensor, penalty: float) -> torch.Tensor:
    """argmin_w of sum -log sigmoid(rewards w) + penalty / 2 |w|^2, convex: (num_heads,)."""
    weights = torch.zeros(rewards.shape[1], dtype=rewards.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = -F.logsigmoid(rewards @ weights).sum() + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
