"""From the configuration to a loaded reward model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger

from pad_vllm.kernels import OutputHead, cap_and_scale, score_candidates
from pad_vllm.reward.heads import ValueHeads
from pad_vllm.reward.paged_model import PagedModel, load_model
from pad_vllm.reward.served import instance_of
from pad_vllm.worker.compatibility import Fit
from pad_vllm.worker.tokens import listed

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class Loaded:
    """A reward model that fits, with its weights and its KV cache."""

    fit: Fit
    model: PagedModel
    head: OutputHead
    heads: ValueHeads | None
    """On the device."""
    base_vocab_size: int
    """Columns of the base model's logits."""
    hidden_states: torch.Tensor
    """[1, hidden_size]: of some token, to try things with"""

    @property
    def device(self) -> torch.device:
        return self.model.device

    def own_parameters(self) -> list[nn.Parameter]:
        """That are not the served model's, which whoever loads that loads too."""
        return [] if self.fit.config.source.is_served else list(self.model.model.parameters())

    @property
    def vocab_size(self) -> int:
        """Of the reward model."""
        return self.fit.model_config.get_vocab_size()


def load(fits: Fit, vllm_config: VllmConfig, device: torch.device) -> Loaded:
    """Load a reward model that fits.

    Args:
        vllm_config: the engine's.
        device: where the base model's logits are.

    Raises:
        ValueError: guidance could not work; one paragraph that says what to change.
    """
    config = fits.config
    for warning in warnings(fits):
        logger.warning(warning)
    heads = fits.heads and ValueHeads(fits.heads.names, fits.heads.weight.to(device), fits.heads.bias.to(device))
    model = PagedModel(
        fits.vllm_config,
        vllm_config,
        device,
        config.kv_cache_memory_bytes,
        fits.typical_context(vllm_config.model_config.max_model_len),
        maker(fits, vllm_config),
        fits.weights.adapters,
    )
    hidden_states = model.warm_up(fits.vllm_config.scheduler_config.max_num_batched_tokens)
    head = model.output_head(hidden_states)
    check_logits(config.reward_model, model, head, hidden_states)
    return Loaded(fits, model, head, heads, vllm_config.model_config.get_vocab_size(), hidden_states)


def maker(fits: Fit, vllm_config: VllmConfig) -> Callable[[VllmConfig], nn.Module]:
    """What makes the reward model: of the served one's weights, or of its own."""
    if fits.config.source.is_served:
        return partial(instance_of, vllm_config)
    return partial(load_model, not_backbone=fits.weights.not_backbone, adapter=fits.weights.merged)


def warnings(fits: Fit) -> Iterator[str]:
    """Warnings to the operator about a reward model that fits."""
    if fits.tokens.foreign:
        foreign = listed(fits.tokens.foreign)
        yield f"Guided requests never generate these tokens, which the reward model does not know: {foreign}."
    if fits.warning is not None:
        yield fits.warning


@torch.inference_mode()
def check_logits(reward_model: str, model: PagedModel, head: OutputHead, hidden_states: torch.Tensor) -> None:
    """Raise ValueError if PAD's scores of candidates would differ from the reward model's own logits.

    Args:
        hidden_states: [1, hidden_size].
    """
    if not bool(hidden_states.isfinite().all()):
        raise ValueError(
            f"pad.reward_model={reward_model!r}: its hidden states are not finite numbers in "
            f"{str(hidden_states.dtype).removeprefix('torch.')}; set pad.dtype to one that holds them, such as "
            "bfloat16 or float32, or check that the weights are sound"
        )
    if head.all_reduce is not None:
        return  # a rank has a shard, and the architecture is the same
    ids = torch.arange(0, head.weight.shape[0], max(head.weight.shape[0] // 64, 1), device=model.device)[None]
    scores = score_candidates(hidden_states, head._replace(adapters=None), ids)
    ours = cap_and_scale(scores, head)
    theirs = model.model.compute_logits(hidden_states).float().gather(1, ids)
    if not torch.allclose(theirs, ours, rtol=0.05, atol=0.05):
        raise ValueError(
            f"pad.reward_model={reward_model!r}: its logits are not just an output head, soft cap and "
            "scale, so PAD cannot compute them for candidates alone"
        )
