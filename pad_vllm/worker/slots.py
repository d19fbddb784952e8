"""What the requests in the slots ask for, where a step needs it.

A slot is a request's place in the engine; its contexts have MAX_CONTEXTS places in the reward engine, one after the
other. The last slot stands for no request: a row of it is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pad_vllm.kernels import Controls, HeadMix, Mixture, OutputHead, OutputTokens, Rows
from pad_vllm.params import MAX_CONTEXTS, MAX_LOGIT_BIAS
from pad_vllm.reward.device import to_device
from pad_vllm.reward.heads import ValueHeads
from pad_vllm.worker.batch import Layout, RequestSlot, context_slots

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

NO_PENALTIES = (0.0, 0.0, 1.0)


class RequestInts(NamedTuple):
    """Integers of a request."""

    num_contexts: int
    """0: there is no request."""
    top_k: int
    """0: leave the row alone."""
    end_id: int
    """The token that ends the request."""


class RequestFloats(NamedTuple):
    """Numbers of a request; behind them stand the weights of the value heads."""

    beta: float
    reference: float
    """How much of the base model's log probability the reward is held against."""
    max_divergence: float
    """inf: no bound"""
    backbone: float
    """Weight of the reward model's own hidden state."""


class RequestFlags(NamedTuple):
    """What a step may leave out where none of its requests has it."""

    mixes: bool
    """Several contexts, or one of another weight than 1."""
    uses_heads: bool
    """Weights of value heads."""
    has_bound: bool


class RowInts(NamedTuple):
    """:class:`RequestInts` of the requests of rows, each a [R] int64 tensor."""

    num_contexts: torch.Tensor
    top_k: torch.Tensor
    end_id: torch.Tensor


class ContextInts(NamedTuple):
    """Integers of a context."""

    offset: int
    """Tokens that the composed prompt has more than the base's."""
    prompt_len: int
    """Length of the base's prompt."""
    last_prompt_id: int
    """Last token of the composed prompt."""
    adapter: int
    """The number of the adapter that it is read through."""


class ContextRowInts(NamedTuple):
    """:class:`ContextInts` of the contexts of context rows, each a [context rows] int64 tensor."""

    offset: torch.Tensor
    prompt_len: torch.Tensor
    last_prompt_id: torch.Tensor
    adapter: torch.Tensor

    def of_head(self, head: OutputHead) -> OutputHead:
        """``head`` as these contexts are read through it."""
        return head if head.adapters is None else head._replace(adapters=head.adapters._replace(numbers=self.adapter))


@dataclass(frozen=True)
class SamplingControls:
    """What a request does to the base logits: the reward is about the models, so it must not see this."""

    penalties: tuple[float, float, float] = NO_PENALTIES
    """presence, frequency, repetition"""
    logit_bias: Mapping[int, float] | None = None

    @classmethod
    def of(cls, params: SamplingParams) -> SamplingControls:
        return cls(
            (params.presence_penalty, params.frequency_penalty, params.repetition_penalty), params.logit_bias or None
        )

    @property
    def penalizes(self) -> bool:
        return self.penalties != NO_PENALTIES


