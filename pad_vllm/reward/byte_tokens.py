"""A tokenizer seen from its bytes: what each token stands for in running text, and which tokens write given bytes.

Two kinds of fast tokenizers can say both exactly. A byte-level one (GPT-2, Llama 3, Qwen) has a character for each
byte. One of SentencePiece's (Llama 2, Gemma; BPE or Unigram) has text with ``▁`` for a space, and a token for each byte
for what it has no text for. Everything else loses something of a text, and is refused.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, models

from pad_vllm.errors import one_line
from pad_vllm.reward.markers import marker_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
KINDS = ("BPE", "Unigram")
"""Models that can say which bytes their tokens stand for."""
NOWHERE = "\ufdd0"
"""A character that is none; where a text has it all the same, it is written byte by byte."""
ODD = f"([\udc80-\udcff{SPACE}{NOWHERE}]|<(?=0x[0-9A-F]{{2}}>))"
"""What SentencePiece's kind would read otherwise than as text: bytes that are none, the character for a space, that of
markers' names, and what spells a token of a single byte."""
READABLE = ("The weather in 東京: naïve, 1,024 times.", "def f(x):\n        return x")


def byte_characters() -> list[str]:
    """The character by which byte-level tokenizers write each byte: itself where it can be seen, else one above 255."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]


BYTE_CHARACTERS = byte_characters()
BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXT_BYTES = frozenset([*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1), 0xF3, 0xF4])
"""That any text may have; control characters, and what begins no assigned one, some vocabularies leave out."""
BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


@contextmanager
def no_collection() -> Iterator[None]:
    """While millions of small objects are made, none of them in a cycle; looking for cycles takes as long as they."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Written(NamedTuple):
    """What :meth:`ByteTokens.encode` gave for texts."""

    places: dict[bytes, int]
    """Text -> its number, n"""
    starts: np.ndarray
    ids: np.ndarray
    """Those of text n are ``ids[starts[n]:starts[n + 1]]``."""

    def encode(self, tokens: ByteTokens, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """As ``tokens.encode``, which has given these: two vocabularies have half of their words in common."""
        place = np.fromiter((self.places.get(text, -1) for text in texts), np.int64, len(texts))
        is_new = place < 0
        new_starts, new_ids = tokens.encode([text for text, new in zip(texts, is_new.tolist(), strict=True) if new])
        begins, lengths = self.starts[place], np.diff(self.starts, append=0)[place]
        begins[is_new], lengths[is_new] = len(self.ids) + new_starts[:-1], np.diff(new_starts)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        at = np.repeat(begins - starts[:-1], lengths) + np.arange(starts[-1])
        return starts, np.concatenate([self.ids, new_ids])[at]


class ByteTokens:
    """A tokenizer's tokens as bytes.

    Added tokens count as text where they are not special: Gemma's runs of newlines are such, and so is Qwen's
    ``<think>``. Special ones have no bytes. A text never becomes a token that only marks
    (:func:`~pad_vllm.reward.markers.marker_tokens`) unless that is asked for.

    Args:
        tokenizer: a fast one.
        name: of the model, for errors.

    Raises:
        ValueError: it cannot say exactly which bytes its tokens stand for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"the tokenizer of {name!r} is {type(tokenizer).__name__}, a slow tokenizer; only fast ones are "
                "supported"
            )
        self.tokenizer, self.name = tokenizer, name
        self.vocabulary = tokenizer.get_vocab()
        self.size = 1 + max(self.vocabulary.values())
        written = backend.to_str()
        with no_collection():
            settings = json.loads(written)
        model = settings["model"]
        writes_bytes = any(
            all(names[byte] in self.vocabulary for byte in TEXT_BYTES) for names in (BYTE_CHARACTERS, BYTE_NAMES)
        )
        if writes_bytes and model["type"] in KINDS:
            check_reading(tokenizer, name)  # it could write any text
        self.is_byte_level = any("ByteLevel" in types_of(settings[key]) for key in ("pre_tokenizer", "decoder"))
        if not self.is_byte_level and not model.get("byte_fallback"):
            raise ValueError(
                f"the tokenizer of {name!r} ({model['type']}) has no tokens for single bytes, so it cannot write "
                "every text that the other model writes"
            )
        if model["type"] not in KINDS:
            raise ValueError(f"the tokenizer of {name!r} is a {model['type']} model; BPE and Unigram are supported")
        self.markers = marker_tokens(tokenizer)
        """By what they are written as: the tokens that only mark"""
        self.marker_ids = frozenset(self.markers.values())
        """Their ids. :meth:`encode` gives none of them."""
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            token["id"] for token in settings["added_tokens"] if token["special"]
        }
        """Those of them that have no bytes"""
        self._odd = re.compile(ODD)
        self._added = {token["id"]: token["content"] for token in settings["added_tokens"]}
        with no_collection():
            self._running = running(settings, self.marker_ids, self.is_byte_level)
        parts = (written, repr((sorted(self.markers.items()), sorted(self.special_ids), self.size)))
        self.fingerprint = hashlib.sha256(chr(0).join(parts).encode(errors="replace")).hexdigest()
        """What the tokens and their bytes follow from"""
        self.bytes = self._token_bytes()
        """By id: what an ordinary token stands for; None for any other"""
        self._byte_ids = self._single_bytes()

    def check(self) -> Written:
        """What is written for the bytes of its own tokens.

        Raises:
            ValueError: with an example, unless for every token that has bytes, what is written for these has these, and
                an added token that is text is written for its own.
        """
        tokens = [i for i, content in enumerate(self.bytes) if content]
        contents = [content for content in self.bytes if content]
        starts, ids = self.encode(contents)
        wrong = np.flatnonzero(self.inexact(contents, starts, ids))
        if len(wrong):
            token = tokens[wrong[0]]
            written = self.decode(ids[starts[wrong[0]] : starts[wrong[0] + 1]].tolist())
            raise ValueError(
                f"the tokenizer of {self.name!r} does not encode the text of its own tokens exactly: token {token} "
                f"is {self.bytes[token]!r}, and encoding that gives {written!r} (one of {len(wrong):,} such tokens)"
            )
        alone = {i for i, content in self._added.items() if self._is_its_own_text(i, content)}
        for n, token in enumerate(tokens):
            if token in alone and ids[starts[n] : starts[n + 1]].tolist() != [token]:
                raise ValueError(
                    f"the tokenizer of {self.name!r} encodes the text of its added token {token}, "
                    f"{self.bytes[token]!r}, as other tokens: {ids[starts[n] : starts[n + 1]].tolist()}"
                )
        return Written({content: n for n, content in enumerate(contents)}, starts, ids)

    def _is_its_own_text(self, token: int, content: str) -> bool:
        """Whether an added token is found in a text as it stands. SentencePiece's runs of spaces are found, or not, by
        the model's merges."""
        return token not in self.marker_ids and (self.is_byte_level or SPACE not in content)

    def inexact(self, texts: Sequence[bytes | None], starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """[texts] bool: which are not what their tokens, as :meth:`encode` returns them, have for bytes together."""
        parts, bounds = [self.bytes[i] or b"" for i in ids.tolist()], starts.tolist()
        return np.array(
            [
                (parts[begin] if end - begin == 1 else b"".join(parts[begin:end])) != text
                for text, begin, end in zip(texts, bounds[:-1], bounds[1:], strict=True)
            ],
            bool,
        )

    def _token_bytes(self) -> list[bytes | None]:
        found: list[bytes | None] = [None] * self.size
        for token, i in self.vocabulary.items():
            if i in self.special_ids:
                continue
            if not self.is_byte_level:
                # Of added tokens too: there is no other way to write Gemma's runs of spaces.
                single = None if i in self._added else BYTE_TOKEN.fullmatch(token)
                found[i] = bytes.fromhex(single[1]) if single else token.replace(SPACE, " ").encode(errors="replace")
            elif i in self._added:
                found[i] = token.encode(errors="replace")
            elif all(character in BYTE_OF for character in token):
                found[i] = bytes(BYTE_OF[character] for character in token)
        return [content or None for content in found]

    def _single_bytes(self) -> list[int]:
        names = BYTE_CHARACTERS if self.is_byte_level else BYTE_NAMES
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
        marker, nothing normalized; so that the tokens have the same bytes together.

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
        with no_collection():
            encoded = iter(self._running.encode_batch_fast(plain, add_special_tokens=False))
            ids = [odd[i] if i in odd else next(encoded).ids for i in range(len(texts))]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in ids], dtype=np.int64)])
        return starts, np.fromiter((i for part in ids for i in part), np.int32, starts[-1])

    def encode_one(self, content: bytes, markers: bool = False) -> list[int]:
        """As :meth:`encode`, of one text; with ``markers`` those that it spells become themselves, as in what a chat
        template writes."""
        if not markers:
            return self.encode([content])[1].tolist()
        parts = self._markers.split(content.decode(errors="surrogateescape"))
        return [
            i
            for n, part in enumerate(parts)
            for i in ([self.markers[part]] if n % 2 else self.encode_one(part.encode(errors="surrogateescape")))
        ]

    @cached_property
    def _markers(self) -> re.Pattern[str]:
        longest_first = sorted(self.markers, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

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


def check_reading(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError for a tokenizer that does not give back the text that it encoded."""
    for text in READABLE:
        ids = tokenizer.encode(text, add_special_tokens=False)
        read = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if read.removeprefix(" ") != text:
            raise ValueError(
                f"transformers reads the tokenizer of {name!r} wrongly, as {type(tokenizer).__name__}: it turns "
                f"{text!r} into {read!r}. Correct tokenizer_class in the model's tokenizer_config.json"
            )


def running(settings: dict[str, Any], marker_ids: frozenset[int], is_byte_level: bool) -> Tokenizer:
    """A tokenizer of running text, from the settings of one of whole texts: what is done to a text's beginning, to its
    characters and to markers in it is left out. Every token keeps its id.

    Raises:
        ValueError: the settings make none.
    """
    try:
        tokenizer, added = running_tokenizer(settings, marker_ids, is_byte_level)
        moved = {content: i for i, content in added.items() if tokenizer.token_to_id(content) != i}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        raise ValueError(
            f"its settings give no tokenizer for text that follows other text: {one_line(error)}"
        ) from None
    for content, i in moved.items():
        raise ValueError(
            f"its added token {content!r} is {i}, but {tokenizer.token_to_id(content)} in text that follows other text"
        )
    return tokenizer


def running_tokenizer(
    settings: dict[str, Any], marker_ids: frozenset[int], is_byte_level: bool
) -> tuple[Tokenizer, dict[int, str]]:
    """As :func:`running`, which raises whatever comes of settings that are none; and its added tokens."""
    model = {name: value for name, value in settings["model"].items() if value is not None}
    maps_spaces = "Metaspace" in types_of(settings["pre_tokenizer"])
    pre_tokenizer = json.loads(json.dumps(settings["pre_tokenizer"]))
    for step in steps_of(pre_tokenizer):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        elif step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    empty = {
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "pre_tokenizer": pre_tokenizer,
        "normalizer": None if is_byte_level or maps_spaces else replace,
    }
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": []} | empty))
    tokenizer.model, names = running_model(model, marker_ids)
    added, contents = [], {}
    for token in settings["added_tokens"]:
        content, is_marker = token["content"], token["id"] in marker_ids
        if not is_marker and not is_byte_level and SPACE in content:
            if tokenizer.token_to_id(content) is not None:  # the model finds it, as where the token is not added
                continue
            content = content.replace(SPACE, " ")
        contents[token["id"]] = content = names.get(content, content)
        # A token that takes the spaces around it would stand for more than its text.
        added.append(AddedToken(content, normalized=False, special=is_marker))
    tokenizer.add_tokens(added)
    # Markers stand among the added tokens as special ones, so that all keep their ids, and are not looked for.
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.encode_special_tokens = True
    return tokenizer, contents


def running_model(model: dict[str, Any], marker_ids: frozenset[int]) -> tuple[models.Model, dict[str, str]]:
    """A model that no text leads to markers, and what it calls those that it has itself, by their names: Unigram would
    find any, BPE those that are whole words or that its merges lead to."""
    vocabulary, kind = model["vocab"], model["type"]
    options = {name: model[name] for name in model.keys() - {"type", "vocab", "merges", "dropout"}}
    if kind == "Unigram":
        names = {vocabulary[i][0]: f"{NOWHERE}{i}" for i in marker_ids & set(range(len(vocabulary)))}
        return models.Unigram([(names.get(token, token), score) for token, score in vocabulary], **options), names
    names = {token: f"{NOWHERE}{i}" for token, i in vocabulary.items() if i in marker_ids}
    merges = [(left, right) for left, right in model["merges"]]
    if names:
        vocabulary = {names.get(token, token): i for token, i in vocabulary.items()}
        merges = [
            (left, right)
            for left, right in merges
            if left + right not in names and left not in names and right not in names
        ]
        if "unk_token" in options:
            options["unk_token"] = names.get(options["unk_token"], options["unk_token"])
    return models.BPE(vocabulary, merges, **options), names


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
