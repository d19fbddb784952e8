"""A tokenizer seen from its bytes: what each token stands for in running text, and which tokens write given bytes.

Two kinds of fast tokenizers can say both exactly. A byte-level one (GPT-2, Llama 3, Qwen) has a character for each
byte. One of SentencePiece's (Llama 2, Gemma; BPE or Unigram) has text with ``▁`` for a space, and a token for each byte
for what it has no text for. Everything else loses something of a text, and is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
ODD = f"([\udc80-\udcff{SPACE}]|<(?=0x[0-9A-F]{{2}}>))"
"""What SentencePiece's kind would read otherwise than as text: bytes that are none, the character for a space, and what
spells a token of a single byte."""
NOWHERE = "\ufdd0"
"""No text has this character."""


def byte_characters() -> list[str]:
    """The character by which byte-level tokenizers write each byte: itself where it can be seen, else one above 255."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]


BYTE_CHARACTERS = byte_characters()
TEXT_BYTES = frozenset([*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1), 0xF3, 0xF4])
"""That any text may have; control characters, and what begins no assigned one, some vocabularies leave out."""
BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


class ByteTokens:
    """A tokenizer's tokens as bytes.

    Added tokens count as text where they are not special: Gemma's runs of newlines are such. Special ones have no
    bytes.

    Args:
        tokenizer: a fast one.
        name: of the model, for errors.

    Raises:
        ValueError: it cannot say exactly which bytes its tokens stand for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(f"the tokenizer of {name!r} is {type(tokenizer).__name__}, which has no fast form")
        self.tokenizer, self.name = tokenizer, name
        settings = json.loads(backend.to_str())
        self.is_byte_level = any("ByteLevel" in types_of(settings[key]) for key in ("pre_tokenizer", "decoder"))
        model = settings["model"]
        if not self.is_byte_level and not model.get("byte_fallback"):
            raise ValueError(
                f"the tokenizer of {name!r} ({model['type']}) has no tokens for single bytes, so it cannot write "
                "every text that the other model writes"
            )
        if model["type"] not in ("BPE", "Unigram"):
            raise ValueError(f"the tokenizer of {name!r} is a {model['type']} model; BPE and Unigram are supported")
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            token["id"] for token in settings["added_tokens"] if token["special"]
        }
        self.vocabulary = tokenizer.get_vocab()
        self.size = 1 + max(self.vocabulary.values())
        self._odd = re.compile(ODD)
        self._running = running(settings, self.special_ids, self.is_byte_level)
        self.bytes = self._token_bytes({token["id"] for token in settings["added_tokens"]})
        """By id: what an ordinary token stands for; None for any other"""
        self._byte_ids = self._single_bytes()

    @cached_property
    def fingerprint(self) -> str:
        """What the tokens and their bytes follow from."""
        return self._running.to_str() + repr((sorted(self.special_ids), self.size))

    def _token_bytes(self, added: set[int]) -> list[bytes | None]:
        found: list[bytes | None] = [None] * self.size
        for token, i in self.vocabulary.items():
            if i in self.special_ids:
                continue
            if i in added:
                found[i] = token.encode(errors="replace")
            elif self.is_byte_level:
                if all(character in BYTE_OF for character in token):
                    found[i] = bytes(BYTE_OF[character] for character in token)
            elif single := BYTE_TOKEN.fullmatch(token):
                found[i] = bytes.fromhex(single[1])
            else:
                found[i] = token.replace(SPACE, " ").encode(errors="replace")
        return [content or None for content in found]

    def _single_bytes(self) -> list[int]:
        names = BYTE_CHARACTERS if self.is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        missing = [byte for byte in range(256) if names[byte] not in self.vocabulary]
        if needed := [byte for byte in missing if byte in TEXT_BYTES]:
            raise ValueError(
                f"the tokenizer of {self.name!r} has no token for {len(needed)} of the bytes that texts are made of "
                f"(0x{needed[0]:02X}, ...), so it cannot write every text that the other model writes"
            )
        lost = self.vocabulary[names[ord("?")]]
        return [self.vocabulary.get(name, lost) for name in names]

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids that the tokenizer gives each of these bytes by itself in running text: no BOS, no added space, no
        special token, nothing normalized; so that the tokens have the same bytes together.

        Args:
            texts: UTF-8 or not: a token may end within a character.

        Returns:
            starts [len(texts) + 1] int64 and ids [starts[-1]] int32: those of text i are ``ids[starts[i]:starts[i +
            1]]``.
        """
        plain: list[str] = []
        odd: dict[int, list[int]] = {}
        for i, content in enumerate(texts):
            try:
                text = content.decode()
            except UnicodeDecodeError:
                text = None
            if text is None or (not self.is_byte_level and self._odd.search(text)):
                odd[i] = self._encode_odd(content)
            else:
                plain.append(text)
        encoded = iter(self._running.encode_batch_fast(plain, add_special_tokens=False))
        ids = [odd[i] if i in odd else next(encoded).ids for i in range(len(texts))]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in ids], dtype=np.int64)])
        return starts, np.fromiter((i for part in ids for i in part), np.int32, starts[-1])

    def encode_one(self, content: bytes) -> list[int]:
        """As :meth:`encode`, of one text."""
        return self.encode([content])[1].tolist()

    def _encode_odd(self, content: bytes) -> list[int]:
        """Of bytes that are no text, or have the character that stands for a space."""
        if self.is_byte_level:
            text = "".join(BYTE_CHARACTERS[byte] for byte in content)
            return [token.id for token in self._running.model.tokenize(text)]
        ids: list[int] = []
        for i, part in enumerate(self._odd.split(content.decode(errors="surrogateescape"))):
            if i % 2:
                ids += [self._byte_ids[byte] for byte in part.encode(errors="surrogateescape")]
            elif part:
                ids += self._running.encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of ordinary tokens together; others have none."""
        return b"".join(self.bytes[i] or b"" for i in ids if 0 <= i < self.size)


def running(settings: dict[str, Any], special_ids: frozenset[int], is_byte_level: bool) -> Tokenizer:
    """A tokenizer of running text, from the settings of one of whole texts: what is done to a text's beginning, to its
    characters and to special tokens in it is left out."""
    settings = json.loads(json.dumps(settings))
    settings["post_processor"] = settings["padding"] = settings["truncation"] = None
    # A token that takes the spaces around it stands for more than its text.
    settings["added_tokens"] = [
        {**token, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
        for token in settings["added_tokens"]
        if token["id"] not in special_ids and not token["special"]
    ]
    maps_spaces = "Metaspace" in types_of(settings["pre_tokenizer"])
    settings["normalizer"] = (
        None if is_byte_level or maps_spaces else {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    )
    for step in steps_of(settings["pre_tokenizer"]):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        elif step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
    model = settings["model"]
    model.pop("dropout", None)
    unknown = {model.get("unk_token"), model.get("unk_id")}
    if model["type"] == "Unigram":  # finds any token that a text spells
        for i in special_ids & set(range(len(model["vocab"]))) - unknown:
            model["vocab"][i][0] = f"{NOWHERE}{i}"
    elif model.get("ignore_merges"):  # finds any that is a whole word
        vocabulary = model["vocab"]
        model["vocab"] = {
            f"{NOWHERE}{i}" if i in special_ids and token not in unknown else token: i
            for token, i in vocabulary.items()
        }
    return Tokenizer.from_str(json.dumps(settings))


def steps_of(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a tokenizer's component, which may be a sequence of them."""
    if component is None:
        return []
    inner = [component[key] for key in ("pretokenizers", "decoders", "normalizers") if key in component]
    return [step for part in inner[0] for step in steps_of(part)] if inner else [component]


def types_of(component: dict[str, Any] | None) -> set[str]:
    return {step["type"] for step in steps_of(component)}


def added_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of a tokenizer's added and special tokens."""
    return set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)


def same_ordinary_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same tokens at the same ids, but for added and special ones."""
    vocabularies = (one.get_vocab(), other.get_vocab())
    return all(
        i in added or theirs.get(token) == i
        for (own, theirs), added in zip((vocabularies, vocabularies[::-1]), map(added_ids, (one, other)), strict=True)
        for token, i in own.items()
    )
