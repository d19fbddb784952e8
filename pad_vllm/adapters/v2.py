"""Model Runner V2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from pad_vllm.adapters import Adapter, RequestState, Resolve
from pad_vllm.guidance import Guidance, GuidedBatch
from pad_vllm.reward.backend import to_device

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


class V2Adapter(Adapter):
    """Model Runner V2: requests have slots, which are reused without notice; token ids are on the device.

    The decode path reads nothing back. A new request's tokens are copied to the host while the base model computes
    its prompt; after that they are read only for a context that has lost its blocks.
    """

    def __init__(self, guidance: Guidance | None, resolve: Resolve, req_states: LogitsProcRequestState) -> None:
        super().__init__(guidance, resolve)
        self.req_states = req_states
        self.states: list[RequestState | None] = [None] * req_states.max_num_reqs  # by slot
        self.asked = np.zeros(req_states.max_num_reqs, bool)
        """[max_num_reqs] slots whose request asked for guidance"""
        self.arrived: dict[int, HostCopy | None] = {}  # slot -> the tokens of a request that has not begun

    def add_request(self, slot: int, sampling_params: SamplingParams) -> bool:
        self.end(self.states[slot])
        self.states[slot] = state = self.new_state(sampling_params)
        self.asked[slot] = state is not None
        self.arrived.pop(slot, None)
        if state is not None and not state.failed:
            self.arrived[slot] = None
        return state is not None

    def apply_staged_writes(self) -> None:
        """Before the base model's forward: begin to copy the tokens of new requests to the host."""
        new = [slot for slot, tokens in self.arrived.items() if tokens is None]
        if new:
            self.guide([self.states[slot] for slot in new], lambda: self._copy_tokens(new))

    def _copy_tokens(self, slots: list[int]) -> None:
        for slot in slots:
            length = self.req_states.prefill_len.np[slot]
            self.arrived[slot] = HostCopy(self.req_states.all_token_ids.gpu[slot, :length])

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        slots, num_tokens = ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np[: len(ctx.idx_mapping_np)]
        # What a row samples before its prompt is whole is thrown away.
        asked = np.flatnonzero(self.asked[slots] & (num_tokens >= self.req_states.prefill_len.np[slots]))
        if not len(asked):
            return
        states = {int(slot): self.states[slot] for slot in slots[asked]}
        self.guide(list(states.values()), lambda: self._guide(logits, ctx, asked))
        for slot, state in states.items():
            if state.failed:
                rows = ctx.expanded_idx_mapping == slot
                logits.masked_fill_(rows.unsqueeze(1), float("-inf"))
                logits[:, state.stop_token_id].masked_fill_(rows, 0.0)

    def _guide(self, logits: torch.Tensor, ctx: LogitsContext, asked: np.ndarray) -> None:
        """``asked``: places in ``ctx.idx_mapping_np`` of the requests that this step samples for."""
        slots = ctx.idx_mapping_np[asked]
        fed: dict[int, list[int]] = {}  # of the requests that begin with this step
        for slot in sorted(self.arrived.keys() & set(slots.tolist())):
            tokens = self.arrived.pop(slot)
            if self.states[slot].failed:
                continue
            fed[slot] = tokens.tolist()
            self.begin(slot, self.states[slot], fed[slot][: self.req_states.prompt_len.np[slot]])
        guided = asked[[not self.states[slot].failed for slot in slots]]
        if len(guided):
            self.guidance.apply(logits, self._batch(ctx, guided, fed))

    def _batch(self, ctx: LogitsContext, guided: np.ndarray, fed: dict[int, list[int]]) -> GuidedBatch:
        """``guided``: places in ``ctx.idx_mapping_np`` of the requests to guide."""
        device, num_rows = self.guidance.device, len(ctx.pos)
        slots = ctx.idx_mapping_np[guided].astype(np.int64)
        if num_rows == len(ctx.idx_mapping_np):  # a row for each request
            rows = to_device(guided, device, torch.int64)
            row_slots = to_device(slots, device, torch.int64)
            positions, token_ids = ctx.pos[rows], ctx.input_ids[rows]
        else:
            # Which rows are whose is known on the device. Guided ones first; the others among these are left alone.
            guided_slot = np.full(self.req_states.max_num_reqs, self.guidance.no_slot, np.int64)
            guided_slot[slots] = slots
            row_slots = to_device(guided_slot, device, torch.int64)[ctx.expanded_idx_mapping]
            left_alone = row_slots == self.guidance.no_slot
            most = min(num_rows, len(slots) * self.guidance.max_rows_per_request)
            rows = left_alone.int().argsort(stable=True)[:most]
            row_slots = row_slots[rows]
            positions = ctx.pos[rows].masked_fill(left_alone[rows], 0)
            token_ids = ctx.input_ids[rows]
        prompt_len = self.req_states.prompt_len.np
        return GuidedBatch(
            slots=slots,
            num_tokens=ctx.seq_lens_upper_bound_np[guided].astype(np.int64),
            exact=self.guidance.max_rows_per_request == 1,
            rows=rows,
            row_slots=row_slots,
            positions=positions,
            token_ids=token_ids,
            output_ids=lambda slot: fed[slot][prompt_len[slot] :] if slot in fed else self._output_ids(slot),
        )

    def _output_ids(self, slot: int) -> list[int]:
        """A request's settled tokens after its prompt. Synchronizes with the device."""
        start, stop = int(self.req_states.prompt_len.np[slot]), int(self.req_states.total_len.gpu[slot])
        return self.req_states.all_token_ids.gpu[slot, start:stop].tolist()


class HostCopy:
    """A tensor on its way to the host, behind what the stream was already told to do."""

    def __init__(self, source: torch.Tensor) -> None:
        on_gpu = source.is_cuda
        self._copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=on_gpu).copy_(source, non_blocking=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record()

    def tolist(self) -> list:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()
