"""Rows of several contexts, mixed in the hidden state: a launch only where requests have several."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launching import COUNTS, ROW_POINTERS
from .types import Mixture

BLOCK = 1024
"""Of the hidden size, what a program mixes."""
WARPS = 4


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def mix_kernel(
    hidden_ptr,  # [C, hidden_size]
    hidden_stride,
    contexts_ptr,  # [R, J] int64
    weights_ptr,  # [R, J] float32
    num_contexts,  # J
    mixed_ptr,  # [R, hidden_size] float32, out
    hidden_size,
    BLOCK: tl.constexpr,
):
    """A row's contexts, mixed; what is not the row's own is not read."""
    row_idx = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mixed = tl.zeros([BLOCK], tl.float32)
    for i in range(row_idx * num_contexts, (row_idx + 1) * num_contexts):
        weight = tl.load(weights_ptr + i)
        if weight != 0.0:
            context_ptr = hidden_ptr + tl.load(contexts_ptr + i) * hidden_stride
            mixed += weight * tl.load(context_ptr + d, mask=d < hidden_size, other=0.0).to(tl.float32)
    tl.store(mixed_ptr + row_idx * hidden_size + d, mixed, mask=d < hidden_size)


def mix_contexts(hidden_states: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """:func:`.scoring.mix_contexts`, of a mixture that is contiguous."""
    contexts, weights = mixture
    num_rows, num_contexts = contexts.shape
    hidden_size = hidden_states.shape[1]
    mixed = torch.empty(num_rows, hidden_size, dtype=torch.float32, device=hidden_states.device)
    mix_kernel[(num_rows, triton.cdiv(hidden_size, BLOCK))](
        hidden_states,
        hidden_states.stride(0),
        contexts,
        weights,
        num_contexts,
        mixed,
        hidden_size,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return mixed
