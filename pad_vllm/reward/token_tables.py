"""What a base model's tokens are to a reward model with another tokenizer: static tables, made once for a pair.

With B the base's tokenizer, R the reward model's, ``bytes`` of a token and ``enc`` of bytes by themselves in running
text (:mod:`.byte_tokens`):

    key(c)     = enc_R(bytes_B(c))[0]               for a base token c: its group
    home(u)    = key(enc_B(bytes_R(u))[0])          for a reward token u
    members(g) = {u : home(u) = g} and g itself
    pieces(c)  = enc_R(bytes_B(c))                  what the reward model reads where the base wrote c

Every end token of the base has the key of the reward model's end token, whose members are all of its end tokens. A
token that is no text and that the base writes inside an answer, as ``</think>``, is the reward model's token of that
name; where it has none, a candidate without a group, of which the reward model has no opinion, and which it reads as
spelled.

Where one of the two models begins its answers with a space and the other does not, an answer's first token has tables
of its own, with bytes_B(c) without that space, or with one, and bytes_R(u) the other way round.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from vllm.logger import init_logger

from pad_vllm.cache import cached
from pad_vllm.kernels.types import NO_OPINION
from pad_vllm.reward.byte_tokens import ByteTokens, Written

logger = init_logger(f"vllm.{__name__}")

MAX_PIECES = 8
"""Reward tokens of a token of a large base vocabulary, at most: on Model Runner V2 each step has room for so many of
every request. Base tokens of more, as long runs of spaces and words in scripts that the reward model spells in bytes,
are no candidates; the base has shorter tokens for the same text."""
LARGE_VOCABULARY = 32_000
"""Tokens of such a vocabulary. In a smaller one the longest tokens are few, and so is what they take."""
MAX_LOST = 0.01
"""Part of the base's tokens that the reward model may be unable to write: control characters, as a rule."""
WORTH_KEEPING = 65536
"""Tokens of both; tables of fewer are made in less time than a file is read."""
FORMAT = 4
TABLES_FILE = "tables.npz"
NO_KEY = -1
"""In place of a group: the token is no candidate."""
ARRAYS = ("key", "pieces", "piece_starts", "members", "member_starts")
FIRST = "first_"
FirstSpace = Literal["drop", "add"] | None
"""``drop``: where the base begins its answers with a space and the reward model does not; ``add``: the reverse"""


@dataclass(frozen=True)
class TokenTables:
    """The tables of a pair, on the host."""

    key: np.ndarray
    """[base tokens] int32: a token's group, which is a reward token; :data:`NO_KEY`: it is no candidate;
    :data:`NO_OPINION`: it is one that the reward model has none of"""
    pieces: np.ndarray
    """[...] int32, reward tokens"""
    piece_starts: np.ndarray
    """[base tokens + 1] int32: those of token c are ``pieces[piece_starts[c]:piece_starts[c + 1]]``, one or more"""
    members: np.ndarray
    """[...] int32, reward tokens"""
    member_starts: np.ndarray
    """[reward tokens + 1] int32: those of group g are ``members[member_starts[g]:member_starts[g + 1]]``"""
    first: TokenTables | None = None
    """Of an answer's first token, where the two models begin their answers differently: one with a space"""

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """What :meth:`of` makes the tables of."""
        found = {f"{prefix}{name}": getattr(self, name) for name in ARRAYS}
        return found | (self.first.arrays(FIRST) if self.first is not None else {})

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], prefix: str = "") -> TokenTables:
        first = None if prefix or f"{FIRST}key" not in arrays else cls.of(arrays, FIRST)
        return cls(**{name: arrays[f"{prefix}{name}"] for name in ARRAYS}, first=first)

    @property
    def max_pieces(self) -> int:
        """Of any token."""
        return int(max(self.num_pieces.max(), self.first.max_pieces if self.first is not None else 0))

    @property
    def num_pieces(self) -> np.ndarray:
        """[base tokens] int32, at least 1."""
        return np.diff(self.piece_starts)

    def whole_tokens(self) -> np.ndarray:
        """[reward tokens] int64: a base token of which the reward token is the only piece, the first of several;
        :data:`NO_KEY` where there is none."""
        tokens = np.flatnonzero((self.num_pieces == 1) & (self.key >= 0))[::-1]
        whole: np.ndarray = np.full(len(self.member_starts) - 1, NO_KEY, np.int64)
        whole[self.pieces[self.piece_starts[tokens]]] = tokens
        return whole

    def pieces_of(self, token_ids: Collection[int]) -> list[int]:
        """What the reward model reads for these base tokens, one after the other."""
        starts, last = self.piece_starts, len(self.key) - 1
        ids = [min(max(i, 0), last) for i in token_ids]
        return [int(u) for i in ids for u in self.pieces[starts[i] : starts[i + 1]]]


