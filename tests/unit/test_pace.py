"""What is counted up from step to step equals what is made anew, and is made anew whenever anything else changed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pad_vllm.reward.block_manager import BlockManager
from pad_vllm.reward.decode import Decoder
from pad_vllm.reward.pace import ALONE, Lengths, Pace
from pad_vllm.reward.rows import ContextRows

BLOCK_SIZE, MAX_BLOCKS = 8, 8


class Contexts:
    """Three contexts of a reward engine, brought up to date as it does it; its forwards are left out."""

    def __init__(self, plans_by_bound: bool = False) -> None:
        self.plans_by_bound = plans_by_bound
        self.blocks = BlockManager(1 + 3 * MAX_BLOCKS, BLOCK_SIZE, 3, MAX_BLOCKS, torch.device("cpu"))
        self.decoder = self.new_decoder()
        for slot in range(3):
            self.blocks.add(slot, [slot] * (5 + slot))
        self.pace, self.num_counted = Pace(), 0

    def new_decoder(self) -> Decoder:
        model = SimpleNamespace(
            graph_sizes=(),
            device=torch.device("cpu"),
            max_model_len=BLOCK_SIZE * MAX_BLOCKS,
            plans_by_bound=self.plans_by_bound,
        )
        return Decoder(model, self.blocks, 3)

    def lay_out(self, slots: list[int], lengths: list[int], step: int) -> ContextRows:
        return ContextRows(
            slots=np.array(slots),
            num_tokens=Lengths(np.array(lengths)),
            lengths=Lengths(np.array(lengths)),
            row_slots=torch.tensor(slots),
            positions=None,
            token_ids=torch.tensor(lengths),
            history=lambda slot: [],
            step=step,
        )

    def run(self, rows: ContextRows) -> None:
        """And compare what the decoder has with what one has that sees the rows for the first time."""
        self.blocks.begin_step()
        version, at = self.blocks.version, self.decoder._step
        if not self.blocks.ready(rows.slots, rows.num_tokens, rows.step):
            admitted, _ = self.blocks.admit(rows.slots.tolist(), rows.num_tokens.array().tolist())
            assert admitted == len(rows.slots)
        self.num_counted += self.blocks.version == version and rows.step == at + 1
        held = []
        for decoder in (self.decoder, self.new_decoder()):
            first = decoder._first(len(rows.row_slots))
            decoder._write(first, rows)
            held.append(first)
        for name in ("input_ids", "positions", "slot_mapping", "seq_lens", "bounds", "block_table"):
            assert torch.equal(getattr(held[0], name), getattr(held[1], name)), name
        bounds, lengths = held[0].bounds, held[0].seq_lens
        assert torch.equal(bounds, lengths) if self.plans_by_bound else (bounds >= lengths).all()


@pytest.mark.parametrize("plans_by_bound", [False, True])
def test_steps_a_token_further_are_counted_up(plans_by_bound):
    contexts = Contexts(plans_by_bound)
    rows = contexts.lay_out([0, 1, 2], [5, 6, 7], contexts.pace.changed())
    contexts.run(rows)
    for i in range(20):
        rows.advance(contexts.pace.further(), torch.tensor([i, i, i]), lambda slot: [])
        contexts.run(rows)
    # Each time that one of the three needs another block, all is made anew.
    assert 0 < contexts.num_counted < 20


def others_in_the_rows(contexts: Contexts, rows: ContextRows) -> ContextRows:
    return contexts.lay_out([2, 0, 1], rows.lengths.array()[[2, 0, 1]].tolist(), contexts.pace.changed())


def one_left(contexts: Contexts, rows: ContextRows) -> ContextRows:
    contexts.blocks.remove(contexts.blocks.contexts[0])
    return contexts.lay_out([1, 2], rows.lengths.array()[1:].tolist(), contexts.pace.changed())


def two_tokens_more(contexts: Contexts, rows: ContextRows) -> ContextRows:
    return contexts.lay_out([0, 1, 2], (rows.lengths.array() + 2).tolist(), contexts.pace.changed())


def blocks_were_lost(contexts: Contexts, rows: ContextRows) -> ContextRows:
    """As by a forward that fails; the contexts get others."""
    contexts.blocks.reset()
    contexts.blocks.pool.get_new_blocks(1)
    rows.advance(contexts.pace.further(), rows.token_ids, rows.history)
    return rows


def a_part_of_it(contexts: Contexts, rows: ContextRows) -> ContextRows:
    rows.advance(contexts.pace.further(), rows.token_ids, rows.history)
    part = rows.select(slice(1, 3))
    assert part.step == ALONE
    return part


@pytest.mark.parametrize(
    "change", [others_in_the_rows, one_left, two_tokens_more, blocks_were_lost, a_part_of_it], ids=lambda f: f.__name__
)
def test_another_step_is_made_anew(change):
    contexts = Contexts()
    rows = contexts.lay_out([0, 1, 2], [9, 10, 9], contexts.pace.changed())
    contexts.run(rows)
    rows.advance(contexts.pace.further(), rows.token_ids, rows.history)
    contexts.run(rows)
    before = contexts.num_counted
    other = change(contexts, rows)
    contexts.run(other)
    assert contexts.num_counted == before
    if len(other.row_slots) == 3:
        other.advance(contexts.pace.further(), other.token_ids, other.history)
        contexts.run(other)
