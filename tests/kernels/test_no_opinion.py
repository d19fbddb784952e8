"""Candidates that the reward model has no opinion of, against the oracle."""

from __future__ import annotations

import pytest
import torch

from pad_vllm.kernels import Mixture, SharedVocabulary
from tests import oracle
from tests.kernels.test_groups import grouped
from tests.kernels.test_kernels import NEG_INF, control, ends, interpreter, problem, run  # noqa: F401 (fixtures)

VOCAB, ROWS_OF_HEAD = 97, 89
SILENT = [3, 10, 40, 41, 90, 95]
"""The last two beyond the reward model's rows."""


def silent_problem(num_rows: int, by_groups: bool):
    """A problem, its arguments and the oracle's. The silent are among the first ten candidates in row 0, all of them in
    row 1, none in row 2."""
    if by_groups:
        logits, hidden, lm_head, groups, plain = grouped(num_rows)
        groups.key[SILENT] = -2
        groups = groups._replace(any_silent=True)
        logits[:, SILENT] = torch.linspace(-1, 1, len(SILENT))
        settings, expected = {"vocabulary": groups}, {"groups": plain._replace(key=groups.key.tolist())}
    else:
        logits, hidden, lm_head = problem(num_rows, VOCAB)
        lm_head = lm_head[:ROWS_OF_HEAD]
        logits[:, ROWS_OF_HEAD:] = NEG_INF
        logits[:, SILENT] = torch.linspace(-1, 1, len(SILENT))
        no_opinion = torch.zeros(VOCAB, dtype=torch.bool)
        no_opinion[SILENT] = True
        settings, expected = {"vocabulary": SharedVocabulary(VOCAB, no_opinion)}, {"no_opinion": SILENT}
    logits[0, SILENT] += torch.tensor([6.0, -9.0, 5.0, -9.0, 4.5, 6.5])
    logits[1, SILENT] += 30.0
    logits[2, SILENT] -= 30.0
    return logits, hidden, lm_head, settings, expected


def reward_logits(lm_head, hidden):
    """With a row for each of the base's tokens: of those that there are none of, anything."""
    r = lm_head.float() @ hidden.float()
    return torch.cat([r, r.new_full((max(VOCAB - len(r), 0),), float("nan"))])


@pytest.mark.parametrize("by_groups", [False, True], ids=["same tokens", "groups"])
def test_they_keep_their_share_of_the_probability(by_groups, run):  # noqa: F811
    logits, hidden, lm_head, settings, plain = silent_problem(4, by_groups)
    top_k, beta = torch.tensor([10, 6, 10, 20]), torch.tensor([1.0, 1.5, 0.5, 0.0])
    for num_shards, reference in ((1, "base"), (2, "none")):
        out = run(
            logits, hidden, lm_head, top_k=top_k, beta=beta, reference=float(reference == "base"),
            num_shards=num_shards, **settings,
        )  # fmt: skip
        for i in range(4):
            r = reward_logits(lm_head, hidden[i])
            expected = oracle.guided_logits(logits[i], r, int(top_k[i]), beta[i].item(), reference, **plain)
            torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-4)
    first = logits[0].topk(10)
    is_silent = torch.isin(first.indices, torch.tensor(SILENT))
    assert 0 < is_silent.sum() < 10
    share = first.values.softmax(0)[is_silent]
    torch.testing.assert_close(out[0].softmax(0)[first.indices[is_silent]], share, rtol=1e-4, atol=1e-6)
    assert torch.equal(out[1, SILENT], logits[1, SILENT]), "where there are no others, z"


@pytest.mark.parametrize("by_groups", [False, True], ids=["same tokens", "groups"])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_rows_of_several_contexts_with_controls(by_groups, soft_cap, run):  # noqa: F811
    """A constant that is added to a context's logits changes nothing, so neither does the sum of the weights."""
    y, hidden, lm_head, settings, plain = silent_problem(3, by_groups)
    mixture = Mixture(torch.tensor([[2, 0], [1, 1], [1, 2]]), torch.tensor([[0.7, -1.2], [2.0, 0.0], [0.6, 0.3]]))
    bias = dict.fromkeys((3, 7, 50), 8.0)
    z, controls = control(y, 3, [1, 0, 2], {1: {"bias": bias}})
    out = run(
        z, hidden, lm_head, top_k=10, beta=0.8, reference=0.0, mixture=mixture, controls=controls, soft_cap=soft_cap,
        **settings,
    )  # fmt: skip
    for i in range(3):
        r = [reward_logits(lm_head, hidden[c]) for c in mixture.contexts[i].tolist()]
        r = [soft_cap * torch.tanh(r_j / soft_cap) if soft_cap else r_j for r_j in r]
        weights = mixture.weights[i].tolist()
        expected = oracle.guided_logits(z[i], r, 10, 0.8, "none", y[i], weights, **plain)
        torch.testing.assert_close(out[i].softmax(0), expected.softmax(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_groups", [False, True], ids=["same tokens", "groups"])
def test_a_reward_that_is_not_finite_ends_the_request_all_the_same(by_groups, run):  # noqa: F811
    logits, hidden, lm_head, settings, _ = silent_problem(3, by_groups)
    hidden[0] = float("nan")
    assert ends(run(logits, hidden, lm_head, top_k=10, **settings)[0], 20)
