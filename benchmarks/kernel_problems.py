"""Random steps of the rule, of every part that :mod:`.kernel` times, and what they should give, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from pad_vllm.kernels import find_large
from pad_vllm.kernels.divergence import bound_beta
from pad_vllm.kernels.types import (
    NUM_COUNTS,
    REFERENCE_BASE,
    Controls,
    Groups,
    HeadAdapters,
    Mixture,
    OutputHead,
    OutputTokens,
    Rows,
    SharedVocabulary,
    Trace,
)

RULE_PARTS = ("guide", "controls", "mixture", "groups", "bound", "adapters", "traces")
GRAPH_BYTES = 300_000_000
"""Of the buffers of a graph together, about."""
MIXTURE_WEIGHTS = (0.7, 0.5, -0.2)  # of a mixture's contexts
NUM_BIAS, NUM_OUTPUT, ROW_PENALTIES = 16, 512, (0.5, 0.3, 1.2)
"""Of a row's controls: biased tokens, generated tokens; presence, frequency, repetition."""
LARGE_GROUPS, LARGE, EVERY = 64, 2000, 8
"""Large groups, their members, and of how many rows one needs such a group."""
NUM_ADAPTERS, ADAPTER_RANK, BOUND = 4, 16, 0.1
"""Of the output head, and nats a token."""


class Problem(NamedTuple):
    """Arguments of a step on any of several buffers of logits; the values of the first are checked."""

    sources: list[torch.Tensor]  # [R, V] float32 each
    hidden_states: torch.Tensor
    head: OutputHead
    rows: Rows
    vocabulary: SharedVocabulary | Groups
    controls: Controls | None
    mixture: Mixture | None
    trace: Trace | None
    y: torch.Tensor  # the first of them, before its controls
    moved: int  # bytes, by a step

    def run(self, step: Callable[..., None], logits: torch.Tensor) -> None:
        args = self.hidden_states, self.head, self.rows, self.vocabulary
        step(logits, *args, controls=self.controls, mixture=self.mixture, trace=self.trace)


@functools.lru_cache(maxsize=1)
def output_head(vocab_size: int, hidden_size: int, device: str) -> torch.Tensor:
    return torch.randn(vocab_size, hidden_size, dtype=torch.bfloat16, device=device) / hidden_size**0.5


def control(y: torch.Tensor) -> tuple[torch.Tensor, Controls]:
    """What requests with a bias and all penalties make of their logits, as vLLM does it; a request a row."""
    (num_rows, vocab_size), device = y.shape, y.device
    biased = y.topk(min(NUM_BIAS, vocab_size)).indices
    bias = 4 * torch.rand(biased.shape, device=device) - 2
    output = torch.randint(0, vocab_size, (num_rows, NUM_OUTPUT), device=device)
    output[:, :4] = biased[:, :4]
    prompted = torch.rand(y.shape, device=device) < 0.01
    counts = torch.zeros_like(y).scatter_add_(1, output, torch.ones(output.shape, device=device))
    presence, frequency, repetition = ROW_PENALTIES
    z = y.scatter_add(1, biased, bias)
    z = torch.where(prompted | (counts > 0), torch.where(z > 0, z / repetition, z * repetition), z)
    z = z - frequency * counts - presence * (counts > 0)
    bits = torch.nn.functional.pad(prompted, (0, -vocab_size % 32)).view(num_rows, -1, 32).long()
    mask = (bits << torch.arange(32, device=device)).sum(-1).int()
    index = torch.arange(num_rows, device=device)
    no_drafts = torch.full((num_rows, 1), -1, dtype=torch.int32, device=device)
    seen = OutputTokens(output.int(), index, torch.zeros_like(index), torch.full_like(index, NUM_OUTPUT), no_drafts)
    num_bias = torch.full_like(index, biased.shape[1]).int()
    penalties = torch.tensor(ROW_PENALTIES, device=device).repeat(num_rows, 1)
    return z, Controls(index, num_bias, biased.int(), bias, penalties, mask, seen)


