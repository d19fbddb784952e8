"""Guidance with a bound on its divergence, against the oracle."""

from __future__ import annotations

import pytest
import torch

from pad_vllm.kernels import Mixture
from pad_vllm.kernels.divergence import NUM_HALVINGS, bound_beta
from tests import oracle
from tests.kernels.test_groups import grouped
from tests.kernels.test_kernels import NEG_INF, control, ends, interpreter, problem, run  # noqa: F401 (fixtures)
from tests.kernels.test_no_opinion import reward_logits, silent_problem
from tests.support import variants

INF = float("inf")
BOUNDS = [INF, 0.0, 0.01, 0.3, 1.0, 1000.0]
BETAS = [1.0, 1.0, 3.0, 1.5, -1.0, 1.0]


def divergence(guided: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Of rows [R, V], over the candidates of each, in double precision: [R]."""
    log_q = guided.double().log_softmax(-1)
    log_p = z.double().where(guided > NEG_INF, NEG_INF).log_softmax(-1)
    return torch.where(guided > NEG_INF, log_q.exp() * (log_q - log_p), 0.0).sum(-1)


def problem_of(kind: str, num_rows: int):
    """A problem, its arguments, the oracle's, and the reward logits of a row."""
    if kind.startswith("silent"):
        logits, hidden, lm_head, settings, plain = silent_problem(num_rows, kind == "silent groups")
    elif kind == "groups":
        logits, hidden, lm_head, groups, by_hand = grouped(num_rows)
        settings, plain = {"vocabulary": groups}, {"groups": by_hand}
    else:
        (logits, hidden, lm_head), settings, plain = problem(num_rows), {}, {}
    return logits, hidden, lm_head, settings, plain


@pytest.mark.parametrize("kind", ["same tokens", "groups", "silent", "silent groups"])
def test_rows_keep_to_their_bounds_and_are_as_strong_as_these_let_them(kind, run):  # noqa: F811
    """Rows of several k and beta, below 0 too. A bound that is far away changes nothing, and 0 leaves the base."""
    logits, hidden, lm_head, settings, plain = problem_of(kind, 6)
    top_k, bounds, beta = torch.tensor([10, 10, 20, 10, 7, 10]), torch.tensor(BOUNDS), torch.tensor(BETAS)
    out = run(logits, hidden, lm_head, top_k=top_k, beta=beta, max_divergence=bounds, **settings)
    for i in range(6):
        r = reward_logits(lm_head, hidden[i])
        of_row = int(top_k[i]), BETAS[i]
        expected = oracle.guided_logits(logits[i], r, *of_row, **plain, max_divergence=BOUNDS[i])
        torch.testing.assert_close(out[i], expected, rtol=1e-3, atol=1e-3)
    free = run(logits, hidden, lm_head, top_k=top_k, beta=beta, **settings)
    for i in (0, 5):
        assert torch.equal(out[i], free[i])
    torch.testing.assert_close(out[1].softmax(0), logits[1].where(out[1] > NEG_INF, NEG_INF).softmax(0))
    found, unbounded = divergence(out, logits), divergence(free, logits)
    assert unbounded[2:5].gt(bounds[2:5]).sum() >= 2
    assert (found <= bounds + 1e-5).all()
    is_bounded = unbounded > bounds + 1e-5
    torch.testing.assert_close(found[is_bounded].float(), bounds[is_bounded], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("soft_cap", "num_shards"), [(None, 2), (2.0, 1)])
@pytest.mark.parametrize("kind", ["same tokens", "groups", "silent"])
def test_rows_of_several_contexts_with_controls(kind, soft_cap, num_shards, run):  # noqa: F811
    """What is bounded is the distance from z: the base with its bias and penalties."""
    y, hidden, lm_head, settings, plain = problem_of(kind, 3)
    mixture = Mixture(torch.tensor([[2, 0], [1, 1], [1, 2]]), torch.tensor([[0.7, -1.2], [2.0, 0.0], [0.6, 0.3]]))
    z, controls = control(y, 3, [1, 0, 2], {1: {"bias": dict.fromkeys((3, 7, 50), 4.0)}})
    bounds = torch.tensor([0.2, 0.02, 0.2])
    out = run(
        z, hidden, lm_head, top_k=10, beta=2.0, reference=0.0, mixture=mixture, controls=controls, soft_cap=soft_cap,
        max_divergence=bounds, num_shards=num_shards, **settings,
    )  # fmt: skip
    for i in range(3):
        r = [reward_logits(lm_head, hidden[c]) for c in mixture.contexts[i].tolist()]
        r = [soft_cap * torch.tanh(r_j / soft_cap) if soft_cap else r_j for r_j in r]
        weights, bound = mixture.weights[i].tolist(), bounds[i].item()
        expected = oracle.guided_logits(z[i], r, 10, 2.0, "none", y[i], weights, **plain, max_divergence=bound)
        torch.testing.assert_close(out[i].softmax(0), expected.softmax(0), rtol=1e-3, atol=1e-4)
    assert (divergence(out, z) <= bounds + 1e-5).all()


def test_masked_rows_and_rewards_that_are_no_number(run):  # noqa: F811
    """One candidate, or none; NaN ends its row, whatever the bound; a row that is left alone stays as it is."""
    logits, hidden, lm_head = problem(5)
    logits[0], logits[1] = NEG_INF, NEG_INF
    logits[0, 7] = 1.5
    hidden[2] = float("nan")
    out = run(
        logits, hidden, lm_head, top_k=torch.tensor([10, 10, 10, 0, 3]), beta=2.0,
        max_divergence=torch.tensor([0.1, 0.1, 0.1, 0.1, 1e-3]),
    )  # fmt: skip
    assert out[0].isfinite().nonzero().flatten().tolist() == [7]
    assert ends(out[1], 21)
    assert ends(out[2], 22)
    assert torch.equal(out[3], logits[3])
    assert divergence(out[4:], logits[4:]) <= 1e-3 + 1e-6


def launched(bounds: list) -> list[set[str]]:
    """What a GPU would have compiled for steps with these bounds: tokens whole, with controls, and groups."""
    from pad_vllm.kernels import OutputHead, Rows, SharedVocabulary, fused

    variants.record()
    found = []
    for bound in bounds:
        logits, hidden, lm_head, settings, _ = problem_of("groups", 3)
        y, _, whole_head = problem(3)
        z, controls = control(y, 3, [1, 0, 2], {1: {"bias": {5: 4.0}}})
        each = torch.arange(3)
        rows = Rows(each, each + 4, torch.ones(3), torch.ones(3), each, 6, max_divergence=bound)
        fused.guide_(logits, hidden, OutputHead(lm_head), rows, settings["vocabulary"])
        fused.guide_(y, hidden, OutputHead(whole_head), rows, SharedVocabulary(97))
        fused.guide_(z, hidden, OutputHead(whole_head), rows, SharedVocabulary(97), controls=controls)
        found.append(set(variants.take()))
    return found


@pytest.mark.slow
def test_the_first_request_with_a_bound_compiles_nothing(interpreter):  # noqa: F811
    """What a bound is decides in the kernel, and so does whether there is one."""
    without, *others = interpreter.run(launched, [None, torch.full((3,), INF), torch.tensor([0.1, INF, 0.0])])
    assert {variant.partition("(")[0] for variant in without} >= {
        *("score_kernel", "reweight_kernel", "reweight_groups_kernel"),
    }
    assert others == [without] * 2


def test_the_divergence_grows_with_the_strength():
    """What bisection rests on: D'(b) = b Var(reward), above 0 for b above 0 and below for b below."""
    z, reward = (torch.randn(7, generator=torch.Generator().manual_seed(i)).double() for i in range(2))

    def guided(b: torch.Tensor) -> torch.Tensor:
        return z + b * reward

    for value in (-2.0, -0.3, 0.4, 1.7):
        b = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        divergence(guided(b).unsqueeze(0), z.unsqueeze(0)).sum().backward()
        q = guided(b.detach()).softmax(0)
        variance = (q * reward**2).sum() - (q * reward).sum() ** 2
        torch.testing.assert_close(b.grad, value * variance)


def test_it_is_the_largest_of_the_strengths_that_are_tried():
    z, reward = (torch.randn(4, 7, generator=torch.Generator().manual_seed(i)) for i in range(2))
    beta, bounds = torch.full((4,), 2.0), torch.tensor([0.05, 0.2, 0.001, 0.4])
    found = bound_beta(z, reward, beta, bounds)
    step = 2.0 / 2**NUM_HALVINGS
    assert torch.equal((found / step).round() * step, found)
    for far, holds in ((0.0, True), (2 * step, False)):
        guided = z + (found + far).unsqueeze(1) * reward
        assert ((divergence(guided, z) <= bounds) == holds).all()
