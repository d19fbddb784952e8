"""Whether base and reward model have the same tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm.config import ModelConfig

from pad_vllm.config import PADConfig
from pad_vllm.errors import one_line
from pad_vllm.reward.byte_tokens import ByteTokens, added_ids, same_ordinary_tokens
from pad_vllm.reward.first_space import first_space
from pad_vllm.reward.markers import answer_end, marker_tokens
from pad_vllm.reward.token_tables import NO_KEY, NO_OPINION, TokenTables, load_tables
from pad_vllm.reward.translation import PromptTranslator
from pad_vllm.worker.answers import answer_tokens


@dataclass(frozen=True)
class TokenizerPair:
    """Two tokenizers, and how texts go from one to the other."""

    tables: TokenTables
    translator: PromptTranslator
    no_opinion: dict[int, str] = field(default_factory=dict)
    """As :attr:`SharedTokens.no_opinion`"""

    @property
    def stretch(self) -> float:
        """How much longer a text may be in the reward model's tokens: as the base's vocabulary is on average, which
        says more than texts do, as common words are short in every vocabulary."""
        return float(self.tables.num_pieces.mean())

    def __str__(self) -> str:
        tables = self.tables
        is_candidate = tables.key != NO_KEY
        num_pieces = tables.num_pieces[is_candidate]
        silent = f"; it has no opinion of {listed(self.no_opinion)}" if self.no_opinion else ""
        if tables.first is not None:
            silent += "; an answer's first token has a space in one model and none in the other"
        return (
            f"another tokenizer: {is_candidate.sum():,} of the base model's {len(is_candidate):,} tokens can be "
            f"candidates, {(num_pieces == 1).mean():.0%} of them one token of the reward model's, and at most "
            f"{num_pieces.max()}{silent}"
        )


@dataclass(frozen=True)
class SharedTokens:
    """The reward model's tokenizer, and what it does not share with the base model's."""

    tokenizer: PreTrainedTokenizerBase | None
    """None where the engine runs without one (skip_tokenizer_init) and there is none."""
    foreign: dict[int, str] = field(default_factory=dict)
    """Added and special tokens of the base model without a counterpart: never candidates."""
    no_opinion: dict[int, str] = field(default_factory=dict)
    """Such tokens that the base writes inside an answer (:mod:`.answers`): candidates, which keep their share of the
    base's probability."""
    reads: dict[int, int] = field(default_factory=dict)
    """What the reward model reads for each of these: its own token of that name, or else a line break"""
    chat_tokenizer: PreTrainedTokenizerBase | None = None
    """The one whose chat template renders what the reward model reads: the base's, where it has a template; with a
    tokenizer of its own, the reward model's."""
    pair: TokenizerPair | None = None
    """Where the reward model has another tokenizer."""

    @property
    def max_pieces(self) -> int:
        """Most tokens of the reward model's that one of the base's is."""
        return 1 if self.pair is None else self.pair.tables.max_pieces

    @property
    def no_candidates(self) -> list[int]:
        """Tokens of the base model that guided requests never generate."""
        if self.pair is not None:
            return np.flatnonzero(self.pair.tables.key == NO_KEY).tolist()
        return list(self.foreign)

    def __str__(self) -> str:
        if self.pair is not None:
            return str(self.pair)
        same = f"same tokens but {listed(self.foreign)}" if self.foreign else "same tokens"
        return f"{same}; no opinion of {listed(self.no_opinion)}" if self.no_opinion else same


def listed(tokens: Mapping[int, str]) -> str:
    """Tokens and their ids, for a log."""
    shown = ", ".join(f"{token!r} ({i})" for i, token in list(tokens.items())[:20])
    return f"{shown} and {len(tokens) - 20} more" if len(tokens) > 20 else shown


