"""A draft of each row, from the reward model's largest logits: all of it that is not the model's, in one launch."""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import gumbel_noised_argmax

from pad_vllm.kernels.writing import bound_beta
from pad_vllm.worker.drafter import Proposals

COUNTS = ["num_places", "step", "num_steps", "keep", "drafts_stride", "has_bound"]
ROW_POINTERS = [
    *("values_ptr", "ids_ptr", "top_k_ptr", "scale_ptr", "slots_ptr", "positions_ptr", "places_ptr"),
    *("stand_in_ptr", "max_divergence_ptr"),
]


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def draft_kernel(
    values_ptr,  # [R, num_places], descending
    ids_ptr,  # [R, num_places] int64
    num_places,
    base_ids_ptr,  # [W] int64, or nothing
    top_k_ptr,  # [R] int64
    scale_ptr,  # [R] float32
    has_bound,
    stand_in_ptr,  # [R, num_places]; anything unless has_bound
    max_divergence_ptr,  # [R] float32; anything unless has_bound
    slots_ptr,  # [R] int64; below 0: of a row that is padding
    positions_ptr,  # [R] int64
    temperature_ptr,  # [S] float32
    seeds_ptr,  # [S] int64
    step,
    num_steps,
    keep,
    draft_logits_ptr,  # [S, num_steps, V]
    draft_logits_stride,
    vocab_size,
    kept_ids_ptr,  # [S, num_steps, PLACES] int32
    places_ptr,  # [R] int64
    drafts_ptr,  # [num_reqs, num_steps] int64, out
    drafts_stride,
    tokens_ptr,  # [R] int64, out
    PLACES: tl.constexpr,
    USE_FP64: tl.constexpr,
):
    """Draw a token of each row, and keep what it was drawn from: draft_logits has the logits of these tokens, and -inf
    everywhere else."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        tl.store(tokens_ptr + row, 0)  # which the next forward reads
        return
    place = tl.arange(0, PLACES)
    top_k = tl.load(top_k_ptr + row)
    is_there = place < tl.minimum(tl.where(top_k > 0, top_k, num_places), num_places)
    values = tl.load(values_ptr + row * num_places + place, mask=is_there, other=float("-inf")).to(tl.float32)
    ids = tl.load(ids_ptr + row * num_places + place, mask=place < num_places, other=0)
    if base_ids_ptr is not None:
        ids = tl.load(base_ids_ptr + ids)
    guided = values * tl.load(scale_ptr + row)
    max_divergence = tl.load(max_divergence_ptr + row, mask=has_bound != 0, other=float("inf"))
    if max_divergence < float("inf"):
        y = tl.load(stand_in_ptr + row * num_places + place, mask=is_there, other=float("-inf")).to(tl.float32)
        way = tl.where(is_there, guided - y, 0.0)
        guided = y + bound_beta(y, way, is_there, is_there, tl.full([], 1.0, tl.float32), max_divergence) * way
    logits = guided.to(draft_logits_ptr.dtype.element_ty)
    if keep != 0:
        kept_ptr = kept_ids_ptr + (slot * num_steps + step) * PLACES + place
        row_ptr = draft_logits_ptr + slot * draft_logits_stride + step.to(tl.int64) * vocab_size
        nothing = tl.full([PLACES], float("-inf"), draft_logits_ptr.dtype.element_ty)
        tl.store(row_ptr + tl.load(kept_ptr), nothing)
        tl.debug_barrier()  # all of it is gone, before others write
        tl.store(row_ptr + ids, logits, mask=is_there)
        tl.store(kept_ptr, tl.where(is_there, ids, 0).to(tl.int32))
    # A position is drafted again after a rejection, as another draft of its step, and by other noise.
    seed = tl.load(seeds_ptr + slot) ^ (step.to(tl.int64) << 32)
    _, drawn = gumbel_noised_argmax(
        logits.to(tl.float32),
        place,
        is_there,
        seed,
        tl.load(positions_ptr + row),
        tl.load(temperature_ptr + slot),
        IS_DRAFTING=True,
        USE_FP64=USE_FP64,
    )
    token = tl.sum(tl.where(place == drawn, ids, 0), 0)
    tl.store(tokens_ptr + row, token)
    tl.store(drafts_ptr + tl.load(places_ptr + row) * drafts_stride + step, token)


class DraftBuffers:
    """What drafts leave for the rejection sampler, by slot.

    Args:
        draft_logits: [max_num_reqs, num_steps, vocab_size], all -inf.
        num_places: most tokens that a draft is drawn from, a power of 2.
        use_fp64: of the noise.
    """

    def __init__(self, draft_logits: torch.Tensor, num_places: int, use_fp64: bool) -> None:
        self.draft_logits, self.num_places, self.use_fp64 = draft_logits, num_places, use_fp64
        self.kept_ids = torch.zeros(*draft_logits.shape[:2], num_places, dtype=torch.int32, device=draft_logits.device)
        """[max_num_reqs, num_steps, num_places]: the tokens whose ``draft_logits`` may not be -inf"""

    def draw(
        self,
        step: int,
        proposals: Proposals,
        positions: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        drafts: torch.Tensor,
        places: torch.Tensor,
        keep: bool,
    ) -> torch.Tensor:
        """Draw draft number ``step`` of each row.

        Args:
            positions: [R] int64, of the tokens that they stand behind.
            temperature, seeds: [max_num_reqs] float32, int64, by slot.
            drafts: [num_reqs, num_steps] int64, out.
            places: [R] int64: rows of ``drafts``.
            keep: whether to keep what they are drawn from, as sampled requests want it.

        Returns:
            [R] int64.
        """
        values, logits, bound = proposals.values, self.draft_logits, proposals.bound
        tokens = positions.new_empty(len(positions))
        draft_kernel[(len(positions),)](
            *(values, proposals.ids, values.shape[1], proposals.base_ids),
            *(proposals.top_k, proposals.scale, int(bound is not None), *(bound or (values, proposals.scale))),
            *(proposals.slots, positions, temperature, seeds),
            *(step, logits.shape[1], int(keep), logits, logits.stride(0), logits.shape[2], self.kept_ids),
            *(places, drafts, drafts.stride(0), tokens),
            PLACES=self.num_places,
            USE_FP64=self.use_fp64,
            num_warps=2,
        )
        return tokens

    def fill(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Of rows without a draft: certain drafts; slots, tokens [rows] int64."""
        self.draft_logits[slots] = float("-inf")
        self.draft_logits[slots, :, tokens] = 0.0
        self.kept_ids[slots] = tokens.int().view(-1, 1, 1)
