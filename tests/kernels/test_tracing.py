"""What guidance did in each row, by both implementations, against the oracle; and how it is added up."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernel_resources
from pad_vllm.kernels import Mixture, OutputHead, Rows, SharedVocabulary, Trace
from pad_vllm.kernels.types import NUM_COUNTS, REFERENCE_BASE, REFERENCE_NONE
from tests import oracle
from tests.kernels.test_groups import REWARD_VOCAB, grouped
from tests.kernels.test_kernels import END, control, interpreter, problem  # noqa: F401 (a fixture)

PLACES, VALUES, TOP_K, BETA = 4, NUM_COUNTS + 5, 10, 0.8
CONTEXTS = [[(2, 0.7), (0, 0.3), (1, -1.0)], [(5, 2.0)], [(3, 0.6), (4, -0.2)]]
"""Of three rows: contexts and weights; the first row's last is its neutral one."""


def blank_trace(slots: list[int], positions: list[int], references: list[int] | None = None) -> Trace:
    """Of 8 slots; ``references`` of the rows' slots."""
    of_slots = torch.full((8,), REFERENCE_BASE)
    if references is not None:
        of_slots[slots] = torch.tensor(references)
    return Trace(
        torch.zeros(8, PLACES, 2, VALUES),
        torch.full((8, PLACES), -1),
        of_slots,
        torch.tensor(slots),
        torch.tensor(positions),
    )


