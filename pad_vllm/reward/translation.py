"""A base model's prompt as the reward model's: the same text, between the role markers of the other chat template.

The messages of a prompt are found by what the base's chat template writes around them, and written again by the reward
model's. Contents are kept byte for byte and never become markers; what has no counterpart, such as tools that the
template describes in a system message, or a role that only the base has, stays as text where it stands. A prompt that
is no chat, or whose template one of the two lacks, is plain text.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.chat import ATOM

logger = logging.getLogger(f"vllm.{__name__}")

CONTENTS = tuple(f"qzxjkvq{letter}" for letter in "bdfghm")
"""That no template writes."""


class Message(NamedTuple):
    role: str
    content: str


class Chat(NamedTuple):
    """Messages, and what the assistant has begun to answer; None: a finished conversation."""

    messages: list[Message]
    answer: str | None


class Translated(NamedTuple):
    """A prompt as the reward model's."""

    ids: list[int]
    begins_answer: bool
    """Whether it is a chat whose next token is the first of an answer"""


class ChatMarkers:
    """What a chat template writes around messages, in text whose special tokens are one private character each.

    Args:
        tokens: whose chat template it is.
        to_text: of token ids, with the private characters.

    Raises:
        ValueError: the template writes no conversation in which messages could be found.
    """

    def __init__(self, tokens: ByteTokens, to_text) -> None:
        self._tokenizer, self._to_text = tokens.tokenizer, to_text
        self.heads: dict[str, str] = {}
        self.between: dict[tuple[str, str], str] = {}
        self.generation: dict[str, str] = {}
        """By the last message's role: what stands behind its content where an answer is to follow"""
        self.endings: dict[str, str] = {}
        """And where none is"""
        talk = ("user", "assistant", "user")
        for roles in (talk, ("system", *talk), ("system", "user"), ("user",)):
            for generate in (True, False):
                self._learn(roles, generate)
        if "user" not in self.heads:
            raise ValueError("no user message that could be found again")

    def _learn(self, roles: Sequence[str], generate: bool) -> None:
        messages = [{"role": role, "content": CONTENTS[i]} for i, role in enumerate(roles)]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            text = self._to_text(self._tokenizer.encode(text, add_special_tokens=False))
        except Exception:  # a template raises what it likes
            return
        parts = split_at(text, CONTENTS[: len(roles)])
        if parts is None:
            return
        self.heads[roles[0]] = parts[0]
        for pair, part in zip(itertools.pairwise(roles), parts[1:-1], strict=True):
            self.between.setdefault(pair, part)
        (self.generation if generate else self.endings)[roles[-1]] = parts[-1]

    def parse(self, text: str) -> Chat | None:
        """The messages of a prompt, or None where it is none of the template's."""
        openers = [role for role, head in self.heads.items() if head and text.startswith(head)]
        if not openers:
            return None
        role = max(openers, key=lambda role: len(self.heads[role]))
        text, messages = text[len(self.heads[role]) :], []
        while True:
            found = [
                (at, -len(part), following, part)
                for (of, following), part in self.between.items()
                if of == role and part and (at := text.find(part)) >= 0
            ]
            at, _, following, part = min(found, default=(len(text), 0, "", ""))
            tail = self.generation.get(role)
            if tail and text.endswith(tail) and len(text) - len(tail) <= at:
                return Chat([*messages, Message(role, text[: -len(tail)])], "")
            if not following:
                break
            messages.append(Message(role, text[:at]))
            role, text = following, text[at + len(part) :]
        ending = self.endings.get(role)
        if role == "assistant" and not (ending and text.endswith(ending)):
            return Chat(messages, text)
        return Chat([*messages, Message(role, text.removesuffix(ending or ""))], None)


