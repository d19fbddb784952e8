"""The guidance step: candidate selection, reward scoring, logit reweighting. Needs torch (and triton) only.

Installed as ``pad_vllm.kernels``. :mod:`.reference` says what the step does, in PyTorch, and :mod:`.selection` what its
candidates are; :mod:`.fused` does it in Triton. :mod:`.groups` and :mod:`.fused_groups` do it for a reward model with
another tokenizer.
"""

import os
from collections.abc import Callable
from functools import partial

import torch

from .groups import Groups
from .reference import (
    Controls,
    Mixture,
    OutputTokens,
    cap_and_scale,
    map_heads,
    mix_contexts,
    score_candidates,
)

__all__ = [
    "Controls",
    "Groups",
    "Mixture",
    "OutputTokens",
    "cap_and_scale",
    "implementation",
    "load_guide",
    "map_heads",
    "mix_contexts",
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


def load_guide(name: str, groups: Groups | None = None) -> Callable[..., None]:
    """``guide_`` of an implementation; by groups of tokens where the reward model has another tokenizer."""
    if groups is not None:
        if name == "triton":
            from .fused_groups import guide_groups_
            from .large_groups import find_large

            groups = groups._replace(large=find_large(groups.starts))
        else:
            from .groups import guide_groups_
        return partial(guide_groups_, groups=groups)
    if name == "triton":
        from .fused import guide_
    else:
        from .reference import guide_
    return guide_
