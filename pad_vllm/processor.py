"""``PADLogitsProcessor``: one class for both of vLLM's runners, and the two adapters that it chooses from.

An adapter tells :class:`~pad_vllm.guidance.Guidance` which rows of a step are guided and where the tokens of their
requests are. Nothing here may raise once the engine runs: an exception in a logits processor ends the engine for
every client. A request that cannot be guided gets end tokens instead: it ends at once (with ``ignore_eos``, once it
has its length of them), and is never answered without guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import torch
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from pad_vllm import admission
from pad_vllm.config import PADConfig
from pad_vllm.guidance import Guidance, GuidedRequest, GuidedRow
from pad_vllm.params import PAD, GuidanceParams

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
        "speculative decoding is not supported yet": vllm_config.speculative_config is not None,
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
    prompt_ids: list[int] | None = None
    output_ids: list[int] | None = None
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

    def begin(self, state: RequestState, prompt_ids: list[int]) -> None:
        """Give a request its context, once its prompt is known."""
        state.guided = self.guidance.new_request(state.params, prompt_ids)

    def end(self, state: RequestState | None) -> None:
        if state is not None and state.guided is not None:
            self.guidance.free(state.guided)
            state.guided = None

    def guide(
        self,
        logits: torch.Tensor,
        states: dict[int, RequestState],
        make_row: Callable[[int, RequestState], GuidedRow],
        last_token_ids: Callable[[list[GuidedRow]], torch.Tensor],
    ) -> None:
        """Guide the rows of ``states`` (row of ``logits`` -> request); end those that cannot be."""
        rows = []
        for row, state in states.items():
            if not state.failed:
                try:
                    rows.append(make_row(row, state))
                except Exception:
                    logger.exception("PAD cannot guide a request: ending it.")
                    state.failed = True
        try:
            if rows:
                self.guidance.apply(logits, rows, last_token_ids(rows))
        except Exception:
            logger.exception("A step of PAD guidance failed: ending its %d requests.", len(rows))
            for row in rows:
                states[row.row].failed = True
        for row, state in states.items():
            if state.failed:
                logits[row] = float("-inf")
                logits[row, state.stop_token_id] = 0.0


class V1Adapter(Adapter):
    """The V1 runner: rows are requests, announced as they come, go and move; token ids are on the host."""

    def __init__(self, guidance: Guidance | None, resolve: Resolve) -> None:
        super().__init__(guidance, resolve)
        self.states: dict[int, RequestState] = {}  # by row

    def update_state(self, batch_update: BatchUpdate) -> None:
        before = list(self.states.values())
        process_dict_updates(self.states, batch_update, self._new_state)
        for state in set(before) - set(self.states.values()):
            self.end(state)

    def _new_state(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> RequestState | None:
        state = self.new_state(params)
        if state is not None:
            state.prompt_ids, state.output_ids = prompt_ids, output_ids
        return state

    def apply(self, logits: torch.Tensor, ctx: None) -> None:
        if self.states:
            self.guide(logits, self.states, self._row, self._last_token_ids)

    def _row(self, row: int, state: RequestState) -> GuidedRow:
        if state.guided is None:
            if state.prompt_ids is None:
                raise ValueError("its prompt is embeddings, not tokens")
            self.begin(state, state.prompt_ids)
        output_ids = state.output_ids
        if output_ids and output_ids[-1] < 0:
            raise ValueError("the runner did not show the token that it generated last")
        return GuidedRow(row, state.guided, len(output_ids), lambda: output_ids)

    def _last_token_ids(self, rows: list[GuidedRow]) -> torch.Tensor:
        last = [row.output_ids()[-1] if row.num_output_tokens else 0 for row in rows]
        return torch.tensor(last, dtype=torch.int32).to(self.guidance.device, non_blocking=True)


class V2Adapter(Adapter):
    """Model Runner V2: requests have slots, which are reused without notice; token ids are on the device."""

    def __init__(self, guidance: Guidance | None, resolve: Resolve, req_states: LogitsProcRequestState) -> None:
        super().__init__(guidance, resolve)
        self.req_states = req_states
        self.states: list[RequestState | None] = [None] * req_states.max_num_reqs  # by slot

    def add_request(self, slot: int, sampling_params: SamplingParams) -> bool:
        self.end(self.states[slot])
        self.states[slot] = self.new_state(sampling_params)
        return self.states[slot] is not None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        states = {}
        for row, slot in enumerate(ctx.idx_mapping_np):
            state = self.states[slot]
            # What a row samples before its prompt is whole is thrown away.
            if state is not None and ctx.seq_lens_upper_bound_np[row] >= self.req_states.prefill_len.np[slot]:
                states[row] = state

        def make_row(row: int, state: RequestState) -> GuidedRow:
            slot, seq_len = ctx.idx_mapping_np[row], int(ctx.seq_lens_upper_bound_np[row])
            prompt_len = int(self.req_states.prompt_len.np[slot])
            if state.guided is None:
                self.begin(state, self._token_ids(slot, 0, prompt_len))
            return GuidedRow(
                row, state.guided, seq_len - prompt_len, lambda: self._token_ids(slot, prompt_len, seq_len)
            )

        if states:
            self.guide(logits, states, make_row, lambda rows: ctx.input_ids[self._index(rows)].to(torch.int32))

    def _token_ids(self, slot: int, start: int, stop: int) -> list[int]:
        """A request's committed tokens. Synchronizes with the device."""
        return self.req_states.all_token_ids.gpu[slot, start:stop].tolist()

    def _index(self, rows: list[GuidedRow]) -> torch.Tensor:
        return torch.tensor([row.row for row in rows]).to(self.guidance.device, non_blocking=True)
