"""The block manager alone: whatever happens, no block is lost or owned twice, and only equal prefixes are shared."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pad_vllm.reward.block_manager import BlockManager, Copy
from pad_vllm.reward.device import copy_blocks
from pad_vllm.reward.pace import Lengths

BLOCK_SIZE = 4
MAX_BLOCKS = 6
"""of the longest context"""
MAX_CONTEXTS = 5
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=BLOCK_SIZE * MAX_BLOCKS - 4)
"""Two tokens only, so that prefixes are often equal."""
SALTS = st.sampled_from([None, None, "one", "other"])


class BlockManagerMachine(RuleBasedStateMachine):
    """Contexts come, grow, are run in any order, and go, as a reward engine makes them."""

    @initialize(num_blocks=st.integers(MAX_BLOCKS + 1, 3 * MAX_BLOCKS))
    def start(self, num_blocks: int) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE, MAX_CONTEXTS, MAX_BLOCKS, torch.device("cpu"))
        self.num_blocks = num_blocks - 1  # without the null block
        self.lengths: dict[int, int] = {}
        # What the model would have written: block -> the tokens from the context's begin to the block's end.
        self.content: dict[int, tuple[int, ...]] = {}
        self.cache = torch.full((num_blocks, BLOCK_SIZE), -1.0)  # as a KV cache holds it

    @precondition(lambda self: len(self.lengths) < MAX_CONTEXTS)
    @rule(prompt=TOKENS, shared=st.lists(st.integers(0, 3 * BLOCK_SIZE), max_size=2).map(sorted), salt=SALTS)
    def add(self, prompt: list[int], shared: list[int], salt: str | None) -> None:
        index = next(i for i in range(MAX_CONTEXTS) if i not in self.lengths)
        self.blocks.add(index, prompt, shared, salt)
        self.lengths[index] = len(prompt)

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.lengths)))
        self.blocks.remove(self.blocks.contexts[index])
        del self.lengths[index]

    @rule()
    def reset(self) -> None:
        """A forward failed."""
        self.blocks.reset()
        self.content.clear()

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        line = data.draw(st.lists(st.sampled_from(sorted(self.lengths)), min_size=1, unique=True))
        for index in line:
            self.lengths[index] = min(self.lengths[index] + data.draw(st.integers(0, 3)), BLOCK_SIZE * MAX_BLOCKS)
        lengths = [self.lengths[index] for index in line]
        blocks = self.blocks
        blocks.begin_step()
        if blocks.ready(np.array(line), Lengths(np.array(lengths))):
            assert all(blocks.contexts[index].blocks for index in line)
            for index in line:
                self.write(index, compute_from=None)
            return
        fits = blocks.has_room(np.array(line), np.array(lengths))
        while line:
            held = {index: list(blocks.contexts[index].blocks) for index in line}
            admitted, cold = blocks.admit(line, lengths)
            assert admitted >= 1
            assert not fits or admitted == len(line), "there was no room"
            starts = {context.slot: num_computed for context, num_computed in cold}
            self.copy(blocks.take_copies(), starts)
            for index in line[:admitted]:
                context = blocks.contexts[index]
                assert len(context.blocks) * BLOCK_SIZE >= self.lengths[index]
                assert (index in starts) == (not held[index] or context.blocks[: len(held[index])] != held[index])
                self.write(index, compute_from=starts.get(index))
            for index in line[:admitted]:  # all of them together, as one forward needs them
                row = blocks.table[index, : len(blocks.contexts[index].blocks)].tolist()
                assert row == [block.block_id for block in blocks.contexts[index].blocks]
            del line[:admitted], lengths[:admitted]

    def copy(self, copies: list[Copy], starts: dict[int, int]) -> None:
        """See that what is copied is what the target would have computed."""
        cold = list(starts)
        for source, source_block, target, block in copies:
            num_shared = starts[target.slot]
            assert num_shared in target.shared
            at, shared = num_shared // BLOCK_SIZE, target.prompt_ids[:num_shared]
            assert target.blocks[at].block_id == block
            assert self.blocks.pool.blocks[block].ref_cnt == 1, "a copy would be written into another's block"
            assert source.prompt_ids[: len(shared)] == shared
            assert source.cache_salt == target.cache_salt, "copied from another tenant's"
            if source.slot in cold:
                assert cold.index(source.slot) < cold.index(target.slot)
                assert source.blocks[at].block_id == source_block
            else:
                assert list(self.content[source_block][: len(shared)]) == shared
        held = [copy for copy in copies if copy.source.slot not in cold]
        copy_blocks([self.cache], [(copy.source_block, copy.block) for copy in held])
        for _, _, target, block in held:
            end = starts[target.slot]
            tail = target.prompt_ids[end // BLOCK_SIZE * BLOCK_SIZE : end]
            assert self.cache[block, : len(tail)].tolist() == [float(token) for token in tail]

    def write(self, index: int, compute_from: int | None) -> None:
        """Do to ``content`` what a forward does to the KV cache, and see that what is reused is what it should be."""
        context = self.blocks.contexts[index]
        prompt = tuple(context.prompt_ids)
        tokens = prompt + tuple((index + 2,) * (self.lengths[index] - len(prompt)))  # generated: the context's own
        for i, block in enumerate(context.blocks):
            end = (i + 1) * BLOCK_SIZE
            if compute_from is not None and end <= compute_from:
                assert compute_from < len(prompt)
                assert self.content[block.block_id] == tokens[:end], "a hit on other tokens"
            elif compute_from is None and end < len(prompt):
                assert self.content[block.block_id] == tokens[:end], "a context's blocks were written by another"
            else:
                self.content[block.block_id] = tokens[:end]
                written = tokens[i * BLOCK_SIZE : end]
                self.cache[block.block_id, : len(written)] = torch.tensor(written, dtype=torch.float)

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        if not hasattr(self, "blocks"):
            return
        contexts = [context for context in self.blocks.contexts if context is not None]
        holders: dict[int, list] = {}
        for context in contexts:
            ids = [block.block_id for block in context.blocks]
            assert len(ids) == len(set(ids)) == self.blocks.num_held[context.slot]
            assert 0 not in ids
            for i, block in enumerate(context.blocks):
                prefix = tuple(context.prompt_ids[: (i + 1) * BLOCK_SIZE])
                holders.setdefault(block.block_id, []).append((prefix, i, context.cache_salt))
        assert self.blocks.num_free_blocks + len(holders) == self.num_blocks
        for block_id, owners in holders.items():
            assert self.blocks.pool.blocks[block_id].ref_cnt == len(owners)
            if len(owners) > 1:  # shared: the same full block of one prompt and tenant, before its last token
                assert len(set(owners)) == 1
                assert len(owners[0][0]) == (owners[0][1] + 1) * BLOCK_SIZE

    def teardown(self) -> None:
        if hasattr(self, "blocks"):
            for index in list(self.lengths):
                self.blocks.remove(self.blocks.contexts[index])
            assert self.blocks.num_free_blocks == self.num_blocks


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def manager(num_blocks: int = 1 + 2 * MAX_BLOCKS) -> BlockManager:
    return BlockManager(num_blocks, BLOCK_SIZE, MAX_CONTEXTS, MAX_BLOCKS, torch.device("cpu"))


def test_contexts_that_arrive_together_share_what_the_first_will_compute():
    blocks = manager()
    prompt = list(range(10))
    for index in range(3):
        blocks.add(index, [*prompt, index])
    blocks.begin_step()
    admitted, cold = blocks.admit([0, 1, 2], [11, 11, 11])
    assert admitted == 3
    assert [num_computed for _, num_computed in cold] == [0, 8, 8]
    assert blocks.stats.num_prefix_hit_tokens == 16


def test_a_shared_head_that_ends_within_a_block_is_copied():
    blocks = manager()
    head = list(range(10))
    for index in range(3):
        blocks.add(index, [*head, 20 + index, 30], shared=[10])
    blocks.begin_step()
    _, cold = blocks.admit([0, 1, 2], [12, 12, 12])
    assert [num_computed for _, num_computed in cold] == [0, 10, 10]
    first = blocks.contexts[0]
    assert [(c.source, c.source_block) for c in blocks.take_copies()] == [(first, first.blocks[2].block_id)] * 2
    assert not blocks.take_copies()
    blocks.remove(first)
    blocks.add(0, [*head, 40, 30], shared=[10])
    _, cold = blocks.admit([0], [12])
    assert [num_computed for _, num_computed in cold] == [8], "nobody else holds it under its name"


def test_a_block_may_be_copied_and_copied_into_at_once():
    """It is shared with one newcomer, and then taken from its context for another: it is read before it is written."""
    blocks = manager(1 + 5)
    heads = [[1, 1, 1, 1, 2, 3], [5, 5, 5, 5, 6, 7]]
    for index, head in enumerate([*heads, *heads]):
        blocks.add(index, [*head, 8, 9], shared=[6])
    for index in (0, 1):
        blocks.begin_step()
        blocks.admit([index], [8])
    lost, kept = (blocks.contexts[index].blocks[1].block_id for index in (0, 1))
    cache = torch.arange(6.0)[:, None].repeat(1, BLOCK_SIZE)
    blocks.begin_step()
    assert blocks.admit([2, 3], [8, 8])[0] == 2
    pairs = [(copy.source_block, copy.block) for copy in blocks.take_copies()]
    assert [source for source, _ in pairs] == [lost, kept]
    assert pairs[1][1] == lost
    for order in (pairs, pairs[::-1]):
        copied = cache.clone()
        copy_blocks([copied], order)
        assert [int(copied[target, 0]) for _, target in pairs] == [lost, kept]


def test_a_system_prompt_is_copied_where_the_preference_is_another():
    """Both end within a block: of two users with one preference the second has both, the third the system prompt."""
    blocks = manager()
    system = list(range(6))
    for index, preference in enumerate(([20, 21, 22], [20, 21, 22], [30, 31, 32])):
        blocks.add(index, [*system, *preference, 40 + index, 50], shared=[6, 9])
    blocks.begin_step()
    _, cold = blocks.admit([0, 1, 2], [11, 11, 11])
    assert [num_computed for _, num_computed in cold] == [0, 9, 6]
    assert [copy.source.slot for copy in blocks.take_copies()] == [0, 0]
    for index in range(3):
        blocks.remove(blocks.contexts[index])
    assert not blocks.tails


def test_tenants_share_neither_full_blocks_nor_what_ends_within_one():
    """Whatever stands in a first block, and behind it; among those of one salt, and those without, all is as ever."""
    for shared, computed_again in ((6, 6), (2, 2)):
        blocks = manager(1 + MAX_CONTEXTS * MAX_BLOCKS)
        salts = ["one", "other", None, "one", None]
        for index, salt in enumerate(salts):
            blocks.add(index, [*range(1, shared + 1), 50 + index, 60], [shared], salt)
        blocks.begin_step()
        _, cold = blocks.admit(range(5), [9] * 5)
        assert [num_computed for _, num_computed in cold] == [0, 0, 0, computed_again, computed_again]
        assert [(copy.source.slot, copy.target.slot) for copy in blocks.take_copies()] == [(0, 3), (2, 4)]


def test_the_last_token_of_a_prompt_is_never_reused():
    """Its hidden state is wanted, so it is computed."""
    blocks = manager()
    for index in range(2):
        blocks.add(index, list(range(8)))
    blocks.begin_step()
    _, cold = blocks.admit([0, 1], [8, 8])
    assert [num_computed for _, num_computed in cold] == [0, 4]


def test_a_short_pool_takes_first_from_the_least_recently_used():
    blocks = manager(1 + 2 * MAX_BLOCKS)
    for index in range(4):
        blocks.add(index, [index] * 12)
    for index in (0, 1, 2, 3):
        blocks.begin_step()
        blocks.admit([index], [12])
    assert blocks.num_free_blocks == 0
    blocks.begin_step()
    assert blocks.ready(np.array([0]), Lengths(np.array([12])))  # used again
    blocks.begin_step()
    blocks.admit([3], [16])
    assert [len(context.blocks) for context in blocks.contexts[:4]] == [3, 0, 3, 4]
    assert blocks.stats.num_contexts_evicted == 1


def test_contexts_of_one_step_in_turn_keep_all_but_one_in_place():
    """Four contexts in a pool for three: each step takes from the one that it has just been through with."""
    blocks = manager(1 + 9)
    for index in range(4):
        blocks.add(index, [index] * 12)
    computed = []
    for _ in range(5):
        blocks.begin_step()
        line, recomputed = [0, 1, 2, 3], []
        while line:
            admitted, cold = blocks.admit(line, [12] * len(line))
            recomputed += [context.slot for context, _ in cold]
            del line[:admitted]
        computed.append(len(recomputed))
    assert computed[0] == 4
    assert max(computed[1:]) <= 2
