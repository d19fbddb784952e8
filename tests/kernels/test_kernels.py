"""The guidance step in PyTorch against the oracle, and its edges."""

from __future__ import annotations

import inspect
import json
from unittest.mock import patch

import pytest
import torch

from benchmarks import kernel_problems
from pad_vllm.kernels import Controls, HeadAdapters, HeadMix, Mixture, OutputHead, OutputTokens, Rows, SharedVocabulary
from pad_vllm.kernels.selection import select_candidates
from tests import oracle
from tests.support.engine import Worker, set_environment

NEG_INF = float("-inf")


def problem(num_rows: int, vocab_size: int = 97, hidden_size: int = 16, seed: int = 0, dtype=torch.float32):
    """logits [N, V], hidden [N, d], lm_head [V, d]."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    lm_head = torch.randn(vocab_size, hidden_size, generator=generator).to(dtype)
    return logits, hidden, lm_head


SENTINEL = 7.0
END = 20
"""End token of the first guided row; those of the others follow."""


def run_guide(implementation: str, logits, hidden, head, rows, vocabulary, kwargs, num_shards=1):
    """``guide_`` on a copy whose rows lie apart, with something between them that must stay; and, sharded, on every
    rank of a tensor-parallel group. Runs in a process that has the Triton interpreter on where it must."""
    from pad_vllm.kernels import load_guide

    step = load_guide("triton" if implementation == "triton" else "reference")
    rows = rows._replace(may_read=False if implementation == "reference as on a device" else None)
    num_cols, shard_size = logits.shape[1], -(-head.weight.shape[0] // num_shards)
    partial, outputs = [], []
    for collect in (True, False) if num_shards > 1 else (False,):
        for shard in range(num_shards):
            wide = torch.full((len(logits), num_cols + 40), SENTINEL, dtype=logits.dtype)
            out = wide[:, 20 : 20 + num_cols]
            out.copy_(logits)
            mine, part = slice(shard * shard_size, (shard + 1) * shard_size), head
            if num_shards > 1:
                part = head._replace(
                    weight=head.weight[mine],
                    bias=None if head.bias is None else head.bias[mine],
                    adapters=None if head.adapters is None else head.adapters._replace(b=head.adapters.b[mine]),
                    vocab_start=mine.start,
                    shard=(shard, num_shards),
                    all_reduce=(lambda scores: partial.append(scores.clone()) or scores)
                    if collect
                    else (lambda scores: sum(partial)),
                )
            step(out, hidden, part, rows, vocabulary, **kwargs)
            outputs.append(out.clone())
            assert (wide[:, :20] == SENTINEL).all()
            assert (wide[:, 20 + num_cols :] == SENTINEL).all()
    for output in outputs[-num_shards:]:
        torch.testing.assert_close(output, outputs[-1], rtol=0, atol=0, equal_nan=True)
    return outputs[-1]


@pytest.fixture(scope="module")
def interpreter():
    """A process with the Triton interpreter on."""
    worker = Worker("v2")
    worker.run(set_environment, "v2")
    yield worker
    worker.close()


@pytest.fixture(params=["reference", "reference as on a device", pytest.param("triton", marks=pytest.mark.slow)])
def run(request):
    """``guide_`` by either implementation, on a copy; scalars fill tensors."""

    def run(
        logits, hidden, lm_head, rows=None, *, top_k, beta=1.0, reference=1.0, vocabulary=None, key_offsets=None,
        bias=None, soft_cap=None, scale=1.0, num_shards=1, max_divergence=None, adapters=None, **kwargs,
    ):  # fmt: skip
        index = torch.arange(len(logits)) if rows is None else torch.tensor(rows, dtype=torch.int64)
        num_rows = len(index)
        top_k, beta, reference = (torch.as_tensor(value).expand(num_rows) for value in (top_k, beta, reference))
        most = int(top_k.max()) if num_rows else 1
        rows = Rows(index, top_k, beta, reference, END + torch.arange(num_rows), most, key_offsets, max_divergence)
        head = OutputHead(lm_head, bias, soft_cap, scale, adapters=adapters)
        vocabulary = vocabulary or SharedVocabulary(logits.shape[1])
        arguments = (request.param, logits, hidden, head, rows, vocabulary, kwargs, num_shards)
        if request.param == "triton":
            return request.getfixturevalue("interpreter").run(run_guide, *arguments)
        return run_guide(*arguments)

    return run


def test_both_back_ends_have_one_signature():
    from pad_vllm.kernels import fused, mixture, reference, scoring

    for in_torch, in_triton in (
        (reference.guide_, fused.guide_),
        (scoring.mix_contexts, mixture.mix_contexts),
    ):
        assert in_torch.__module__ != in_triton.__module__
        assert inspect.signature(in_torch) == inspect.signature(in_triton)
        assert len(inspect.signature(in_torch).parameters) <= 9


def expected_row(z, hidden, lm_head, top_k, beta, reference="base", bias=0.0):
    return oracle.guided_logits(z.float(), lm_head.float() @ hidden.float() + bias, top_k, beta, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reference", ["base", "none"])
def test_rows_with_their_own_k_and_beta(dtype, reference, run):
    logits, hidden, lm_head = problem(6, dtype=dtype)
    top_k, beta = torch.tensor([1, 2, 10, 50, 97, 3]), torch.tensor([0.0, 0.5, 1.0, 1.5, 3.0, 1.0])
    out = run(logits, hidden, lm_head, top_k=top_k, beta=beta, reference=float(reference == "base"))
    for i in range(6):
        expected = expected_row(logits[i], hidden[i], lm_head, int(top_k[i]), beta[i].item(), reference)
        torch.testing.assert_close(out[i], expected, rtol=1e-5, atol=1e-5)


def test_beta_zero_is_the_base_model_and_one_the_reward_models_choice(run):
    logits, hidden, lm_head = problem(5)
    assert torch.equal(run(logits, hidden, lm_head, top_k=10, beta=0.0).argmax(-1), logits.argmax(-1))
    candidates = logits.topk(10).indices
    rewarded = (hidden @ lm_head.T).gather(1, candidates).argmax(-1)
    chosen = run(logits, hidden, lm_head, top_k=10, beta=1.0).argmax(-1)
    assert torch.equal(chosen, candidates.gather(1, rewarded[:, None])[:, 0])


def test_other_rows_are_untouched_to_the_bit(run):
    logits, hidden, lm_head = problem(5)
    logits[0, 3], logits[2, 5] = float("nan"), NEG_INF
    out = run(logits, hidden[:2], lm_head, rows=[3, 1], top_k=4)
    for i in (0, 2, 4):
        assert torch.equal(out[i].view(torch.int32), logits[i].view(torch.int32))
    torch.testing.assert_close(out[3], expected_row(logits[3], hidden[0], lm_head, 4, 1.0))
    torch.testing.assert_close(out[1], expected_row(logits[1], hidden[1], lm_head, 4, 1.0))


def test_masked_tokens_stay_masked_and_shrink_the_candidates(run):
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
def test_ties_go_to_the_lower_token_id(top_k, run):
    logits, hidden, lm_head = problem(3)
    logits[0] = 0.0
    logits[1] = logits[1].round()
    logits[2, [90, 7, 50, 31]] = 20.0
    out = run(logits, hidden, lm_head, top_k=top_k)
    for i in range(3):
        torch.testing.assert_close(out[i], expected_row(logits[i], hidden[i], lm_head, top_k, 1.0))


def test_infinite_and_nan_logits_are_no_candidates(run):
    logits, hidden, lm_head = problem(3)
    logits[0, 4], logits[0, 9] = float("inf"), float("nan")
    logits[1] = NEG_INF
    out = run(logits, hidden, lm_head, top_k=5)
    torch.testing.assert_close(out[0], expected_row(logits[0], hidden[0], lm_head, 5, 1.0))
    assert ends(out[1], END + 1), "no candidate"
    torch.testing.assert_close(out[2], expected_row(logits[2], hidden[2], lm_head, 5, 1.0))


def ends(row: torch.Tensor, token: int) -> bool:
    """Whether nothing but ``token`` can follow."""
    return row[token] == 0 and row.isneginf().sum() == len(row) - 1


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_whose_reward_is_not_finite_gets_its_end_token_and_nothing_else(bad, num_shards, run):
    """Also where one candidate's is, as the end token itself; no other row notices."""
    logits, hidden, lm_head = problem(5)
    hidden[1, 0] = bad
    logits[3, END + 3] = 30
    logits[4, END + 3] = NEG_INF
    lm_head[END + 3, 0] = bad
    hidden[:, 0] = torch.where(hidden[:, 0].isfinite(), hidden[:, 0].abs(), bad)
    out = run(logits, hidden, lm_head, top_k=5, beta=0.7, num_shards=num_shards)
    assert ends(out[1], END + 1)
    assert ends(out[3], END + 3)
    good = [i for i in (0, 2, 4) if END + 3 not in logits[i].topk(5).indices]
    assert 4 in good
    for i in good:
        torch.testing.assert_close(out[i], expected_row(logits[i], hidden[i], lm_head, 5, 0.7))


