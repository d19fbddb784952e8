"""What a guidance step is told, by name: the arguments of ``guide_``, which every back end takes alike.

Shapes: N rows of logits of which R are guided, C contexts (R, or more), V tokens of the base model, d hidden, S slots
of requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class HeadAdapters(NamedTuple):
    """LoRA adapters of an output head, side by side: read through adapter n, the logits are W h + sum_q b_q (a_q . h)
    over the q in [Q] that are n's."""

    a: torch.Tensor
    """[Q, d] float32"""
    b: torch.Tensor
    """[V', Q], any float dtype; the adapters' scaling is in it"""
    owner: torch.Tensor
    """[Q] int64: the adapter of each"""
    numbers: torch.Tensor
    """[C] int64: the adapter that each context is read through; one that owns nothing: none"""


class OutputHead(NamedTuple):
    """What turns the reward model's hidden states into logits, one token at a time; or this rank's shard of it."""

    weight: torch.Tensor
    """[V', d], any float dtype: rows of the tokens [vocab_start, vocab_start + V')"""
    bias: torch.Tensor | None = None
    """[V'], any float dtype, or None"""
    soft_cap: float | None = None
    """s in s * tanh(logits / s), where the architecture has that; None: it has not"""
    scale: float = 1.0
    """What the logits are multiplied with, behind the soft cap"""
    vocab_start: int = 0
    """First token of this rank's shard"""
    shard: tuple[int, int] = (0, 1)
    """This rank in the tensor-parallel group, and how many ranks there are"""
    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Sums float32 tensors of any shape over that group; None: the head is whole"""
    adapters: HeadAdapters | None = None
    """None: contexts are read through the head as it is"""


class HeadMix(NamedTuple):
    """A mix of value heads: a_0 h + sum_i a_i (W_i h + b_i), for i = 1..H."""

    weight: torch.Tensor
    """[H, d, d] float32, W; or [H, d] for heads that are diagonal: the paper's w_p"""
    bias: torch.Tensor
    """[H, d] float32, b"""
    head_weights: torch.Tensor
    """[C, 1 + H] float32, a of each context; a_0 is the weight of the unmapped hidden state"""


class Mixture(NamedTuple):
    """Rows that several contexts are mixed in: their reward logits are sum_j weights_j r_j, over J of C contexts."""

    contexts: torch.Tensor
    """[R, J] int64: each row's contexts, of C; behind the last of its own, any of them"""
    weights: torch.Tensor
    """[R, J] float32; 0 behind the last of a row's own"""


class Rows(NamedTuple):
    """The guided rows of a step, and what each asks for."""

    index: torch.Tensor
    """[R] int64: which rows of the logits, distinct"""
    top_k: torch.Tensor
    """[R] int64, k of each row; 0 leaves the row alone, so that how many rows are guided may be known on the device
    only"""
    beta: torch.Tensor
    """[R] float32, guidance strength"""
    reference: torch.Tensor
    """[R] float32, how much of the base model's log probability the reward is held against: with ``base`` 1, or the sum
    of the contexts' weights; else 0"""
    end_ids: torch.Tensor
    """[R] int64, the token that ends each row's request where guidance gives nothing finite"""
    max_top_k: int
    """K >= every ``top_k``, known on the host"""
    key_offsets: torch.Tensor | None = None
    """[R] int64: where in :attr:`Groups.key` the keys of each row's candidates begin; None: at 0"""
    max_divergence: torch.Tensor | None = None
    """[R] float32, nats: a bound of each row's KL(softmax(z') || softmax(z)) over its candidates, to which beta gives
    way (:mod:`.divergence`); inf: none. None: no row has one"""
    may_read: bool | None = None
    """Whether the host may look at values, and at lengths that depend on them; None: where it waits for no device. Only
    what is in PyTorch asks."""

    @property
    def is_readable(self) -> bool:
        return self.index.is_cpu if self.may_read is None else self.may_read


