"""The runner adapters: which rows of a step are guided, and where the tokens of their requests are.

An adapter tells :class:`~pad_vllm.worker.guidance.Guidance` what vLLM's runner does to its requests. Once the engine
runs, nothing may raise: an exception in a logits processor ends the engine for every client. A request that cannot be
guided gets end tokens instead, so that it ends at once (with ``ignore_eos``, when it has reached its length). It is
never answered without guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from pad_vllm.params import PAD, GuidanceParams
from pad_vllm.personas import admitted_persona
from pad_vllm.reward.block_manager import Context
from pad_vllm.reward.pace import Pace
from pad_vllm.worker.batch import RequestSlot
from pad_vllm.worker.board import Board
from pad_vllm.worker.guidance import Guidance
from pad_vllm.worker.slots import SamplingControls
from pad_vllm.worker.traces import Generated, TraceRecord, Traces

if TYPE_CHECKING:
    import torch
    from vllm.sampling_params import SamplingParams

logger = init_logger(f"vllm.{__name__}")

Resolve = Callable[[PAD | None, PAD | None], GuidanceParams | None]
"""Of what a request asks, and of the persona that it was admitted with."""


@dataclass(eq=False)
class RequestState:
    """A request in the batch that asked for guidance; ``failed`` once it can no longer be given."""

    params: GuidanceParams | None
    controls: SamplingControls
    stop_token_id: int
    slot: RequestSlot | None = None
    """None until the request has begun, and if it could not."""
    contexts: list[Context] = field(default_factory=list)
    failed: bool = False
    record: TraceRecord | None = None
    """None where it is not traced."""

    @property
    def is_guided(self) -> bool:
        """Else the reward model only drafts for it."""
        return self.params is None or self.params.guides


class Adapter:
    """What the two runners' adapters share: reading a request, the guided step, and failing closed."""

    def __init__(self, guidance: Guidance | None, resolve: Resolve) -> None:
        self._guidance = guidance
        self.resolve = resolve
        self.board: Board | None = None
        self.pace = Pace()
        if self.traces is not None:
            self.traces.attach(self.read_tail, self.show)

    @property
    def guidance(self) -> Guidance:
        """Of an engine with a reward model; others begin no request."""
        assert self._guidance is not None
        return self._guidance

    @property
    def traces(self) -> Traces | None:
        """None where nothing is traced."""
        return None if self._guidance is None else self._guidance.traces

    def read_tail(self, record: TraceRecord) -> Generated | None:
        """The last tokens of a request that is gone."""
        raise NotImplementedError

    def _record(
        self, key: str | None, params: GuidanceParams | None, sampling_params: SamplingParams
    ) -> TraceRecord | None:
        return None if self.traces is None else self.traces.arrive(key, params, sampling_params)

    def new_state(self, sampling_params: SamplingParams, key: str | None = None) -> RequestState | None:
        """None for a request that is not guided. ``key``: the engine's own id of it, if it is to be traced."""
        stop = sampling_params.stop_token_ids or sorted(sampling_params.all_stop_token_ids) or [0]
        controls = SamplingControls.of(sampling_params)
        try:
            extra_args = sampling_params.extra_args
            params = self.resolve(PAD.from_extra_args(extra_args), admitted_persona(extra_args))
            if params is None:
                return None
            return RequestState(params, controls, stop[0], record=self._record(key, params, sampling_params))
        except Exception:
            logger.exception("A request for PAD guidance got past admission and cannot be guided: ending it.")
            state = RequestState(None, controls, stop[0], record=self._record(key, None, sampling_params))
            self.fail([state])
            return state

    def begin(self, slot: RequestSlot, state: RequestState, prompt_ids: list[int]) -> bool:
        """Give a request its contexts, once its prompt is known. Returns whether it is guided."""
        try:
            assert state.params is not None  # else it has failed
            state.contexts = self.guidance.new_request(
                slot, state.params, state.controls, prompt_ids, state.stop_token_id
            )
            state.slot = slot
            if state.record is not None and self.traces is not None:
                self.traces.begin(slot, state.record, prompt_ids)
        except Exception as error:
            if not state.is_guided:
                logger.debug("PAD cannot draft for a request: %s", error)
            else:
                logger.exception("PAD cannot guide a request: ending it.")
            self.guidance.clear(slot)
            self.fail([state])
        return not state.failed

    def end(self, state: RequestState | None) -> None:
        """A request left the batch."""
        if state is not None and state.slot is not None:
            self.guidance.free(state.contexts)
            state.slot, state.contexts = None, []

    def guide_each(
        self,
        states: list[RequestState],
        error: Exception,
        guide: Callable[[RequestState], None],
        logits_of: Callable[[RequestState], torch.Tensor],
    ) -> None:
        """A step failed: guide its requests again, one by one, and end those that fail alone.

        Whatever failed, contexts are as they were, or are computed again. The base model's logits are gone only where
        the kernel has begun: it leaves a row no more than its candidates, and then nothing can be guided by it.

        Args:
            states: whose step it was.
            error: what it raised.
            guide: guides one of them.
            logits_of: its rows, [rows, V].
        """
        num_guided = sum(state.is_guided for state in states)
        has_written, self.guidance.has_written = self.guidance.has_written, False
        if len(states) == 1:
            logger.error("A step of PAD guidance failed for its one request.", exc_info=error)
            return self.fail(states)
        logger.error("A step of PAD guidance failed: guiding its %d requests one by one.", num_guided, exc_info=error)
        for state in states:
            if state.failed:
                continue
            try:
                if has_written and state.is_guided and state.params is not None:
                    num_left = logits_of(state).isfinite().sum(-1)
                    if bool((num_left <= state.params.top_k).any()):
                        raise RuntimeError("the step failed when it had written over the request's logits")
                guide(state)
            except Exception:
                logger.exception("PAD cannot guide a request: ending it.")
                self.fail([state])

    def fail(self, states: list[RequestState]) -> None:
        """Give requests up: from now on they get end tokens."""
        if self._guidance is not None:
            self._guidance.stats.failed_requests += sum(not state.failed and state.is_guided for state in states)
        for state in states:
            state.failed = True
            if state.record is not None:
                state.record.failed = True
        self.show()

    def show(self) -> None:
        """Bring the engine's board up to date."""
        if self.board is not None:
            self.guidance.show_stats(self.board)
