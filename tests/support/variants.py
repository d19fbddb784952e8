"""The kernels that a GPU would compile, seen in Triton's interpreter, which compiles none.

Triton compiles a kernel for each set of what it specializes: the constants, the types of the other arguments, whether a
number is 1 or divisible by 16, how a pointer is aligned, which arguments are None; and the options of the launch.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import KernelParam

_seen: dict[str, None] = {}


def variant(kernel: InterpretedFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What Triton would look a launch's binary up by, for a reader: a kernel's name, and what is compiled into it."""
    signature = inspect.signature(kernel.fn)
    options = {name: value for name, value in kwargs.items() if name not in signature.parameters}
    bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in options})
    bound.apply_defaults()
    parts = []
    for i, (name, parameter) in enumerate(signature.parameters.items()):
        not_specialized, not_aligned = (
            name in (kernel.kwargs.get(key) or ()) for key in ("do_not_specialize", "do_not_specialize_on_alignment")
        )
        param, value = KernelParam(i, parameter, not_specialized, not_aligned), bound.arguments[name]
        if param.is_constexpr:
            parts.append(f"{name}={value}")
            continue
        kind, how = native_specialize_impl(BaseBackend, value, param.is_const, not not_specialized, not not_aligned)
        parts.append(f"{name}:{kind}" + (f"/{how}" if how else ""))
    return f"{kernel.fn.__name__}({', '.join([*parts, *(f'{k}={v}' for k, v in sorted(options.items()))])})"


def record() -> None:
    """From now on, in this process."""
    run = InterpretedFunction.run

    def recorded(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith("pad_vllm."):
            _seen[variant(self, args, kwargs)] = None
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = recorded


def take(llm: Any = None) -> list[str]:
    """The variants launched since the last call, or since :func:`record`."""
    seen = list(_seen)
    _seen.clear()
    return seen
