"""The guidance step for a reward model with another tokenizer, against the oracle."""

from __future__ import annotations

import pytest
import torch

from pad_vllm.kernels import Groups, Mixture
from pad_vllm.kernels import groups as in_torch
from pad_vllm.kernels.large_groups import find_large
from tests import oracle
from tests.kernels.test_kernels import (  # noqa: F401 (fixtures)
    adapted_head,
    control,
    ends,
    head_adapters,
    interpreter,
    problem,
    run,
)

NEG_INF = float("-inf")
REWARD_VOCAB = 61


def tables(vocab_size: int, reward_vocab: int = REWARD_VOCAB, seed: int = 3) -> tuple[Groups, oracle.Groups]:
    """Keys of few groups, so that candidates share them; a token in nine without one; members from one to a fifth of
    the vocabulary, in several groups some."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(0, -(-reward_vocab // 4), (vocab_size,), generator=generator)
    key[::9] = -1
    sizes = torch.randint(0, 4, (reward_vocab,), generator=generator)
    sizes[::13] = reward_vocab // 5
    members = [
        sorted({g, *torch.randint(0, reward_vocab, (int(n),), generator=generator).tolist()})
        for g, n in enumerate(sizes)
    ]
    starts = torch.tensor([0, *(len(part) for part in members)]).cumsum(0)
    flat = torch.tensor([u for part in members for u in part])
    groups = Groups(vocab_size, key.int(), flat.int(), starts.int(), max(map(len, members)))
    return groups, oracle.Groups(key.tolist(), members, [])


def grouped(num_rows: int, vocab_size: int = 97, hidden_size: int = 16, reward_vocab: int = REWARD_VOCAB, **kwargs):
    """A problem with tables; tokens without a key are masked, as the step finds them."""
    logits, hidden, _ = problem(num_rows, vocab_size, hidden_size, **kwargs)
    lm_head = problem(1, reward_vocab, hidden_size, seed=1, **kwargs)[2]
    groups, plain = tables(vocab_size, reward_vocab)
    logits[:, groups.key < 0] = NEG_INF
    return logits, hidden, lm_head, groups, plain


@pytest.mark.parametrize(
    ("dtype", "reference", "shards"), [(torch.float32, "base", (1, 2)), (torch.bfloat16, "none", (1,))]
)
def test_rows_with_their_own_k_and_beta(dtype, reference, shards, run):  # noqa: F811
    logits, hidden, lm_head, groups, plain = grouped(5, dtype=dtype)
    top_k, beta = torch.tensor([1, 2, 10, 3, 20]), torch.tensor([0.0, 0.5, 1.0, 1.5, 3.0])
    for num_shards in shards:
        out = run(
            logits, hidden, lm_head, top_k=top_k, beta=beta, reference=float(reference == "base"), vocabulary=groups,
            num_shards=num_shards,
        )  # fmt: skip
        for i in range(5):
            r = lm_head.float() @ hidden[i].float()
            expected = oracle.guided_logits(logits[i], r, int(top_k[i]), beta[i].item(), reference, groups=plain)
            torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-4)


def test_groups_of_one_token_are_the_ordinary_rule(run):  # noqa: F811
    logits, hidden, lm_head = problem(4)
    each = torch.arange(98)
    groups = Groups(97, each[:97].int(), each[:97].int(), each.int(), 1)
    out = run(logits, hidden, lm_head, top_k=20, beta=0.7, vocabulary=groups)
    torch.testing.assert_close(out, run(logits, hidden, lm_head, top_k=20, beta=0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_rows_of_several_contexts(soft_cap, run):  # noqa: F811
    """Each context's groups by themselves, with a bias, a cap and a scale; what is not a row's may be NaN."""
    logits, _, lm_head, groups, plain = grouped(3)
    hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(7))
    hidden[6] = float("nan")
    bias = torch.randn(REWARD_VOCAB, generator=torch.Generator().manual_seed(5))
    rows = [[(2, 0.7), (0, 0.3), (1, -1.0)], [(5, 2.0)], [(3, 0.6), (4, -0.2)]]
    padded = [row + [(6, 0.0)] * (3 - len(row)) for row in rows]
    mixture = Mixture(
        torch.tensor([[context for context, _ in row] for row in padded]),
        torch.tensor([[weight for _, weight in row] for row in padded]),
    )
    totals = torch.tensor([sum(weight for _, weight in row) for row in rows])
    settings = {"bias": bias, "soft_cap": soft_cap, "scale": 0.7, "mixture": mixture, "vocabulary": groups}
    for num_shards in (1, 2):
        out = run(logits, hidden, lm_head, top_k=10, beta=0.8, reference=totals, num_shards=num_shards, **settings)
        for i, row in enumerate(rows):
            r = [lm_head @ hidden[context] + bias for context, _ in row]
            r = [0.7 * (soft_cap * torch.tanh(r_j / soft_cap) if soft_cap else r_j) for r_j in r]
            weights = [weight for _, weight in row]
            expected = oracle.guided_logits(logits[i], r, 10, 0.8, weights=weights, groups=plain)
            torch.testing.assert_close(out[i].log_softmax(0), expected.log_softmax(0), rtol=1e-4, atol=1e-4)


def test_the_reward_does_not_see_bias_and_penalties(run):  # noqa: F811
    y, hidden, lm_head, groups, plain = grouped(3)
    requests = {
        1: {"bias": {5: 20.0, 31: 2.0, 96: -2.0}},
        0: {"penalties": (1.0, 0.5, 1.3), "prompt": list(range(40)), "output": [7, 7, 50], "drafts": [60]},
    }
    z, controls = control(y, 3, [1, 0, 2], requests)
    out = run(z, hidden, lm_head, top_k=torch.tensor([12, 12, 0]), beta=1.5, controls=controls, vocabulary=groups)
    for i in range(2):
        expected = oracle.guided_logits(z[i], lm_head @ hidden[i], 12, 1.5, y=y[i], groups=plain)
        torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(out[2], z[2])


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_each_context_is_read_through_an_adapter_of_the_head(soft_cap, run):  # noqa: F811
    logits, hidden, lm_head, groups, rule = grouped(3)
    numbers = [1, -1, 0]
    adapters = head_adapters(REWARD_VOCAB, 16, numbers)
    out = run(logits, hidden, lm_head, top_k=12, vocabulary=groups, adapters=adapters, soft_cap=soft_cap)
    for i, number in enumerate(numbers):
        r = adapted_head(lm_head, adapters, number) @ hidden[i]
        if soft_cap is not None:
            r = torch.tanh(r / soft_cap) * soft_cap
        expected = oracle.guided_logits(logits[i], r, 12, 1.0, groups=rule)
        torch.testing.assert_close(out[i], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_whose_reward_is_not_finite_gets_its_end_token(bad, run):  # noqa: F811
    logits, hidden, lm_head, groups, plain = grouped(3)
    hidden[1] = bad
    logits[2] = NEG_INF
    out = run(logits, hidden, lm_head, top_k=5, vocabulary=groups)
    assert ends(out[1], 21)
    assert ends(out[2], 22)
    torch.testing.assert_close(out[0], oracle.guided_logits(logits[0], lm_head @ hidden[0], 5, 1.0, groups=plain))


@pytest.mark.parametrize(
    ("vocab_size", "reward_vocab", "hidden_size", "top_k"),
    [(9001, 5003, 48, 33), (2049, 70, 520, 10), (31, 3, 8, 20)],
)
def test_shapes(run, vocab_size, reward_vocab, hidden_size, top_k):  # noqa: F811
    logits, hidden, lm_head, groups, plain = grouped(2, vocab_size, hidden_size, reward_vocab)
    groups = groups._replace(key=groups.key.clamp(max=reward_vocab - 1))
    plain = plain._replace(key=groups.key.tolist())
    out = run(logits, hidden, lm_head, top_k=top_k, beta=0.8, vocabulary=groups)
    for i in range(2):
        expected = oracle.guided_logits(logits[i], lm_head @ hidden[i], top_k, 0.8, groups=plain)
        torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("soft_cap", "dtype"), [(None, torch.bfloat16), (2.0, torch.float32)], ids=str)
def test_large_groups_are_read_once_for_all_rows(soft_cap, dtype, run, monkeypatch):  # noqa: F811
    """More contexts than a program has, blocks that do not fill, members on two ranks; a context of no row is NaN."""
    monkeypatch.setattr(in_torch, "LARGE_GROUP", 30)
    num_rows = 10
    logits, _, lm_head, groups, plain = grouped(num_rows, hidden_size=100, reward_vocab=700, dtype=dtype)
    large = find_large(groups.starts, 30)
    assert large is not None
    assert len(large.blocks) > 2 * (len(large.starts) - 1)
    groups = groups._replace(large=large)
    hidden = torch.randn(2 * num_rows + 1, 100, generator=torch.Generator().manual_seed(7)).to(dtype)
    hidden[-1] = float("nan")
    bias = torch.randn(700, generator=torch.Generator().manual_seed(5)).to(dtype)
    contexts = torch.arange(2 * num_rows).view(num_rows, 2)
    weights = torch.tensor([[0.8, -0.5]]).repeat(num_rows, 1)
    contexts[3, 1], weights[3, 1] = 2 * num_rows, 0.0
    top_k = torch.arange(num_rows) * 2
    adapters = head_adapters(700, 100, torch.arange(2 * num_rows + 1) % 3 - 1) if soft_cap else None
    for num_shards in (1, 2):
        out = run(
            logits, hidden, lm_head, top_k=top_k, beta=0.8, reference=weights.sum(1), bias=bias, vocabulary=groups,
            soft_cap=soft_cap, mixture=Mixture(contexts, weights), num_shards=num_shards, adapters=adapters,
        )  # fmt: skip
        assert torch.equal(out[0], logits[0])
        for i in range(1, num_rows):
            head_of = [adapted_head(lm_head, adapters, c % 3 - 1) if adapters else lm_head.float() for c in contexts[i]]
            r = [one @ hidden[c].float() + bias.float() for one, c in zip(head_of, contexts[i].tolist(), strict=True)]
            r = [soft_cap * torch.tanh(r_j / soft_cap) if soft_cap else r_j for r_j in r]
            parts = {"weights": weights[i].tolist()} if i != 3 else {"weights": [weights[i, 0].item()]}
            expected = oracle.guided_logits(
                logits[i], r[: len(parts["weights"])], int(top_k[i]), 0.8, groups=plain, **parts
            )
            torch.testing.assert_close(out[i].softmax(0), expected.softmax(0), rtol=1e-3, atol=1e-5)
    has = groups.key[logits[1:].topk(18).indices]
    assert (large.index[has.clamp(min=0)] >= 0).any()


def test_keys_of_each_row(run):  # noqa: F811
    """An answer's first token has another table."""
    logits, hidden, lm_head, groups, plain = grouped(3)
    other = groups.key.roll(7).where(groups.key >= 0, -1).clamp(max=REWARD_VOCAB - 1)
    other = other.where((groups.key < 0) | (other >= 0), 1)
    both = groups._replace(key=torch.cat([groups.key, other]))
    out = run(logits, hidden, lm_head, top_k=10, vocabulary=both, key_offsets=torch.tensor([97, 0, 97]))
    for i in range(3):
        now = plain if i == 1 else plain._replace(key=other.tolist())
        expected = oracle.guided_logits(logits[i], lm_head @ hidden[i], 10, 1.0, groups=now)
        torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-4)
