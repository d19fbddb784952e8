"""Compiling kernels side by side.

A start launches dozens of variants, and each takes a second or two to compile. Triton compiles a variant where it is
launched first, one after the other; most of that is outside of Python, so that threads share it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton.runtime import JITFunction

MOST_THREADS = 16


def compile_together(launch: Callable[[], None]) -> int:
    """Compile the kernels that ``launch`` would launch, and that this process has not compiled yet. It is called, and
    their launches are left out. The others are launched, so their rows must be ones that they leave alone (top_k 0).

    A kernel that cannot be compiled says so where it is launched.

    Returns:
        How many were compiled. In Triton's interpreter, and where Triton cannot do it, none: nothing is called then.
    """
    try:
        from triton import knobs
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        return 0
    if knobs.runtime.interpret:
        return 0
    missing: dict[str, JITFunction[Any]] = {}

    def leave_out(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        missing[compile["specialization_data"]] = fn.jit_function
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, leave_out
    try:
        launch()
    finally:
        knobs.runtime.jit_cache_hook = before
    num_threads = max(1, min(len(missing), os.cpu_count() or 1, MOST_THREADS))
    with ThreadPoolExecutor(num_threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for variant, kernel in missing.items():
            kernel.preload(variant)
    return len(missing)
