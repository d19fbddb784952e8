"""The last steps of a guided engine's start: run the largest kernel call, announce what it accepts, log a summary."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from pad_vllm.channel import Announcement
from pad_vllm.config import PADConfig
from pad_vllm.kernels import Groups, Mixture, OutputTokens, compiled_top_k
from pad_vllm.kernels.compiling import compile_together
from pad_vllm.params import MAX_CONTEXTS
from pad_vllm.worker.batch import Layout
from pad_vllm.worker.loading import Loaded
from pad_vllm.worker.rule import Rule
from pad_vllm.worker.slots import RowParams, Slots
from pad_vllm.worker.tokens import listed
from pad_vllm.worker.traces import Traces

logger = init_logger(f"vllm.{__name__}")

MANY_ROWS = 17
"""Kernels may be compiled apart for fewer."""
LOGITS_BYTES = 2**30
"""vLLM verifies drafts by pieces of the batch whose float32 logits take no more."""


@torch.inference_mode()
def warm_up_kernels(warm_up: WarmUp) -> None:
    """Run the largest kernel call once, so that its memory is taken while vLLM still counts; and compile all that
    requests can launch (:func:`launch_kernels`)."""
    num_rows, most = warm_up.num_rows, warm_up.loaded.fit.config.max_top_k
    if warm_up.rule.kernels == "triton":
        compile_together(partial(launch_kernels, warm_up, most))
        launch_kernels(warm_up, most)
    warm_up.guide(num_rows, most, most)
    warm_up.guide(num_rows, most, most, controls="penalties", num_contexts=MAX_CONTEXTS, heads=True)


def launch_kernels(warm_up: WarmUp, most: int) -> None:
    """Launch each variant of the kernels that requests can launch, on rows that are left alone: what is compiled
    follows from the number of candidates (two sizes up to the usual most), in :mod:`pad_vllm.kernels.fused` from
    whether there are few rows, and from whether any request has a bias, penalties, several contexts or heads."""
    of_groups = isinstance(warm_up.rule.vocabulary, Groups)
    all_num_rows = {1} if of_groups else {1, min(MANY_ROWS, warm_up.num_rows)}
    all_heads = (False, True) if warm_up.slots.heads else (False,)
    for top_k, num_rows, controls, num_contexts, heads in itertools.product(
        compiled_top_k(most), sorted(all_num_rows), (None, "bias", "penalties"), (1, 2), all_heads
    ):
        warm_up.guide(num_rows, 0, top_k, controls, num_contexts, heads)


class WarmUp:
    """Calls of the rule as requests make them, before there are any.

    Args:
        max_rows: most rows of logits in a step; vLLM itself takes no more than LOGITS_BYTES of them at a time.
        max_rows_per_request: with its drafts.
    """

    def __init__(
        self,
        loaded: Loaded,
        rule: Rule,
        slots: Slots,
        max_rows: int,
        max_rows_per_request: int,
        traces: Traces | None,
    ) -> None:
        self.loaded, self.rule, self.slots, self.traces = loaded, rule, slots, traces
        self.num_rows = num_rows = max(1, min(max_rows, LOGITS_BYTES // (4 * loaded.base_vocab_size)))
        self.logits = torch.rand(num_rows, loaded.base_vocab_size, device=loaded.device)
        self.num_drafts = max_rows_per_request - 1
        pair = loaded.fit.tokens.pair
        self.has_first = pair is not None and pair.tables.first is not None

    def guide(
        self,
        num_rows: int,
        top_k: int,
        max_top_k: int,
        controls: str | None = None,
        num_contexts: int = 1,
        heads: bool = False,
    ) -> None:
        """``top_k`` of each row; 0: they are left alone. ``controls``: ``bias`` or ``penalties``, if any request of the
        step had some."""
        slots, device = self.slots, self.loaded.device
        index = torch.arange(num_rows, device=device)
        layout = Layout(np.array([slots.no_slot]), index, torch.full_like(index, slots.no_slot))
        params = RowParams(layout, slots, num_rows)
        params.rows = params.rows._replace(top_k=torch.full_like(index, top_k), max_top_k=max_top_k)
        nowhere, given = torch.zeros_like(index), None
        if controls is not None:
            tokens = torch.zeros(1, 1, dtype=torch.int32, device=device)
            drafts = tokens.expand(num_rows, self.num_drafts).contiguous()
            seen = OutputTokens(tokens, nowhere, nowhere, nowhere, drafts) if controls == "penalties" else None
            given = slots.controls.of_rows(layout.row_slots, seen)
        if num_contexts > 1:
            contexts = nowhere.unsqueeze(1).repeat(1, num_contexts)
            params.contexts.mixture = Mixture(contexts, torch.ones_like(contexts, dtype=torch.float32))
        params.head_mix = slots.head_mix(params.head_weights) if heads else None
        hidden_states = self.loaded.hidden_states.expand(num_rows, -1).contiguous()
        trace = None
        if self.traces is not None:
            trace = self.traces.on_device._replace(slots=layout.row_slots, row_positions=nowhere)
        self.rule.apply(self.logits, hidden_states, params, given, nowhere if self.has_first else None, trace)


def announcement(loaded: Loaded, vllm_config: VllmConfig, traces: bool) -> Announcement:
    """What the frontend may let through, of an engine. ``traces``: whether it keeps any."""
    fits, base = loaded.fit, vllm_config.model_config
    config, template = fits.config, fits.template
    base_tokenizer = {"pretrained_model_name_or_path": base.tokenizer, "revision": base.tokenizer_revision}
    return Announcement(
        configured=True,
        head_names=fits.head_names,
        max_top_k=config.max_top_k,
        max_preference_tokens=fits.max_preference_tokens,
        tokenizer=fits.tokenizer_args if template else None,
        base_tokenizer=base_tokenizer if fits.tokens.pair else None,
        max_context_len=loaded.model.max_model_len,
        prompt_template=config.prompt_template,
        default_persona=config.default_persona,
        instance_id=vllm_config.instance_id,
        labels=(str(base.served_model_name or base.model), str(vllm_config.parallel_config.data_parallel_index)),
        chat=config.chat,
        insert_after=config.insert_after,
        adapters=tuple(config.adapters),
        about=about_guidance(config),
        traces=traces,
    )


def about_guidance(config: PADConfig) -> dict[str, Any]:
    """What clients may want to know of an engine's guidance. Admission does not read it."""
    return {
        "reward_model": {"name": config.reward_model, "kind": config.source.kind},
        "defaults": {"beta": config.beta, "top_k": config.top_k, "reference": config.reference},
    }