def control(y, num_slots: int, slots: list[int], requests: dict[int, dict]):
    """What requests make of the base logits, and the step's ``controls``. ``requests``: slot -> ``bias``,
    ``penalties``, ``prompt``, ``output``, ``drafts``."""
    width = 600
    num_bias, bias_ids = torch.zeros(num_slots, dtype=torch.int32), torch.zeros(num_slots, width, dtype=torch.int32)
    bias, penalties = torch.full((num_slots, width), 50.0), torch.tensor([[0.0, 0.0, 1.0]]).repeat(num_slots, 1)
    prompt_mask = torch.zeros(num_slots, -(-y.shape[1] // 32), dtype=torch.int32)
    histories, begin, end = torch.full((num_slots, 900), 3, dtype=torch.int32), [], []
    drafts, z = torch.full((len(slots), 3), -1, dtype=torch.int32), y.clone()
    for row, slot in enumerate(slots):
        asked = {"bias": {}, "penalties": (0.0, 0.0, 1.0), "prompt": [], "output": [], "drafts": []}
        asked |= requests.get(slot, {})
        ids = list(asked["bias"])
        num_bias[slot], bias_ids[slot, : len(ids)] = len(ids), torch.tensor(ids, dtype=torch.int32)
        bias[slot, : len(ids)] = torch.tensor(list(asked["bias"].values()))
        penalties[slot] = torch.tensor(asked["penalties"])
        for token in set(asked["prompt"]):
            prompt_mask[slot, token // 32] |= torch.tensor(1 << (token % 32)).int()
        begin.append(5)
        end.append(5 + len(asked["output"]))
        histories[slot, 5 : end[-1]] = torch.tensor(asked["output"], dtype=torch.int32)
        drafts[row, : len(asked["drafts"])] = torch.tensor(asked["drafts"], dtype=torch.int32)
        seen = asked["output"] + asked["drafts"]
        z[row] = oracle.penalized(oracle.biased(y[row], asked["bias"]), asked["prompt"], seen, *asked["penalties"])
    index = torch.tensor(slots)
    output = OutputTokens(histories, index, torch.tensor(begin), torch.tensor(end), drafts)
    if all(request.get("penalties") is None for request in requests.values()):
        output = None
    return z, Controls(index, num_bias, bias_ids, bias, penalties, prompt_mask, output)


MANY = list(range(90)) * 9
CONTROLS = [
    {1: {"bias": {5: 100.0}}},
    {1: {"bias": {5: -100.0, 31: 2.0, 96: -2.0}}, 0: {"bias": {i: 0.1 * i for i in range(90)}}},
    {1: {"penalties": (0.7, 0.0, 1.0), "output": [1, 1, 2, 31]}},
    {1: {"penalties": (0.0, -0.4, 1.0), "output": MANY, "drafts": [3, 3, 5]}},
    {1: {"penalties": (0.0, 0.0, 1.7), "prompt": [0, 31, 32, 63, 64, 95, 96], "output": [7, 7]}},
    {1: {"penalties": (0.0, 0.0, 0.6), "prompt": list(range(0, 97, 2)), "drafts": [9, 9, 11]}},
    {
        2: {
            "penalties": (1.0, 0.5, 1.3),
            "prompt": list(range(40)),
            "output": MANY[:50],
            "drafts": [60],
            "bias": {3: 4.0},
        },
        0: {"penalties": (-0.5, 0.2, 0.8), "prompt": [4, 4], "output": [4], "bias": {4: -30.0, 9: 5.5}},
        3: {"bias": dict.fromkeys(range(90), 1.5)},
    },
]


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("requests", CONTROLS, ids=range(len(CONTROLS)))
def test_the_reward_does_not_see_bias_and_penalties(beta, requests, run):
    """Candidates by z, the reward against y, for requests with and without controls in one batch."""
    y, hidden, lm_head = problem(5)
    slots = [3, 1, 0, 2, 4]
    z, controls = control(y, 6, slots, requests)
    expected = [oracle.guided_logits(z[i], lm_head @ hidden[i], 6, beta, y=y[i]) if i < 4 else z[i] for i in range(5)]
    assert not torch.equal(z, y)
    for num_shards in (1, 2):
        out = run(
            z, hidden, lm_head, top_k=torch.tensor([6, 6, 6, 6, 0]), beta=beta, controls=controls, num_shards=num_shards
        )
        for i in range(5):
            torch.testing.assert_close(out[i], expected[i], rtol=1e-4, atol=1e-4)


def test_absurd_penalties_stay_finite(run):
    y, hidden, lm_head = problem(3)
    every = {"prompt": list(range(97)), "output": []}
    requests = {i: every | {"penalties": (0.0, 0.0, r)} for i, r in enumerate((1e-37, 3e38, 1e-5))}
    z, controls = control(y, 3, [0, 1, 2], requests)
    out = run(z, hidden, lm_head, top_k=6, controls=controls)
    for i in range(3):
        assert ends(out[i], END + i) or (out[i].isfinite().sum() == z[i].isfinite().sum().clamp(max=6))
        assert not out[i].isnan().any()


def test_bias_soft_cap_and_scale(run):
    logits, hidden, lm_head = problem(2)
    bias = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(5))
    out = run(logits, hidden, lm_head, top_k=10, bias=bias, soft_cap=5.0, scale=0.7)
    for i in range(2):
        r = 0.7 * 5.0 * torch.tanh((lm_head @ hidden[i] + bias) / 5.0)
        torch.testing.assert_close(out[i], oracle.guided_logits(logits[i], r, 10, 1.0))


MIXTURES = [
    [[(2, 0.7), (0, 0.3), (1, -1.0)], [(5, 2.0)], [(3, 0.6), (4, 0.2), (5, 0.2), (1, 0.5), (0, -0.3), (2, -1.2)]],
    [[(0, 0.0)], [(3, 1.0), (4, -1.0)], [(5, -1.0)]],
]


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("contexts", MIXTURES, ids=range(len(MIXTURES)))
def test_rows_of_several_contexts(contexts, soft_cap, num_shards, run):
    """A row's reward is the weighted sum of its contexts', with an output head that has a bias; what is not a row's is
    not read, and may be NaN."""
    logits, _, lm_head = problem(3)
    hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(7))
    hidden[6] = float("nan")
    bias = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(5))
    width = max(map(len, contexts))
    padded = [row + [(row[0][0], 0.0)] * (width - len(row)) for row in contexts]
    mixture = Mixture(
        torch.tensor([[context for context, _ in row] for row in padded]),
        torch.tensor([[weight for _, weight in row] for row in padded]),
    )
    totals = [sum(weight for _, weight in row) for row in contexts]
    reference, settings = torch.tensor(totals), {"bias": bias, "soft_cap": soft_cap, "scale": 0.7}
    out = run(
        logits, hidden, lm_head, top_k=10, beta=0.8, reference=reference, mixture=mixture, num_shards=num_shards,
        **settings,
    )  # fmt: skip
    for i, row in enumerate(contexts):
        r = [lm_head @ hidden[context] + bias for context, _ in row]
        r = [0.7 * (soft_cap * torch.tanh(r_j / soft_cap) if soft_cap else r_j) for r_j in r]
        expected = oracle.guided_logits(logits[i], r, 10, 0.8, weights=[weight for _, weight in row])
        # Each context's normalizer shifts a whole row, and no more.
        torch.testing.assert_close(out[i].log_softmax(0), expected.log_softmax(0), rtol=1e-4, atol=1e-4)


