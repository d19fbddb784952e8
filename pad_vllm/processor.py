"""``PADLogitsProcessor``: one class for both of vLLM's runners, which vLLM loads in the frontend and in the workers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar, cast
from weakref import WeakSet

import torch
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from pad_vllm import internals
from pad_vllm.channel import ANNOUNCE_DIR, Announcement, announce, why_no_folder
from pad_vllm.config import PADConfig
from pad_vllm.errors import one_line
from pad_vllm.frontend import admission, patches
from pad_vllm.params import PAD, GuidanceParams
from pad_vllm.worker.order import is_first, log_order, num_giving_way, processors

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    from pad_vllm.worker.adapters import Resolve
    from pad_vllm.worker.adapters.v1 import V1Adapter
    from pad_vllm.worker.adapters.v2 import V2Adapter
    from pad_vllm.worker.guidance import Guidance

logger = init_logger(f"vllm.{__name__}")

patches.install()  # again: the hook may have run before vLLM's API server was imported


class PADLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Guides requests by a personalized reward model, on the V1 runner and on Model Runner V2.

    ``additional_config["pad"]`` (:class:`~pad_vllm.config.PADConfig`) configures it. Without that it loads nothing and
    changes nothing, and refuses requests that set guidance. It may be listed in ``logits_processors`` and registered as
    an entry point at once; it then runs once, at its place in the list.

    Raises:
        ValueError: at the start, if the configuration or the engine does not allow guidance.

    Example:
        >>> llm = LLM(
        ...     model,
        ...     logits_processors=["pad_vllm:PADLogitsProcessor"],
        ...     additional_config={"pad": {"reward_model": reward_model}},
        ... )
        >>> llm.generate(prompts, SamplingParams(extra_args={"pad_preference": "Be concise."}))
    """

    _built: ClassVar[WeakSet[PADLogitsProcessor]] = WeakSet()

    @classmethod
    def running(cls) -> list[PADLogitsProcessor]:
        """The instances that guide an engine of this process. ``adapter.guidance`` of each runs its step."""
        return [processor for processor in cls._built if processor.adapter is not None]

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a bad request at admission, with ValueError (HTTP 400)."""
        admission.validate(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device_or_req_states: Any, is_pin_memory: bool = False) -> None:
        self.vllm_config = vllm_config
        self.adapter: V1Adapter | V2Adapter | None = None
        self._is_pending = False
        found = processors(vllm_config.model_config.logits_processors, PADLogitsProcessor)
        num_before = sum(processor.vllm_config is vllm_config for processor in self._built)
        self._built.add(self)
        if num_before != num_giving_way(found):
            return  # loaded by entry point and by name: the listed one does the work, where it stands

        config = self._read_config()
        if config is not None:
            internals.check_version()
            if ANNOUNCE_DIR not in os.environ:
                raise ValueError(why_no_folder())
        try:
            self._start(config, device_or_req_states, sees_base_logits=is_first(found))
            if config is not None:
                log_order(found)
        except ImportError as error:
            if config is not None:
                raise ValueError(f"pad cannot run on this vLLM: {one_line(error)}") from error
            announce(Announcement(configured=False), self)  # and change nothing

    def _read_config(self) -> PADConfig | None:
        vllm_config = self.vllm_config

        def read() -> PADConfig | None:
            return PADConfig.from_additional_config(vllm_config.additional_config, vllm_config.model_config)

        if vllm_config.parallel_config.tensor_parallel_size == 1:
            return read()
        try:
            from pad_vllm.worker.ranks import read_alike
        except ImportError:  # of a newer vLLM: whoever guides comes upon it once more
            return read()
        return read_alike(read)

    def _start(self, config: PADConfig | None, device_or_req_states: Any, sees_base_logits: bool) -> None:
        # Here, so that what moved in a newer vLLM cannot stop an engine that has not asked for guidance.
        from pad_vllm.reward import served
        from pad_vllm.worker.adapters.speculator import RewardSpeculator
        from pad_vllm.worker.adapters.v1 import V1Adapter
        from pad_vllm.worker.adapters.v2 import V2Adapter
        from pad_vllm.worker.compatibility import check_fit
        from pad_vllm.worker.engine_checks import check_engine
        from pad_vllm.worker.guidance import Guidance
        from pad_vllm.worker.patches import reward_model_drafts, shows_models
        from pad_vllm.worker.sleep import make_kept

        on_v2 = isinstance(device_or_req_states, LogitsProcRequestState)

        def take(guidance: Guidance | None, resolve: Resolve) -> None:
            if on_v2:
                self.adapter = V2Adapter(guidance, resolve, device_or_req_states)
            else:
                self.adapter = V1Adapter(guidance, resolve)

        if config is None:
            take(None, refuse_unless_silent)
            announce(Announcement(configured=False), self)
            return
        check_engine(self.vllm_config, on_v2)
        device = device_or_req_states.device if on_v2 else torch.device(device_or_req_states)
        speculator = RewardSpeculator.of(self.vllm_config)
        if speculator is None and reward_model_drafts(self.vllm_config):
            logger.warning(
                "PAD: vLLM drafts with the reward model, but without preferences: pad-vllm's hook did not run"
            )
        num_drafts = 0 if speculator is None else speculator.num_speculative_steps
        fits = check_fit(config, self.vllm_config, sees_base_logits)
        is_served = config.source.is_served

        def make() -> Guidance:
            guidance = Guidance(fits, self.vllm_config, device, num_drafts)
            if speculator is not None:
                speculator.begin(guidance)
            return guidance

        def begin() -> None:
            guidance = make_kept(make, self.vllm_config, on_v2 or is_served)
            take(guidance, fits.resolve)
            if is_served:
                served.when_reloaded(self.vllm_config, guidance.forget)
            if speculator is not None:
                speculator.adapter = cast("V2Adapter", self.adapter)
            self._announce(guidance)

        if is_served:  # the V1 runner builds logits processors before it loads the model
            if not served.is_loaded(self.vllm_config) and (on_v2 or not shows_models()):
                raise ValueError(
                    "pad.reward_model: PAD does not know the served model, because pad-vllm's plugin hook did not "
                    "run before vLLM loaded it; if VLLM_PLUGINS is set, add 'pad' to it"
                )
            self._is_pending = not served.is_loaded(self.vllm_config)
            served.when_loaded(self.vllm_config, begin)
        else:
            begin()

    def _announce(self, guidance: Guidance) -> None:
        from pad_vllm.reward.derive import is_first_rank
        from pad_vllm.worker.board import Board
        from pad_vllm.worker.start import announcement
        from pad_vllm.worker.watch import watch_personas

        accepted = announcement(guidance.loaded, self.vllm_config, guidance.traces is not None)
        path = announce(accepted, self)
        if path is not None and is_first_rank():
            assert self.adapter is not None
            self.adapter.board = board = Board(path, accepted.labels)
            watch_personas(guidance.loaded.fit, path, board, guidance.stats)

    def is_argmax_invariant(self) -> bool:
        return self.adapter is None and not self._is_pending

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: requests joined or left the batch, or moved in it."""
        if self.adapter is not None and batch_update is not None:
            cast("V1Adapter", self.adapter).update_state(batch_update)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes slot ``req_idx``. Returns whether it is guided."""
        return self.adapter is not None and cast("V2Adapter", self.adapter).add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """V2: before the base model's forward."""
        if self.adapter is not None:
            cast("V2Adapter", self.adapter).apply_staged_writes()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Guide the rows of guided requests in place; [num_rows, vocab_size] float32. ``ctx`` comes from V2 only."""
        if self.adapter is not None:
            self.adapter.apply(logits, ctx)
        return logits


def refuse_unless_silent(asked: PAD | None, admitted: PAD | None = None) -> GuidanceParams | None:
    """``resolve`` of an engine without a reward model."""
    if asked is not None and asked.asks_for_guidance:
        raise ValueError("this engine runs without a reward model")
    return None
