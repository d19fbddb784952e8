"""What the start of a guided engine does once it is loaded: the largest kernel call, what it announces and logs."""

from __future__ import annotations

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from pad_vllm.channel import Announcement
from pad_vllm.kernels import Controls, Mixture, OutputTokens
from pad_vllm.params import MAX_CONTEXTS
from pad_vllm.worker.batch import Layout
from pad_vllm.worker.loading import Loaded
from pad_vllm.worker.rule import Rule
from pad_vllm.worker.slots import RowParams, Slots
from pad_vllm.worker.tokens import listed

logger = init_logger(f"vllm.{__name__}")

MANY_ROWS = 17
"""Kernels may be compiled apart for fewer."""
LOGITS_BYTES = 2**30
"""vLLM verifies drafts by pieces of the batch whose float32 logits take no more."""


@torch.inference_mode()
def warm_up_kernels(loaded: Loaded, rule: Rule, slots: Slots, max_rows: int, max_rows_per_request: int) -> None:
    """Run the largest kernel call once, so that its memory is taken while vLLM still counts; and what requests would
    otherwise compile: with controls, with several contexts, for few rows and many, for each number of candidates that
    kernels are compiled for.

    Args:
        max_rows: most rows of logits in a step; vLLM itself takes no more than LOGITS_BYTES of them at a time.
        max_rows_per_request: with its drafts.
    """
    num_rows, most = max(1, min(max_rows, LOGITS_BYTES // (4 * loaded.base_vocab_size))), loaded.fit.config.max_top_k
    logits = torch.rand(num_rows, loaded.base_vocab_size, device=loaded.device)
    pair = loaded.fit.tokens.pair
    has_first = pair is not None and pair.tables.first is not None

    def guide(top_k: int, params: RowParams, controls: Controls | None = None) -> None:
        params.rows.top_k.fill_(top_k)
        params.rows = params.rows._replace(max_top_k=top_k)
        params.head_mix = slots.head_mix(params.head_weights)
        index = params.rows.index
        offsets = torch.zeros_like(index) if has_first else None
        rule.apply(logits, loaded.hidden_states.expand(len(index), -1), params, controls, offsets)

    few = sorted({1, min(num_rows, MANY_ROWS)})
    for top_k in sorted({most} | {2**n for n in range(4, most.bit_length()) if 2**n < most}):
        for num in few:
            guide(top_k, _no_requests(slots, num))
    params = _no_requests(slots, num_rows)
    nowhere = torch.zeros(num_rows, dtype=torch.int64, device=loaded.device)
    tokens = torch.zeros(1, 1, dtype=torch.int32, device=loaded.device)
    drafts = tokens.expand(num_rows, max_rows_per_request - 1).contiguous()
    output = OutputTokens(tokens, nowhere, nowhere, nowhere, drafts)
    for controls in (None, *(slots.controls.of_rows(params.layout.row_slots, seen) for seen in (None, output))):
        guide(most, params, controls)
    every = nowhere.unsqueeze(1).repeat(1, MAX_CONTEXTS)
    params.contexts.mixture = Mixture(every, torch.ones_like(every, dtype=torch.float32))
    guide(most, params)


def _no_requests(slots: Slots, num_rows: int) -> RowParams:
    """Rows of the slot that stands for no request."""
    rows = torch.arange(num_rows, device=slots.ints.device)
    layout = Layout(np.array([slots.no_slot]), rows, torch.full_like(rows, slots.no_slot))
    return RowParams(layout, slots, num_rows)


def announcement(loaded: Loaded, vllm_config: VllmConfig) -> Announcement:
    """What the frontend may let through, of an engine."""
    fits, base = loaded.fit, vllm_config.model_config
    config, template = fits.config, fits.template
    personas, added = config.personas, template.num_added_tokens if template else len
    base_tokenizer = {"pretrained_model_name_or_path": base.tokenizer, "revision": base.tokenizer_revision}
    return Announcement(
        configured=True,
        personas=tuple(personas),
        head_names=fits.head_names,
        max_top_k=config.max_top_k,
        max_preference_tokens=fits.max_preference_tokens,
        tokenizer=fits.tokenizer_args if template else None,
        base_tokenizer=base_tokenizer if fits.tokens.pair else None,
        max_context_len=loaded.model.max_model_len,
        prompt_template=config.prompt_template,
        num_preferences=tuple(persona.num_contexts for persona in personas.values()),
        num_preference_tokens=tuple(max(map(added, p.preferences), default=0) for p in personas.values()),
        default_persona=config.default_persona,
        instance_id=vllm_config.instance_id,
        labels=(str(base.served_model_name or base.model), str(vllm_config.parallel_config.data_parallel_index)),
        chat=config.chat,
        insert_after=config.insert_after,
        adapters=tuple(config.adapters),
    )


def describe_weights(loaded: Loaded) -> str:
    """Whose they are and what they take."""
    source, config, adapters = loaded.fit.config.source, loaded.fit.config, loaded.model.adapters
    words = f"{sum(p.nbytes for p in loaded.own_parameters()) / 2**30:.2f} GiB of weights"
    if source.is_served:
        words = "the served model's own weights"
    elif source.is_adapter:
        words += f", the adapter merged into {source.model}"
    if adapters is not None:
        names = ", ".join(config.adapters) or config.reward_model
        words += f", {adapters.num_bytes / 2**20:.0f} MiB of adapters ({names})"
    return words


def log_summary(loaded: Loaded, kernels: str, base_max_model_len: int) -> None:
    """Say what guides, with what, and how much of it there is."""
    model, fits = loaded.model, loaded.fit
    config, num_tokens = fits.config, (model.num_blocks - 1) * model.block_size
    logger.info(
        "PAD guidance by %s: reference %s (%s), beta %g, top_k %d (at most %d), %d personas, heads: %s, kernels: %s. "
        "Reward model: %s, KV cache of %s tokens (%.2f GiB), %.1f requests of the full %d tokens.",
        config.reward_model,
        config.reference,
        config.why_reference,
        config.beta,
        config.top_k,
        config.max_top_k,
        len(config.personas),
        ", ".join(fits.head_names) or "none",
        kernels,
        describe_weights(loaded),
        f"{num_tokens:,}",
        num_tokens * model.bytes_per_token / 2**30,
        num_tokens / model.max_model_len,
        model.max_model_len,
    )
    if fits.shortage:
        logger.info(
            "PAD: the reward model has %d positions, so a guided request has %d of its tokens less than the engine's "
            "max_model_len of %d, and its preference's; it ends where its longest context is full.",
            model.max_model_len,
            fits.shortage,
            base_max_model_len,
        )
    if fits.tokens.pair is not None:
        logger.info("PAD: the reward model has %s.", fits.tokens.pair)
    elif fits.tokens.no_opinion:
        logger.info("PAD: the reward model has no opinion of %s.", listed(fits.tokens.no_opinion))
    if fits.template is not None:
        logger.info("PAD: what the reward model reads: %r", fits.example())