class Trace(NamedTuple):
    """Where rows leave what guidance did in them (:mod:`.tracing`), by slot of the S requests.

    A slot has P places, more than a request has rows in a step. A row at position p leaves its values at place p % P;
    what was there of an earlier position is added to that place's sum, and of the same position, overwritten: a draft
    that was refused, or a token computed again, is not counted twice.
    """

    values: torch.Tensor
    """[S, P, 2, NUM_COUNTS + contexts] float32: of the last row, and the sums of those before"""
    positions: torch.Tensor
    """[S, P] int64: of the last row; negative: there was none"""
    references: torch.Tensor
    """[S] int64: of :data:`REFERENCE_BASE`, :data:`REFERENCE_NONE`; or which of the request's contexts is neutral"""
    slots: torch.Tensor
    """[R] int64: each guided row's request"""
    row_positions: torch.Tensor
    """[R] int64: position of the last token that a row sees; [N], of the rows of logits, ``if by_logits_row``"""
    by_logits_row: bool = False


REFERENCE_BASE, REFERENCE_NONE = -1, -2
"""In place of a context: rewards are held against the base model, or against nothing."""
NUM_COUNTS = 3
"""Of a row's values before its contexts' rewards: whether it was guided, whether the first choice changed, and the
divergence."""


class OutputTokens(NamedTuple):
    """The generated tokens that guided rows have seen: what presence and frequency are counted in."""

    token_ids: torch.Tensor
    """[H, L] int32, histories"""
    rows: torch.Tensor
    """[R] int64: each guided row's history"""
    begin: torch.Tensor
    """[R] int64: where in its history the generated tokens begin"""
    end: torch.Tensor
    """[R] int64: behind the last of them that is settled"""
    draft_ids: torch.Tensor
    """[R, D] int32: this step's drafts that the row has seen too, negative where there are fewer"""


class Controls(NamedTuple):
    """What requests did to the base logits: z = penalize(y + bias), in this order, as vLLM does it.

    By slot of the S requests; R rows are guided, V tokens.
    """

    slots: torch.Tensor
    """[R] int64: each guided row's request"""
    num_bias: torch.Tensor
    """[S] int32: how many tokens of the request are biased"""
    bias_ids: torch.Tensor
    """[S, B] int32: the first ``num_bias`` are these tokens"""
    bias: torch.Tensor
    """[S, B] float32: and this was added to their logits"""
    penalties: torch.Tensor
    """[S, 3] float32: presence, frequency, repetition; 0, 0 and 1 where there are none"""
    prompt_mask: torch.Tensor
    """[S, ceil(V / 32)] int32: a bit for each token of the prompt, for requests with a repetition penalty"""
    output: OutputTokens | None
    """None where no request in the batch has penalties"""


class SharedVocabulary(NamedTuple):
    """The tokens of a reward model with the base's tokenizer: a candidate is scored by its own row of the output
    head."""

    vocab_size: int
    """Tokens that base and reward model share, or that ``no_opinion`` names; others are never candidates."""
    no_opinion: torch.Tensor | None = None
    """[vocab_size] bool: of which tokens the reward model has no opinion, nor needs a row; None: of none"""


NO_OPINION = -2
"""In place of a group: the reward model has none, and no opinion."""


class LargeGroups(NamedTuple):
    """The groups of so many members that Triton programs of their own score them (:mod:`.large_groups`)."""

    index: torch.Tensor
    """[groups] int32: which of the large ones a group is; -1: none"""
    blocks: torch.Tensor
    """[B, 4] int32: of each program its group, which of the large ones that is, and the places of its members"""
    starts: torch.Tensor
    """[large + 1] int32: where each one's blocks begin"""


class Groups(NamedTuple):
    """The tokens of a reward model with another tokenizer: a candidate is scored by its group's members
    (:mod:`.groups`). Static tables of the two tokenizers; M members."""

    vocab_size: int
    """Tokens of the base model that may have a key; others are never candidates."""
    key: torch.Tensor
    """[V] int32: the group of each base token; :data:`NO_OPINION` where the reward model has none; of other negative
    ones the logits must be -inf. Or as many times V as there are tables, by :attr:`Rows.key_offsets`"""
    members: torch.Tensor
    """[M] int32: reward tokens, those of a group together"""
    starts: torch.Tensor
    """[groups + 1] int32: where each group's begin"""
    most: int
    """Members of the largest group, known on the host."""
    large: LargeGroups | None = None
    """Those that the Triton kernels have programs of their own for."""
    any_silent: bool = False
    """Whether there are candidates that the reward model has no opinion of."""
