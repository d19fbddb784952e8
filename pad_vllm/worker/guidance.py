"""One step of PAD for a batch: the guided requests' contexts, through the reward engine, into the guidance kernel.

Knows no runner: :mod:`pad_vllm.worker.adapters` says which rows are guided and where a request's tokens are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from pad_vllm import kernels
from pad_vllm.channel import Announcement
from pad_vllm.config import PADConfig
from pad_vllm.kernels import Controls
from pad_vllm.params import MAX_CONTEXTS, GuidanceParams, check_logit_bias
from pad_vllm.reward.block_manager import Context
from pad_vllm.reward.device import to_device
from pad_vllm.reward.engine import ContextRows, RewardEngine
from pad_vllm.reward.heads import ValueHeads
from pad_vllm.reward.paged_model import PagedModel
from pad_vllm.reward.template import Composed
from pad_vllm.stats import Stats
from pad_vllm.worker import start
from pad_vllm.worker.batch import GuidedBatch, Layout
from pad_vllm.worker.board import Board
from pad_vllm.worker.compatibility import fit
from pad_vllm.worker.device_tables import device_vocabulary, foreign_candidates
from pad_vllm.worker.drafter import Drafter
from pad_vllm.worker.growth import Growth
from pad_vllm.worker.slots import ContextColumns, IntColumns, RowParams, SamplingControls, Slots

logger = init_logger(f"vllm.{__name__}")


class Guidance:
    """The reward model and the rule, for one engine.

    Args:
        config: the engine's PAD configuration.
        vllm_config: the engine's configuration.
        device: where the base model's logits are.
        num_drafts: most tokens that the reward model is to draft at a time; 0: it does not.

    Raises:
        ValueError: guidance could not work; one paragraph that says what to change.
    """

    def __init__(self, config: PADConfig, vllm_config: VllmConfig, device: torch.device, num_drafts: int = 0) -> None:
        self.config, self.device = config, device
        self.base, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        base = self.base
        self.instance_id = vllm_config.instance_id
        self.labels = (str(base.served_model_name or base.model), str(vllm_config.parallel_config.data_parallel_index))
        self.fit = fit(config, vllm_config)
        self.template, self.vocab_size = self.fit.template, self.fit.vocab_size
        self.reward_vocab_size = self.fit.model_config.get_vocab_size()
        self.base_vocab_size = base.get_vocab_size()
        self.max_model_len = base.max_model_len
        for warning in start.warnings(self.fit):
            logger.warning(warning)
        tokens = self.fit.tokens
        self.foreign_ids = foreign_candidates(tokens, self.vocab_size, self.reward_vocab_size, device)
        heads = self.fit.heads
        self.heads = heads and ValueHeads(heads.names, heads.weight.to(device), heads.bias.to(device))
        self.model = PagedModel(
            self.fit.vllm_config, vllm_config, device, config.kv_cache_memory_bytes, self.fit.not_backbone
        )
        self.kernels = kernels.implementation(device)
        self.pair = self.fit.tokens.pair
        self.guide_ = kernels.load_guide(self.kernels)
        self.vocabulary = device_vocabulary(tokens, self.vocab_size, device)
        max_num_batched_tokens = self.fit.vllm_config.scheduler_config.max_num_batched_tokens
        hidden_states = self.model.warm_up(max_num_batched_tokens)
        self.output_head = self.model.output_head(hidden_states)
        start.check_logits(config.reward_model, self.model, self.output_head, hidden_states)
        self.no_slot = scheduler.max_num_seqs
        self.max_rows_per_request = 1 + vllm_config.num_speculative_tokens
        max_num_rows = scheduler.max_num_seqs * self.max_rows_per_request
        max_num_contexts = scheduler.max_num_seqs * MAX_CONTEXTS
        rows_per_token = 1 if self.pair is None else self.pair.tables.max_pieces
        self.engine = RewardEngine(
            self.model, max_num_batched_tokens, max_num_contexts, max_num_rows * rows_per_token * MAX_CONTEXTS
        )
        self.growth: Growth | None = None
        if self.pair is not None:
            tables, num_slots = self.pair.tables, scheduler.max_num_seqs + 1
            self.growth = Growth(tables, self.engine, num_slots, self.max_rows_per_request)
        self.stats = Stats()
        # Tokens beyond the shared vocabulary: of a drafter with a larger one, or of a base model padded further.
        self.may_be_foreign = self.max_rows_per_request > 1 or self.base_vocab_size > self.reward_vocab_size
        self.reads, self.device_reads = tokens.reads, None
        if self.reads:
            table = torch.arange(self.base_vocab_size)
            table[list(self.reads)] = torch.tensor(list(self.reads.values()))
            self.device_reads = to_device(table, device, torch.int64)
        self.slots = Slots(scheduler.max_num_seqs + 1, self.heads, self.base_vocab_size, device)
        self._params: RowParams | None = None
        self.has_written = False
        """Whether a step came to the kernel, which writes over the guided rows, and not to its end"""
        self.drafter = Drafter(self, num_drafts) if num_drafts else None
        start.warm_up_kernels(self, hidden_states, max_num_rows)
        if self.drafter is not None:
            self.drafter.warm_up(hidden_states)
        start.log_summary(self)

    def announcement(self) -> Announcement:
        """What the frontend may let through."""
        personas, added = self.config.personas, self.template.num_added_tokens if self.template else len
        base = self.base
        base_tokenizer = {"pretrained_model_name_or_path": base.tokenizer, "revision": base.tokenizer_revision}
        return Announcement(
            configured=True,
            personas=tuple(personas),
            head_names=self.fit.head_names,
            max_top_k=self.config.max_top_k,
            max_preference_tokens=self.fit.max_preference_tokens,
            tokenizer=self.fit.tokenizer_args if self.template else None,
            base_tokenizer=base_tokenizer if self.pair else None,
            max_context_len=self.model.max_model_len,
            prompt_template=self.config.prompt_template,
            num_preferences=tuple(len(persona.preferences) for persona in personas.values()),
            num_preference_tokens=tuple(max(map(added, p.preferences), default=0) for p in personas.values()),
            default_persona=self.config.default_persona,
            instance_id=self.instance_id,
            labels=self.labels,
            chat=self.config.chat,
            insert_after=self.config.insert_after,
        )

    def new_request(
        self, slot: int, params: GuidanceParams, controls: SamplingControls, prompt_ids: list[int], end_id: int
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
        contexts, read_ids, text_len = params.contexts(), prompt_ids, len(prompt_ids)
        begins_answer = is_misread = False
        if self.growth is not None:
            (read_ids, begins_answer, is_misread), text_len = self.pair.translator.read(prompt_ids), 1
        composed = [self._compose(read_ids, preference) for preference in contexts]
        if params.guides and (is_misread or any(prompt.is_misread for prompt in composed)):
            self.stats.plain_prompts += 1
            if self.config.chat == "strict":
                raise ValueError("pad.chat='strict': its prompt begins as a chat, and is none that the template writes")
        check_logit_bias(controls.logit_bias)
        self._write_slot(slot, params, text_len, composed, list(contexts.values()), end_id)
        if self.growth is not None:
            self.growth.begin(slot, len(prompt_ids), begins_answer)
        self.slots.write_controls(slot, controls, prompt_ids)
        if self.drafter is not None:
            self.drafter.begin(slot, params)
        if params.guides:
            self.stats.guided_requests += 1
            self.stats.contexts += len(composed)
        return [
            self.engine.blocks.add(slot * MAX_CONTEXTS + i, prompt.ids, prompt.shared, params.cache_salt)
            for i, prompt in enumerate(composed)
        ]

    def _compose(self, prompt_ids: list[int], preference: str | None) -> Composed:
        """A context's prompt. Raises ValueError for a token that the reward model has no row for."""
        composed = Composed(prompt_ids, ())
        if preference is not None:
            composed = self.template.compose_shared(prompt_ids, preference)
        if len(composed.ids) > self.model.max_model_len:
            raise ValueError(
                f"its prompt is {len(composed.ids)} of the reward model's tokens, and a context holds "
                f"{self.model.max_model_len}"
            )
        if self.reads:
            composed = composed._replace(ids=[self.reads.get(i, i) for i in composed.ids])
        low, high = min(composed.ids), max(composed.ids)
        if low < 0 or high >= self.reward_vocab_size:
            raise ValueError(
                f"its prompt has tokens {low} to {high}, and the reward model a vocabulary of {self.reward_vocab_size}"
            )
        return composed

    def free(self, contexts: list[Context]) -> None:
        """A request left the batch."""
        for context in contexts:
            self.engine.blocks.remove(context)

    def clear(self, slot: int) -> None:
        """Forget a request that could not begin, however far it came."""
        first = slot * MAX_CONTEXTS
        self.free([context for context in self.engine.blocks.contexts[first : first + MAX_CONTEXTS] if context])
        self.slots.clear(slot)

    def apply(self, logits: torch.Tensor, batch: GuidedBatch) -> None:
        """Guide the rows of ``batch`` in ``logits``, in place.

        Args:
            logits: [N, V], base logits after bias, penalties and grammar mask.
            batch: which rows, and what they have seen.
        """
        began = time.perf_counter()
        layout, params = batch.layout, self._params_of(batch.layout)
        hidden_states = self._hidden_states(batch, params)
        if params.rows.max_top_k:
            controls = None
            if params.control:
                controls = self.slots.controls(layout.row_slots, batch.output_tokens() if params.penalize else None)
            key_offsets = None if self.growth is None else self.growth.key_offsets(batch)
            self.has_written = True
            self.guide(logits, hidden_states, params, controls, key_offsets)
            self.has_written = False
        self._count(params)
        self.stats.step_seconds += time.perf_counter() - began

    def _hidden_states(self, batch: GuidedBatch, params: RowParams) -> torch.Tensor:
        """[context rows, hidden_size]; NaN where a context is full: the request then gets its end token."""
        if self.growth is not None:
            return self.growth.hidden_states(batch, params)
        rows = self.context_rows(batch, params)
        if self.drafter is None:
            hidden_states = self.engine.step(rows)
        else:
            of_rows = params.contexts.rows
            local_positions = batch.local_positions if of_rows is None else batch.local_positions[of_rows]
            hidden_states = self.drafter.hidden_states(rows, batch.layout.slots, local_positions)
        if rows.is_full is not None:
            hidden_states = hidden_states.masked_fill(rows.is_full.unsqueeze(1), float("nan"))
        return hidden_states

    def context_rows(self, batch: GuidedBatch, params: RowParams) -> ContextRows:
        """The rows of a batch in the reward model's contexts: as many as its rows, or, of requests that have several,
        more."""
        contexts, token_ids = params.contexts, batch.token_ids
        if contexts.rows is not None:
            token_ids = token_ids[contexts.rows]
        if self.device_reads is not None:
            token_ids = self.device_reads[token_ids.clamp(0, self.base_vocab_size - 1).long()]
        if self.may_be_foreign:
            # Such a draft or token is no candidate, so what follows it is void.
            token_ids = token_ids.clamp(0, self.reward_vocab_size - 1)
        if params.last_rows is not None and batch.num_ahead and params.room:
            params.room -= 1
            params.last_rows.advance(token_ids, self._history(batch))
            return params.last_rows
        batch.settle()
        num_tokens = batch.num_tokens if contexts.requests is None else batch.num_tokens[contexts.requests]
        num_tokens = num_tokens + contexts.host_offset
        room = self.model.max_model_len - int(num_tokens.max())
        params.past_prompts |= batch.exact and bool((batch.num_tokens > params.host_prompt_len).all())
        positions = None
        if not params.past_prompts:
            positions = batch.device_positions()
            if contexts.rows is not None:
                positions = positions[contexts.rows]
                if not batch.exact:
                    positions = positions.masked_fill(contexts.row_slots == self.engine.no_slot, 0)
            # The composed prompt may end otherwise than the base's, from which the base samples its first token.
            token_ids = torch.where(positions < contexts.ints.prompt_len, contexts.ints.last_prompt_id, token_ids)
        rows = ContextRows(
            slots=contexts.slots,
            num_tokens=num_tokens,
            lengths=num_tokens if batch.exact else None,
            row_slots=contexts.row_slots,
            positions=None if batch.exact else positions + contexts.ints.offset,
            token_ids=token_ids,
            history=self._history(batch),
        )
        if room < 0:
            rows = rows.within(self.model.max_model_len, self.engine.no_slot)
        params.last_rows, params.room = rows if params.past_prompts else None, max(room, 0)
        return rows

    def _history(self, batch: GuidedBatch) -> Callable[[int], Sequence[int]]:
        def history(slot: int) -> Sequence[int]:
            ids, last = batch.output_ids(slot // MAX_CONTEXTS), self.reward_vocab_size - 1
            return [min(self.reads.get(i, i), last) for i in ids] if self.reads or self.may_be_foreign else ids

        return history

    def _count(self, params: RowParams) -> None:
        layout, stats = params.layout, self.stats
        num_rows, num_unguided = layout.rows.shape[0], params.num_unguided
        if num_unguided:  # how many of the rows are theirs is known on the device
            num_rows = min(num_rows, (len(layout.slots) - num_unguided) * self.max_rows_per_request)
        stats.guided_tokens += num_rows
        stats.running_requests = len(layout.slots) - num_unguided
        stats.running_contexts = len(params.contexts.slots) - num_unguided
        stats.steps += 1

    def _params_of(self, layout: Layout) -> RowParams:
        if self._params is None or self._params.layout is not layout:
            self._params = RowParams(layout, self.slots, self.max_rows_per_request)
        return self._params

    def show_stats(self, board: Board) -> None:
        """Bring a board up to date."""
        stats, engine, blocks = self.stats, self.engine.stats, self.engine.blocks
        stats.reward_tokens, stats.recomputed_tokens = engine.num_tokens, engine.num_recomputed_tokens
        stats.prefix_hit_tokens = blocks.stats.num_prefix_hit_tokens
        stats.evicted_contexts = blocks.stats.num_contexts_evicted
        stats.kv_cache_usage_perc = blocks.usage
        board.show(stats)

    def guide(
        self,
        logits: torch.Tensor,
        hidden_states: torch.Tensor,
        params: RowParams,
        controls: Controls | None = None,
        key_offsets: torch.Tensor | None = None,
    ) -> None:
        """The rule, for rows whose hidden states are there.

        Args:
            logits: [N, V], in place.
            hidden_states: [context rows, hidden_size], of the reward model.
            params: which rows of ``logits``, and what they ask for.
            controls: what their requests did to the logits; None: nothing.
            key_offsets: [R] int64, of :meth:`Growth.key_offsets`.
        """
        rows = params.rows
        if key_offsets is not None:
            rows = rows._replace(key_offsets=key_offsets)
        if self.foreign_ids is not None:
            places = rows.index.unsqueeze(1), self.foreign_ids
            logits[places] = logits[places].masked_fill(rows.top_k.unsqueeze(1) > 0, float("-inf"))
        self.guide_(
            logits,
            hidden_states,
            self.output_head,
            rows,
            self.vocabulary,
            controls=controls,
            mixture=params.contexts.mixture,
            head_mix=params.head_mix,
        )

    def _write_slot(
        self,
        slot: int,
        params: GuidanceParams,
        text_len: int,
        composed: list[Composed],
        context_weights: list[float],
        end_id: int,
    ) -> None:
        default = self.heads.default_weights if self.heads and params.guides else None
        weights = params.weights or default
        mix = (0.0, *weights) if weights else (1.0, *[0.0] * len(self.fit.head_names))
        contexts = [ContextColumns(len(ids) - text_len, text_len, ids[-1]) for ids, *_ in composed]
        ints = IntColumns(len(contexts), params.top_k, end_id)
        floats = [params.beta, params.base_weight, *mix]
        self.slots.write(slot, ints, floats, contexts, context_weights, weights is not None)
