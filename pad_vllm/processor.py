"""``PADLogitsProcessor``: one class for both of vLLM's runners, and the engines that it refuses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import torch
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from pad_vllm import admission, frontend, internals
from pad_vllm.config import PADConfig
from pad_vllm.params import PAD

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    from pad_vllm.adapters.v1 import V1Adapter
    from pad_vllm.adapters.v2 import V2Adapter


frontend.install()  # again: the hook may have run before vLLM's API server was imported


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
        if config is not None:
            internals.check_version()
            if admission.ANNOUNCE_DIR not in os.environ:
                raise ValueError(
                    "pad: vLLM has not run pad-vllm's plugin hook, and requests could go unguided in silence; install "
                    "the package, and where VLLM_PLUGINS is set, add 'pad' to it"
                )
        try:
            self._start(config, device_or_req_states)
        except ImportError as error:
            if config is not None:
                raise ValueError(f"pad cannot run on this vLLM: {internals.one_line(error)}") from error
            admission.announce(admission.Announcement(configured=False), self)  # and change nothing

    def _start(self, config: PADConfig | None, device_or_req_states: Any) -> None:
        # Here, so that what moved in a newer vLLM cannot stop an engine that has not asked for guidance.
        from pad_vllm.adapters.v1 import V1Adapter
        from pad_vllm.adapters.v2 import V2Adapter
        from pad_vllm.guidance import Guidance
        from pad_vllm.metrics import Board
        from pad_vllm.reward.backend import is_first_rank

        on_v2 = isinstance(device_or_req_states, LogitsProcRequestState)
        guidance, resolve = None, refuse_unless_silent
        if config is not None:
            check_engine(self.vllm_config, on_v2)
            device = device_or_req_states.device if on_v2 else torch.device(device_or_req_states)
            guidance = Guidance(config, self.vllm_config, device)
            resolve = guidance.resolve
        self.adapter = V2Adapter(guidance, resolve, device_or_req_states) if on_v2 else V1Adapter(guidance, resolve)
        announcement = guidance.announcement() if guidance else admission.Announcement(configured=False)
        path = admission.announce(announcement, self)
        if guidance is not None and is_first_rank():
            self.adapter.board = Board(path, announcement.labels)

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
        if self.adapter is not None:
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
        "the base model takes more than text, and the reward model reads text alone; add --language-model-only": (
            model.is_multimodal_model and model.supports_multimodal_inputs
        ),
        "a diffusion model samples without logits processors": model.is_diffusion,
        "enable_sleep_mode: Model Runner V2 discards the reward model in its sleep": on_v2 and model.enable_sleep_mode,
        "with async scheduling the V1 runner shows generated tokens only to listed logits processors; add "
        "--logits-processors pad_vllm:PADLogitsProcessor, or --no-async-scheduling": (
            not on_v2 and vllm_config.scheduler_config.async_scheduling and not model.logits_processors
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise ValueError(f"pad cannot guide this engine: {reason}")