def load_shared_tokens(
    config: PADConfig,
    tokenizer_args: dict[str, Any],
    base: ModelConfig,
    reward: ModelConfig,
    num_rows: int,
    reasoning: Collection[int] = (),
) -> SharedTokens:
    """The reward model's tokenizer, and what the base model's tokens are to it.

    Where ordinary tokens are the same, added and special ones may differ, as they do between members of a family: a
    token that the reward model does not know is no candidate, or, where the base writes it inside an answer, one that
    the reward model has no opinion of. Where ordinary tokens differ, tables say what each is.

    Args:
        num_rows: of the reward model's output head.
        reasoning: tokens that begin or end the base's reasoning, as vLLM knows them.

    Raises:
        ValueError: there is none, one of two different ones cannot say what its tokens stand for, or guided requests
            could never end.
    """

    try:
        tokenizer = AutoTokenizer.from_pretrained(**tokenizer_args)
    except Exception as error:
        if base.skip_tokenizer_init:
            return SharedTokens(None)
        raise ValueError(f"pad.reward_model={config.reward_model!r}: no tokenizer: {one_line(error)}") from error
    if base.skip_tokenizer_init:
        return SharedTokens(tokenizer, chat_tokenizer=tokenizer)
    try:
        theirs = AutoTokenizer.from_pretrained(
            base.tokenizer, revision=base.tokenizer_revision, trust_remote_code=base.trust_remote_code
        )
        vocabulary = theirs.get_vocab()
    except Exception as error:
        raise ValueError(
            f"pad: the base model's tokenizer {base.tokenizer!r} cannot be compared with the reward model's: "
            f"{one_line(error)}"
        ) from error
    ours, added = tokenizer.get_vocab(), added_ids(theirs)
    if not same_ordinary_tokens(theirs, tokenizer):
        pair = pair_of(config, tokenizer, base, theirs, reward, num_rows, reasoning)
        return SharedTokens(tokenizer, chat_tokenizer=tokenizer, pair=pair)
    roles, their_roles = token_roles(tokenizer), token_roles(theirs)
    foreign = {
        i: token
        for token, i in sorted(vocabulary.items(), key=lambda item: item[1])
        if i in added
        and (i >= num_rows or not (ours.get(token) == i or roles.get(i, set()) & their_roles.get(i, set())))
    }
    ends = end_ids(base, theirs)
    if ends and ends <= foreign.keys():
        raise ValueError(
            f"pad.reward_model={config.reward_model!r}: it does not know any end token of the base model "
            f"({', '.join(f'{foreign[i]!r} ({i})' for i in sorted(ends))}), so a guided request would never end; use "
            "a reward model with the same end of turn"
        )
    written = answer_end(theirs, ends, marker_tokens(theirs).values())
    if written in foreign:
        raise ValueError(
            f"pad.reward_model={config.reward_model!r}: the base model's chat template ends an answer with "
            f"{foreign[written]!r} ({written}), which the reward model does not know, so a guided request would never "
            "end there; use a reward model with the same end of turn"
        )
    answers = answer_tokens(theirs, ends, reasoning)
    no_opinion = {i: token for i, token in answers.items() if i in foreign}
    line_break = next(iter(tokenizer.encode("\n", add_special_tokens=False)[::-1]), 0)
    reads = {i: ours.get(token, num_rows) for i, token in no_opinion.items()}
    return SharedTokens(
        tokenizer,
        {i: token for i, token in foreign.items() if i not in no_opinion},
        no_opinion,
        {i: read if read < num_rows else line_break for i, read in reads.items()},
        theirs if getattr(theirs, "chat_template", None) else tokenizer,
    )