def make_tables(
    base: ByteTokens,
    base_ends: Collection[int],
    reward: ByteTokens,
    reward_ends: list[int],
    answers: Mapping[int, int | str] | None = None,
    first_space: FirstSpace = None,
) -> TokenTables:
    """The tables of a pair.

    Args:
        base, reward: the two tokenizers.
        base_ends: the base's end tokens.
        reward_ends: the reward model's; the first is what it reads where the base ends.
        answers: the base's tokens that are no text and stand inside an answer -> the reward model's token of that
            name, or the name, where it has none.
        first_space: what becomes of an answer's first space, where the two models begin theirs differently.

    Raises:
        ValueError: the reward model's tokenizer cannot write what the base writes, or one of the two does not write its
            own tokens byte for byte.
    """
    pair = Tokenizers(base, base_ends, reward, reward_ends, answers or {}, base.check(), reward.check())
    contents = {i: content for i, content in enumerate(base.bytes) if content and i not in pair.no_text}
    tables, lost = _make(pair, contents, lambda content: content)
    if len(lost) > MAX_LOST * len(contents):
        raise ValueError(
            f"the tokenizer of {reward.name!r} cannot write {len(lost):,} of the {len(contents):,} tokens of "
            f"{base.name!r}, as {base.bytes[lost[0]]!r}"
        )
    if first_space is None:
        return tables
    there, back = (without_space, with_space) if first_space == "drop" else (with_space, without_space)
    changed = {i: there(content) for i, content in contents.items()}
    first, _ = _make(pair, changed, back)
    # A candidate is one at any place: what cannot be written so is written as it is elsewhere.
    if len(unfit := np.flatnonzero((first.key == NO_KEY) & (tables.key != NO_KEY))):
        first, _ = _make(pair, changed | {i: contents[i] for i in unfit.tolist()}, back)
    first.key[tables.key == NO_KEY] = NO_KEY
    return replace(tables, first=first)


def with_space(content: bytes) -> bytes:
    return content if content.startswith(b" ") else b" " + content


def without_space(content: bytes) -> bytes:
    """Without one space at the start; a lone one stays, as a token must be read as something."""
    return content[1:] if content.startswith(b" ") and len(content) > 1 else content


class Tokenizers(NamedTuple):
    """The arguments of :func:`make_tables`."""

    base: ByteTokens
    base_ends: Collection[int]
    reward: ByteTokens
    reward_ends: list[int]
    answers: Mapping[int, int | str]
    base_written: Written
    reward_written: Written
    """Of their own tokens"""

    @property
    def no_text(self) -> set[int]:
        """Tokens of the base that are no text."""
        return {*self.base_ends, *self.answers}


def _make(
    pair: Tokenizers, contents: Mapping[int, bytes], back: Callable[[bytes], bytes]
) -> tuple[TokenTables, list[int]]:
    """The tables of a pair, and the tokens that cannot be written.

    Args:
        contents: what the base's ordinary tokens say to the reward model.
        back: of what the reward model's tokens say, what they do to the base.
    """
    base, reward, end = pair.base, pair.reward, pair.reward_ends[0]
    tokens = np.array(list(contents), np.int64)
    starts, ids = _with_same_markers(pair, tokens, *pair.reward_written.encode(reward, list(contents.values())))
    lengths = np.diff(starts)
    # A marker of another kind, special there and not here, has no bytes and is the same all the same.
    known = np.isin(ids[starts[:-1].clip(max=len(ids) - 1)], list(reward.marker_ids))
    is_lost = reward.inexact(list(contents.values()), starts, ids) & ~known | (lengths == 0)
    key = np.full(base.size, NO_KEY, np.int32)
    fits = ~is_lost
    if base.size >= LARGE_VOCABULARY:
        fits &= lengths <= MAX_PIECES
    first = ids[starts[:-1].clip(max=len(ids) - 1)]
    key[tokens[fits]] = first[fits]
    group = np.full(base.size, NO_KEY, np.int32)  # as key, also of tokens that are too long to be candidates
    group[tokens[~is_lost]] = first[~is_lost]
    key[list(pair.base_ends)] = group[list(pair.base_ends)] = end
    # Where a token without a text stands in a context all the same, it is one that ends it.
    num_pieces = np.ones(base.size, np.int64)
    num_pieces[tokens[fits]] = lengths[fits]
    spelled = {}
    for i, answer in pair.answers.items():
        spelled[i] = [answer] if isinstance(answer, int) else reward.encode_one(answer.encode())
        key[i] = answer if isinstance(answer, int) else NO_OPINION
        group[i] = max(key[i], NO_KEY)
        num_pieces[i] = len(spelled[i])
    piece_starts = np.concatenate([[0], np.cumsum(num_pieces)])
    pieces = np.full(piece_starts[-1], end, np.int32)
    source: np.ndarray = np.repeat(fits, lengths)
    at: np.ndarray = np.repeat(piece_starts[tokens[fits]], lengths[fits])
    within = np.arange(len(at)) - np.repeat(np.cumsum(lengths[fits]) - lengths[fits], lengths[fits])
    pieces[at + within] = ids[source]
    for i, parts in spelled.items():
        pieces[piece_starts[i] : piece_starts[i + 1]] = parts
    members, member_starts = _members(pair, group, back)
    tables = TokenTables(key, pieces, piece_starts.astype(np.int32), members, member_starts)
    return tables, tokens[is_lost].tolist()


