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

from pad_vllm.adapters import Adapter, RequestState, Resolve
from pad_vllm.guidance import Guidance, GuidedBatch
from pad_vllm.reward.backend import to_device

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

logger = init_logger(f"vllm.{__name__}")

NO_PENALTIES = (0.0, 0.0, 1.0)


@dataclass(eq=False)
class V1RequestState(RequestState):
    """With the runner's own lists of its tokens; the second one grows."""

    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    penalties: tuple[float, float, float] | None = None
    """Presence, frequency, repetition; None where they change nothing."""


class V1Adapter(Adapter):
    """The V1 runner: rows are requests, announced as they come, go and move; token ids are on the host."""

    def __init__(self, guidance: Guidance | None, resolve: Resolve) -> None:
        super().__init__(guidance, resolve)
        self.states: dict[int, V1RequestState] = {}  # by row
        self.free_slots = list(range(guidance.no_slot)) if guidance else []

    def update_state(self, batch_update: BatchUpdate) -> None:
        before = list(self.states.values())
        process_dict_updates(self.states, batch_update, self._new_state)
        after = set(self.states.values())
        for state in before:  # in an order that is the same on all ranks, as everything here must be
            if state not in after:
                if state.context is not None:
                    self.free_slots.append(state.context.index)
                self.end(state)

    def _new_state(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> V1RequestState | None:
        state = self.new_state(params)
        if state is None:
            return None
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        return V1RequestState(
            **vars(state),
            prompt_ids=prompt_ids or [],
            output_ids=output_ids,
            penalties=penalties if penalties != NO_PENALTIES else None,
        )

    def apply(self, logits: torch.Tensor, ctx: None) -> None:
        rows = {row: state for row, state in self.states.items() if not state.failed and self._ready(state)}
        if rows:
            self.guide(list(rows.values()), lambda: self._guide(logits, rows))
        for row, state in self.states.items():
            if state.failed:
                logits[row] = float("-inf")
                logits[row, state.stop_token_id] = 0.0

    def _guide(self, logits: torch.Tensor, rows: dict[int, V1RequestState]) -> None:
        penalized = {row: state for row, state in rows.items() if state.penalties is not None}
        penalties = Penalties(penalized, logits) if penalized else None
        if penalties is not None:
            penalties.apply_(logits)
        self.guidance.apply(logits, self._batch(rows))
        if penalties is not None:
            penalties.invert_(logits)

    def _ready(self, state: V1RequestState) -> bool:
        if state.context is None:
            slot = self.free_slots.pop()
            if not self.begin(slot, state, state.prompt_ids):
                self.free_slots.append(slot)
        elif state.output_ids and state.output_ids[-1] < 0:
            logger.error("PAD cannot guide a request whose last token the runner does not show: ending it.")
            self.fail([state])
        return not state.failed

    def _batch(self, rows: dict[int, V1RequestState]) -> GuidedBatch:
        device = self.guidance.device
        by_slot = {state.context.index: state for state in rows.values()}
        slots = np.array(list(by_slot), np.int64)
        num_tokens = np.array([len(s.prompt_ids) + len(s.output_ids) for s in rows.values()], np.int64)
        last = [(s.output_ids or s.prompt_ids)[-1] for s in rows.values()]
        return GuidedBatch(
            slots=slots,
            num_tokens=num_tokens,
            exact=True,
            rows=to_device(list(rows), device, torch.int64),
            row_slots=to_device(slots, device, torch.int64),
            positions=to_device(num_tokens - 1, device, torch.int64),
            token_ids=to_device(last, device, torch.int32),
            output_ids=lambda slot: by_slot[slot].output_ids,
        )


class Penalties:
    """Presence, frequency and repetition penalties of some rows.

    V1's sampler applies them after custom logits processors, and PAD's z has them in (as on Model Runner V2). So they
    are applied to z, and what guidance made of it is mapped to that which the sampler will penalize into it. A
    penalty is a map of each token's logit by itself, and keeps its sign up to the subtraction: it can be inverted.

    Args:
        states: row of the logits -> request, those with penalties.
        logits: [N, V].
    """

    def __init__(self, states: dict[int, V1RequestState], logits: torch.Tensor) -> None:
        vocab_size, device = logits.shape[1], logits.device
        self.rows = to_device(list(states), device, torch.int64)
        values = to_device([state.penalties for state in states.values()], device, torch.float32)
        self.presence, self.frequency, self.repetition = values.unbind(1)
        # vLLM pads with the first id that is no token.
        self.prompt_ids, self.output_ids = (
            make_tensor_with_pad(ids, pad=vocab_size, dtype=torch.int64, device="cpu").to(device)
            for ids in ([s.prompt_ids for s in states.values()], [s.output_ids for s in states.values()])
        )

    def apply_(self, logits: torch.Tensor) -> None:
        """Penalize, in place, by vLLM's own function."""
        logits[self.rows] = apply_penalties(
            logits[self.rows], self.prompt_ids, self.output_ids, self.presence, self.frequency, self.repetition
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
