"""Model Runner V2 in Triton's interpreter, where there is no GPU: right, and slow."""

from __future__ import annotations

import functools
import math
import os
import types
from dataclasses import replace
from typing import Any


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
    _hasten()


@functools.cache
def _hasten() -> None:
    """Let the interpreter do once what it does at every operation; a kernel then takes half the time."""
    _patch_once()
    _leave_out_what_is_thrown_away()
    _make_types_once()


def _leave_out_what_is_thrown_away() -> None:
    """Without ``debug`` the interpreter computes in 64 bits whether an integer operation overflows, and drops the
    answer; and it makes a table of all types to look one of them up."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    look_up, found = interpreter._get_np_dtype, {}

    def get_np_dtype(tt_dtype):
        if isinstance(tt_dtype, tl.block_type):
            tt_dtype = tt_dtype.element_ty
        name = tt_dtype.name
        if name not in found:
            found[name] = look_up(tt_dtype)
        return found[name]

    interpreter._get_np_dtype = get_np_dtype


def _make_types_once() -> None:
    """What follows from a shape is the same for every tensor of it. Triton makes it for each, as it compiles a kernel
    once; the interpreter runs through it at each launch."""
    from triton.language import core

    block_type, tensor, constexpr = core.block_type, core.tensor, core.constexpr
    make_block_type, unwrap = block_type.__init__, core._unwrap_if_constexpr
    of_block: dict[Any, dict[str, Any]] = {}
    of_shape: dict[Any, tuple[Any, Any]] = {}

    def block_type_init(self, element_ty, shape):
        key = element_ty.name, *[size.value if isinstance(size, constexpr) else size for size in shape]
        if key not in of_block:
            make_block_type(self, element_ty, shape)
            of_block[key] = dict(vars(self))
        vars(self).update(of_block[key])

    def tensor_init(self, handle, type):
        shape = type.shape if type.is_block() else ()
        if shape not in of_shape:
            of_shape[shape] = core.tuple([constexpr(size) for size in shape]), constexpr(math.prod(shape))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_shape[shape]

    def unwrap_if_constexpr(value):
        kind = value.__class__
        if kind is constexpr:
            return value.value
        return value if kind in (tensor, block_type, int, float, bool, core.dtype) else unwrap(value)

    block_type.__init__, tensor.__init__, core._unwrap_if_constexpr = block_type_init, tensor_init, unwrap_if_constexpr


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
