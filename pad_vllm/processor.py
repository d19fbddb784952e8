"""``PADLogitsProcessor``: one class for both of vLLM's runners, and the two adapters that it chooses from.

An adapter tells :class:`~pad_vllm.guidance.Guidance` which rows of a step are guided and where the tokens of their
requests are. Nothing here may raise once the engine runs: an exception in a logits processor ends the engine for
every client. A request that cannot be guided gets end tokens instead: it ends at once (with ``ignore_eos``, once it
has its length of them), and is never answered without guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from pad_vllm import admission
from pad_vllm.config import PADConfig
from pad_vllm.guidance import Guidance, GuidedBatch, GuidedRequest
from pad_vllm.params import PAD, GuidanceParams
from pad_vllm.reward.backend import to_device

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

logger = init_logger(f"vllm.{__name__}")

Resolve = Callable[[PAD | None], GuidanceParams | None]


class PADLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Guides requests by a personalized reward model, on the V1 runner and on Model Runner V2.

    Configured by ``additional_config["pad"]`` (:class:`~pad_vllm.config.PADConfig`); without it, nothing is loaded
    and nothing changes, and requests that ask for guidance are refused. Listed in ``logits_processors`` and
    registered as an entry point at once, it runs once.

    Raises:
        ValueError: at the start, for a configuration with which guidance could not work.

    Example:
        >>> llm = LLM(
        ...     model,
        ...     logits_processors=["pad_vllm:PADLogitsProcessor"],
        ...     additional_config={"pad": {"reward_model": reward_model}},
        ... )
        >>> llm.generate(prompts, SamplingParams(extra_args={"pad_preference": "Be concise."}))
    """

    _running: ClassVar[WeakValueDictionary[int, PADLogitsProcessor]] = WeakValueDictionary()  # by id of VllmConfig

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a bad request at admission, with ValueError (HTTP 400)."""
        admission.validate(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device_or_req_states: Any, is_pin_memory: bool = False) -> None:
        self.vllm_config = vllm_config
        self.adapter: V1Adapter | V2Adapter | None = None
        if id(vllm_config) in self._running:
            return  # loaded by entry point and by name: the first of the two does the work
        self._running[id(vllm_config)] = self

        config = PADConfig.from_additional_config(vllm_config.additional_config)
        on_v2 = isinstance(device_or_req_states, LogitsProcRequestState)
        guidance, resolve = None, refuse_unless_silent
        if config is not None:
            check_engine(vllm_config, on_v2)
            device = device_or_req_states.device if on_v2 else torch.device(device_or_req_states)
            guidance = Guidance(config, vllm_config, device)
            resolve = guidance.resolve
        self.adapter = V2Adapter(guidance, resolve, device_or_req_states) if on_v2 else V1Adapter(guidance, resolve)
        admission.announce(guidance.announcement() if guidance else admission.Announcement(configured=False), self)

    def is_argmax_invariant(self) -> bool:
        return self.adapter is None

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: requests joined, left or moved."""
        if self.adapter is not None and batch_update is not None:
            self.adapter.update_state(batch_update)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes slot ``req_idx``. Returns whether it is guided."""
        return self.adapter is not None and self.adapter.add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """V2: before the base model's forward."""
        if isinstance(self.adapter, V2Adapter):
            self.adapter.apply_staged_writes()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Guide the rows of guided requests in place; [num_rows, vocab_size] float32. ``ctx`` comes from V2 only."""
        if self.adapter is not None:
            self.adapter.apply(logits, ctx)
        return logits


def refuse_unless_silent(asked: PAD | None) -> None:
    """``resolve`` of an engine without a reward model."""
    if asked is not None:
        raise ValueError("this engine runs without a reward model")


def check_engine(vllm_config: VllmConfig, on_v2: bool) -> None:
    """Raise ValueError for an engine configuration with which guidance could not work."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    refused = {
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}: the reward model stands beside the whole base "
        "model; use tensor parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism splits sequences over ranks, and the reward model's would not be": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "data parallelism of a mixture of experts lets ranks step together, and only some have guided requests": (
            parallel.data_parallel_size > 1 and bool(parallel.is_moe_model)
        ),
        "enable_batch_sharded_sampling gives every rank other requests to sample": (
            parallel.enable_batch_sharded_sampling
        ),
        "on the V1 runner vLLM verifies drafts without logits processors; speculative decoding with guidance needs "
        "Model Runner V2": vllm_config.speculative_config is not None and not on_v2,
        "rejection_sample_method='synthetic' accepts drafts whatever the guided logits say": (
            vllm_config.speculative_config is not None
            and vllm_config.speculative_config.rejection_sample_method == "synthetic"
        ),
        "enable_prompt_embeds: the reward model reads tokens": model.enable_prompt_embeds,
        "enable_sleep_mode: Model Runner V2 discards the reward model in its sleep": on_v2 and model.enable_sleep_mode,
        "with async scheduling the V1 runner shows generated tokens only to listed logits processors; add "
        "--logits-processors pad_vllm:PADLogitsProcessor, or --no-async-scheduling": (
            not on_v2 and vllm_config.scheduler_config.async_scheduling and not model.logits_processors
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise ValueError(f"pad cannot guide this engine: {reason}")


@dataclass(eq=False)
class RequestState:
    """A request in the batch that asked for guidance; ``failed`` once it can no longer be given."""

    params: GuidanceParams | None
    stop_token_id: int
    guided: GuidedRequest | None = None
    failed: bool = False


class Adapter:
    """What the two runners' adapters share: reading a request, the guided step, and failing closed."""

    def __init__(self, guidance: Guidance | None, resolve: Resolve) -> None:
        self.guidance = guidance
        self.resolve = resolve

    def new_state(self, sampling_params: SamplingParams) -> RequestState | None:
        """None for a request that is not guided."""
        stop = sampling_params.stop_token_ids or sorted(sampling_params.all_stop_token_ids) or [0]
        try:
            params = self.resolve(PAD.from_extra_args(sampling_params.extra_args))
            return None if params is None else RequestState(params, stop[0])
        except Exception:
            logger.exception("A request for PAD guidance got past admission and cannot be guided: ending it.")
            return RequestState(None, stop[0], failed=True)

    def begin(self, slot: int, state: RequestState, prompt_ids: list[int]) -> bool:
        """Give a request its context, once its prompt is known. Returns whether it is guided."""
        try:
            state.guided = self.guidance.new_request(slot, state.params, prompt_ids)
        except Exception:
            logger.exception("PAD cannot guide a request: ending it.")
            state.failed = True
        return not state.failed

    def end(self, state: RequestState | None) -> None:
        """A request left the batch."""
        if state is not None and state.guided is not None:
            self.guidance.free(state.guided)
            state.guided = None

    def guide(self, logits: torch.Tensor, states: list[RequestState], make_batch: Callable[[], GuidedBatch]) -> None:
        """Guide a step, or give up the requests that it was for."""
        try:
            self.guidance.apply(logits, make_batch())
        except Exception:
            logger.exception("A step of PAD guidance failed: ending its %d requests.", len(states))
            for state in states:
                state.failed = True


class V1Adapter(Adapter):
    """The V1 runner: rows are requests, announced as they come, go and move; token ids are on the host."""

    def __init__(self, guidance: Guidance | None, resolve: Resolve) -> None:
        super().__init__(guidance, resolve)
        self.states: dict[int, V1RequestState] = {}  # by row
        self.free_slots = list(range(guidance.no_slot)) if guidance else []

    def update_state(self, batch_update: BatchUpdate) -> None:
        before = list(self.states.values())
        process_dict_updates(self.states, batch_update, self._new_state)
        for state in set(before) - set(self.states.values()):
            if state.guided is not None:
                self.free_slots.append(state.guided.slot)
            self.end(state)

    def _new_state(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> V1RequestState | None:
        state = self.new_state(params)
        return state and V1RequestState(**vars(state), prompt_ids=prompt_ids or [], output_ids=output_ids)

    def apply(self, logits: torch.Tensor, ctx: None) -> None:
        rows = {row: state for row, state in self.states.items() if not state.failed and self._ready(state)}
        if rows:
            self.guide(logits, list(rows.values()), lambda: self._batch(rows))
        for row, state in self.states.items():
            if state.failed:
                logits[row] = float("-inf")
                logits[row, state.stop_token_id] = 0.0

    def _ready(self, state: V1RequestState) -> bool:
        if state.guided is None:
            slot = self.free_slots.pop()
            if not self.begin(slot, state, state.prompt_ids):
                self.free_slots.append(slot)
        elif state.output_ids and state.output_ids[-1] < 0:
            logger.error("PAD cannot guide a request whose last token the runner does not show: ending it.")
            state.failed = True
        return not state.failed

    def _batch(self, rows: dict[int, V1RequestState]) -> GuidedBatch:
        device = self.guidance.device
        by_slot = {state.guided.slot: state for state in rows.values()}
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


@dataclass(eq=False)
class V1RequestState(RequestState):
    """With the runner's own lists of its tokens; the second one grows."""

    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)


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
        for slot, tokens in self.arrived.items():
            if tokens is None:
                length = self.req_states.prefill_len.np[slot]
                self.arrived[slot] = HostCopy(self.req_states.all_token_ids.gpu[slot, :length])

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        slots, num_tokens = ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np[: len(ctx.idx_mapping_np)]
        # What a row samples before its prompt is whole is thrown away.
        asked = self.asked[slots] & (num_tokens >= self.req_states.prefill_len.np[slots])
        if not asked.any():
            return
        fed: dict[int, list[int]] = {}  # of the requests that begin with this step
        for slot in [slot for slot in self.arrived if slot in slots[asked]]:
            fed[slot] = self.arrived.pop(slot).tolist()
            self.begin(slot, self.states[slot], fed[slot][: self.req_states.prompt_len.np[slot]])
        failed = np.array([self.states[slot].failed for slot in slots[asked]])
        guided = np.flatnonzero(asked)[~failed]
        if len(guided):
            states = [self.states[slot] for slot in slots[guided]]
            self.guide(logits, states, lambda: self._batch(ctx, guided, fed))
        for slot in slots[asked]:
            if self.states[slot].failed:
                rows = ctx.expanded_idx_mapping == int(slot)
                logits.masked_fill_(rows.unsqueeze(1), float("-inf"))
                logits[:, self.states[slot].stop_token_id].masked_fill_(rows, 0.0)

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