def split_at(text: str, marks: Sequence[str]) -> list[str] | None:
    """``text`` cut at each mark; None unless each stands there once, in order."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        part, _, text = text.partition(mark)
        parts.append(part)
    return [*parts, text]


class PromptTranslator:
    """Translates prompts.

    Args:
        base, reward: the two tokenizers.
        ends: end tokens of the base -> the reward model's.
    """

    def __init__(self, base: ByteTokens, reward: ByteTokens, ends: Mapping[int, int]) -> None:
        self.base, self.reward = base, reward
        self._atoms = {token_id: chr(ATOM + n) for n, token_id in enumerate(sorted(base.special_ids))}
        names = {token_id: token for token, token_id in base.vocabulary.items()}
        self._spelled = {atom: names.get(token_id, "") for token_id, atom in self._atoms.items()}
        theirs = {name: i for name, i in reward.vocabulary.items() if i in reward.special_ids}
        same = {atom: theirs[name] for atom, name in self._spelled.items() if name in theirs}
        self._ids = same | {self._atoms[i]: end for i, end in ends.items() if i in self._atoms}
        """Of special tokens that have a counterpart in plain text"""
        self._special = re.compile("|".join(map(re.escape, sorted(theirs, key=len, reverse=True))) or r"(?!)")
        self._special_ids = theirs
        self._private = re.compile(f"[{chr(ATOM)}-{chr(ATOM + len(self._atoms))}]")
        self._render = lru_cache(maxsize=256)(self._render_literals)
        self._warned = False

    def translate(self, prompt_ids: Sequence[int]) -> list[int]:
        """The reward model's ids of a base model's prompt."""
        return self.read(prompt_ids).ids

    def read(self, prompt_ids: Sequence[int]) -> Translated:
        """As :meth:`translate`, and what was seen of the prompt."""
        text = self._to_text(prompt_ids)
        chat = self.markers and self.markers.parse(text)
        if chat is not None and (ids := self._translate_chat(chat)) is not None:
            return Translated(ids, begins_answer=chat.answer == "")
        if self.markers is not None and text.lstrip()[:1] in self._spelled and len(prompt_ids) > 1 and not self._warned:
            self._warned = prompt_ids[0] != self.base.tokenizer.bos_token_id
            if self._warned:
                logger.warning("A prompt is none that the base model's chat template writes: it is translated as text.")
        return Translated(self._translate_plain(text), begins_answer=False)

    @cached_property
    def markers(self) -> ChatMarkers | None:
        """Of the base's chat template; None where one of the two has none that can be followed."""
        both = (self.base.tokenizer, self.reward.tokenizer)
        if not all(getattr(tokenizer, "chat_template", None) for tokenizer in both):
            return None
        try:
            return ChatMarkers(self.base, self._to_text)
        except ValueError as error:
            logger.warning("The base model's chat template cannot be followed (%s): prompts are plain text.", error)
            return None

    @cached_property
    def _bos(self) -> list[int]:
        """What the reward model reads for the base's BOS before a plain text: its own, unless messages begin with
        it."""
        tokenizer = self.reward.tokenizer
        if tokenizer.bos_token_id is None:
            return []
        talk = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), "abc", strict=True)
        ]
        try:
            is_opener = tokenizer.apply_chat_template(talk, tokenize=False).count(tokenizer.bos_token) > 1
        except Exception:  # no template, or one that raises
            is_opener = False
        return [] if is_opener else [tokenizer.bos_token_id]

    @cached_property
    def _adds_space(self) -> tuple[bool, bool]:
        """Whether base and reward model write a space before a text that has none."""
        return tuple(
            tokens.decode(tokens.tokenizer.encode("a", add_special_tokens=False)).startswith(b" ")
            for tokens in (self.base, self.reward)
        )

    def _to_text(self, ids: Sequence[int]) -> str:
        """Text with a private character for each special token; bytes that are no text as lone surrogates."""
        parts, run = [], bytearray()

        def flush() -> None:
            text = run.decode(errors="surrogateescape")
            # What looks like a special token's character is none.
            parts.append(self._private.sub(lambda c: c[0].encode().decode("ascii", "surrogateescape"), text))
            run.clear()

        for i in ids:
            if i in self._atoms:
                flush()
                parts.append(self._atoms[i])
            elif 0 <= i < self.base.size:
                run += self.base.bytes[i] or b""
        flush()
        return "".join(parts)

    def _translate_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        bos = self._atoms.get(self.base.tokenizer.bos_token_id)
        if bos and text.startswith(bos):
            ids += self._bos
            text = text[1:]
        base_adds, reward_adds = self._adds_space
        if base_adds:
            text = text.removeprefix(" ")
        items: list[int | str] = [" "] if reward_adds and text[:1] not in self._spelled and text[:1] != " " else []
        for part in re.split(f"({self._private.pattern})", text):
            items.append(self._ids.get(part, self._spell(part)) if part in self._spelled else part)
        return ids + self._encode(items) or [*self._bos] or self._encode([" "])

    def _translate_chat(self, chat: Chat) -> list[int] | None:
        messages = chat.messages
        literals = self._render(self._shape(messages), chat.answer is not None)
        if literals is None and messages[0].role == "system" and len(messages) > 1:
            # The reward model has no system turn: its text opens the next.
            system, first, *rest = messages
            joined = "\n\n".join(part for part in (system.content, first.content) if part.strip())
            messages = [Message(first.role, joined), *rest]
            literals = self._render(self._shape(messages), chat.answer is not None)
        if literals is None:
            return None
        items: list[int | str] = []
        for i, literal in enumerate(literals):
            at = 0
            for special in self._special.finditer(literal):
                items += [literal[at : special.start()], self._special_ids[special[0]]]
                at = special.end()
            items.append(literal[at:])
            if i < len(messages):
                items.append(self._spell(messages[i].content.strip()))
        items.append(self._spell(chat.answer or ""))
        if self._adds_space[1] and (first := next((i for i, item in enumerate(items) if item != ""), None)) is not None:
            items[first:first] = [" "] if isinstance(items[first], str) else []
        return self._encode(items)

    @staticmethod
    def _shape(messages: Sequence[Message]) -> tuple[tuple[str, str, str], ...]:
        """Of each message its role, and the white space around its content, which some templates take away."""
        return tuple(
            (role, text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :] if text.strip() else "")
            for role, text in messages
        )

    def _render_literals(self, shape: tuple[tuple[str, str, str], ...], generate: bool) -> list[str] | None:
        """What the reward model's template writes before, between and after contents, their white space included."""
        marks = [f"{CONTENTS[0]}{'x' * (i + 1)}{CONTENTS[1]}" for i in range(len(shape))]
        messages = [
            {"role": role, "content": f"{left}{mark}{right}"}
            for (role, left, right), mark in zip(shape, marks, strict=True)
        ]
        try:
            text = self.reward.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception:  # a template raises what it likes
            return None
        return split_at(text, marks)

    def _spell(self, text: str) -> str:
        """Special tokens in a text, as text."""
        return self._private.sub(lambda atom: self._spelled.get(atom[0], ""), text)

    def _encode(self, items: Sequence[int | str]) -> list[int]:
        """Token ids, and texts between them, each encoded as a whole."""
        ids: list[int] = []
        text = ""
        for item in [*items, None]:
            if isinstance(item, str):
                text += item
                continue
            if text:
                ids += self.reward.encode_one(text.encode(errors="surrogateescape"))
                text = ""
            if item is not None:
                ids.append(item)
        return ids
