"""The kernels of drafting against PyTorch: a draft and what it was drawn from, and the rows of a decode step."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.support.engine import Worker, set_environment

pytestmark = pytest.mark.slow

NUM_SLOTS, NUM_STEPS, V, PLACES = 5, 3, 40, 8


@pytest.fixture(scope="module")
def interpreter():
    worker = Worker("v2")
    worker.run(set_environment, "v2")
    yield worker
    worker.close()


def draw(rounds: list[tuple], with_base_ids: bool, keep: bool) -> list[tuple]:
    """Draft after draft of rows; what each draws, and ``draft_logits`` after it."""
    from pad_vllm.worker.adapters.draft_kernel import DraftBuffers
    from pad_vllm.worker.drafter import Proposals

    buffers = DraftBuffers(torch.full((NUM_SLOTS, NUM_STEPS, V), float("-inf")), PLACES, use_fp64=False)
    base_ids = torch.arange(V).flip(0) if with_base_ids else None
    temperature, seeds = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0]), torch.arange(NUM_SLOTS) + 7
    results = []
    for step, values, ids, top_k, scale, slots, places in rounds:
        drafts = torch.full((NUM_SLOTS, NUM_STEPS), -1)
        proposals = Proposals(values, ids, base_ids, top_k, scale, slots, places)
        tokens = buffers.draw(step, proposals, torch.arange(len(slots)), temperature, seeds, drafts, places, keep)
        results.append((tokens, drafts, buffers.draft_logits.clone()))
    return results


@pytest.mark.parametrize(("with_base_ids", "keep"), [(False, True), (True, True), (False, False)])
def test_a_draft_is_drawn_from_what_is_kept(interpreter, with_base_ids, keep):
    """A row's own k of K, of slots that were drafted for before; K is no power of 2, and other rows are untouched.
    Nothing is drawn of padding."""
    generator = torch.Generator().manual_seed(0)
    rounds = []
    for step, num_places, slots in ((0, 5, [3, 1, 4]), (2, 3, [1, 0]), (0, 8, [4, -1, 1]), (0, 1, [3, -1])):
        values = torch.randn(len(slots), num_places, generator=generator).sort(descending=True).values
        ids = torch.stack([torch.randperm(V, generator=generator)[:num_places] for _ in slots])
        top_k = torch.tensor([0, 2, 4][: len(slots)])
        scale = torch.tensor([1.0, 0.5, 3.0][: len(slots)])
        rounds.append((step, values, ids, top_k, scale, torch.tensor(slots), torch.arange(len(slots)).flip(0)))
    expected = torch.full((NUM_SLOTS, NUM_STEPS, V), float("-inf"))
    for each, result in zip(rounds, interpreter.run(draw, rounds, with_base_ids, keep), strict=True):
        (step, values, ids, top_k, scale, slots, places), (tokens, drafts, draft_logits) = each, result
        ids = V - 1 - ids if with_base_ids else ids
        is_there = (torch.arange(values.shape[1]) < top_k.unsqueeze(1)) | (top_k == 0).unsqueeze(1)
        for row, slot in enumerate(slots.tolist()):
            if slot < 0:
                assert tokens[row] == 0 > drafts[places[row], step]
                continue
            own = ids[row][is_there[row]]
            if keep:
                expected[slot, step] = float("-inf")
                expected[slot, step, own] = values[row][is_there[row]] * scale[row]
            assert tokens[row] in own
            if slot in (0, 3):
                assert tokens[row] == ids[row, 0]  # greedy
        torch.testing.assert_close(draft_logits, expected)
        assert drafts[places[slots >= 0], step].tolist() == tokens[slots >= 0].tolist()


def draw_bound(values, stand_in, max_divergence, scale, top_k) -> torch.Tensor:
    """``draft_logits`` of a draft of rows with these bounds; ids are places."""
    from pad_vllm.worker.adapters.draft_kernel import DraftBuffers
    from pad_vllm.worker.drafter import Bound, Proposals

    buffers = DraftBuffers(torch.full((NUM_SLOTS, NUM_STEPS, V), float("-inf")), PLACES, use_fp64=False)
    rows = torch.arange(len(values))
    ids, bound = torch.arange(values.shape[1]).repeat(len(values), 1), Bound(stand_in, max_divergence)
    proposals = Proposals(values, ids, None, top_k, scale, rows, rows, bound)
    drafts = torch.zeros(NUM_SLOTS, NUM_STEPS, dtype=torch.int64)
    nothing = torch.zeros(NUM_SLOTS)
    buffers.draw(1, proposals, rows, nothing, nothing.long(), drafts, rows, keep=True)
    return buffers.draft_logits[: len(values), 1, : values.shape[1]]


def test_drafts_keep_to_a_bound(interpreter):
    """On the way from what stands in for the base model to the draft, as far as the bound lets them; K is no power of
    2, and a row without a bound goes all the way."""
    generator = torch.Generator().manual_seed(1)
    stand_in = torch.randn(4, 6, generator=generator).sort(descending=True).values
    values, scale = torch.randn(4, 6, generator=generator), torch.tensor([1.0, 1.5, 3.0, 2.0])
    bounds, top_k = torch.tensor([float("inf"), 0.1, 0.02, 0.0]), torch.tensor([0, 6, 3, 4])
    found = interpreter.run(draw_bound, values, stand_in, bounds, scale, top_k)
    for row in range(4):
        k = int(top_k[row]) or 6
        z, full = stand_in[row, :k], values[row, :k] * scale[row]
        share = 1.0 if row == 0 else oracle.bounded_beta(z, full - z, 1.0, bounds[row].item())
        assert row == 0 or share < 1
        torch.testing.assert_close(found[row, :k], z + share * (full - z), rtol=1e-4, atol=1e-4)
        assert found[row, k:].isneginf().all()


def write(row_slots, positions, token_ids, table, block_size, copies_table, num_rows: int) -> tuple[torch.Tensor, ...]:
    from pad_vllm.reward.row_kernel import write_rows

    dtypes = torch.int32, torch.int64, torch.int64, torch.int32
    out = tuple(torch.full((num_rows,), -1, dtype=dtype) for dtype in dtypes)
    out += (torch.full((num_rows, table.shape[1]), -1, dtype=torch.int32),)
    write_rows(row_slots, positions, token_ids, table, block_size, copies_table, out)
    return out


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("copies_table", [True, False])
def test_rows_of_a_step(interpreter, dtype, copies_table):
    """More rows than a program has, and more blocks; what is behind the rows is untouched."""
    generator = torch.Generator().manual_seed(0)
    num_rows, block_size, table = 70, 16, torch.randint(1, 999, (9, 67), dtype=torch.int32, generator=generator)
    row_slots = torch.randint(0, 9, (num_rows,), generator=generator)
    positions = torch.randint(0, 67 * block_size, (num_rows,), generator=generator)
    token_ids = torch.randint(0, 999, (num_rows,), dtype=dtype, generator=generator)
    out = interpreter.run(write, row_slots, positions, token_ids, table, block_size, copies_table, num_rows + 3)
    slots = table[row_slots, positions // block_size].long() * block_size + positions % block_size
    expected = token_ids, positions, slots, positions + 1, table[row_slots] if copies_table else torch.tensor([-1])
    for written, wanted in zip(out, expected, strict=True):
        assert (written[:num_rows] == wanted).all()
        assert (written[num_rows:] == -1).all()
