"""``pad-vllm fit --adapters``: fit a user's weights of adapters of one model to a few comparisons.

An adapter that DPO tuned for a taste gives a reward, its log-ratio to the model that it was made for,

    D_j(answer) = log p_j(answer | prompt) - log p(answer | prompt)

and a user's reward is a weighted sum of these, R = sum_j w_j D_j. The weights are fitted like those of attributes in
words (:mod:`pad_vllm.training.sliders`). In serving, each adapter has its own context with its weight, and is compared
with the neutral reference, the model without any adapter. Summed over tokens, that is R. If the served model is the
reward model, that reference costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from pad_vllm.errors import one_line
from pad_vllm.reward.source import check_paths
from pad_vllm.training.data import PairExample, read_comparisons
from pad_vllm.training.fit import Basis, FittedWeights, load_reward_model, max_positions
from pad_vllm.training.loading import check_keys, import_peft
from pad_vllm.training.sliders import fit_slider_weights, margins, scorer_of

if TYPE_CHECKING:
    from peft import PeftModel


def fit_adapters(
    reward_model: str,
    data: str | Path,
    adapters: Mapping[str, str],
    *,
    heads: str | None = None,
    prompt_template: str | None = None,
    insert_after: str | None = None,
    columns: dict[str, str] | None = None,
    split: str = "train",
    seed: int = 0,
) -> FittedWeights:
    """Fit weights of ``adapters`` to the comparisons in ``data``, which one user made. At most
    :data:`~pad_vllm.params.MAX_PREFERENCES` weights are not 0.

    Args:
        reward_model: folder of the model that the adapters were made for; with ``pad.reward_model: base``, the served
            model. If one head stands beside it, the head applies, as in serving.
        data: the user's comparisons; see :mod:`pad_vllm.training.data`. Their ``preference`` is ignored, because the
            adapters take its place.
        adapters: name -> path or hub id of a PEFT LoRA adapter, as ``pad.adapters``.
        heads, prompt_template, insert_after: as for :func:`~pad_vllm.training.sliders.fit_sliders`.

    Raises:
        ValueError: adapters or comparisons that cannot be used, fewer comparisons than folds, or adapters that make no
            difference between this user's answers.
    """
    basis = adapter_basis(reward_model, adapters, heads, prompt_template, insert_after)
    pairs = basis.encode(read_comparisons(data, columns, split))
    return fit_slider_weights(basis.features(pairs), basis.names, seed, basis.what)


def adapter_basis(
    reward_model: str,
    adapters: Mapping[str, str],
    heads: str | None,
    prompt_template: str | None,
    insert_after: str | None,
) -> Basis:
    """Adapters of a model; see :func:`fit_adapters`."""
    check_paths("--adapters", adapters)
    model, template = load_reward_model(reward_model, prompt_template, insert_after)
    length, scorer = max_positions(model), scorer_of(model, reward_model, heads)
    adapted = load_adapters(model, adapters)
    return Basis("adapter", tuple(adapters), template, length, lambda pairs: log_ratios(scorer, adapted, pairs))


def load_adapters(model: PreTrainedModel, adapters: Mapping[str, str]) -> PeftModel:
    """Put adapters into a model, in this order. None is merged: the weights are there once.

    Raises:
        ValueError: one is no LoRA adapter of this model.
    """
    peft, adapted = import_peft(), None
    for number, (name, path) in enumerate(adapters.items()):
        try:
            config = peft.PeftConfig.from_pretrained(path)
            if config.peft_type != "LORA":
                raise ValueError(f"a PEFT adapter of the type {config.peft_type}; only LORA is supported")
            own = f"pad{number:03}"  # peft looks for it anywhere in the names of tensors
            adapted = adapted or peft.PeftModel(model, config, adapter_name=own)
            check_keys(adapted.load_adapter(path, own))
        except Exception as error:
            raise ValueError(f"--adapters: {name}={path!r} does not fit this model: {one_line(error)}") from error
    if adapted is None:
        raise ValueError("--adapters: none is given")
    return adapted.eval()


def log_ratios(scorer: nn.Module, adapted: PeftModel, pairs: Sequence[PairExample]) -> torch.Tensor:
    """By how much more each adapter favors a pair's chosen answer than its rejected one, D(chosen) - D(rejected), in
    nats: (num_pairs, num_adapters) float32.

    Args:
        scorer: the model that ``adapted`` wraps, or a :class:`~pad_vllm.training.heads.HeadedModel` of it.
    """
    with adapted.disable_adapter():
        without = margins(scorer, pairs)
    columns = []
    for name in tqdm(list(adapted.peft_config), desc="adapters", disable=None):
        adapted.set_adapter(name)
        columns.append(margins(scorer, pairs) - without)
    return torch.stack(columns, dim=1)


def mixture_of(sliders: Mapping[str, float]) -> dict[str, Any]:
    """A request's arguments by which weights over adapters are served."""
    return {
        "pad_adapter": list(sliders),
        "pad_preference_weights": list(sliders.values()),
        "pad_reference": "neutral",
    }
