"""All drafts of a step in one CUDA graph: forwards, output head, the largest logits, draws, and positions.

By the pattern of vLLM's own drafters (``v1/worker/gpu/spec_decode/target_dependent_ar``): attention metadata is built
where the graph is captured, and each forward in it renews on the device what it says of lengths
(``update_draft_decode_metadata``). A step then writes a few inputs and launches the graph, where the loop in
:meth:`~pad_vllm.worker.drafter.Drafter.draft` builds metadata, replays a forward and launches some twenty kernels for
each draft.

A replay is what the loop would do if

- the step asks for as many drafts as are captured, of no more context rows than the largest graph has
  (:meth:`DraftGraphs.fits`), and no bound holds any of them back;
- every context holds the blocks of all drafts, and lacks no token before its last (:meth:`DraftGraphs.replay`);
- what the graph reads is where it was, and up to date: its inputs (:class:`DraftRows`, temperatures, seeds), which are
  written before each replay; the block table, and the reward model's KV cache and weights, which stay where they are,
  as does what drafts leave for verification.

No host value is in it but sizes. The loop drafts whatever this cannot: where the reward model has another tokenizer,
and where :func:`why_not` names a reason.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import graph_capture
from vllm.logger import init_logger

from pad_vllm.kernels import HeadMix, Mixture, map_heads, mix_contexts
from pad_vllm.params import MAX_CONTEXTS
from pad_vllm.reward.decode import Captured, DecodeRows, capture_graph, replay_graph
from pad_vllm.reward.paged_model import ForwardBatch
from pad_vllm.reward.row_kernel import write_rows
from pad_vllm.worker.adapters.draft_kernel import DraftBuffers
from pad_vllm.worker.batch import GuidedBatch
from pad_vllm.worker.drafter import Drafter, Proposals
from pad_vllm.worker.loading import Loaded
from pad_vllm.worker.same_tokens import SameTokens
from pad_vllm.worker.slots import RowParams

logger = init_logger(f"vllm.{__name__}")

MOST_ROWS = 128
"""Context rows of the largest graph, or a few more. A graph holds memory for [rows, vocabulary] logits as long as the
engine runs; with more rows the card has enough to do while the host launches."""
PADDING = -1
"""Slot of a row without a request, which is not drawn."""


@dataclass
class DraftRows:
    """What graphs read of S rows: one for each request and, up to as many, one for each of their contexts."""

    token_ids: torch.Tensor
    """[S] int64, of requests: the base's last token"""
    positions: torch.Tensor
    """[S] int64, of requests: its position"""
    slots: torch.Tensor
    """[S] int64, of requests; PADDING behind the last"""
    places: torch.Tensor
    """[S] int64, of requests in the batch"""
    top_k: torch.Tensor
    """[S] int64, of requests"""
    scale: torch.Tensor
    """[S] float32, of requests"""
    contexts: torch.Tensor
    """[S, MAX_CONTEXTS] int64, of requests: rows of their contexts"""
    weights: torch.Tensor
    """[S, MAX_CONTEXTS] float32, of requests: what these have in a draft"""
    context_slots: torch.Tensor
    """[S] int64, of contexts; ``no_slot`` behind the last"""
    offset: torch.Tensor
    """[S] int64, of contexts: tokens that they have more than their requests"""
    layout_rows: torch.Tensor
    """[S] int64, of contexts: rows of their requests"""
    head_weights: torch.Tensor
    """[S, 1 + H] float32, of contexts"""

    @classmethod
    def padding(cls, num_rows: int, num_heads: int, device: torch.device) -> DraftRows:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(num_rows, *shape, dtype=dtype, device=device)

        return cls(
            token_ids=zeros(),
            positions=zeros(),
            slots=zeros(),
            places=zeros(),
            top_k=zeros(),
            scale=zeros(dtype=torch.float32),
            contexts=zeros(MAX_CONTEXTS),
            weights=zeros(MAX_CONTEXTS, dtype=torch.float32),
            context_slots=zeros(),
            offset=zeros(),
            layout_rows=zeros(),
            head_weights=zeros(1 + num_heads, dtype=torch.float32),
        )

    def __getitem__(self, rows: slice) -> DraftRows:
        """A view of some of them."""
        return DraftRows(*(getattr(self, field.name)[rows] for field in fields(self)))

    def pad_(self, no_slot: int) -> None:
        """Make padding of them."""
        for field in fields(self):
            getattr(self, field.name).zero_()
        self.slots.fill_(PADDING)
        self.context_slots.fill_(no_slot)
        self.layout_rows.fill_(len(self.layout_rows) - 1)  # of no request, where there are fewer contexts than rows

    def write_(self, params: RowParams, drafter: Drafter) -> None:
        """Write what follows from a layout over padding."""
        layout, contexts = params.layout, params.contexts
        of_requests, of_contexts = self[: len(layout.row_slots)], self[: len(contexts.row_slots)]
        of_requests.slots.copy_(layout.row_slots)
        of_requests.places.copy_(params.rows.index)
        of_requests.top_k.copy_(params.rows.top_k)
        of_requests.scale.copy_(drafter.scale[layout.row_slots])
        of_contexts.context_slots.copy_(contexts.row_slots)
        of_contexts.offset.copy_(contexts.ints.offset)
        of_contexts.head_weights.copy_(params.head_weights)
        if contexts.mixture is not None and contexts.layout_rows is not None:
            own = contexts.mixture.contexts
            of_requests.contexts.copy_(own[:, :1])  # where a request has fewer, its first one, with no weight
            of_requests.contexts[:, : own.shape[1]] = own
            of_requests.weights.copy_(drafter.weights[layout.row_slots])
            of_contexts.layout_rows.copy_(contexts.layout_rows)


