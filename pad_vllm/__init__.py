"""Personalized alignment at decoding time (PAD, arXiv 2410.04070) inside vLLM."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pad_vllm.params import PAD, SamplingParams
    from pad_vllm.processor import PADLogitsProcessor

__version__ = "0.2.0"

__all__ = ["PAD", "PADLogitsProcessor", "SamplingParams"]

_HOME = {
    "PAD": "pad_vllm.params",
    "SamplingParams": "pad_vllm.params",
    "PADLogitsProcessor": "pad_vllm.processor",
}


def __getattr__(name: str) -> Any:
    # Lazy: pad_vllm.kernels and pad_vllm.training work without vLLM.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
