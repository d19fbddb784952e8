"""What is changed in vLLM's engine.

Its loaders show the model that they have loaded, since a logits processor is given none
(:mod:`pad_vllm.reward.served`).

Its workers tell which requests are gone at a step, since a logits processor is told that of none (:mod:`.traces`),
and that the served model has been given other weights (:mod:`pad_vllm.reward.served`).

Where the draft model of ``speculative_config`` is the reward model, Model Runner V2 makes its drafter of the reward
engine (:mod:`.adapters.speculator`), and does not refuse a draft model with another tokenizer, whose drafts vLLM's own
speculator could not read. Nothing else is touched, and with any other draft model vLLM does what it always does.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pad_vllm.reward.source import is_same, source_of

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    import torch
    from vllm.config import VllmConfig

MODULES = ("vllm.v1.worker.gpu.spec_decode", "vllm.v1.worker.gpu.model_runner")
"""Where ``init_speculator`` stands, and where the runner has it by its own name once it is imported."""


WORKER = "vllm.v1.worker.gpu_worker"
"""Where the class is that runs a step on a rank; the one of CPUs is derived from it."""
LOADERS = "vllm.model_executor.model_loader"
NO_TRANSLATION = "heterogeneous-vocabulary draft models"
"""What vLLM says of ``use_heterogeneous_vocab`` on Model Runner V2."""


def install() -> None:
    """Put our choices before vLLM's; as often as one likes."""
    _choose_speculator()
    _allow_another_tokenizer()
    after_import(LOADERS, _show_models)
    after_import(WORKER, _tell_of_requests)
    after_import(WORKER, _tell_of_weights)


def after_import(name: str, call: Callable[[ModuleType], None]) -> None:
    """Call with a module as soon as it is there. It is not imported for this: it takes seconds, and not every process
    of vLLM's needs it."""
    if name in sys.modules:
        call(sys.modules[name])
    elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, call))


class _AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, call: Callable[[ModuleType], None]) -> None:
        self.name, self.call = name, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run, call = spec.loader.exec_module, self.call

            def exec_module(module: ModuleType) -> None:
                run(module)
                call(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _tell_of_requests(module: ModuleType) -> None:
    original = module.Worker.execute_model
    if hasattr(original, "__wrapped_by_pad__"):
        return

    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        traces = sys.modules.get("pad_vllm.worker.traces")
        if traces is not None:  # else this process guides nothing
            try:
                traces.tell(self.model_runner, scheduler_output.finished_req_ids)
            except Exception:
                traces.logger.exception("PAD cannot tell which requests are gone.")
        return original(self, scheduler_output, *args, **kwargs)

    execute_model.__wrapped_by_pad__ = True  # type: ignore[attr-defined]
    module.Worker.execute_model = execute_model


def _tell_of_weights(module: ModuleType) -> None:
    """Weights come from a file (``reload_weights``), or from a trainer in several parts."""
    for name in ("reload_weights", "finish_weight_update"):
        original = getattr(module.Worker, name, None)
        if original is not None and not hasattr(original, "__wrapped_by_pad__"):
            setattr(module.Worker, name, _telling_of_weights(original))


def _telling_of_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def change_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:  # where it failed, a part of them may be new
            served = sys.modules.get("pad_vllm.reward.served")
            if served is not None:
                served.reloaded(self.vllm_config)

    change_weights.__wrapped_by_pad__ = True  # type: ignore[attr-defined]
    return change_weights


def _show_models(loaders: ModuleType) -> None:
    for loader in (loaders.BaseModelLoader, *_subclasses(loaders.BaseModelLoader)):
        original = vars(loader).get("load_model")
        if original is not None and not hasattr(original, "__wrapped_by_pad__"):
            loader.load_model = _showing(original)


def shows_models() -> bool:
    """Whether vLLM's loaders will show the next model that they load."""
    from vllm.model_executor.model_loader import BaseModelLoader

    return hasattr(BaseModelLoader.load_model, "__wrapped_by_pad__")


def _subclasses(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    return children + [each for child in children for each in _subclasses(child)]


def _showing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(self: Any, vllm_config: VllmConfig, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, vllm_config, model_config, *args, **kwargs)
        if model_config is vllm_config.model_config:  # not a draft model's
            from pad_vllm.reward import served

            served.loaded(vllm_config, model)
        return model

    load_model.__wrapped_by_pad__ = True  # type: ignore[attr-defined]
    return load_model


def _allow_another_tokenizer() -> None:
    from vllm.config import VllmConfig

    original = getattr(VllmConfig, "_get_v2_model_runner_unsupported_features", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def unsupported(self: VllmConfig) -> list[str]:
        return [what for what in original(self) if what != NO_TRANSLATION or not reward_model_drafts(self)]

    VllmConfig._get_v2_model_runner_unsupported_features = unsupported


def _choose_speculator() -> None:
    try:
        from vllm.v1.worker.gpu.spec_decode import init_speculator as original
    except ImportError:
        return  # then vLLM's own speculator drafts; `pad-vllm check` says that this has moved
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
        if not reward_model_drafts(vllm_config):
            return original(vllm_config, device, req_states)
        from pad_vllm.worker.adapters.speculator import RewardSpeculator

        return RewardSpeculator(vllm_config, device)

    for name in MODULES:
        if name in sys.modules:
            setattr(sys.modules[name], "init_speculator", init_speculator)  # noqa: B010


def reward_model_drafts(vllm_config: VllmConfig) -> bool:
    """Whether an engine's draft model is the reward model that guides it."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return False
    pad = (vllm_config.additional_config or {}).get("pad")
    if not isinstance(speculative.model, str) or not isinstance(pad, dict):
        return False
    given = {key: value for key, value in pad.items() if value is not None}
    try:
        source = source_of(given, vllm_config.model_config)
    except (KeyError, TypeError, ValueError):
        return False  # what is wrong with the configuration is said at the start
    # A PEFT folder is no model to vLLM: there the model that it is over is named.
    return is_same(source.reward_model, speculative.model) or is_same(source.model, speculative.model)