def guide_traced(implementation: str, steps: list[tuple], num_shards: int = 1) -> tuple[list[torch.Tensor], Trace]:
    """What steps make of their logits, and what the last one's trace holds then; on every rank of a tensor-parallel
    group, of which the last answers. Runs in a process that has the Triton interpreter on where it must."""
    from pad_vllm.kernels import load_guide

    step = load_guide("triton" if implementation == "triton" else "reference")
    sums: dict[tuple[int, int], list[torch.Tensor]] = {}
    for collect in (True, False) if num_shards > 1 else (False,):
        for shard in range(num_shards):
            outputs = []
            for number, (logits, hidden, head, rows, vocabulary, kwargs) in enumerate(steps):
                out, calls, part = logits.clone(), 0, head
                if collect:
                    kwargs = kwargs | {"trace": type(kwargs["trace"])(*map(copied, kwargs["trace"]))}

                def all_reduce(scores: torch.Tensor) -> torch.Tensor:
                    nonlocal calls
                    calls += 1
                    parts = sums.setdefault((number, calls), [])  # noqa: B023
                    if not collect:  # noqa: B023
                        return sum(parts)
                    parts.append(scores.clone())
                    return scores

                if num_shards > 1:
                    size = -(-len(head.weight) // num_shards)
                    mine = slice(shard * size, (shard + 1) * size)
                    bias = None if head.bias is None else head.bias[mine]
                    part = head._replace(
                        weight=head.weight[mine],
                        bias=bias,
                        vocab_start=mine.start,
                        shard=(shard, num_shards),
                        all_reduce=all_reduce,
                    )
                own = kwargs
                if not collect and shard < num_shards - 1:
                    own = kwargs | {"trace": type(kwargs["trace"])(*map(copied, kwargs["trace"]))}
                step(out, hidden, part, rows, vocabulary, **own)
                outputs.append(out)
    return outputs, steps[-1][-1]["trace"]


def copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.fixture(params=["reference", "reference as on a device", pytest.param("triton", marks=pytest.mark.slow)])
def traced(request):
    def run(*steps: tuple, num_shards: int = 1) -> tuple[list[torch.Tensor], Trace]:
        may_read = False if request.param == "reference as on a device" else None
        made = [(*step[:3], step[3]._replace(may_read=may_read), *step[4:]) for step in steps]
        if request.param == "triton":
            return request.getfixturevalue("interpreter").run(guide_traced, "triton", made, num_shards)
        return guide_traced("reference", made, num_shards)

    return run


def rows_of(num: int, reference=1.0, top_k=TOP_K) -> Rows:
    top_k, reference = (torch.as_tensor(value).expand(num) for value in (top_k, reference))
    beta = torch.tensor(BETA).expand(num)
    return Rows(torch.arange(num), top_k, beta, reference, END + torch.arange(num), int(top_k.max()))


def last_of(trace: Trace, row: int, position: int) -> torch.Tensor:
    assert trace.positions[trace.slots[row], position % PLACES] == position
    return trace.values[trace.slots[row], position % PLACES, 0]


def assert_is(values: torch.Tensor, expected: oracle.Effect) -> None:
    wanted = [1.0, float(expected.changed), expected.divergence, *expected.rewards]
    wanted += [0.0] * (VALUES - len(wanted))
    torch.testing.assert_close(values, torch.tensor(wanted), rtol=2e-4, atol=2e-5)


def mixture_of(contexts: list, nowhere: int | None = None) -> Mixture:
    width = max(map(len, contexts))
    padded = [row + [(row[0][0] if nowhere is None else nowhere, 0.0)] * (width - len(row)) for row in contexts]
    return Mixture(
        torch.tensor([[context for context, _ in row] for row in padded]),
        torch.tensor([[weight for _, weight in row] for row in padded]),
    )


@pytest.mark.parametrize("num_shards", [1, 2])
def test_rows_of_one_context(num_shards, traced):
    """Each reference, controls, tokens that the reward model has no opinion of, and a row that is left alone."""
    y, hidden, lm_head = problem(5)
    requests = {3: {"bias": {5: 9.0, 31: 2.0}}, 1: {"penalties": (0.7, 0.2, 1.4), "prompt": [3, 4, 9], "output": [9]}}
    silent = torch.zeros(97, dtype=torch.bool)
    silent[y[0].topk(3).indices] = True
    silent[y[2].topk(TOP_K).indices] = True  # of all of its candidates
    slots, positions = [3, 1, 0, 2, 6], [7, 40, 9, 3, 5]
    for has_controls, reference in ((True, "base"), (False, "base"), (False, "none")):
        z, controls = control(y, 7, slots, requests) if has_controls else (y, None)
        no_opinion = silent if not has_controls else None
        kind = REFERENCE_BASE if reference == "base" else REFERENCE_NONE
        rows = rows_of(5, float(reference == "base"), torch.tensor([TOP_K] * 4 + [0]))
        trace = blank_trace(slots, positions, [kind] * 5)
        step = (z, hidden, OutputHead(lm_head), rows, SharedVocabulary(97, no_opinion))
        (out,), trace = traced((*step, {"controls": controls, "trace": trace}), num_shards=num_shards)
        names = set() if no_opinion is None else set(no_opinion.nonzero().flatten().tolist())
        for i in range(4):
            r = lm_head @ hidden[i]
            guided = oracle.guided_logits(z[i], r, TOP_K, BETA, reference, y[i], no_opinion=names)
            torch.testing.assert_close(out[i], guided, rtol=1e-4, atol=1e-4)
            expected = oracle.effect(z[i], guided, r, reference, y[i], no_opinion=names)
            assert_is(last_of(trace, i, positions[i]), expected)
        assert (trace.positions[6] == -1).all()
        assert not trace.values[6].any()


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("kind", ["tokens", "groups"])
def test_rows_of_several_contexts(kind, soft_cap, traced):
    """Each context's reward by itself: against the base, the neutral context, and nothing; where a context is not a
    row's own nothing is read."""
    logits, _, lm_head = problem(3)
    vocabulary, plain = SharedVocabulary(97), None
    if kind == "groups":
        logits, _, lm_head, vocabulary, plain = grouped(3)
    hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(7))
    hidden[6] = float("nan")
    bias = torch.randn(len(lm_head), generator=torch.Generator().manual_seed(5))
    head = OutputHead(lm_head, bias, soft_cap, 0.7)
    totals = torch.tensor([sum(weight for _, weight in row) for row in CONTEXTS])
    for num_shards, references in ((1, [2, REFERENCE_BASE, REFERENCE_NONE]), (2, [REFERENCE_BASE, REFERENCE_NONE, 1])):
        rows = rows_of(3, totals.where(torch.tensor(references) == REFERENCE_BASE, 0.0))
        trace = blank_trace([4, 2, 5], [11, 12, 13], references)
        kwargs = {"mixture": mixture_of(CONTEXTS, 6 if kind == "groups" else None), "trace": trace}
        (out,), trace = traced((logits, hidden, head, rows, vocabulary, kwargs), num_shards=num_shards)
        for i, row in enumerate(CONTEXTS):
            r = [lm_head @ hidden[context] + bias for context, _ in row]
            r = [0.7 * (soft_cap * torch.tanh(r_j / soft_cap) if soft_cap else r_j) for r_j in r]
            reference = {REFERENCE_BASE: "base", REFERENCE_NONE: "none"}.get(references[i], "neutral")
            r_0 = r[references[i]] if references[i] >= 0 else None
            expected = oracle.effect(logits[i], out[i], r, reference, r_0=r_0, groups=plain)
            assert_is(last_of(trace, i, 11 + i), expected)


