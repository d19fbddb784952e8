"""The served model as the reward model: an instance of it with attention layers, and so a KV cache, of its own.

vLLM hands a logits processor no model. :func:`pad_vllm.worker.patches.install` has its loaders call :func:`loaded`, on
Model Runner V2 before logits processors are built, on the V1 runner after.

:func:`instance_of` copies no weight. The modules that hold other modules are made again, since LoRA replaces some of
what they hold; all that compute are the served ones, as quantization left them, and what is loaded into these later is
the reward model's too. Attention layers are found by name in the forward's context, which is the configuration's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod, WeakValueDictionary

from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationMode, VllmConfig
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

COMPUTING = (LinearBase, VocabParallelEmbedding, MoERunner)
"""Modules that are shared with all that they hold."""

_models: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_waiting: dict[int, list[Callable[[], None]]] = {}
_readers: dict[int, list[WeakMethod[Callable[[], None]]]] = {}


def loaded(vllm_config: VllmConfig, model: nn.Module) -> None:
    """vLLM has loaded the model that an engine serves."""
    _models[id(vllm_config)] = model
    for call in _waiting.pop(id(vllm_config), ()):
        call()


def is_loaded(vllm_config: VllmConfig) -> bool:
    """Whether an engine's model is there."""
    return id(vllm_config) in _models


def when_loaded(vllm_config: VllmConfig, call: Callable[[], None]) -> None:
    """Call, once the model that an engine serves is there."""
    if is_loaded(vllm_config):
        call()
    else:
        _waiting.setdefault(id(vllm_config), []).append(call)


def when_reloaded(vllm_config: VllmConfig, forget: Callable[[], None]) -> None:
    """Call a method, as long as its object lives, whenever an engine's model has been given other weights: by vLLM's
    workers, or by a trainer that calls the model's ``load_weights`` itself."""
    model = _models[id(vllm_config)]
    if not hasattr(model.load_weights, "__wrapped_by_pad__"):
        model.load_weights = _telling(vllm_config, model.load_weights)
    _readers.setdefault(id(vllm_config), []).append(WeakMethod(forget))


def _telling(vllm_config: VllmConfig, load_weights: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_weights)
    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            return load_weights(*args, **kwargs)
        finally:
            reloaded(vllm_config)

    load.__wrapped_by_pad__ = True  # type: ignore[attr-defined]
    return load


def reloaded(vllm_config: VllmConfig) -> None:
    """vLLM has put other weights into the model that an engine serves."""
    for reference in _readers.get(id(vllm_config), ()):
        forget = reference()
        if forget is not None:
            forget()


def instance_of(base: VllmConfig, own: VllmConfig) -> nn.Module:
    """The model that an engine serves, with attention layers of its own.

    Args:
        base: the engine's configuration.
        own: the instance's, which must be vLLM's current one. Its forward context gets the layers.

    Raises:
        ValueError: the model is not known, or vLLM has put something around its layers.
    """
    served = _models.get(id(base))
    if served is None:
        raise ValueError("pad.reward_model='base': the served model is not known; vLLM's loader has not shown it")
    if base.lora_config is not None and any(isinstance(module, MoERunner) for module in served.modules()):
        raise ValueError(
            "pad.reward_model='base': vLLM's LoRA changes a mixture of experts in place, so the reward model would "
            "read the served adapters too; start without --enable-lora"
        )
    copies: dict[int, nn.Module] = {}
    with set_model_tag("pad_reward_model"):  # a compilation cache of its own
        model = _instance(served, copies, own)
    names, theirs = own.compilation_config.static_forward_context, base.compilation_config.static_forward_context
    for name, layer in theirs.items():
        if id(layer) in copies:  # not those of a draft model
            names[name] = copies[id(layer)]
    own.compilation_config.static_all_moe_layers.extend(base.compilation_config.static_all_moe_layers)
    return model


def _instance(module: nn.Module, copies: dict[int, nn.Module], own: VllmConfig) -> nn.Module:
    if isinstance(module, BaseLayerWithLoRA):  # of adapters that the served model serves
        module = module.base_layer
    if id(module) not in copies:
        is_attention = isinstance(module, AttentionLayerBase)
        if isinstance(module, COMPUTING) or not (is_attention or module._modules):
            copies[id(module)] = module
            return module
        if not is_attention and "forward" in vars(module):
            raise ValueError(
                f"pad.reward_model='base': {type(module).__name__} of the served model runs through a function that "
                "vLLM has put around it (offloading), and would read the served model's KV cache; start without "
                "--cpu-offload-gb"
            )
        copy = copies[id(module)] = _shallow(module)
        if not is_attention:
            copy._modules = {
                name: None if child is None else _instance(child, copies, own)
                for name, child in module._modules.items()
            }
        if isinstance(copy, TorchCompileWithNoGuardsWrapper):
            _compile_anew(copy, own)
    return copies[id(module)]


def _shallow(module: nn.Module) -> nn.Module:
    """The same parameters and buffers, in the same dictionaries: who sets one of the one's sets the other's."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    return copy


def _compile_anew(module: TorchCompileWithNoGuardsWrapper, own: VllmConfig) -> None:
    """Let a module that vLLM compiles be compiled by its own configuration."""
    is_compiled = not module.do_not_compile
    module.vllm_config, module.compilation_config = own, own.compilation_config
    module.do_not_compile = not is_compiled or own.compilation_config.mode == CompilationMode.NONE
    if not module.do_not_compile:
        module.aot_compiled_fn, module.was_aot_compile_fn_loaded_from_disk = None, False
        TorchCompileWithNoGuardsWrapper.__init__(module)