def _with_same_markers(
    pair: Tokenizers, tokens: np.ndarray, starts: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the reward model writes for the base's ``tokens``: a marker that it has by the same name is that one."""
    base, reward = pair.base, pair.reward
    same = {base.markers[name]: reward.markers[name] for name in base.markers.keys() & reward.markers.keys()}
    whole = np.array([same.get(i, NO_KEY) for i in tokens.tolist()], np.int64)
    is_same = whole != NO_KEY
    if not is_same.any():
        return starts, ids
    lengths = np.diff(starts)
    kept = np.where(is_same, 1, lengths)
    starts_kept = np.concatenate([[0], np.cumsum(kept)])
    written = np.empty(starts_kept[-1], np.int32)
    written[np.repeat(~is_same, kept)] = ids[np.repeat(~is_same, lengths)]
    written[starts_kept[:-1][is_same]] = whole[is_same]
    return starts_kept, written


def _members(pair: Tokenizers, group: np.ndarray, back: Callable[[bytes], bytes]) -> tuple[np.ndarray, np.ndarray]:
    """members and member_starts of :class:`TokenTables`."""
    reward, reward_ends = pair.reward, pair.reward_ends
    tokens = np.array([u for u, content in enumerate(reward.bytes) if content and u not in reward_ends], np.int64)
    starts, ids = pair.base_written.encode(pair.base, [back(reward.bytes[u]) for u in tokens])
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
    answers: Mapping[int, int | str] | None = None,
    first_space: FirstSpace = None,
    cache_dir: Path | None = None,
) -> TokenTables:
    """As :func:`make_tables`; those of large vocabularies are kept (:mod:`pad_vllm.cache`)."""

    def make() -> TokenTables:
        return make_tables(base, base_ends, reward, reward_ends, answers, first_space)

    if cache_dir is None and base.size + reward.size < WORTH_KEEPING:
        return make()
    rules = (sorted((answers or {}).items()), first_space)
    settings = repr((FORMAT, MAX_PIECES, LARGE_VOCABULARY, sorted(base_ends), reward_ends, rules))
    parts = (settings, base.fingerprint, reward.fingerprint)
    name = f"token-tables-{hashlib.sha256(chr(0).join(parts).encode(errors='replace')).hexdigest()[:16]}"
    made: list[TokenTables] = []

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        made.append(make())
        kept = made[0].arrays()
        file = tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False)  # noqa: SIM115
        try:
            with file:
                np.savez(file, **kept, checksum=_checksum(kept))  # type: ignore[arg-type]  # none is allow_pickle
            Path(file.name).rename(folder / TABLES_FILE)
        finally:
            Path(file.name).unlink(missing_ok=True)

    try:
        folder = cached(cache_dir, name, write)
        if made:
            return made[0]
        try:
            return _read_tables(folder / TABLES_FILE)
        except Exception as error:  # cut short, flipped: zip, zlib and NumPy raise what they like
            logger.warning("PAD: %s is damaged and is being made again: %r", folder / TABLES_FILE, error)
            write(folder)
    except OSError as error:  # no room, or not ours to write
        logger.warning("PAD: the tables of the two tokenizers could not be saved: %r", error)
    return made[0] if made else make()


def _read_tables(path: Path) -> TokenTables:
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files if name != "checksum"}
        if not np.array_equal(file["checksum"], _checksum(kept)):
            raise ValueError("other contents than were written")
    return TokenTables.of(kept)


def _checksum(tables: Mapping[str, np.ndarray]) -> np.ndarray:
    """[32] uint8: a zip's own sums say nothing of its headers, in which shapes and dtypes stand."""
    digest = hashlib.sha256()
    for name, table in tables.items():
        digest.update(repr((name, table.dtype.str, table.shape)).encode())
        digest.update(table.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
