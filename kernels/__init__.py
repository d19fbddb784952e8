"""The guidance step: candidate selection, reward scoring, logit reweighting. Needs torch (and triton) only.

Installed as ``pad_vllm.kernels``. :mod:`.reference` says what the step does, in PyTorch; :mod:`.fused` does it in
Triton.
"""

import os
from collections.abc import Callable

import torch

from .reference import Controls, Mixture, OutputTokens, cap_and_scale, score_candidates

__all__ = [
    "Controls",
    "Mixture",
    "OutputTokens",
    "cap_and_scale",
    "implementation",
    "load_guide",
    "score_candidates",
]

SWITCH = "PAD_VLLM_KERNELS"
"""Environment: ``triton`` or ``reference``, where it should not be decided here."""


def implementation(device: torch.device) -> str:
    """``triton`` on a GPU and where the Triton interpreter is on, ``reference`` elsewhere.

    Raises:
        ValueError: the environment asks for something else.
    """
    asked = os.environ.get(SWITCH)
    if asked in ("triton", "reference"):
        return asked
    if asked:
        raise ValueError(f"{SWITCH}={asked!r}: must be 'triton' or 'reference'")
    on_gpu = device.type == "cuda"  # ROCm's too
    return "triton" if on_gpu or os.environ.get("TRITON_INTERPRET") == "1" else "reference"


def load_guide(name: str) -> Callable[..., None]:
    """``guide_`` of an implementation."""
    if name == "triton":
        from .fused import guide_
    else:
        from .reference import guide_
    return guide_
