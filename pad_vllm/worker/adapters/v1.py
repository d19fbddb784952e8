"""The V1 runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.utils import apply_penalties, get_token_bin_counts_and_mask
from vllm.utils.torch_utils import make_tensor_with_pad
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates

from pad_vllm.kernels import OutputTokens
from pad_vllm.reward.device import to_device
from pad_vllm.reward.pace import Lengths, Pace
from pad_vllm.worker.adapters import Adapter, RequestState, Resolve
from pad_vllm.worker.batch import GuidedBatch, Layout, RequestSlot
from pad_vllm.worker.guidance import Guidance
from pad_vllm.worker.traces import Generated, TraceRecord

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

logger = init_logger(f"vllm.{__name__}")


@dataclass(eq=False)
class V1RequestState(RequestState):
    """With the runner's own lists of its tokens; the second one grows."""

    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)


class V1Batch:
    """The guided requests, as long as they stay in their rows: what is in it for a step is made once."""

    def __init__(self, rows: dict[int, V1RequestState], vocab_size: int, device: torch.device) -> None:
        states = list(rows.values())
        penalize = any(state.controls.penalizes for state in states)
        self.penalties = Penalties(rows, vocab_size, device) if penalize else None
        slots = np.array([state.slot for state in states], np.int64)
        layout = Layout(
            slots=slots,
            logits_rows=to_device(list(rows), device, torch.int64),
            row_slots=to_device(slots, device, torch.int64),
        )
        by_slot = {state.slot: state for state in states}
        self.output_ids = [state.output_ids for state in states]
        self.prompt_lens = np.array([len(state.prompt_ids) for state in states])
        self.last_prompt_ids = [state.prompt_ids[-1] for state in states]
        self.one_more: list[int] = []  # generated tokens of each, one more than in the last step
        self.device = device
        self.guided = GuidedBatch(
            layout=layout,
            num_tokens=Lengths(self.prompt_lens),
            exact=True,
            positions=None,
            token_ids=layout.logits_rows,  # until there is a step
            output_ids=lambda slot: by_slot[slot].output_ids,
            output_tokens=None if self.penalties is None else self.penalties.output_tokens,
        )

    def step(self, pace: Pace) -> GuidedBatch:
        """The batch, with the tokens that there are by now.

        Raises:
            RuntimeError: the runner does not show one.
        """
        guided, num_generated = self.guided, [len(ids) for ids in self.output_ids]
        if num_generated == self.one_more:
            guided.step = pace.further()
            guided.num_tokens.advance()
            last_ids = [ids[-1] for ids in self.output_ids]
        else:
            guided.step, guided.num_tokens = pace.changed(), Lengths(self.prompt_lens + num_generated)
            of_prompts = self.last_prompt_ids
            last_ids = [
                ids[-1] if ids else of_prompt for ids, of_prompt in zip(self.output_ids, of_prompts, strict=True)
            ]
        self.one_more = [n + 1 for n in num_generated]
        if min(last_ids) < 0:
            raise RuntimeError("the runner does not show a request's last token")
        guided.last_ids = np.array(last_ids)
        guided.token_ids = to_device(guided.last_ids, self.device, torch.int64)
        return guided