class DraftGraph(NamedTuple):
    """A graph, and what must not be freed as long as it may be replayed."""

    graph: Captured
    batch: ForwardBatch
    attn_metadata: dict[str, Any]


class DraftGraphs:
    """Graphs of all drafts of a step, for some numbers of context rows: where requests have one context each, and where
    contexts are mixed.

    Args:
        drafter: says what drafts are drawn from.
        contexts: the requests', in the base model's tokens.
        buffers: draw drafts, and keep what they are drawn from.
        drafts: [max_num_reqs, num_drafts] int64, out.
    """

    def __init__(self, drafter: Drafter, contexts: SameTokens, buffers: DraftBuffers, drafts: torch.Tensor) -> None:
        self.drafter, self.contexts, self.buffers, self.drafts = drafter, contexts, buffers, drafts
        loaded, engine, max_num_reqs = drafter.loaded, contexts.engine, len(drafts)
        sizes = engine.decoder.sizes
        self.sizes = {mixes: up_to(sizes, max_num_reqs * (MAX_CONTEXTS if mixes else 1)) for mixes in (True, False)}
        """Whether contexts are mixed -> context rows of the graphs, ascending"""
        most, num_heads = self.sizes[True][-1], len(loaded.heads.names) if loaded.heads else 0
        self.inputs = DraftRows.padding(most, num_heads, loaded.device)
        self.rows = DecodeRows.padding(most, engine.blocks.table.shape[1], loaded.device)
        """What the forwards read, which graphs write"""
        self.rows.bounds.fill_(loaded.model.max_model_len)  # a graph serves every length
        self.temperature = torch.zeros(max_num_reqs, device=loaded.device)
        """[max_num_reqs] float32, by slot. vLLM's is somewhere else each time"""
        self.seeds = torch.zeros(max_num_reqs, dtype=torch.int64, device=loaded.device)
        """[max_num_reqs] int64, by slot"""
        self.captured: dict[tuple[int, bool], DraftGraph] = {}
        """By context rows, and whether contexts are mixed"""
        self._written: RowParams | None = None  # what the inputs say of layouts

    def fits(self, params: RowParams, num_drafts: int) -> bool:
        """Whether there is a graph that makes ``num_drafts`` drafts of these rows."""
        sizes = self.sizes[params.contexts.mixture is not None]
        return num_drafts == self.drafts.shape[1] and len(params.contexts.row_slots) <= sizes[-1]

    def replay(self, batch: GuidedBatch, params: RowParams, temperature: torch.Tensor, seeds: torch.Tensor) -> bool:
        """Make all drafts of rows that fit.

        Args:
            batch: a row for each request.
            params: of these rows.
            temperature, seeds: [max_num_reqs] float32, int64, by slot.

        Returns:
            Whether the pool had room for them.
        """
        num_drafts, engine, slots = self.drafts.shape[1], self.contexts.engine, params.contexts.slots
        lengths = self.contexts.draft_lengths(batch, params, num_drafts)
        if lengths is None:
            return False
        num_rows, mixes = len(params.contexts.row_slots), params.contexts.mixture is not None
        size = next(size for size in self.sizes[mixes] if size >= num_rows)
        try:
            engine.give_blocks(slots, lengths)
            if self._written is not params:
                self._written = None
                self.inputs[:size].pad_(engine.no_slot)
                self.inputs[:size].write_(params, self.drafter)
                self._written = params
            num_requests = len(batch.token_ids)
            self.inputs.token_ids[:num_requests].copy_(batch.token_ids)
            self.inputs.positions[:num_requests].copy_(batch.device_positions())
            self.temperature.copy_(temperature)
            self.seeds.copy_(seeds)
            replay_graph(self.captured[size, mixes].graph)
        except Exception:
            engine.blocks.reset()  # what is in them, nobody knows
            raise
        engine.stats.num_forwards += num_drafts
        engine.stats.num_tokens += num_drafts * num_rows
        self.contexts.note_drafts(params, num_drafts)
        return True

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture a graph of each size, of padding alone; the largest first, as the others fit into its memory."""
        model, engine = self.drafter.loaded.model, self.contexts.engine
        with set_current_vllm_config(model.vllm_config), graph_capture(device=model.device):
            for mixes, sizes in self.sizes.items():
                for size in reversed(sizes):
                    batch = self.rows[:size].batch(model)
                    self.inputs[:size].pad_(engine.no_slot)
                    self._make_drafts(batch, mixes, model.prepare(batch, for_capture=True))  # warms up
                    known = model.prepare(batch, for_capture=True)

                    def launch(batch: ForwardBatch = batch, mixes: bool = mixes, known: dict[str, Any] = known) -> None:
                        self._make_drafts(batch, mixes, known)

                    graph = capture_graph(launch, engine.decoder.pool, model.vllm_config)
                    self.captured[size, mixes] = DraftGraph(graph, batch, known)

    def _make_drafts(self, batch: ForwardBatch, mixes: bool, attn_metadata: dict[str, Any]) -> None:
        """What a graph does: all drafts of the inputs. Nothing is read back.

        Args:
            batch: of the graph's size, on ``rows``.
            mixes: whether contexts are mixed.
            attn_metadata: of ``batch``.
        """
        inputs, contexts, model = self.inputs[: len(batch.input_ids)], self.contexts, self.drafter.loaded.model
        blocks, drafted = contexts.engine.blocks, contexts.drafted
        assert drafted is not None  # there is a drafter
        out = batch.input_ids, batch.positions, batch.slot_mapping, batch.seq_lens, batch.block_table
        further = torch.arange(self.drafts.shape[1], device=model.device).unsqueeze(1)
        positions = inputs.positions[inputs.layout_rows] if mixes else inputs.positions
        positions = (positions + inputs.offset + further).clamp(max=contexts.max_len - 1)
        drawn_at, tokens = (inputs.positions + further).clamp(max=self.drafter.max_position), inputs.token_ids
        for j in range(self.drafts.shape[1]):
            token_ids = contexts.reads.on_device(tokens[inputs.layout_rows] if mixes else tokens)
            write_rows(inputs.context_slots, positions[j], token_ids, blocks.table, blocks.block_size, j == 0, out)
            for group in model.attn_groups:
                group.update_draft_decode_metadata(attn_metadata)
            hidden_states = model.run(batch, attn_metadata)
            drafted.kept[inputs.context_slots, j] = hidden_states
            tokens = self.buffers.draw(
                *(j, self._proposals(hidden_states, inputs, mixes), drawn_at[j]),
                *(self.temperature, self.seeds, self.drafts, inputs.places),
                keep=True,
            )

    def _proposals(self, hidden_states: torch.Tensor, inputs: DraftRows, mixes: bool) -> Proposals:
        """As the drafter's, of ``hidden_states`` [S, hidden_size], for the largest ``top_k`` that there may be."""
        heads, dtype = self.drafter.loaded.heads, hidden_states.dtype
        if heads is not None:
            hidden_states = map_heads(hidden_states, HeadMix(heads.weight, heads.bias, inputs.head_weights))
        if mixes:
            hidden_states = mix_contexts(hidden_states, Mixture(inputs.contexts, inputs.weights))
        values, ids, base_ids, _ = self.drafter.largest(
            hidden_states, hidden_states, dtype, None, self.drafter.max_top_k
        )
        return Proposals(values, ids, base_ids, inputs.top_k, inputs.scale, inputs.slots, inputs.places)


