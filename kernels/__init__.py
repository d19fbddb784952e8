"""The guidance step: candidate selection, reward scoring, logit reweighting. Needs torch (and triton) only.

Installed as ``pad_vllm.kernels``. :mod:`.types` names what a step is told. :mod:`.reference` says what it does, in
PyTorch, with :mod:`.selection` for its candidates, :mod:`.groups` for a reward model with another tokenizer and
:mod:`.divergence` for guidance with a bound; :mod:`.fused` does it in Triton, with :mod:`.fused_selection` and
:mod:`.fused_groups`. What it did in each row is measured by :mod:`.tracing` and :mod:`.fused_tracing`, where somebody
asks.
"""

import os
from collections.abc import Callable

import torch

from .large_groups import find_large
from .scoring import append_adapters, cap_and_scale, map_heads, mix_contexts, score_candidates
from .selection import compiled_top_k, pad_k
from .types import (
    Controls,
    Groups,
    HeadAdapters,
    HeadMix,
    Mixture,
    OutputHead,
    OutputTokens,
    Rows,
    SharedVocabulary,
    Trace,
)

__all__ = [
    "Controls",
    "Groups",
    "HeadAdapters",
    "HeadMix",
    "Mixture",
    "OutputHead",
    "OutputTokens",
    "Rows",
    "SharedVocabulary",
    "Trace",
    "append_adapters",
    "cap_and_scale",
    "compiled_top_k",
    "find_large",
    "implementation",
    "load_guide",
    "map_heads",
    "mix_contexts",
    "pad_k",
    "score_candidates",
]

SWITCH = "PAD_VLLM_KERNELS"
"""Environment variable: ``triton`` or ``reference`` overrides the choice made here."""


def implementation(device: torch.device) -> str:
    """``triton`` on a GPU and in the Triton interpreter, ``reference`` elsewhere.

    Raises:
        ValueError: the environment variable has another value.
    """
    asked = os.environ.get(SWITCH)
    if asked in ("triton", "reference"):
        return asked
    if asked:
        raise ValueError(f"{SWITCH}={asked!r}: must be 'triton' or 'reference'")
    on_gpu = device.type == "cuda"  # ROCm's too
    return "triton" if on_gpu or os.environ.get("TRITON_INTERPRET") == "1" else "reference"


def load_guide(name: str) -> Callable[..., None]:
    """``guide_`` of an implementation, which :func:`.reference.guide_` describes."""
    if name == "triton":
        from .fused import guide_  # triton may be missing where it is not used
    else:
        from .reference import guide_
    return guide_