class V1Adapter(Adapter):
    """The V1 runner: rows are requests, announced as they come, go and move; token ids are on the host."""

    def __init__(self, guidance: Guidance | None, resolve: Resolve) -> None:
        super().__init__(guidance, resolve)
        self.states: dict[int, V1RequestState] = {}  # by row
        self.free_slots = list(range(guidance.no_slot)) if guidance else []
        self.rows: dict[int, V1RequestState] = {}  # those to guide
        self.any_failed = False  # whether a request in the batch may have
        self.batch: V1Batch | None = None  # of these; None: requests have come, gone or moved

    def update_state(self, batch_update: BatchUpdate) -> None:
        self.batch = None
        if self.traces is not None:
            self.traces.collect()
        before = list(self.states.values())
        process_dict_updates(self.states, batch_update, self._new_state)
        after = set(self.states.values())
        for state in before:  # in an order that is the same on all ranks, as everything here must be
            if state not in after:
                if state.slot is not None:
                    self.free_slots.append(state.slot)
                self.end(state)
        self.any_failed = any(state.failed for state in self.states.values())

    def _new_state(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> V1RequestState | None:
        state = self.new_state(params, self._request_id(output_ids))
        if state is None:
            return None
        if state.record is not None:
            state.record.output_ids, state.record.prompt_ids = output_ids, prompt_ids or []
        return V1RequestState(**vars(state), prompt_ids=prompt_ids or [], output_ids=output_ids)

    def _request_id(self, output_ids: list[int]) -> str | None:
        """The runner's own id of a request, where it is traced: by its list of generated tokens."""
        runner = None if self.traces is None else self.traces.runner()
        if runner is None:
            return None
        return next((key for key, one in runner.requests.items() if one.output_token_ids is output_ids), None)

    def read_tail(self, record: TraceRecord) -> Generated | None:
        return None if record.output_ids is None else Generated(list(record.output_ids), len(record.prompt_ids))

    def fail(self, states: list[RequestState]) -> None:
        super().fail(states)
        self.any_failed, self.batch = True, None

    def apply(self, logits: torch.Tensor, ctx: None) -> None:
        if not self.states:
            return
        if self.batch is None:
            self.rows = {row: state for row, state in self.states.items() if self._has_begun(state)}
        if self.rows:
            try:
                if self.batch is None:
                    self.batch = V1Batch(self.rows, logits.shape[1], self.guidance.device)
                self._guide(logits, self.batch)
            except Exception as error:
                self._guide_each(logits, error)
            self.show()
        if self.any_failed:
            for row, state in self.states.items():
                if state.failed:
                    logits[row] = float("-inf")
                    logits[row, state.stop_token_id] = 0.0

    def _has_begun(self, state: V1RequestState) -> bool:
        if state.slot is None and not state.failed:
            slot = RequestSlot(self.free_slots.pop())
            if not self.begin(slot, state, state.prompt_ids):
                self.free_slots.append(slot)
        return not state.failed

    def _guide(self, logits: torch.Tensor, batch: V1Batch) -> None:
        guided, penalties = batch.step(self.pace), batch.penalties
        if penalties is None:
            self.guidance.apply(logits, guided)
            return
        penalties.apply_(logits)
        try:
            self.guidance.apply(logits, guided)
        finally:
            self._invert(logits, penalties)

    def _invert(self, logits: torch.Tensor, penalties: Penalties) -> None:
        """Take the penalties out again, of guided rows or of what a failed step has left as it was."""
        try:
            return penalties.invert_(logits)
        except Exception as error:
            logger.error("PAD cannot take a step's penalties out again: trying one by one.", exc_info=error)
        for row, state in penalties.penalized.items():
            try:
                alone = Penalties({row: state}, penalties.vocab_size, penalties.device)
                alone.count()
                alone.invert_(logits)
            except Exception:
                logger.exception("PAD cannot guide a request: ending it.")
                self.fail([state])

    def _guide_each(self, logits: torch.Tensor, error: Exception) -> None:
        row_of: dict[RequestState, int] = {state: row for row, state in self.rows.items()}

        def guide(state: RequestState) -> None:
            row = row_of[state]
            self._guide(logits, V1Batch({row: self.rows[row]}, logits.shape[1], self.guidance.device))

        self.guide_each(list(row_of), error, guide, lambda state: logits[row_of[state]].unsqueeze(0))
        self.batch = None


class Penalties:
    """Presence, frequency and repetition penalties of the guided rows that have them.

    V1's sampler applies them after custom logits processors, and PAD's z has them in (as on Model Runner V2). So they
    are applied to z, and what guidance made of it is mapped to that which the sampler will penalize into it. A
    penalty is a map of each token's logit by itself, and keeps its sign up to the subtraction: it can be inverted.

    Args:
        rows: row of the logits -> request, all guided ones.
        vocab_size: of the base model; with this id, which is no token, vLLM pads.
        device: of the logits.
    """

    def __init__(self, rows: dict[int, V1RequestState], vocab_size: int, device: torch.device) -> None:
        self.penalized = penalized = {row: state for row, state in rows.items() if state.controls.penalizes}
        place = {row: i for i, row in enumerate(penalized)}
        self.vocab_size, self.device = vocab_size, device
        self.rows = to_device(list(penalized), device, torch.int64)
        self.places = to_device([place.get(row, 0) for row in rows], device, torch.int64)
        """[R] int64: of all guided rows; those without penalties count nothing, and have any place"""
        # vLLM's operators read each of the three as memory without gaps.
        values = np.array([state.controls.penalties for state in penalized.values()], np.float32)
        self.presence, self.frequency, self.repetition = to_device(values.T.copy(), device, torch.float32).unbind()
        self.prompt_ids = self._pad([state.prompt_ids for state in penalized.values()])
        self._outputs = [state.output_ids for state in penalized.values()]
        self.output_ids = self.prompt_ids[:, :0]

    def _pad(self, token_ids: list[list[int]]) -> torch.Tensor:
        return make_tensor_with_pad(token_ids, pad=self.vocab_size, dtype=torch.int64, device="cpu").to(self.device)

    def count(self) -> None:
        """Take the tokens that there are by now."""
        self.output_ids = self._pad(self._outputs)

    def apply_(self, logits: torch.Tensor) -> None:
        """Penalize, in place, by vLLM's own function; with the tokens that there are by now."""
        self.count()
        logits[self.rows] = apply_penalties(
            logits[self.rows], self.prompt_ids, self.output_ids, self.presence, self.frequency, self.repetition
        )

    def output_tokens(self) -> OutputTokens:
        """What :meth:`apply_` counted, for the guidance step."""
        lengths = to_device([len(ids) for ids in self._outputs], self.device, torch.int64)
        return OutputTokens(
            token_ids=self.output_ids.int(),
            rows=self.places,
            begin=torch.zeros_like(self.places),
            end=lengths[self.places],
            draft_ids=self.places.new_empty(len(self.places), 0, dtype=torch.int32),
        )

    def invert_(self, logits: torch.Tensor) -> None:
        """The inverse of :meth:`apply_`, in place."""
        values = logits[self.rows]
        counts, generated = get_token_bin_counts_and_mask(self.output_ids, values.shape[1], len(values))
        _, prompted = get_token_bin_counts_and_mask(self.prompt_ids, values.shape[1], len(values))
        values += self.frequency.unsqueeze(1) * counts + self.presence.unsqueeze(1) * generated
        repetition = self.repetition.unsqueeze(1)
        unrepeated = torch.where(values > 0, values * repetition, values / repetition)
        # An absurd penalty overflows: infinity would come back from the sampler as NaN.
        limit = torch.finfo(values.dtype)
        unrepeated = unrepeated.clamp(limit.min, limit.max).masked_fill(values == float("-inf"), float("-inf"))
        logits[self.rows] = torch.where(prompted | generated, unrepeated, values)
