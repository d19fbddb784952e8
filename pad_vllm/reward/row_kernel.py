"""The buffers of a decode step, written in one launch where the host does not know the rows' positions."""

from __future__ import annotations

import os

import torch
from vllm.triton_utils import tl, triton

ROWS, BLOCK = 32, 64
"""Of a program, and of their block tables, at a time."""


def can_launch(device: torch.device) -> bool:
    """Whether there is a GPU, or Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit(
    do_not_specialize=["num_rows", "copies_table"],
    do_not_specialize_on_alignment=["row_slots_ptr", "positions_ptr", "token_ids_ptr"],
)
def write_rows_kernel(
    row_slots_ptr,  # [R] int64
    positions_ptr,  # [R] int64
    token_ids_ptr,  # [R] int32 or int64
    num_rows,
    table_ptr,  # [contexts + 1, max_num_blocks] int32
    max_num_blocks,
    block_size,
    copies_table,
    input_ids_ptr,  # [R] int32, out
    out_positions_ptr,  # [R] int64, out
    slot_mapping_ptr,  # [R] int64, out
    seq_lens_ptr,  # [R] int32, out
    block_table_ptr,  # [R, max_num_blocks] int32, out
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    is_row = row < num_rows
    table_row = tl.load(row_slots_ptr + row, mask=is_row, other=0) * max_num_blocks
    position = tl.load(positions_ptr + row, mask=is_row, other=0)
    block_id = tl.load(table_ptr + table_row + position // block_size, mask=is_row, other=0).to(tl.int64)
    tl.store(input_ids_ptr + row, tl.load(token_ids_ptr + row, mask=is_row, other=0).to(tl.int32), mask=is_row)
    tl.store(out_positions_ptr + row, position, mask=is_row)
    tl.store(slot_mapping_ptr + row, block_id * block_size + position % block_size, mask=is_row)
    tl.store(seq_lens_ptr + row, (position + 1).to(tl.int32), mask=is_row)
    if copies_table != 0:
        for start in range(0, max_num_blocks, BLOCK):
            i = start + tl.arange(0, BLOCK)[None, :]
            mask = is_row[:, None] & (i < max_num_blocks)
            blocks = tl.load(table_ptr + table_row[:, None] + i, mask=mask, other=0)
            tl.store(block_table_ptr + row[:, None] * max_num_blocks + i, blocks, mask=mask)


def write_rows(
    row_slots: torch.Tensor,
    positions: torch.Tensor,
    token_ids: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    copies_table: bool,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write rows of one token each.

    Args:
        row_slots, positions: [R] int64.
        token_ids: [R] int32 or int64.
        table: [contexts + 1, max_num_blocks] int32.
        copies_table: whether to write the rows' block tables too.
        out: input_ids [R] int32, positions [R] int64, slot_mapping [R] int64, seq_lens [R] int32 and block_table
            [R, max_num_blocks] int32.
    """
    num_rows = len(positions)
    write_rows_kernel[(triton.cdiv(num_rows, ROWS),)](
        *(row_slots, positions, token_ids, num_rows, table, table.shape[1], block_size, int(copies_table), *out),
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
    )