class Slots:
    """A row of each column for each slot, on the device; what the host asks of them too, on the host."""

    def __init__(self, num_slots: int, heads: ValueHeads | None, vocab_size: int, device: torch.device) -> None:
        self.heads = heads
        num_heads = len(heads.names) if heads else 0
        self.ints = torch.zeros(num_slots, len(RequestInts._fields), dtype=torch.int64, device=device)
        """[slots, 3]: :class:`RequestInts`"""
        self.floats = torch.zeros(num_slots, len(RequestFloats._fields) + num_heads, device=device)
        """[slots, 4 + H]: :class:`RequestFloats`, weights of the heads"""
        self.contexts = torch.zeros(
            num_slots * MAX_CONTEXTS, len(ContextInts._fields), dtype=torch.int64, device=device
        )
        """[slots * MAX_CONTEXTS, 4]: :class:`ContextInts`"""
        self.context_weights = torch.zeros(num_slots, MAX_CONTEXTS, device=device)
        """[slots, MAX_CONTEXTS]: 0 where there is none"""
        self.controls = ControlSlots(num_slots, vocab_size, device)
        self.host_num_contexts: np.ndarray = np.zeros(num_slots, np.int64)
        self.host_flags: np.ndarray = np.zeros((num_slots, len(RequestFlags._fields)), bool)
        """[slots, 3]: :class:`RequestFlags`"""
        self.host_offset: np.ndarray = np.zeros(num_slots * MAX_CONTEXTS, np.int64)
        self.host_prompt_len: np.ndarray = np.zeros(num_slots, np.int64)
        self.host_top_k: np.ndarray = np.zeros(num_slots, np.int64)

    @property
    def no_slot(self) -> RequestSlot:
        """The slot that stands for no request."""
        return RequestSlot(len(self.ints) - 1)

    def write(
        self,
        slot: RequestSlot,
        ints: RequestInts,
        floats: RequestFloats,
        head_weights: Sequence[float],
        contexts: list[ContextInts],
        weights: list[float],
        uses_heads: bool,
    ) -> None:
        """
        Args:
            head_weights: one for each value head.
            contexts: as many as ``ints`` says, each with its part in the reward in ``weights``.
            uses_heads: whether the request's heads have weights.
        """
        device, first = self.ints.device, context_slots(slot).start
        places = slice(first, first + len(contexts))
        self.ints[slot] = to_device(list(ints), device, torch.int64)
        self.floats[slot] = to_device([*floats, *head_weights], device, torch.float32)
        self.contexts[places] = to_device(np.array(contexts, np.int64), device, torch.int64)
        unused = [0.0] * (MAX_CONTEXTS - len(weights))
        self.context_weights[slot] = to_device([*weights, *unused], device, torch.float32)
        self.host_num_contexts[slot] = len(contexts)
        self.host_flags[slot] = RequestFlags(weights != [1.0], uses_heads, floats.max_divergence < math.inf)
        self.host_offset[places] = [context.offset for context in contexts]
        self.host_prompt_len[slot] = contexts[0].prompt_len
        self.host_top_k[slot] = ints.top_k

    def flags(self, slots: np.ndarray) -> RequestFlags:
        """Whether any of these has it; ``slots``: int64."""
        return RequestFlags(*self.host_flags[slots].any(0).tolist())

    def head_mix(self, head_weights: torch.Tensor) -> HeadMix | None:
        """Of contexts with these weights, [context rows, 1 + H]; None where there are no heads."""
        return self.heads and HeadMix(self.heads.weight, self.heads.bias, head_weights)