def up_to(sizes: Sequence[int], num_rows: int) -> Sequence[int]:
    """Of ascending sizes, those up to the first that has ``num_rows``, or MOST_ROWS."""
    return sizes[: bisect_left(sizes, min(num_rows, MOST_ROWS)) + 1]


def why_not(loaded: Loaded) -> str | None:
    """What of a reward model with the base model's tokens stands against graphs of drafts, in words; None: nothing."""
    if loaded.model.adapters is not None:
        return "the reward model has adapters"
    if loaded.head.all_reduce is not None:
        return "the reward model runs on several ranks"
    groups = [group for group in loaded.model.attn_groups if not group.supports_draft_decode_metadata_update]
    names = ", ".join(sorted({group.backend.get_name() for group in groups}))
    return f"the attention back end {names} plans each forward on the host" if groups else None


def capture_drafts(drafter: Drafter, buffers: DraftBuffers, drafts: torch.Tensor) -> DraftGraphs | None:
    """Graphs of the drafts that go to ``drafts`` [max_num_reqs, num_drafts] int64; None where they cannot be, and where
    the reward model's forwards have none."""
    contexts = drafter.contexts
    if not isinstance(contexts, SameTokens) or not contexts.engine.decoder.sizes:
        return None
    reason = why_not(drafter.loaded)
    if reason is not None:
        logger.info("PAD: drafts are made one after the other, not in one CUDA graph, because %s.", reason)
        return None
    graphs = DraftGraphs(drafter, contexts, buffers, drafts)
    try:
        graphs.capture()
    except Exception as error:
        logger.warning("PAD: CUDA graphs of drafts could not be captured, so drafts are slower: %r", error)
        return None
    sizes = (", ".join(map(str, graphs.sizes[mixes])) for mixes in (False, True))
    logger.info("PAD: captured CUDA graphs of drafts for %s rows, and with several contexts for %s.", *sizes)
    return graphs
