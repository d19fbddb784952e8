"""One step of PAD for a batch: the guided requests' contexts, through the reward engine, into the rule.

Knows no runner, and no tokenizer: :mod:`pad_vllm.worker.adapters` says which rows are guided and where a request's
tokens are, :mod:`.contexts` what these are to the reward model.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group

from pad_vllm.params import MAX_CONTEXTS, GuidanceParams, check_logit_bias
from pad_vllm.reward.block_manager import Context
from pad_vllm.reward.derive import is_first_rank
from pad_vllm.reward.engine import RewardEngine
from pad_vllm.reward.paged_model import PagedModel
from pad_vllm.reward.rows import ContextSlot
from pad_vllm.reward.template import Composed
from pad_vllm.stats import Stats
from pad_vllm.worker import start
from pad_vllm.worker.batch import GuidedBatch, Layout, RequestSlot, context_slots
from pad_vllm.worker.board import Board
from pad_vllm.worker.compatibility import Fit
from pad_vllm.worker.contexts import Contexts
from pad_vllm.worker.drafter import Drafter
from pad_vllm.worker.kept_rows import row_keeper
from pad_vllm.worker.loading import Loaded, load
from pad_vllm.worker.other_tokens import OtherTokens
from pad_vllm.worker.rule import Rule
from pad_vllm.worker.same_tokens import SameTokens
from pad_vllm.worker.slots import ContextInts, RequestFloats, RequestInts, RowParams, SamplingControls, Slots
from pad_vllm.worker.traces import Traces


class Guidance:
    """The reward model and the rule, for one engine: what a request's life and a step do to their parts.

    Args:
        fits: the configured reward model, held against the engine.
        vllm_config: the engine's configuration.
        device: where the base model's logits are.
        num_drafts: most tokens that the reward model is to draft at a time; 0: it does not.

    Raises:
        ValueError: guidance could not work; one paragraph that says what to change.
    """

    def __init__(self, fits: Fit, vllm_config: VllmConfig, device: torch.device, num_drafts: int = 0) -> None:
        self.loaded = loaded = load(fits, vllm_config, device)
        max_num_seqs, max_model_len = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
        self.max_rows_per_request = 1 + vllm_config.num_speculative_tokens
        max_num_rows = max_num_seqs * self.max_rows_per_request
        self.engine = make_engine(loaded, max_num_seqs, max_num_rows)
        self.slots = Slots(max_num_seqs + 1, loaded.heads, loaded.base_vocab_size, device)
        self.contexts = make_contexts(loaded, self.engine, max_num_seqs + 1, self.max_rows_per_request, num_drafts)
        self.rule = Rule(loaded)
        self.drafter = Drafter(loaded, self.contexts, self.slots, max_model_len) if num_drafts else None
        self.stats = Stats()
        self.traces = make_traces(loaded, vllm_config, self.max_rows_per_request, self.stats)
        self._params: RowParams | None = None
        self.has_written = False
        """Whether a step reached the kernel, which overwrites the guided rows, and did not finish"""
        warm_up = start.WarmUp(loaded, self.rule, self.slots, max_num_rows, self.max_rows_per_request, self.traces)
        start.warm_up_kernels(warm_up)
        if self.drafter is not None:
            self.drafter.warm_up(loaded.hidden_states, max_num_seqs)
        start.log_summary(loaded, self.rule.kernels, max_model_len)

    @property
    def model(self) -> PagedModel:
        return self.loaded.model

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @property
    def no_slot(self) -> RequestSlot:
        """The slot of a row that is to be left alone."""
        return self.slots.no_slot

    def new_request(
        self, slot: RequestSlot, params: GuidanceParams, controls: SamplingControls, prompt_ids: list[int], end_id: int
    ) -> list[Context]:
        """Begin guiding a request in a slot that is free; returns its contexts.

        Args:
            slot: of the request.
            params: its guidance.
            controls: what it does to the base logits besides.
            prompt_ids: the base model's prompt.
            end_id: the token that ends it, should guidance fail.

        Raises:
            ValueError: the prompt has a token that the reward model has no row for, or too many tokens are biased.
        """
        contexts, prompt = params.contexts(), self.contexts.read(prompt_ids)
        composed = [self._compose(prompt.ids, reading.preference) for reading in contexts]
        adapters = [self.loaded.fit.adapter_number(reading.adapter) for reading in contexts]
        if params.guides and (prompt.is_misread or any(one.is_misread for one in composed)):
            self.stats.plain_prompts += 1
            if self.loaded.fit.config.chat == "strict":
                raise ValueError(
                    "its prompt begins as a chat, but not as the chat template writes one; pad.chat='strict' "
                    "refuses that"
                )
        check_logit_bias(controls.logit_bias)
        self._write_slot(slot, params, prompt.num_own, composed, adapters, list(contexts.values()), end_id)
        self.contexts.begin(slot, len(prompt_ids), prompt)
        self.slots.controls.write(slot, controls, prompt_ids)
        if self.drafter is not None:
            self.drafter.begin(slot, params)
        if params.guides:
            self.stats.guided_requests += 1
            self.stats.contexts += len(composed)
        return [
            self.engine.add(ContextSlot(place), one.ids, one.shared, params.cache_salt, adapter)
            for place, one, adapter in zip(context_slots(slot), composed, adapters, strict=False)
        ]

    def _compose(self, prompt_ids: list[int], preference: str | None) -> Composed:
        """A context's prompt. Raises ValueError for a token that the reward model has no row for."""
        composed = Composed(prompt_ids, ())
        if preference is not None:
            template = self.loaded.fit.template
            assert template is not None  # without a tokenizer there are no preferences: Fit.resolve
            composed = template.compose_shared(prompt_ids, preference)
        max_len, vocab_size = self.loaded.model.max_model_len, self.loaded.vocab_size
        if len(composed.ids) > max_len:
            raise ValueError(
                f"its prompt takes {len(composed.ids)} of the reward model's tokens, but a context holds {max_len}"
            )
        composed = composed._replace(ids=self.contexts.own_ids(composed.ids))
        low, high = min(composed.ids), max(composed.ids)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"its prompt has token ids from {low} to {high}, but the reward model's vocabulary has {vocab_size}"
            )
        return composed

    def _write_slot(
        self,
        slot: RequestSlot,
        params: GuidanceParams,
        num_own: int,
        composed: list[Composed],
        adapters: list[int],
        context_weights: list[float],
        end_id: int,
    ) -> None:
        heads = self.loaded.heads
        default = heads.default_weights if heads and params.guides else None
        weights = params.weights or default
        backbone, head_weights = (0.0, weights) if weights else (1.0, (0.0,) * len(self.loaded.fit.head_names))
        contexts = [
            ContextInts(len(one.ids) - num_own, num_own, one.ids[-1], adapter)
            for one, adapter in zip(composed, adapters, strict=True)
        ]
        ints = RequestInts(len(contexts), params.top_k, end_id)
        bound = math.inf if params.max_divergence is None else params.max_divergence
        floats = RequestFloats(params.beta, params.base_weight, bound, backbone)
        self.slots.write(slot, ints, floats, head_weights, contexts, context_weights, weights is not None)

    def free(self, contexts: list[Context]) -> None:
        """A request left the batch."""
        for context in contexts:
            self.engine.blocks.remove(context)

    def clear(self, slot: RequestSlot) -> None:
        """Forget a request that could not begin, whatever parts of it had begun."""
        held = [self.engine.blocks.contexts[place] for place in context_slots(slot)]
        self.free([context for context in held if context is not None])
        self.slots.controls.clear(slot)

    def forget(self) -> None:
        """The reward model's weights have changed: nothing that they computed before may be read again."""
        self.engine.blocks.reset()

    def apply(self, logits: torch.Tensor, batch: GuidedBatch) -> None:
        """Guide the rows of ``batch`` in ``logits``, in place.

        Args:
            logits: [N, V], base logits after bias, penalties and grammar mask.
            batch: which rows, and what they have seen.
        """
        began = time.perf_counter()
        params = self._params_of(batch.layout)
        hidden_states = self.contexts.hidden_states(batch, params)
        if params.rows.max_top_k:
            controls = None
            if params.control:
                output = batch.output_tokens() if params.penalize and batch.output_tokens else None
                controls = self.slots.controls.of_rows(batch.layout.row_slots, output)
            key_offsets = self.contexts.key_offsets(batch)
            self.has_written = True
            trace = None if self.traces is None else self.traces.of_rows(batch)
            self.rule.apply(logits, hidden_states, params, controls, key_offsets, trace)
            self.has_written = False
        self._count(params)
        self.stats.step_seconds += time.perf_counter() - began

    def _params_of(self, layout: Layout) -> RowParams:
        if self._params is None or self._params.layout is not layout:
            self._params = RowParams(layout, self.slots, self.max_rows_per_request)
        return self._params

    def _count(self, params: RowParams) -> None:
        layout, stats = params.layout, self.stats
        num_rows, num_unguided = layout.logits_rows.shape[0], params.num_unguided
        if num_unguided:  # how many of the rows are theirs is known on the device
            num_rows = min(num_rows, (len(layout.slots) - num_unguided) * self.max_rows_per_request)
        stats.guided_tokens += num_rows
        stats.running_requests = len(layout.slots) - num_unguided
        stats.running_contexts = len(params.contexts.slots) - num_unguided
        stats.steps += 1

    def show_stats(self, board: Board) -> None:
        """Bring a board up to date."""
        stats, engine, blocks = self.stats, self.engine.stats, self.engine.blocks
        stats.reward_tokens, stats.recomputed_tokens = engine.num_tokens, engine.num_recomputed_tokens
        stats.prefix_hit_tokens = blocks.stats.num_prefix_hit_tokens
        stats.evicted_contexts = blocks.stats.num_contexts_evicted
        stats.kv_cache_usage_perc = blocks.usage
        if self.traces is not None:
            self.traces.count()
        board.show(stats)


