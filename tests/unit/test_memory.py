"""The size of the reward model's KV cache where nobody says it."""

from __future__ import annotations

import pytest

from pad_vllm.reward.memory import BaseMemory, derive_kv_cache_bytes


def derive(base: BaseMemory, **overrides) -> int:
    sizes = {"bytes_per_token": 100, "stretch": 1.25, "one_context": 100_000, "max_num_seqs": 10}
    return derive_kv_cache_bytes(base, **sizes | overrides)


def test_room_for_as_many_tokens_as_the_base_has():
    """And for what preferences add to them."""
    assert derive(BaseMemory(1000, 4000, 0)) == 4000 * 125


def test_what_is_left_is_divided_so_that_both_last_equally_long():
    budget = 4_500_000
    reward = derive(BaseMemory(1000, None, budget))
    assert reward == 500_000
    assert (budget - reward) / 1000 == reward / 125


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (BaseMemory(1000, 10**9, 0), 1_000_000),  # every request at its full length
        (BaseMemory(1000, 10, 0), 100_000),  # one
        (BaseMemory(1000, None, -5), 100_000),
    ],
)
def test_never_more_than_all_requests_need_nor_less_than_one(base, expected):
    assert derive(base) == expected