def head_adapters(vocab_size: int, hidden_size: int, numbers, ranks=(3, 40), seed: int = 5) -> HeadAdapters:
    """Of those ranks; more than a program multiplies at a time."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(sum(ranks), hidden_size, generator=generator) / 4
    b = torch.randn(vocab_size, sum(ranks), generator=generator) / 4
    return HeadAdapters(a, b, torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)), torch.tensor(numbers))


def adapted_head(lm_head: torch.Tensor, adapters: HeadAdapters, number: int) -> torch.Tensor:
    """The output head with an adapter merged into it."""
    mine = adapters.owner == number
    return lm_head.float() + adapters.b[:, mine].float() @ adapters.a[mine]


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_is_read_through_an_adapter_of_the_head(dtype, num_shards, run):
    logits, hidden, lm_head = problem(4, dtype=dtype)
    adapters = head_adapters(97, 16, [1, -1, 0, 1])
    adapters = adapters._replace(b=adapters.b.to(dtype))
    out = run(logits, hidden, lm_head, top_k=10, adapters=adapters, num_shards=num_shards)
    for i, number in enumerate([1, -1, 0, 1]):
        expected = expected_row(logits[i], hidden[i], adapted_head(lm_head, adapters, number), 10, 1.0)
        torch.testing.assert_close(out[i], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_contexts_of_a_row_through_other_adapters_of_the_head_are_mixed(soft_cap, run):
    """In the scores, as it comes to the same: what an adapter adds to the head is linear in what it makes of h."""
    logits, hidden, lm_head = problem(2)
    hidden = torch.cat([hidden, problem(3, seed=9)[1]])
    contexts, weights, numbers = [[0, 1, 2], [3, 4, 4]], [[0.7, 0.5, -0.4], [1.0, -0.5, 0.0]], [0, 1, -1, 1, 0]
    adapters = head_adapters(97, 16, numbers)
    out = run(
        logits,
        hidden,
        lm_head,
        top_k=10,
        adapters=adapters,
        soft_cap=soft_cap,
        mixture=Mixture(torch.tensor(contexts), torch.tensor(weights)),
    )
    for i in range(2):
        r = torch.stack([adapted_head(lm_head, adapters, numbers[c]) @ hidden[c] for c in contexts[i]])
        if soft_cap is not None:
            r = torch.tanh(r / soft_cap) * soft_cap
        mixed = (torch.tensor(weights[i]).unsqueeze(1) * r).sum(0)
        torch.testing.assert_close(out[i], oracle.guided_logits(logits[i], mixed, 10, 1.0), rtol=2e-5, atol=2e-5)


def test_mixed_heads(run):
    logits, hidden, lm_head = problem(3)
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(2, 16, 16, generator=generator), torch.randn(2, 16, generator=generator)
    mix = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.3, -0.7], [0.0, 1.0, 0.0]])
    out = run(logits, hidden, lm_head, top_k=10, head_mix=HeadMix(weight, bias, mix))
    mapped = [
        hidden[0],
        0.3 * (weight[0] @ hidden[1] + bias[0]) - 0.7 * (weight[1] @ hidden[1] + bias[1]),
        weight[0] @ hidden[2] + bias[0],
    ]
    for i, h in enumerate(mapped):
        expected = expected_row(logits[i], h, lm_head, 10, 1.0)
        torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-4)


def test_vector_heads_are_diagonal_matrices(run):
    logits, hidden, lm_head = problem(2)
    generator = torch.Generator().manual_seed(4)
    vectors, bias = torch.randn(2, 16, generator=generator), torch.randn(2, 16, generator=generator)
    mix = torch.tensor([[0.0, 0.3, -0.7], [1.0, 0.0, 0.0]])
    out = run(logits, hidden, lm_head, top_k=10, head_mix=HeadMix(vectors, bias, mix))
    matrices = torch.stack([torch.diag(vector) for vector in vectors])
    torch.testing.assert_close(out, run(logits, hidden, lm_head, top_k=10, head_mix=HeadMix(matrices, bias, mix)))


def test_tensor_parallel_shards_sum_to_the_whole(run):
    logits, hidden, lm_head = problem(4, vocab_size=100)
    whole = run(logits, hidden, lm_head, top_k=10)
    torch.testing.assert_close(run(logits, hidden, lm_head, top_k=10, num_shards=3), whole)
    for i in range(4):
        torch.testing.assert_close(whole[i], expected_row(logits[i], hidden[i], lm_head, 10, 1.0))


def test_tokens_beyond_the_shared_vocabulary_are_no_candidates(run):
    logits, hidden, lm_head = problem(2)
    logits[:, 90:] += 50
    out = run(logits, hidden, lm_head[:90], top_k=10, vocabulary=SharedVocabulary(90))
    masked = logits.clone()
    masked[:, 90:] = NEG_INF
    r = torch.cat([hidden @ lm_head[:90].T, torch.zeros(2, 7)], dim=1)
    for i in range(2):
        torch.testing.assert_close(out[i], oracle.guided_logits(masked[i], r[i], 10, 1.0))


def test_bf16_logits(run):
    """Values to the 8 bits that bf16 has."""
    logits, hidden, lm_head = problem(3)
    logits = logits.bfloat16()
    out = run(logits, hidden[:1], lm_head, rows=[2], top_k=4)
    expected = expected_row(logits[2], hidden[0], lm_head, 4, 1.0)
    torch.testing.assert_close(out[2].float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(out[:2], logits[:2])


def test_rows_of_top_k_zero_are_left_alone(run):
    """They stand for rows of which only the device knows that they are not guided."""
    logits, hidden, lm_head = problem(4)
    logits[1, 3] = float("nan")
    out = run(logits, hidden, lm_head, rows=[3, 1, 0, 2], top_k=torch.tensor([5, 0, 0, 5]))
    assert torch.equal(out[:2].view(torch.int32), logits[:2].view(torch.int32))
    torch.testing.assert_close(out[3], expected_row(logits[3], hidden[0], lm_head, 5, 1.0))
    torch.testing.assert_close(out[2], expected_row(logits[2], hidden[3], lm_head, 5, 1.0))


def test_no_rows(run):
    logits, hidden, lm_head = problem(2)
    assert torch.equal(run(logits, hidden[:0], lm_head, rows=[], top_k=5), logits)


def sliced(case: str) -> torch.Tensor:
    """[7, 1280] logits of whole slices, in rows enough to be looked at by slices."""
    logits = problem(7, 1280)[0]
    match case:
        case "ties":
            logits = logits.mul_(2).round_()
        case "ties of slices":  # the largest of more slices than there are candidates
            logits[2, torch.arange(5, 1280, 64)] = 20.0
        case "nan":
            logits[3, 70] = float("nan")
        case "infinite":
            logits[1, 1279] = float("inf")
        case "masked":
            logits[4, 3:] = NEG_INF
        case "in one slice":
            logits[:, 640:704] += 100.0
    return logits


@pytest.mark.parametrize("rows", [[6, 0, 1, 2, 3, 4, 5], [4, 3, 2, 1, 6]], ids=["all", "some"])
@pytest.mark.parametrize("case", ["distinct", "ties", "ties of slices", "nan", "infinite", "masked", "in one slice"])
def test_candidates_by_slices(case, rows):
    logits = sliced(case)
    top_k = torch.arange(5, 5 + len(rows))
    rows = torch.tensor(rows)
    nothing = torch.zeros(len(rows))
    ids, z, _ = select_candidates(logits.clone(), Rows(rows, top_k, nothing, nothing, top_k, 11), 1280)
    for row, k, found, values in zip(logits[rows], top_k.tolist(), ids.tolist(), z, strict=True):
        finite = [i for i in range(1280) if row[i].isfinite()]
        expected = sorted(finite, key=lambda i: (-float(row[i]), i))[:k]
        assert found[: len(expected)] == expected
        assert torch.equal(values[: len(expected)], row[expected])
        assert (values[len(expected) :] == NEG_INF).all()


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "hidden_size", "top_k", "dtype"),
    [
        (6, 32_000, 24, 40, torch.float32),
        (1, 262_144, 32, 10, torch.bfloat16),
        (2, 33_003, 48, 64, torch.float32),
        (5, 9001, 100, 1, torch.bfloat16),
        (3, 2049, 130, 33, torch.bfloat16),
        (2, 4096, 16, 200, torch.float32),
        (9, 31, 8, 31, torch.bfloat16),
        (9, 31, 8, 31, torch.float32),
    ],
    ids=str,
)
def test_shapes(run, num_rows, vocab_size, hidden_size, top_k, dtype):
    """Many slices, slices that do not fill, hidden sizes that are no power of two; float32 accumulation throughout."""
    logits, hidden, lm_head = problem(num_rows, vocab_size, hidden_size, dtype=dtype)
    out = run(logits, hidden, lm_head, top_k=top_k, beta=0.8)
    for i in range(num_rows):
        expected = expected_row(logits[i], hidden[i], lm_head, top_k, 0.8)
        torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-4)


def fuzz_fused(max_examples: int) -> None:
    """Rows made to break selection and normalization, by both implementations. In the interpreter's process."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from pad_vllm.kernels import fused
    from pad_vllm.kernels import reference as in_torch

    values = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, NEG_INF, float("inf"), float("nan"), 3e38, -3e38, 1e-42, -1e-42, 1e-38]),
        st.floats(-20, 20, width=32),
    )

    @settings(max_examples=max_examples, deadline=None, database=None)
    @given(data=st.data())
    def equal(data) -> None:
        num_rows, vocab_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
        row = st.lists(values, min_size=vocab_size, max_size=vocab_size)
        logits = torch.tensor(data.draw(st.lists(row, min_size=num_rows, max_size=num_rows)))
        rows = torch.tensor(data.draw(st.permutations(range(num_rows)))[: data.draw(st.integers(1, num_rows))])
        top_k = torch.tensor(data.draw(st.lists(st.integers(0, 12), min_size=len(rows), max_size=len(rows))))
        top_k = top_k.clamp(max=vocab_size)
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
        hidden = torch.randn(len(rows), 8, generator=generator)
        if data.draw(st.booleans()):
            hidden[0, 0] = data.draw(st.sampled_from([float("nan"), float("inf"), 1e30]))
        lm_head = torch.randn(vocab_size, 8, generator=generator)
        beta, mode = torch.full((len(rows),), data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))), torch.ones(len(rows))
        bounds = [data.draw(st.sampled_from([float("inf"), 0.0, 1e-3, 0.1, 2.0])) for _ in range(len(rows))]
        max_divergence = data.draw(st.sampled_from([None, torch.tensor(bounds)]))
        outputs = []
        ends = torch.arange(len(rows)) % vocab_size
        for step in (in_torch.guide_, fused.guide_):
            out = logits.clone()
            asked = Rows(rows, top_k, beta, mode, ends, 12, max_divergence=max_divergence)
            step(out, hidden, OutputHead(lm_head), asked, SharedVocabulary(vocab_size))
            outputs.append(out)
        # Two sums of a divergence may lie on two sides of a bound: the last halving is one of beta / 2**16.
        near = 1e-4 if max_divergence is None else 3e-3
        torch.testing.assert_close(*outputs, rtol=near, atol=near, equal_nan=True)

    equal()


