"""The guidance step in PyTorch against the oracle, and its edges."""

from __future__ import annotations

import pytest
import torch

from pad_vllm import kernels
from tests import oracle

NEG_INF = float("-inf")


def problem(num_rows: int, vocab_size: int = 97, hidden_size: int = 16, seed: int = 0, dtype=torch.float32):
    """logits [N, V], hidden [N, d], lm_head [V, d]."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    lm_head = torch.randn(vocab_size, hidden_size, generator=generator).to(dtype)
    return logits, hidden, lm_head


def run(logits, hidden, lm_head, rows=None, *, top_k, beta=None, reference=None, **kwargs):
    """``guide_`` on a copy; scalars fill tensors."""
    out = logits.clone()
    rows = torch.arange(len(logits)) if rows is None else torch.tensor(rows)
    top_k = torch.as_tensor(top_k).expand(len(rows))
    beta = torch.as_tensor(1.0 if beta is None else beta).expand(len(rows))
    reference = torch.as_tensor(1.0 if reference is None else reference).expand(len(rows))
    kwargs.setdefault("vocab_size", logits.shape[1])
    kernels.guide_(out, hidden, lm_head, rows, top_k, beta, reference, max_top_k=int(top_k.max()), **kwargs)
    return out


def expected_row(z, hidden, lm_head, top_k, beta, reference="base", bias=0.0):
    return oracle.guided_logits(z.float(), lm_head.float() @ hidden.float() + bias, top_k, beta, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reference", ["base", "none"])
def test_rows_with_their_own_k_and_beta(dtype, reference):
    logits, hidden, lm_head = problem(6, dtype=dtype)
    top_k, beta = torch.tensor([1, 2, 10, 50, 97, 3]), torch.tensor([0.0, 0.5, 1.0, 1.5, 3.0, 1.0])
    out = run(logits, hidden, lm_head, top_k=top_k, beta=beta, reference=float(reference == "base"))
    for i in range(6):
        expected = expected_row(logits[i], hidden[i], lm_head, int(top_k[i]), beta[i].item(), reference)
        torch.testing.assert_close(out[i], expected, rtol=1e-5, atol=1e-5)


def test_beta_zero_is_the_base_model_and_one_the_reward_models_choice():
    logits, hidden, lm_head = problem(5)
    assert torch.equal(run(logits, hidden, lm_head, top_k=10, beta=0.0).argmax(-1), logits.argmax(-1))
    candidates = logits.topk(10).indices
    rewarded = (hidden @ lm_head.T).gather(1, candidates).argmax(-1)
    chosen = run(logits, hidden, lm_head, top_k=10, beta=1.0).argmax(-1)
    assert torch.equal(chosen, candidates.gather(1, rewarded[:, None])[:, 0])


def test_other_rows_are_untouched_to_the_bit():
    logits, hidden, lm_head = problem(5)
    logits[0, 3], logits[2, 5] = float("nan"), NEG_INF
    out = run(logits, hidden[:2], lm_head, rows=[3, 1], top_k=4)
    for i in (0, 2, 4):
        assert torch.equal(out[i].view(torch.int32), logits[i].view(torch.int32))
    torch.testing.assert_close(out[3], expected_row(logits[3], hidden[0], lm_head, 4, 1.0))
    torch.testing.assert_close(out[1], expected_row(logits[1], hidden[1], lm_head, 4, 1.0))


def test_masked_tokens_stay_masked_and_shrink_the_candidates():
    logits, hidden, lm_head = problem(2)
    logits[0] = NEG_INF
    logits[0, [5, 40]] = torch.tensor([1.0, 2.0])
    logits[1, ::2] = NEG_INF
    out = run(logits, hidden, lm_head, top_k=10)
    assert out[0].isfinite().nonzero().flatten().tolist() == [5, 40]
    assert not out[1, ::2].isfinite().any()
    for i in range(2):
        torch.testing.assert_close(out[i], expected_row(logits[i], hidden[i], lm_head, 10, 1.0))


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_ties_go_to_the_lower_token_id(top_k):
    logits, hidden, lm_head = problem(3)
    logits[0] = 0.0
    logits[1] = logits[1].round()
    logits[2, [90, 7, 50, 31]] = 20.0
    out = run(logits, hidden, lm_head, top_k=top_k)
    for i in range(3):
        torch.testing.assert_close(out[i], expected_row(logits[i], hidden[i], lm_head, top_k, 1.0))


def test_infinite_and_nan_logits_are_no_candidates():
    logits, hidden, lm_head = problem(3)
    logits[0, 4], logits[0, 9] = float("inf"), float("nan")
    logits[1] = NEG_INF
    out = run(logits, hidden, lm_head, top_k=5)
    torch.testing.assert_close(out[0], expected_row(logits[0], hidden[0], lm_head, 5, 1.0))
    assert (out[1] == NEG_INF).all()
    torch.testing.assert_close(out[2], expected_row(logits[2], hidden[2], lm_head, 5, 1.0))


def test_a_nan_hidden_state_does_not_spread_to_other_rows():
    logits, hidden, lm_head = problem(3)
    hidden[1, 0] = float("nan")
    out = run(logits, hidden, lm_head, top_k=5)
    for i in (0, 2):
        torch.testing.assert_close(out[i], expected_row(logits[i], hidden[i], lm_head, 5, 1.0))


def test_bias_soft_cap_and_scale():
    logits, hidden, lm_head = problem(2)
    bias = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(5))
    out = run(logits, hidden, lm_head, top_k=10, bias=bias, soft_cap=5.0, scale=0.7)
    for i in range(2):
        r = 0.7 * 5.0 * torch.tanh((lm_head @ hidden[i] + bias) / 5.0)
        torch.testing.assert_close(out[i], oracle.guided_logits(logits[i], r, 10, 1.0))


def test_mixed_heads():
    logits, hidden, lm_head = problem(3)
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(2, 16, 16, generator=generator), torch.randn(2, 16, generator=generator)
    mix = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.3, -0.7], [0.0, 1.0, 0.0]])
    out = run(logits, hidden, lm_head, top_k=10, heads=(weight, bias, mix))
    mapped = [
        hidden[0],
        0.3 * (weight[0] @ hidden[1] + bias[0]) - 0.7 * (weight[1] @ hidden[1] + bias[1]),
        weight[0] @ hidden[2] + bias[0],
    ]
    for i, h in enumerate(mapped):
        expected = expected_row(logits[i], h, lm_head, 10, 1.0)
        torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-4)


def test_tensor_parallel_shards_sum_to_the_whole():
    logits, hidden, lm_head = problem(4, vocab_size=100)
    bias = torch.randn(100, generator=torch.Generator().manual_seed(2))
    ids, _ = kernels.select_candidates(logits, torch.arange(4), torch.full((4,), 10), 10, 100)
    shards = [
        kernels.score_candidates(hidden, lm_head[start:end], ids, bias[start:end], vocab_start=start)
        for start, end in [(0, 34), (34, 68), (68, 100)]
    ]
    torch.testing.assert_close(sum(shards), kernels.score_candidates(hidden, lm_head, ids, bias))


def test_tokens_beyond_the_shared_vocabulary_are_no_candidates():
    logits, hidden, lm_head = problem(2)
    logits[:, 90:] += 50
    out = run(logits, hidden, lm_head[:90], top_k=10, vocab_size=90)
    masked = logits.clone()
    masked[:, 90:] = NEG_INF
    r = torch.cat([hidden @ lm_head[:90].T, torch.zeros(2, 7)], dim=1)
    for i in range(2):
        torch.testing.assert_close(out[i], oracle.guided_logits(masked[i], r[i], 10, 1.0))


def test_bf16_logits_and_strided_rows():
    logits, hidden, lm_head = problem(3)
    wide = torch.zeros(3, 200, dtype=torch.bfloat16)
    view = wide[:, 20:117]
    view.copy_(logits)
    kernels.guide_(
        view,
        hidden,
        lm_head,
        torch.tensor([2]),
        torch.tensor([4]),
        torch.tensor([1.0]),
        torch.tensor([1.0]),
        max_top_k=4,
        vocab_size=97,
    )
    expected = expected_row(logits[2].bfloat16(), hidden[0], lm_head, 4, 1.0)
    torch.testing.assert_close(view[2].float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(view[0], logits[0].bfloat16())
    assert not wide[:, :20].any()
    assert not wide[:, 117:].any()