def describe_weights(loaded: Loaded) -> str:
    """Whose weights the reward model has, and how much memory they take."""
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
    """Log which model guides, with which settings, and how many requests it has room for."""
    model, fits = loaded.model, loaded.fit
    config, num_tokens = fits.config, (model.num_blocks - 1) * model.block_size
    typical = fits.typical_context(base_max_model_len)
    logger.info(
        "PAD guidance by %s: reference %s (%s), beta %g%s, top_k %d (at most %d), %d personas, heads: %s, kernels: %s. "
        "Reward model: %s, KV cache of %s tokens (%.2f GiB): room for %.1f requests of a typical %d tokens, "
        "or %.1f of the full %d.",
        config.reward_model,
        config.reference,
        config.why_reference,
        config.beta,
        "" if config.max_divergence is None else f" within {config.max_divergence:g} nats a token",
        config.top_k,
        config.max_top_k,
        len(config.personas),
        ", ".join(fits.head_names) or "none",
        kernels,
        describe_weights(loaded),
        f"{num_tokens:,}",
        num_tokens * model.bytes_per_token / 2**30,
        num_tokens / typical.num_tokens,
        typical.num_tokens,
        num_tokens / model.max_model_len,
        model.max_model_len,
    )
    if fits.shortage:
        logger.info(
            "PAD: the reward model has %d positions. A guided request therefore has room for %d tokens less than the "
            "engine's max_model_len of %d, and for its preference's tokens less again; it ends when its longest "
            "context is full.",
            model.max_model_len,
            fits.shortage,
            base_max_model_len,
        )
    if fits.tokens.pair is not None:
        logger.info("PAD: the reward model has %s.", fits.tokens.pair)
    elif fits.tokens.no_opinion:
        logger.info(
            "PAD: the reward model does not score these tokens, which keep the base model's probability: %s.",
            listed(fits.tokens.no_opinion),
        )
    if fits.template is not None:
        logger.info("PAD: an example of what the reward model reads: %r", fits.example())