@pytest.mark.slow
def test_adversarial_rows(interpreter):
    interpreter.run(fuzz_fused, 150)


def run_benchmark(argv: list[str]) -> None:
    from benchmarks import kernel

    kernel.main(argv)


def run_benchmark_of_a_wrong_step(argv: list[str]) -> None:
    from benchmarks import kernel

    def almost(logits, hidden, head, rows, *args, **kwargs):
        kernel.reference.guide_(logits, hidden, head, rows._replace(beta=1.01 * rows.beta), *args, **kwargs)

    with patch.object(kernel.fused, "guide_", almost):
        kernel.main(argv)


@pytest.mark.slow
def test_the_benchmark_runs_and_checks_values(interpreter, tmp_path):
    """What times the kernels on a GPU, on tiny shapes: every part of it, but for the graphs."""
    output, plot = tmp_path / "results" / "kernel.json", tmp_path / "kernel.png"
    tiny = ["--device", "cpu", "--vocabulary", "97", "--hidden", "24", "--rows", "2", "--k", "5", "--repeats", "0"]
    interpreter.run(run_benchmark, [*tiny, "--reference", "--output", str(output), "--plot", str(plot)])
    rows = json.loads(output.read_text())["results"]
    assert [row["part"] for row in rows] == [*kernel_problems.RULE_PARTS]
    for row in rows:
        assert row["error"] < 1e-5
        assert row["fused"] > 0
        assert row["reference"] > 0
        assert ("composite" in row) == (row["part"] == "guide")
    assert plot.stat().st_size > 0
    with pytest.raises(AssertionError):
        interpreter.run(run_benchmark_of_a_wrong_step, [*tiny, "--only", "guide"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: values, and a CUDA graph's capture and replay")
@pytest.mark.parametrize("part", kernel_problems.RULE_PARTS)
@pytest.mark.parametrize("num_rows", [1, 64])
def test_on_a_gpu(num_rows, part):
    from benchmarks import kernel

    problem = kernel_problems.problem(part, num_rows, 128_256, 4096, 10, "cuda")
    kernel.largest_error(problem)
    kernel.check_graph(problem, kernel.GraphTimer())
