"""Token ids as one string in which what only marks and what is text cannot be taken for each other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pad_vllm.reward.byte_tokens import BYTE_OF, BYTE_TOKEN, SPACE
from pad_vllm.reward.markers import marker_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ATOM = 0xF0000
"""The first of the private characters that stand for markers."""
ATOMS = f"[{chr(ATOM)}-{chr(0xFFFFD)}]"
NO_TOKEN = "\ufdd0"
"""For an id that stands for no token; no text has it."""


class MarkedText:
    """A tokenizer's ids as strings: a private character for each token that only marks, and for others a character for
    each of their bytes, of the same number. Joined, they say the same however the tokenizer cut a text, as it does
    where a content begins with a space or a newline.

    Args:
        tokenizer: any; where it is not one of bytes, its tokens' own text is taken for what they say.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        markers = marker_tokens(tokenizer)
        self.atoms = {token_id: chr(ATOM + n) for n, token_id in enumerate(sorted(set(markers.values())))}
        """By id: the characters of markers"""
        self.spelled = {self.atoms[token_id]: content for content, token_id in markers.items()}
        """By character: what the marker is written as"""
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        words = "".join(tokenizer.convert_ids_to_tokens(tokenizer.encode("a b", add_special_tokens=False)))
        self.is_byte_level = "Ġ" in words
        self.adds_prefix = not self.is_byte_level and words.startswith(SPACE)
        """The tokenizer writes a space before a text that has none (SentencePiece)."""
        self.bos = self.atoms.get(tokenizer.bos_token_id, "")
        self._pieces = dict(self.atoms)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """A string for each id."""
        known = self._pieces
        return [known[i] if i in known else self._piece(i) for i in ids]

    def read(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces(ids))

    def encode(self, text: str) -> str:
        """A text as its ids say it."""
        return self.read(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, marked: str) -> str:
        """The text of a string, markers spelled; bytes that are no text as lone surrogates."""
        parts = re.split(f"({ATOMS}|{NO_TOKEN})", marked)
        return "".join(
            self.spelled.get(part, "") if i % 2 else part.encode("latin-1").decode(errors="surrogateescape")
            for i, part in enumerate(parts)
        )

    def _piece(self, token_id: int) -> str:
        try:
            token = self.tokenizer.convert_ids_to_tokens([token_id])[0]
        except OverflowError:
            token = None
        piece = NO_TOKEN if not token else self._bytes(token_id, token).decode("latin-1")
        self._pieces[token_id] = piece
        return piece

    def _bytes(self, token_id: int, token: str) -> bytes:
        added = self._added.get(token_id)
        if not self.is_byte_level:
            single = None if added is not None else BYTE_TOKEN.fullmatch(token)
            return bytes.fromhex(single[1]) if single else token.replace(SPACE, " ").encode(errors="replace")
        if added is None and all(character in BYTE_OF for character in token):
            return bytes(BYTE_OF[character] for character in token)
        return token.encode(errors="replace")


def is_marker(character: str) -> bool:
    return character >= chr(ATOM)


def first_marker(marked: str) -> str:
    """The first marker in a string; empty where it has none."""
    return next(filter(is_marker, marked), "")


def has_text(marked: str) -> bool:
    """Whether there is more than markers and white space."""
    return any(not (is_marker(c) or c.isspace()) for c in marked)


def num_common(*sequences: Sequence) -> int:
    """How long a beginning they have in common."""
    columns = zip(*sequences, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))