class ControlSlots:
    """What the requests in the slots do to their logits by bias and penalties."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.num_bias = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.bias_ids = torch.zeros(num_slots, MAX_LOGIT_BIAS, dtype=torch.int32, device=device)
        self.bias = torch.zeros(num_slots, MAX_LOGIT_BIAS, device=device)
        self.penalties = torch.tensor(NO_PENALTIES, device=device).repeat(num_slots, 1)
        self.prompt_mask = torch.zeros(num_slots, -(-vocab_size // 32), dtype=torch.int32, device=device)
        self.host_biases: np.ndarray = np.zeros(num_slots, bool)
        self.host_penalizes: np.ndarray = np.zeros(num_slots, bool)

    def write(self, slot: RequestSlot, controls: SamplingControls, prompt_ids: list[int]) -> None:
        device, bias = self.bias.device, controls.logit_bias or {}
        if bias or self.host_biases[slot]:
            self.num_bias[slot] = len(bias)
            self.bias_ids[slot, : len(bias)] = to_device(list(bias), device, torch.int32)
            self.bias[slot, : len(bias)] = to_device(list(bias.values()), device, torch.float32)
        if controls.penalizes or self.host_penalizes[slot]:
            self.penalties[slot] = to_device(list(controls.penalties), device, torch.float32)
            seen = np.zeros(32 * self.prompt_mask.shape[1], bool)
            seen[prompt_ids] = True
            self.prompt_mask[slot] = to_device(np.packbits(seen, bitorder="little").view("<i4"), device, torch.int32)
        self.host_biases[slot], self.host_penalizes[slot] = bool(bias), controls.penalizes

    def clear(self, slot: RequestSlot) -> None:
        """Of a request that could not begin there may be anything: the next one writes all of its controls."""
        self.host_biases[slot] = self.host_penalizes[slot] = True

    def of_rows(self, row_slots: torch.Tensor, output: OutputTokens | None) -> Controls:
        """``output`` None: none of the rows is penalized."""
        return Controls(row_slots, self.num_bias, self.bias_ids, self.bias, self.penalties, self.prompt_mask, output)


class RowParams:
    """What the rows of a layout ask for, and their contexts: gathered from their slots, once for a layout."""

    def __init__(self, layout: Layout, slots: Slots, max_rows_per_request: int) -> None:
        self.layout = layout
        ints = RowInts(*(column.contiguous() for column in slots.ints[layout.row_slots].unbind(1)))
        floats, flags = slots.floats[layout.row_slots], slots.flags(layout.slots)
        beta, reference = floats[:, 0].contiguous(), floats[:, 1].contiguous()
        max_divergence = floats[:, 2].contiguous() if flags.has_bound else None
        self.host_prompt_len = slots.host_prompt_len[layout.slots]
        host_top_k = slots.host_top_k[layout.slots]
        most = int(host_top_k.max())
        self.rows = Rows(
            layout.logits_rows, ints.top_k, beta, reference, ints.end_id, most, max_divergence=max_divergence
        )
        """What the guidance step is told of them"""
        self.num_unguided = int((host_top_k == 0).sum())
        """Requests that are only drafted for."""
        self.penalize = bool(slots.controls.host_penalizes[layout.slots].any())
        self.control = self.penalize or bool(slots.controls.host_biases[layout.slots].any())
        self.contexts = ContextRowParams(layout, slots, ints.num_contexts, max_rows_per_request)
        self.head_weights = floats[:, RequestFloats._fields.index("backbone") :]
        """[context rows, 1 + H]"""
        if self.contexts.layout_rows is not None:
            self.head_weights = self.head_weights[self.contexts.layout_rows]
        self.head_mix = slots.head_mix(self.head_weights) if flags.uses_heads else None


class ContextRowParams:
    """The contexts of a layout's rows: one for each row, in the rows' order, or several, a row's one after the other.

    Nothing is read back: which rows are whose may be known on the device only.
    """

    def __init__(self, layout: Layout, slots: Slots, num_contexts: torch.Tensor, max_rows_per_request: int) -> None:
        """``num_contexts``: [R] int64, of each row."""
        self.slots: np.ndarray = layout.slots * MAX_CONTEXTS
        """[C] int64, on the host"""
        self.row_slots = layout.row_slots * MAX_CONTEXTS
        """[context rows] int64"""
        self.requests: np.ndarray | None = None
        """[C] int64: places in the layout of the contexts' requests; None: one for each"""
        self.layout_rows: torch.Tensor | None = None
        """[context rows] int64: the layout's row of each; None: one for each"""
        self.mixture: Mixture | None = None
        if slots.flags(layout.slots).mixes:
            self._expand(layout, slots, num_contexts, max_rows_per_request)
        self.ints = ContextRowInts(*(column.contiguous() for column in slots.contexts[self.row_slots].unbind(1)))
        self.host_offset = slots.host_offset[self.slots]

    def _expand(self, layout: Layout, slots: Slots, num_contexts: torch.Tensor, max_rows_per_request: int) -> None:
        counts, num_rows, device = (
            slots.host_num_contexts[layout.slots],
            len(layout.logits_rows),
            layout.logits_rows.device,
        )
        self.requests = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(self.requests)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.slots = self.slots[self.requests] + within
        most, total = int(counts.max()), int(counts.sum())
        if num_rows > len(counts):  # more than a row a request; no more than so many
            total = min(total * max_rows_per_request, num_rows * most)
        ends = num_contexts.cumsum(0)
        begins, place = ends - num_contexts, torch.arange(total, device=device)
        rows = torch.searchsorted(ends, place, right=True)
        self.layout_rows = rows.clamp(max=num_rows - 1)
        # What the device finds to be no context of any row is one of the slot that stands for none.
        row_slots = self.row_slots[self.layout_rows] + place - begins[self.layout_rows]
        self.row_slots = row_slots.where(rows < num_rows, (len(slots.ints) - 1) * MAX_CONTEXTS)
        column = torch.arange(most, device=device).minimum((num_contexts - 1).clamp(min=0).unsqueeze(1))
        self.mixture = Mixture(
            (begins.unsqueeze(1) + column).clamp(max=total - 1), slots.context_weights[layout.row_slots, :most]
        )