def make_engine(loaded: Loaded, max_num_seqs: int, max_num_rows: int) -> RewardEngine:
    """``max_num_rows``: of logits in a step."""
    return RewardEngine(
        loaded.model,
        loaded.fit.vllm_config.scheduler_config.max_num_batched_tokens,
        max_num_seqs * MAX_CONTEXTS,
        max_num_rows * loaded.fit.tokens.max_pieces * MAX_CONTEXTS,
    )


def make_contexts(
    loaded: Loaded, engine: RewardEngine, num_slots: int, max_rows_per_request: int, num_drafts: int
) -> Contexts:
    """Of the tokens that the reward model has."""
    pair = loaded.fit.tokens.pair
    if pair is not None:
        return OtherTokens(pair, engine, num_slots, max_rows_per_request, drafts=num_drafts > 0)
    return SameTokens(loaded, engine, num_slots, num_drafts, verifies=max_rows_per_request > 1)


def make_traces(loaded: Loaded, vllm_config: VllmConfig, rows_per_request: int, stats: Stats) -> Traces | None:
    """Of the engine that ``vllm_config`` configures; None where nothing is traced."""
    fit, num_slots = loaded.fit, vllm_config.scheduler_config.max_num_seqs + 1
    if fit.config.trace is None and row_keeper() is None:
        return None
    writes = is_first_rank() and get_pp_group().is_last_rank
    base = base_tokenizer(fit) if fit.config.trace_text and writes else None
    decode = None if base is None else base.decode
    return Traces(fit.config, vllm_config, num_slots, rows_per_request, stats, loaded.device, decode, writes)


def base_tokenizer(fit: Fit) -> Any:
    """A copy of the served model's, for another thread; None where there is none."""
    pair = fit.tokens.pair
    tokenizer = fit.tokens.tokenizer if pair is None else pair.translator.base.tokenizer
    return None if tokenizer is None else copy.deepcopy(tokenizer)
