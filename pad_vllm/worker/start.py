"""What the start of a guided engine does once: warnings, checks on the loaded model, the largest kernel call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.logger import init_logger

from pad_vllm import kernels
from pad_vllm.kernels import Controls, Mixture, OutputHead, OutputTokens
from pad_vllm.params import MAX_CONTEXTS
from pad_vllm.reward.paged_model import PagedModel
from pad_vllm.worker.batch import Layout
from pad_vllm.worker.compatibility import Fit
from pad_vllm.worker.slots import RowParams
from pad_vllm.worker.tokens import listed

if TYPE_CHECKING:
    from pad_vllm.worker.guidance import Guidance

logger = init_logger(f"vllm.{__name__}")

MANY_ROWS = 17
"""Kernels may be compiled apart for fewer."""
LOGITS_BYTES = 2**30
"""vLLM verifies drafts by pieces of the batch whose float32 logits take no more."""


def warnings(fits: Fit) -> Iterator[str]:
    """What an operator should know of a reward model that fits."""
    if fits.tokens.foreign:
        yield f"Guided requests never generate what the reward model does not know: {listed(fits.tokens.foreign)}."
    if fits.warning is not None:
        yield fits.warning


@torch.inference_mode()
def warm_up_kernels(guidance: Guidance, hidden_states: torch.Tensor, max_rows: int) -> None:
    """Run the largest kernel call once, so that its memory is taken while vLLM still counts; and what requests would
    otherwise compile: with controls, with several contexts, for few rows and many, for each number of candidates that
    kernels are compiled for.

    Args:
        hidden_states: [1, hidden_size].
        max_rows: most rows of logits in a step; vLLM itself takes no more than LOGITS_BYTES of them at a time.
    """
    num_rows, most = max(1, min(max_rows, LOGITS_BYTES // (4 * guidance.base_vocab_size))), guidance.config.max_top_k
    logits = torch.rand(num_rows, guidance.base_vocab_size, device=guidance.device)
    has_first = guidance.growth is not None and guidance.growth.has_first

    def guide(top_k: int, params: RowParams, controls: Controls | None = None) -> None:
        params.rows.top_k.fill_(top_k)
        params.rows = params.rows._replace(max_top_k=top_k)
        params.head_mix = guidance.slots.head_mix(params.head_weights)
        index = params.rows.index
        offsets = torch.zeros_like(index) if has_first else None
        guidance.guide(logits, hidden_states.expand(len(index), -1), params, controls, offsets)

    few = sorted({1, min(num_rows, MANY_ROWS)})
    for top_k in sorted({most} | {2**n for n in range(4, most.bit_length()) if 2**n < most}):
        for num in few:
            guide(top_k, _no_requests(guidance, num))
    params = _no_requests(guidance, num_rows)
    nowhere = torch.zeros(num_rows, dtype=torch.int64, device=guidance.device)
    tokens = torch.zeros(1, 1, dtype=torch.int32, device=guidance.device)
    drafts = tokens.expand(num_rows, guidance.max_rows_per_request - 1).contiguous()
    output = OutputTokens(tokens, nowhere, nowhere, nowhere, drafts)
    for controls in (None, *(guidance.slots.controls(params.layout.row_slots, seen) for seen in (None, output))):
        guide(most, params, controls)
    every = nowhere.unsqueeze(1).repeat(1, MAX_CONTEXTS)
    params.contexts.mixture = Mixture(every, torch.ones_like(every, dtype=torch.float32))
    guide(most, params)


def _no_requests(guidance: Guidance, num_rows: int) -> RowParams:
    """Rows of the slot that stands for no request."""
    rows = torch.arange(num_rows, device=guidance.device)
    layout = Layout(np.array([guidance.no_slot]), rows, torch.full_like(rows, guidance.no_slot))
    return RowParams(layout, guidance.slots, num_rows)


@torch.inference_mode()
def check_logits(reward_model: str, model: PagedModel, head: OutputHead, hidden_states: torch.Tensor) -> None:
    """Raise ValueError if candidates would be scored otherwise than the reward model scores its vocabulary.

    Args:
        hidden_states: [1, hidden_size].
    """
    if not bool(hidden_states.isfinite().all()):
        raise ValueError(
            f"pad.reward_model={reward_model!r}: its hidden states are not finite numbers in "
            f"{str(hidden_states.dtype).removeprefix('torch.')}; set pad.dtype to one that holds them, as "
            "bfloat16 or float32, or see whether the weights are sound"
        )
    if head.all_reduce is not None:
        return  # a rank has a shard, and the architecture is the same
    ids = torch.arange(0, head.weight.shape[0], max(head.weight.shape[0] // 64, 1), device=model.device)[None]
    scores = kernels.score_candidates(hidden_states, head, ids)
    ours = kernels.cap_and_scale(scores, head)
    theirs = model.model.compute_logits(hidden_states).float().gather(1, ids)
    if not torch.allclose(theirs, ours, rtol=0.05, atol=0.05):
        raise ValueError(
            f"pad.reward_model={reward_model!r}: its logits are more than an output head, soft cap and "
            "scale, so they cannot be computed for candidates alone"
        )


def log_summary(guidance: Guidance) -> None:
    model, config = guidance.model, guidance.config
    num_tokens = (model.num_blocks - 1) * model.block_size
    logger.info(
        "PAD guidance by %s: reference %s (%s), beta %g, top_k %d (at most %d), %d personas, heads: %s, kernels: %s. "
        "Reward model: %.2f GiB of weights, KV cache of %s tokens (%.2f GiB), %.1f requests of the full %d tokens.",
        config.reward_model,
        config.reference,
        config.why_reference,
        config.beta,
        config.top_k,
        config.max_top_k,
        len(config.personas),
        ", ".join(guidance.fit.head_names) or "none",
        guidance.kernels,
        model.weight_bytes / 2**30,
        f"{num_tokens:,}",
        num_tokens * model.bytes_per_token / 2**30,
        num_tokens / model.max_model_len,
        model.max_model_len,
    )
    if guidance.fit.shortage:
        logger.info(
            "PAD: the reward model has %d positions, so a guided request has %d of its tokens less than the engine's "
            "max_model_len of %d, and its preference's; it ends where its longest context is full.",
            model.max_model_len,
            guidance.fit.shortage,
            guidance.max_model_len,
        )
    if guidance.pair is not None:
        logger.info("PAD: the reward model has %s.", guidance.pair)
    elif guidance.fit.tokens.no_opinion:
        logger.info("PAD: the reward model has no opinion of %s.", listed(guidance.fit.tokens.no_opinion))
    if guidance.template is not None:
        logger.info("PAD: what the reward model reads: %r", guidance.fit.example())
