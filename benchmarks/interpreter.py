"""Model Runner V2 in Triton's interpreter, where there is no GPU: right, and slow."""

from __future__ import annotations

import os
import types


def use_v2() -> None:
    """Let vLLM take Model Runner V2 in this process; before it is imported. On a GPU that is all."""
    import torch

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    # vLLM asks Triton for an active back end; the interpreter needs none.
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True))
    _patch_once()


def _patch_once() -> None:
    """Let the interpreter give ``triton.language`` its own functions once: it would look for what is to be replaced at
    every call of a function within a kernel, which takes longer than the call, and put it back after every launch."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, {}

    def patch_once(function):
        modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules not in patched:
            patched[modules] = patch(function)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once


def complete() -> None:
    """Give the interpreter what vLLM's sampling kernels use and it lacks; once vLLM is imported. On a GPU nothing."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

    rejection_sampler_utils.tldevice = types.SimpleNamespace(log1p=lambda x: tl.log(x + 1.0))  # a GPU library's
    store = InterpreterBuilder.create_masked_store

    def create_masked_store(self, ptrs, value, mask, cache_policy):  # a mask and a scalar comparison are integers
        return store(self, ptrs, value, TensorHandle(mask.data.astype(bool), tl.int1), cache_policy)

    InterpreterBuilder.create_masked_store = create_masked_store