def test_groups_of_one_context(traced):
    """With controls, and candidates that the reward model has no opinion of."""
    y, hidden, lm_head, groups, plain = grouped(3)
    spoken = [token for token in range(97) if plain.key[token] >= 0]
    for token in (spoken[3], spoken[10], spoken[20]):
        groups.key[token] = plain.key[token] = -2
        y[:, token] += 4.0
    groups = groups._replace(any_silent=True)
    z, controls = control(y, 3, [1, 0, 2], {1: {"bias": {5: 20.0, 31: 2.0}}, 0: {"bias": {7: -3.0}}})
    trace = blank_trace([1, 0, 2], [5, 6, 7])
    kwargs = {"controls": controls, "trace": trace}
    (out,), trace = traced((z, hidden, OutputHead(lm_head), rows_of(3), groups, kwargs))
    assert len(lm_head) == REWARD_VOCAB
    for i in range(3):
        r = lm_head @ hidden[i]
        guided = oracle.guided_logits(z[i], r, TOP_K, BETA, y=y[i], groups=plain)
        torch.testing.assert_close(out[i], guided, rtol=1e-4, atol=1e-4)
        assert_is(last_of(trace, i, 5 + i), oracle.effect(z[i], guided, r, y=y[i], groups=plain))


def test_sums_count_each_position_once(traced):
    """Rows of a request that verifies drafts: a refused one is overwritten by what stands there at last, and what is
    overwritten by a later position is added up. A row that gets its end token leaves nothing."""
    positions = [[10, 11, 12], [11, 12, 13], [14, 15, 16], [14, 15, 16], [17, 18, 19]]
    trace, steps, kept = blank_trace([5, 5, 5], positions[0]), [], {}
    for number, at in enumerate(positions):
        logits, hidden, lm_head = problem(3, seed=number)
        if number == 1:
            hidden[1] = float("nan")
        trace = trace._replace(row_positions=torch.tensor(at))
        steps.append((logits, hidden, OutputHead(lm_head), rows_of(3), SharedVocabulary(97), {"trace": trace}))
        for i, position in enumerate(at):
            kept.pop(position, None)
            if hidden[i].isnan().any():  # its request gets its end token
                continue
            guided = oracle.guided_logits(logits[i], lm_head @ hidden[i], TOP_K, BETA)
            kept[position] = oracle.effect(logits[i], guided, lm_head @ hidden[i])
    _, trace = traced(*steps)
    assert sorted(trace.positions[5].tolist()) == [16, 17, 18, 19]
    total = trace.values[5].sum((0, 1))
    assert total[0] == len(kept) == 9
    assert total[1] == sum(effect.changed for effect in kept.values())
    torch.testing.assert_close(total[2], torch.tensor(sum(e.divergence for e in kept.values())), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total[3], torch.tensor(sum(e.rewards[0] for e in kept.values())), rtol=1e-4, atol=1e-4)
    last = trace.values[5, 19 % PLACES, 0]
    assert_is(last, kept[19])


def test_positions_by_rows_of_logits(traced):
    """As Model Runner V2 has them, of all rows."""
    logits, hidden, lm_head = problem(4)
    rows = rows_of(2)._replace(index=torch.tensor([3, 1]))
    trace = blank_trace([2, 7], [0, 21, 0, 33])._replace(by_logits_row=True)
    (out,), trace = traced((logits, hidden[:2], OutputHead(lm_head), rows, SharedVocabulary(97), {"trace": trace}))
    for i, (row, position) in enumerate(((3, 33), (1, 21))):
        assert_is(last_of(trace, i, position), oracle.effect(logits[row], out[row], lm_head @ hidden[i]))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_compile_ahead_without_spills(target, monkeypatch):
    """What the interpreter lets pass, a compiler may not."""
    from pad_vllm.kernels import fused_tracing

    floats, ints = ("values_ptr",), ("row_positions_ptr", "positions_ptr", "references_ptr")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(ints, "*i64")
    monkeypatch.setattr(kernel_resources, "TYPES", kernel_resources.TYPES | types)
    trace = {"K": 64, "VALUES": 12, "WIDTH": 16, "BY_LOGITS_ROW": True}
    plain = trace | {"HAS_CONTROLS": False, "HAS_SOFT_CAP": False, "y_ptr": None, "weights_ptr": None}
    full, grouped_ = trace | {"HAS_CONTROLS": True}, fused_tracing.NUM_OTHERS
    score = {"K": 64, "SCORED": fused_tracing.SCORED, "BLOCK_D": fused_tracing.BLOCK_D, "HAS_BIAS": True}
    for kernel, constants, warps in (
        (fused_tracing.trace_kernel, plain | {"no_opinion_ptr": None}, fused_tracing.TRACE_WARPS),
        (fused_tracing.trace_kernel, full | {"HAS_SOFT_CAP": True}, fused_tracing.TRACE_WARPS),
        (fused_tracing.trace_groups_kernel, full | {"NUM_OTHERS": grouped_}, fused_tracing.TRACE_WARPS),
        (fused_tracing.score_contexts_kernel, score, fused_tracing.SCORE_WARPS),
    ):
        on = kernel_resources.TARGETS[target]
        compiled = kernel_resources.compile_ahead(kernel, constants, warps, on)
        assert kernel_resources.resources(*compiled, on)["spilled"] == 0
