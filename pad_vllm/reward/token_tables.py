"""What a base model's tokens are to a reward model with another tokenizer: static tables, made once for a pair.

With B the base's tokenizer, R the reward model's, ``bytes`` of a token and ``enc`` of bytes by themselves in running
text (:mod:`.byte_tokens`):

    key(c)     = enc_R(bytes_B(c))[0]               for a base token c: its group
    home(u)    = key(enc_B(bytes_R(u))[0])          for a reward token u
    members(g) = {u : home(u) = g} and g itself
    pieces(c)  = enc_R(bytes_B(c))                  what the reward model reads where the base wrote c

Every end token of the base has the key of the reward model's end token, whose members are all of its end tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from vllm.logger import init_logger

from pad_vllm.cache import cached
from pad_vllm.reward.byte_tokens import ByteTokens

logger = init_logger(f"vllm.{__name__}")

MAX_PIECES = 8
"""Reward tokens of a token of a large base vocabulary, at most: on Model Runner V2 each step has room for so many of
every request. Base tokens of more, as long runs of spaces and words in scripts that the reward model spells in bytes,
are no candidates; the base has shorter tokens for the same text."""
LARGE = 32_000
"""Tokens of such a vocabulary. In a smaller one the longest tokens are few, and so is what they take."""
MAX_LOST = 0.01
"""Part of the base's tokens that the reward model may be unable to write: control characters, as a rule."""
WORTH_KEEPING = 65536
"""Tokens of both; tables of fewer are made in less time than a file is read."""
FORMAT = 2
NO_KEY = -1


@dataclass(frozen=True)
class TokenTables:
    """The tables of a pair, on the host."""

    key: np.ndarray
    """[base tokens] int32: a token's group, which is a reward token; :data:`NO_KEY`: it is no candidate"""
    pieces: np.ndarray
    """[...] int32, reward tokens"""
    piece_starts: np.ndarray
    """[base tokens + 1] int32: those of token c are ``pieces[piece_starts[c]:piece_starts[c + 1]]``, one or more"""
    members: np.ndarray
    """[...] int32, reward tokens"""
    member_starts: np.ndarray
    """[reward tokens + 1] int32: those of group g are ``members[member_starts[g]:member_starts[g + 1]]``"""

    @property
    def num_pieces(self) -> np.ndarray:
        """[base tokens] int32, at least 1."""
        return np.diff(self.piece_starts)

    def whole_tokens(self) -> np.ndarray:
        """[reward tokens] int64: a base token of which the reward token is the only piece, the first of several;
        :data:`NO_KEY` where there is none."""
        tokens = np.flatnonzero((self.num_pieces == 1) & (self.key != NO_KEY))[::-1]
        whole = np.full(len(self.member_starts) - 1, NO_KEY, np.int64)
        whole[self.pieces[self.piece_starts[tokens]]] = tokens
        return whole

    def pieces_of(self, token_ids: Collection[int]) -> list[int]:
        """What the reward model reads for these base tokens, one after the other."""
        starts, last = self.piece_starts, len(self.key) - 1
        ids = [min(max(i, 0), last) for i in token_ids]
        return [int(u) for i in ids for u in self.pieces[starts[i] : starts[i + 1]]]


def make_tables(
    base: ByteTokens, base_ends: Collection[int], reward: ByteTokens, reward_ends: list[int]
) -> TokenTables:
    """The tables of a pair.

    Args:
        base, reward: the two tokenizers.
        base_ends: the base's end tokens.
        reward_ends: the reward model's; the first is what it reads where the base ends.

    Raises:
        ValueError: the reward model's tokenizer cannot write what the base writes, or one of the two does not write its
            own tokens byte for byte.
    """
    base.check()
    reward.check()
    end = reward_ends[0]
    tokens, starts, ids = _encode_tokens(base, base_ends, reward)
    lengths = np.diff(starts)
    # A marker of another kind, special there and not here, has no bytes and is the same all the same.
    known = np.isin(ids[starts[:-1].clip(max=len(ids) - 1)], list(reward.marker_ids))
    lost = reward.inexact([base.bytes[i] for i in tokens], starts, ids) & ~known
    is_lost = lost | (lengths == 0)
    if is_lost.sum() > MAX_LOST * len(tokens):
        example = base.bytes[tokens[int(np.argmax(is_lost))]]
        raise ValueError(
            f"the tokenizer of {reward.name!r} cannot write {is_lost.sum():,} of the {len(tokens):,} tokens of "
            f"{base.name!r}, as {example!r}"
        )
    key = np.full(base.size, NO_KEY, np.int32)
    fits = ~is_lost
    if base.size >= LARGE:
        fits &= lengths <= MAX_PIECES
    first = ids[starts[:-1].clip(max=len(ids) - 1)]
    key[tokens[fits]] = first[fits]
    group = np.full(base.size, NO_KEY, np.int32)  # as key, also of tokens that are too long to be candidates
    group[tokens[~is_lost]] = first[~is_lost]
    key[list(base_ends)] = group[list(base_ends)] = end
    # Where a token without a text stands in a context all the same, it is one that ends it.
    num_pieces = np.ones(base.size, np.int64)
    num_pieces[tokens[fits]] = lengths[fits]
    piece_starts = np.concatenate([[0], np.cumsum(num_pieces)])
    pieces = np.full(piece_starts[-1], end, np.int32)
    source = np.repeat(fits, lengths)
    at = np.repeat(piece_starts[tokens[fits]], lengths[fits])
    within = np.arange(len(at)) - np.repeat(np.cumsum(lengths[fits]) - lengths[fits], lengths[fits])
    pieces[at + within] = ids[source]
    members, member_starts = _members(base, group, reward, reward_ends)
    return TokenTables(key, pieces, piece_starts.astype(np.int32), members, member_starts)


