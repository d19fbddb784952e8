"""The size of the reward model's KV cache where nobody says it."""

from __future__ import annotations

import pytest

from pad_vllm.reward.memory import BaseMemory, TypicalContext, derive_kv_cache_bytes


def derive(base: BaseMemory, **overrides) -> int:
    typical = TypicalContext(2048, 1.0, 256)  # a quarter more than the base's 1,024
    sizes = {"bytes_per_token": 100, "typical": typical, "one_context": 100_000, "max_num_seqs": 10}
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


LLAMA_8B, LLAMA_1B = 32 * 8 * 128 * 2 * 2, 16 * 8 * 64 * 2 * 2
"""Bytes of a token: layers, KV heads, head size, key and value, bfloat16."""


def of_both(typical: TypicalContext, num_tokens: int) -> float:
    """The 1B's part of 48 GiB beside the 8B, whose longest context has ``num_tokens``."""
    base, budget = BaseMemory(LLAMA_8B, None, 48 * 2**30), 48 * 2**30
    return derive_kv_cache_bytes(base, LLAMA_1B, typical, num_tokens * LLAMA_1B, 256) / budget


@pytest.mark.parametrize("base_len", [2048, 8192, 131072])
def test_a_1b_beside_an_8b_takes_little_more_than_its_tokens_bytes_say(base_len):
    """It took 29% on a card, as a context was reckoned 3,086 tokens long for a base's 2,048."""
    share = LLAMA_1B / (LLAMA_8B + LLAMA_1B)
    typical = TypicalContext(base_len, 1.0, 26 + 32)
    with_preference = of_both(typical, base_len + 1038)
    shared = of_both(TypicalContext(base_len, 1.0, 0), base_len + 1038)
    assert share == 0.2
    assert share == pytest.approx(shared)
    assert share < with_preference < 1.1 * share
    assert typical.num_tokens == 1082


def test_a_typical_request_is_no_longer_than_half_of_what_the_engine_takes():
    assert TypicalContext(256, 1.5, 10).num_tokens == 202
    assert TypicalContext(1, 1.0, 0).per_base_token == 1.0