def pair_of(
    config: PADConfig,
    tokenizer: PreTrainedTokenizerBase,
    base: ModelConfig,
    theirs: PreTrainedTokenizerBase,
    reward: ModelConfig,
    num_rows: int,
    reasoning: Collection[int] = (),
) -> TokenizerPair:
    """Two tokenizers whose ordinary tokens differ; ``theirs`` is the base's. Raises ValueError where one cannot be
    translated into the other."""
    ends = all_end_ids(base, theirs)
    preferred = tokenizer.eos_token_id
    reward_ends = sorted((i for i in all_end_ids(reward, tokenizer) if i < num_rows), key=lambda i: (i != preferred, i))
    try:
        if not ends or not reward_ends:
            whose = "base model" if reward_ends else "reward model"
            raise ValueError(f"no token ends an answer of the {whose}, so guided requests would never end")
        base_tokens, reward_tokens = ByteTokens(theirs, base.model), ByteTokens(tokenizer, config.reward_model)
        answers = answer_tokens(theirs, ends, reasoning)
        known = {i: reward_tokens.vocabulary.get(token, num_rows) for i, token in answers.items()}
        # What ends the reward model's answer does not stand inside one.
        counterparts = {
            i: known[i] if known[i] < num_rows and known[i] not in reward_ends else token
            for i, token in answers.items()
        }
        tables = load_tables(
            base_tokens, ends, reward_tokens, reward_ends, counterparts, first_space(base_tokens, reward_tokens)
        )
    except ValueError as error:
        raise ValueError(
            f"pad.reward_model={config.reward_model!r}: its tokenizer is not that of the base model {base.model!r}, "
            f"and cannot be translated from that: {error}"
        ) from None
    return TokenizerPair(
        tables,
        PromptTranslator(base_tokens, reward_tokens, dict.fromkeys(ends, reward_ends[0])),
        {i: token for i, token in answers.items() if tables.key[i] == NO_OPINION},
    )


def token_roles(tokenizer: PreTrainedTokenizerBase) -> dict[int, set[str]]:
    """What special tokens are for: id -> ``eos_token``, ``pad_token`` and the like."""
    roles: dict[int, set[str]] = {}
    for role, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):  # extra special tokens are a list, and for anything
            roles.setdefault(tokenizer.convert_tokens_to_ids(token), set()).add(role)
    return roles


def end_ids(base: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end the base model's answers: its tokenizer's, and its generation config's."""
    configured = (base.try_get_generation_config() or {}).get("eos_token_id")
    configured = configured if isinstance(configured, list) else [configured]
    return {i for i in (*configured, tokenizer.eos_token_id) if isinstance(i, int)}


def all_end_ids(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Those of :func:`end_ids`, and what the chat template writes behind an answer, which not every model names."""
    ends = end_ids(model, tokenizer)
    written = answer_end(tokenizer, ends, marker_tokens(tokenizer).values())
    return ends if written is None else ends | {written}


def check_vocabulary(reward_model: str, reward: int, base: int, tokens: SharedTokens) -> int:
    """How many token ids base and reward model share, or up to the last that the reward model has no opinion of; of
    these, those that ``tokens.foreign`` has, and those without a row, are no candidates.

    The two may pad their embeddings differently; what lies beyond the tokenizer stands for no token.

    Raises:
        ValueError: the reward model has no row for some ordinary token.
    """
    if tokens.pair is not None:
        ordinary = max(i for i, content in enumerate(tokens.pair.translator.reward.bytes) if content)
        known = max(ordinary, int(tokens.pair.tables.pieces.max()))  # of markers the base has too
        if reward <= known:
            raise ValueError(
                f"pad.reward_model={reward_model!r}: its output head has {reward} rows, but its tokenizer has "
                f"{known + 1} tokens; each of them needs a row"
            )
        return min(base, len(tokens.pair.tables.key))
    needed = base
    if tokens.tokenizer is not None:
        added = added_ids(tokens.tokenizer)
        needed = 1 + max((i for i in tokens.tokenizer.get_vocab().values() if i not in added), default=-1)
    if reward < needed:
        raise ValueError(
            f"pad.reward_model={reward_model!r}: its output head has {reward} rows, but PAD scores the base model's "
            f"{needed} tokens; each of them needs a row"
        )
    return max(min(reward, base), 1 + max(tokens.no_opinion, default=-1))