def _encode_tokens(
    base: ByteTokens, ends: Collection[int], reward: ByteTokens
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of ``base``'s ordinary tokens, and what ``reward`` writes for each: starts, ids. A marker is the one of
    the same name, where there is one."""
    tokens = np.array([i for i, content in enumerate(base.bytes) if content and i not in ends], np.int64)
    starts, ids = reward.encode([base.bytes[i] for i in tokens])
    same = {base.markers[name]: reward.markers[name] for name in base.markers.keys() & reward.markers.keys()}
    whole = np.array([same.get(i, NO_KEY) for i in tokens.tolist()], np.int64)
    is_same = whole != NO_KEY
    if not is_same.any():
        return tokens, starts, ids
    lengths = np.diff(starts)
    kept = np.where(is_same, 1, lengths)
    starts_kept = np.concatenate([[0], np.cumsum(kept)])
    written = np.empty(starts_kept[-1], np.int32)
    written[np.repeat(~is_same, kept)] = ids[np.repeat(~is_same, lengths)]
    written[starts_kept[:-1][is_same]] = whole[is_same]
    return tokens, starts_kept, written


def _members(
    base: ByteTokens, group: np.ndarray, reward: ByteTokens, reward_ends: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """members and member_starts of :class:`TokenTables`."""
    tokens = np.array([u for u, content in enumerate(reward.bytes) if content and u not in reward_ends], np.int64)
    starts, ids = base.encode([reward.bytes[u] for u in tokens])
    home = np.full(reward.size, NO_KEY, np.int64)
    written = np.diff(starts) > 0
    home[tokens[written]] = group[ids[starts[:-1][written]]]
    home[reward_ends] = reward_ends[0]
    itself = np.arange(reward.size)
    away = home != itself
    groups = np.concatenate([itself, home[away]])
    members = np.concatenate([itself, itself[away]])
    known = groups >= 0
    order = np.lexsort((members[known], groups[known]))
    counts = np.bincount(groups[known], minlength=reward.size)
    return members[known][order].astype(np.int32), np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def load_tables(
    base: ByteTokens,
    base_ends: Collection[int],
    reward: ByteTokens,
    reward_ends: list[int],
    cache_dir: Path | None = None,
) -> TokenTables:
    """As :func:`make_tables`; those of large vocabularies are kept (:mod:`pad_vllm.cache`)."""

    def make() -> TokenTables:
        return make_tables(base, base_ends, reward, reward_ends)

    if cache_dir is None and base.size + reward.size < WORTH_KEEPING:
        return make()
    settings = repr((FORMAT, MAX_PIECES, LARGE, sorted(base_ends), reward_ends))
    parts = (settings, base.fingerprint, reward.fingerprint)
    name = f"token-tables-{hashlib.sha256(chr(0).join(parts).encode(errors='replace')).hexdigest()[:16]}"
    made: list[TokenTables] = []

    def write(folder: Path) -> None:
        folder.mkdir()
        made.append(make())
        np.savez(folder / "tables.npz", **{field.name: getattr(made[0], field.name) for field in fields(TokenTables)})

    try:
        folder = cached(cache_dir, name, write)
        with np.load(folder / "tables.npz") as kept:
            return TokenTables(**{field.name: kept[field.name] for field in fields(TokenTables)})
    except (OSError, KeyError) as error:  # no room, or not ours to write
        logger.warning("PAD: the tables of the two tokenizers are not kept: %r", error)
        return made[0] if made else make()