def tables(sources: list[torch.Tensor]) -> Groups:
    """Groups of one or two members each, and some large ones. Of every eighth row of logits the first candidate's is
    large, another one from step to step; of every row the second and third candidate share one."""
    vocab_size, device = sources[0].shape[1], sources[0].device
    each = torch.arange(vocab_size, device=device)
    has_two = torch.rand(vocab_size, device=device) < 0.5
    small = torch.stack([each, each.roll(vocab_size // 3)], 1)[torch.stack([torch.ones_like(has_two), has_two], 1)]
    size = max(1, min(LARGE, vocab_size // 4))
    large = torch.rand(LARGE_GROUPS, vocab_size, device=device).topk(size).indices.sort().values
    counts = torch.cat([has_two + 1, torch.full((LARGE_GROUPS,), size, device=device)])
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    key = torch.randperm(vocab_size, device=device)
    for i, logits in enumerate(sources):
        ids = logits.topk(3).indices
        key[ids[:, 1]] = key[ids[:, 2]]
        first = ids[::EVERY, 0]
        key[first] = vocab_size + (i * len(first) + torch.arange(len(first), device=device)) % LARGE_GROUPS
    starts, members = starts.int(), torch.cat([small, large.flatten()]).int()
    return Groups(vocab_size, key.int(), members, starts, max(2, size), find_large(starts))


def adapters_of(num_rows: int, lm_head: torch.Tensor) -> HeadAdapters:
    """Rows read in turns through one of the adapters, or through none."""
    (vocab_size, hidden_size), device, size = lm_head.shape, lm_head.device, NUM_ADAPTERS * ADAPTER_RANK
    owner = torch.arange(NUM_ADAPTERS, device=device).repeat_interleave(ADAPTER_RANK)
    a = torch.randn(size, hidden_size, device=device) / hidden_size**0.5
    b = torch.randn(vocab_size, size, device=device).to(lm_head.dtype) / ADAPTER_RANK**0.5
    return HeadAdapters(a, b, owner, torch.arange(num_rows, device=device) % (NUM_ADAPTERS + 1))


def blank_trace(index: torch.Tensor) -> Trace:
    """Of a request a row."""
    values = torch.zeros(len(index), 2, 2, NUM_COUNTS + 1, device=index.device)
    nowhere = torch.full((len(index), 2), -1, device=index.device)
    return Trace(values, nowhere, torch.full_like(index, REFERENCE_BASE), index, torch.zeros_like(index))


def problem(
    part: str, num_rows: int, vocab_size: int, hidden_size: int, top_k: int, device: str, most_buffers: int = 1
) -> Problem:
    """Random logits of which the reward model's are as large, and a step's other arguments."""
    lm_head = output_head(vocab_size, hidden_size, device)
    num_buffers = min(most_buffers, max(4, GRAPH_BYTES // (4 * num_rows * vocab_size)))
    sources = [3 * torch.randn(num_rows, vocab_size, device=device) for _ in range(num_buffers)]
    num_contexts = len(MIXTURE_WEIGHTS) if part == "mixture" else 1
    hidden = torch.randn(num_rows * num_contexts, hidden_size, dtype=torch.bfloat16, device=device)
    index = torch.arange(num_rows, device=device)
    beta = torch.full((num_rows,), 0.8, device=device)
    of_base, y = torch.ones_like(beta), sources[0]
    vocabulary: SharedVocabulary | Groups = SharedVocabulary(vocab_size)
    controls, mixture, num_scored, width = None, None, num_rows * top_k, hidden_size
    adapters, bound = None, None
    moved = 2 * y.nbytes + hidden.nbytes
    if part == "controls":
        sources[0], controls = control(y)
        moved += num_rows * (8 * NUM_BIAS + 4 * NUM_OUTPUT)
    elif part == "mixture":
        contexts = torch.arange(num_rows * num_contexts, device=device).view(num_rows, num_contexts)
        mixture = Mixture(contexts, torch.tensor(MIXTURE_WEIGHTS, device=device).repeat(num_rows, 1))
        of_base = mixture.weights.sum(1)
    elif part == "groups":
        vocabulary = tables(sources)
        needed = torch.zeros(len(vocabulary.starts) - 1, dtype=torch.bool, device=device)
        needed[vocabulary.key[y.topk(top_k).indices].long().flatten()] = True
        num_scored = len(vocabulary.members[needed.repeat_interleave(vocabulary.starts.diff())].unique())
    elif part == "adapters":
        adapters = adapters_of(num_rows, lm_head)
        width += len(adapters.owner)
    elif part == "bound":
        bound = torch.full_like(beta, BOUND)
    moved += num_scored * width * lm_head.element_size()
    rows = Rows(index, torch.full_like(index, top_k), beta, of_base, torch.zeros_like(index), top_k)
    rows, head = rows._replace(max_divergence=bound), OutputHead(lm_head, adapters=adapters)
    trace = blank_trace(index) if part == "traces" else None
    return Problem(sources, hidden, head, rows, vocabulary, controls, mixture, trace, y, moved)


def expected(of: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The candidates of the first buffer [R, k], and their logits in float64, before and after."""
    rows = of.rows
    z, ids = (found[:, : rows.max_top_k] for found in of.sources[0].sort(descending=True, stable=True))
    r, key = of.hidden_states.double() @ of.head.weight.double().T, ids
    if (of_head := of.head.adapters) is not None:
        is_theirs = of_head.owner == of_head.numbers.unsqueeze(1)
        r += (of.hidden_states.double() @ of_head.a.double().T * is_theirs) @ of_head.b.double().T
    if isinstance(of.vocabulary, Groups):
        members, starts = of.vocabulary.members, of.vocabulary.starts
        key, most = of.vocabulary.key[ids].long(), r.amax(1, keepdim=True)
        owner = torch.arange(len(starts) - 1, device=r.device).repeat_interleave(starts.diff())
        sums = r.new_zeros(len(r), len(starts) - 1).index_add_(1, owner, (r - most).exp()[:, members.long()])
        r = most + sums.log()
    if of.mixture is not None:
        contexts, weights = of.mixture
        r = (weights.double().unsqueeze(-1) * r[contexts]).sum(1)
    r, y = r.gather(1, key), of.y.double().gather(1, ids)
    same = key.unsqueeze(2) == key.unsqueeze(1)
    is_first = ~same.tril(-1).any(-1)  # of its group
    y_group = torch.where(same, y.unsqueeze(1), float("-inf")).logsumexp(-1)
    log_r = r - r.masked_fill(~is_first, float("-inf")).logsumexp(-1, keepdim=True)
    reward = log_r - rows.reference.double().unsqueeze(1) * (y_group - y.logsumexp(-1, keepdim=True))
    z, beta = z.double(), rows.beta.double()
    if rows.max_divergence is not None:
        beta = bound_beta(z, reward, beta, rows.max_divergence.double())
    return ids, z, z + beta.unsqueeze(1) * reward
