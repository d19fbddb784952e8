"""Model Runner V2."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from pad_vllm.kernels import OutputTokens
from pad_vllm.params import PAD
from pad_vllm.reward.device import HostCopy, to_device
from pad_vllm.reward.pace import Lengths
from pad_vllm.worker.adapters import Adapter, RequestState, Resolve
from pad_vllm.worker.batch import GuidedBatch, Layout, RequestSlot
from pad_vllm.worker.drafter import UNGUIDED, Draws
from pad_vllm.worker.guidance import Guidance
from pad_vllm.worker.slots import SamplingControls
from pad_vllm.worker.traces import Generated, TraceRecord

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

logger = init_logger(f"vllm.{__name__}")


class V2Adapter(Adapter):
    """Model Runner V2: requests have slots, which are reused without notice; token ids are on the device.

    The decode path reads nothing back. A new request's tokens are copied to the host while the base model computes
    its prompt; after that they are read only for a context that has lost its blocks.
    """

    def __init__(self, guidance: Guidance | None, resolve: Resolve, req_states: LogitsProcRequestState) -> None:
        super().__init__(guidance, resolve)
        self.req_states = req_states
        self.drafter = None if guidance is None else guidance.drafter
        self.states: list[RequestState | None] = [None] * req_states.max_num_reqs  # by slot
        self.asked = np.zeros(req_states.max_num_reqs, bool)
        """[max_num_reqs] slots whose request asked for guidance; and, if the reward model drafts, of all others"""
        self.failed = np.zeros(req_states.max_num_reqs, bool)
        """[max_num_reqs] of these, slots whose request was given up"""
        self.num_tokens = np.zeros(req_states.max_num_reqs, np.int64)
        """[max_num_reqs] upper bound on the tokens of a slot's request before its last sampling step"""
        self.sampled = np.zeros(req_states.max_num_reqs, bool)
        """[max_num_reqs] slots whose request is not greedy"""
        self.arrived: dict[int, HostCopy | None] = {}  # slot -> the tokens of a request that has not begun
        self.last: tuple[np.ndarray, Layout] | None = None  # places of the guided requests in the last step's batch
        self.last_drafted: tuple[np.ndarray, Layout] | None = None  # and of those that were drafted for
        self.last_full: Layout | None = None  # where each request in the batch has rows of all its drafts
        self.last_step: Step | None = None  # where the next may be the same, a token further

    def add_request(self, slot: int, sampling_params: SamplingParams) -> bool:
        self._forget()
        self.end(self.states[slot])
        self.states[slot] = state = self.new_state(sampling_params, self._request_id(slot))
        if state is None and self.drafter is not None:
            asked = PAD.from_extra_args(sampling_params.extra_args)
            unguided = replace(UNGUIDED, cache_salt=asked.cache_salt) if asked else UNGUIDED
            self.states[slot] = state = RequestState(unguided, SamplingControls(), 0)
        self.asked[slot] = state is not None
        self.failed[slot] = state is not None and state.failed
        self.sampled[slot] = sampling_params.temperature > 0
        self.arrived.pop(slot, None)
        if state is not None and not state.failed:
            self.arrived[slot] = None
        return state is not None

    def _request_id(self, slot: int) -> str | None:
        """The runner's own id of a slot's new request, where requests are traced; the last one's values are saved."""
        if self.traces is None:
            return None
        self.traces.collect()
        self.traces.park(RequestSlot(slot))
        runner = self.traces.runner()
        return None if runner is None else runner.req_states.index_to_req_id.get(slot)

    def read_tail(self, record: TraceRecord) -> Generated | None:
        if record.slot is None or self.traces is None:
            return None
        slots, states, num_prompt = self.req_states.all_token_ids.gpu, self.req_states, len(record.prompt_ids)
        total, first = states.total_len.gpu[record.slot].view(1), None
        if self.traces.has_text:
            first, num = num_prompt, min(record.max_tokens, slots.shape[1] - num_prompt)
            ids = slots[record.slot, first : first + num]
        else:
            at = total - 1 - torch.arange(self.traces.num_places - 1, -1, -1, device=total.device)
            ids = slots[record.slot][at.clamp(min=0)]
        return Generated(HostCopy(torch.cat([total.int(), ids.int()])), first)

    def _state(self, slot: int) -> RequestState:
        """Of a slot whose request asked for guidance, or is drafted for."""
        state = self.states[slot]
        assert state is not None
        return state

    def fail(self, states: list[RequestState]) -> None:
        super().fail(states)
        self._forget()
        for slot, state in enumerate(self.states):
            if state is None or not state.failed:
                self.failed[slot] = False
            elif state.is_guided:
                self.failed[slot] = True
            else:
                self.failed[slot] = self.asked[slot] = False  # it goes on without drafts

    def _forget(self) -> None:
        self.last = self.last_drafted = self.last_full = self.last_step = None

    def apply_staged_writes(self) -> None:
        """Before the base model's forward: begin to copy the tokens of new requests to the host."""
        if self.traces is not None:
            self.traces.collect()
        for slot in [slot for slot, tokens in self.arrived.items() if tokens is None]:
            try:
                length = self.req_states.prefill_len.np[slot]
                self.arrived[slot] = HostCopy(self.req_states.all_token_ids.gpu[slot, :length])
            except Exception:
                logger.exception("PAD cannot read a request's tokens: ending it.")
                self.fail([self._state(slot)])

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        slots, num_tokens = ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np[: len(ctx.idx_mapping_np)]
        if self.last_step is not None and self.last_step.advance(slots, num_tokens):
            asked, self.last_step.batch.step = self.last_step.asked, self.pace.further()
        else:
            self.last_step, asked = None, self._asked(slots, num_tokens)
        if not len(asked):
            return
        try:
            if self.last_step is None:
                self._guide(logits, ctx, asked)
            else:
                self._guide_again(logits, ctx, self.last_step.batch)
        except Exception as error:
            asked = self._asked(slots, num_tokens)
            self._guide_each(logits, ctx, asked, error)
        self.show()
        if self.last_step is None:
            for slot in slots[asked[self.failed[slots[asked]]]]:
                rows = ctx.expanded_idx_mapping == int(slot)
                logits.masked_fill_(rows.unsqueeze(1), float("-inf"))
                logits[:, self._state(slot).stop_token_id].masked_fill_(rows, 0.0)

    def _guide_each(self, logits: torch.Tensor, ctx: LogitsContext, asked: np.ndarray, error: Exception) -> None:
        place_of = {self._state(ctx.idx_mapping_np[place]): place for place in asked.tolist()}
        self.last = self.last_step = None  # a step further than what was guided

        def guide(state: RequestState) -> None:
            self._guide(logits, ctx, np.array([place_of[state]]))

        def logits_of(state: RequestState) -> torch.Tensor:
            return logits[ctx.expanded_idx_mapping == int(ctx.idx_mapping_np[place_of[state]])]

        self.guide_each([state for state in place_of if not state.failed], error, guide, logits_of)
        self.last = self.last_step = None

    def _asked(self, slots: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """Places in the batch of requests that asked for guidance, and that this step samples for."""
        self.num_tokens[slots] = num_tokens
        # What a row samples before its prompt is whole is thrown away.
        return np.flatnonzero(self.asked[slots] & (num_tokens >= self.req_states.prefill_len.np[slots]))

    def _guide_again(self, logits: torch.Tensor, ctx: LogitsContext, batch: GuidedBatch) -> None:
        """Guide the last step's batch, which has advanced."""
        batch.token_ids = ctx.input_ids[batch.layout.logits_rows]
        batch.output_ids = self._output_ids
        batch.output_tokens, batch.logits_positions = lambda: self._output_tokens(ctx, batch.layout), ctx.pos
        self.guidance.apply(logits, batch)

    def _guide(self, logits: torch.Tensor, ctx: LogitsContext, asked: np.ndarray) -> None:
        """``asked``: places in ``ctx.idx_mapping_np`` of the requests that this step samples for."""
        slots = ctx.idx_mapping_np[asked]
        fed: dict[int, list[int]] = {}  # of the requests that begin with this step
        if self.arrived:
            for slot in sorted(self.arrived.keys() & set(slots.tolist())):
                tokens, state = self.arrived.pop(slot), self._state(slot)
                if state.failed:
                    continue
                try:
                    if tokens is None:
                        raise RuntimeError("the runner has not staged its writes")
                    fed[slot] = tokens.tolist()
                except Exception:
                    logger.exception("PAD cannot read a request's tokens: ending it.")
                    self.fail([state])
                    continue
                self.begin(RequestSlot(slot), state, fed[slot][: self.req_states.prompt_len.np[slot]])
        guided = asked[self.asked[slots] & ~self.failed[slots]]
        if not len(guided):
            return
        layout = self._layout(ctx, guided)
        exact = self.guidance.max_rows_per_request == 1
        positions = local_positions = None
        token_ids = ctx.input_ids
        if layout.last_rows is not None:  # all rows, as they are
            local_positions, positions = ctx.expanded_local_pos, ctx.pos
        else:
            token_ids = token_ids[layout.logits_rows]
            if not exact:
                local_positions = ctx.expanded_local_pos[layout.logits_rows]
                positions = ctx.pos[layout.logits_rows]
                if len(ctx.pos) > len(ctx.idx_mapping_np):
                    positions = positions.masked_fill(layout.row_slots == self.guidance.no_slot, 0)
        if local_positions is not None:
            local_positions = local_positions.long()
        prompt_len = self.req_states.prompt_len.np
        batch = GuidedBatch(
            layout=layout,
            num_tokens=Lengths(ctx.seq_lens_upper_bound_np[guided].astype(np.int64)),
            exact=exact,
            positions=positions,
            token_ids=token_ids,
            output_ids=lambda slot: fed[slot][prompt_len[slot] :] if slot in fed else self._output_ids(slot),
            output_tokens=lambda: self._output_tokens(ctx, layout),
            local_positions=local_positions,
            logits_positions=ctx.pos,
            step=self.pace.changed(),
        )
        self.guidance.apply(logits, batch)
        # Not where one still reads its prompt, or is given up.
        if exact and len(guided) == np.count_nonzero(self.asked[ctx.idx_mapping_np]):
            num_tokens = ctx.seq_lens_upper_bound_np[: len(ctx.idx_mapping_np)]
            self.last_step = Step(ctx.idx_mapping_np, num_tokens, asked, batch)

    def draft(
        self, slots: np.ndarray, last_sampled: torch.Tensor, num_drafts: int, draws: Draws
    ) -> tuple[np.ndarray, bool]:
        """Draft for the requests of a batch that have sampled in this step.

        Args:
            slots: [num_reqs] of the batch.
            last_sampled: [max_num_reqs] int64, by slot.
            num_drafts, draws: see :meth:`Drafter.draft`.

        Returns:
            Places in the batch, and whether there are drafts of these.
        """
        num_tokens = self.num_tokens[slots]
        places = np.flatnonzero(
            self.asked[slots] & ~self.failed[slots] & (num_tokens >= self.req_states.prefill_len.np[slots])
        )
        if not len(places):
            return places, False
        try:
            layout = self._draft_layout(places, slots[places].astype(np.int64))
            batch = GuidedBatch(
                layout=layout,
                num_tokens=Lengths(num_tokens[places] + 1),
                exact=False,
                positions=self.req_states.total_len.gpu[layout.row_slots] - 1,
                token_ids=last_sampled[layout.row_slots],
                output_ids=self._output_ids,
            )
            assert self.drafter is not None  # the speculator is ours
            found = self.drafter.draft(batch, num_drafts, draws)
        except Exception:
            logger.exception("The reward model could not draft in a step.")
            found = False
        self.guidance.stats.drafted_tokens += found * len(places) * num_drafts
        self.guidance.stats.steps_without_drafts += not found
        return places, found

    def _draft_layout(self, places: np.ndarray, slots: np.ndarray) -> Layout:
        if self.last_drafted is not None:
            last_places, layout = self.last_drafted
            if np.array_equal(last_places, places) and np.array_equal(layout.slots, slots):
                return layout
        device = self.guidance.device
        layout = Layout(slots, to_device(places, device, torch.int64), to_device(slots, device, torch.int64))
        self.last_drafted = places, layout
        return layout

    def _output_tokens(self, ctx: LogitsContext, layout: Layout) -> OutputTokens:
        """The tokens that penalties count, where they are: settled ones in the runner's state, drafts in the step's."""
        local = ctx.expanded_local_pos[layout.logits_rows].unsqueeze(1)
        before = torch.arange(self.guidance.max_rows_per_request - 1, device=self.guidance.device)
        drafts = ctx.input_ids[(layout.logits_rows.unsqueeze(1) - before).clamp(min=0)]
        slots = layout.row_slots.clamp(max=self.req_states.max_num_reqs - 1)
        return OutputTokens(
            token_ids=self.req_states.all_token_ids.gpu,
            rows=slots,
            begin=self.req_states.prompt_len.gpu[slots].long(),
            end=ctx.pos[layout.logits_rows] - local.squeeze(1) + 1,
            draft_ids=drafts.where(before < local, -1).int(),
        )

    def _layout(self, ctx: LogitsContext, guided: np.ndarray) -> Layout:
        """``guided``: places in ``ctx.idx_mapping_np`` of the requests to guide."""
        device, num_rows = self.guidance.device, len(ctx.pos)
        slots = ctx.idx_mapping_np[guided].astype(np.int64)
        if num_rows == len(ctx.idx_mapping_np):  # a row for each request
            if self.last is not None:
                places, layout = self.last
                if np.array_equal(places, guided) and np.array_equal(layout.slots, slots):
                    return layout
            rows, row_slots = to_device(guided, device, torch.int64), to_device(slots, device, torch.int64)
            self.last = guided, Layout(slots, rows, row_slots)
            return self.last[1]
        most = self.guidance.max_rows_per_request
        if num_rows == most * len(slots) and len(slots) == len(ctx.idx_mapping_np):
            if self.last_full is None or not np.array_equal(self.last_full.slots, slots):
                row_slots = to_device(slots.repeat(most), device, torch.int64)
                last_rows = to_device(np.arange(most - 1, num_rows, most), device, torch.int64)
                self.last_full = Layout(slots, torch.arange(num_rows, device=device), row_slots, last_rows)
            return self.last_full
        # Which rows are whose is known on the device. Guided ones first; the others among these are left alone.
        guided_slot = np.full(self.req_states.max_num_reqs, self.guidance.no_slot, np.int64)
        guided_slot[slots] = slots
        row_slots = to_device(guided_slot, device, torch.int64)[ctx.expanded_idx_mapping]
        rows = (row_slots == self.guidance.no_slot).int().argsort(stable=True)[: most * len(slots)]
        return Layout(slots, rows, row_slots[rows])

    def _output_ids(self, slot: int) -> list[int]:
        """A request's settled tokens after its prompt. Synchronizes with the device."""
        start, stop = int(self.req_states.prompt_len.np[slot]), int(self.req_states.total_len.gpu[slot])
        return self.req_states.all_token_ids.gpu[slot, start:stop].tolist()


class Step:
    """A step of a batch whose guided requests all read a prompt no more, each with one row: the next step is often the
    same, a token further.

    Args:
        slots, num_tokens: [num_reqs] of all requests in the batch.
        asked: places in it of the guided ones.
        batch: of these.
    """

    def __init__(self, slots: np.ndarray, num_tokens: np.ndarray, asked: np.ndarray, batch: GuidedBatch) -> None:
        self.slots, self.asked, self.batch = slots.tobytes(), asked, batch
        self.one_more = [n + 1 for n in num_tokens.tolist()]

    def advance(self, slots: np.ndarray, num_tokens: np.ndarray) -> bool:
        """Become the next step, if that is what this is."""
        if slots.tobytes() != self.slots or num_tokens.tolist() != self.one_more:
            return False
        self.one_more = [n + 1 for n in self.one_more]
        self.batch.num_tokens.advance()
        return True
