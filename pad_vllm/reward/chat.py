"""Where a preference goes in a chat, found on the token ids of the rendered conversation.

A server sees the ids that a chat template wrote, not its messages. What the template writes around a message of each
role is found by rendering conversations whose contents are known. Prompts are compared in pieces, the strings that the
vocabulary has for tokens: joined, they say the same however the tokenizer cut a text, as it does where a content begins
with a space or a newline.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import decoders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(f"vllm.{__name__}")

SEPARATOR = "\n\n"
"""Between the content of a system message and the preference."""
FIRST, SECOND = "qzxjkvq", "vwqkzjx"
"""Contents that no template writes: lowercase ASCII is its own piece in every vocabulary."""
ATOM = 0xF0000
"""Private characters stand for added tokens, so that a token and its spelling in text differ."""
ROLES = ("user", "assistant", "developer")
"""Of messages other than system messages that may open a conversation."""
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
DATES = ({"strftime_now": lambda form: "1"}, {"strftime_now": lambda form: "2"}, {"date_string": "3"})
VARIANTS = (*DATES, {"tools": [TOOL]}, {"enable_thinking": False})
"""Requests and days change what a template writes into the system message before its content."""


class Seam(NamedTuple):
    """How a preference's text joins what stands around it."""

    left: str = ""
    """Text before the preference that one token held together with what follows it."""
    lead: str = ""
    right: str = ""
    strip_left: bool = False
    """The template strips contents, and the preference begins one."""
    strip_right: bool = False


class Place(NamedTuple):
    """A preference goes between ``ids[:start]`` and ``ids[end:]``; the seam has the text of ``ids[start:end]``, and is
    None in a plain prompt."""

    start: int
    end: int
    seam: Seam | None = None
    ends_system: bool = False
    """It stands at the end of a system message, which users may share."""


class ChatFormat:
    """What a chat template writes around messages, in pieces.

    Args:
        tokenizer: whose chat template renders the prompts.

    Raises:
        ValueError: the template writes no user message in a way that could be found again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        atoms = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
        self._atoms = {token_id: chr(ATOM + n) for n, token_id in enumerate(atoms)}
        words = "".join(self.pieces(self._encode("a b")))
        self._byte_level = "Ġ" in words
        self.adds_prefix = not self._byte_level and words.startswith("▁")
        """The tokenizer writes a space before a text that has none (SentencePiece)."""
        self._bos = self._atoms.get(tokenizer.bos_token_id, "")
        self.openers: dict[str, bool] = {}
        """What opens a message -> whether the template strips its content. The system message's are apart."""
        self.system_openers: tuple[str, ...] = ()
        self.closers: tuple[str, ...] = ()
        """What stands between the content of a system message and the next message's, to its first added token where
        it has one."""
        self._strips_system = False
        heads = self._derive_heads()
        if not heads:
            raise ValueError("no user message that could be found again")
        # A BOS stands once; where every message begins with it (ChatML), it belongs to the opener.
        after_first = self._split([{"role": "user", "content": FIRST}], FIRST)
        self.bos_once = not self._bos or after_first is None or self._bos not in after_first[1]
        self._derive_system(heads)
        for role, head in heads.items():
            self.openers |= dict.fromkeys(self._with_and_without_bos(head), self._strips(role, "left"))
        openers = (*self.openers, *self.system_openers)
        self._longest = max(map(len, openers))
        ids = {piece: token_id for token_id, piece in self._atoms.items()}
        self._first_atoms = {ids[opener[0]] for opener in openers if opener and opener[0] in ids.keys() - {self._bos}}
        if not self.bos_once:
            self._first_atoms.add(tokenizer.bos_token_id)
        self._closing_atoms = {ids[closer[-1]] for closer in self.closers if closer[-1] in ids}

    def find(self, prompt_ids: Sequence[int]) -> Place | None:
        """Where a preference goes in a prompt that opens with a message, or None."""
        has_bos = bool(prompt_ids) and prompt_ids[0] == self.tokenizer.bos_token_id
        for start in (0, 1) if has_bos else (0,):
            if (place := self._at(prompt_ids, start)) is not None:
                return place
        start = int(has_bos and self.bos_once)
        if not self.looks_like_chat(prompt_ids) or prompt_ids[start] in self._first_atoms:
            return None
        # Something else stands before the first message, such as tools.
        starts = (i for i, token_id in enumerate(prompt_ids) if token_id in self._first_atoms)
        return next((place for start in starts if (place := self._at(prompt_ids, start)) is not None), None)

    def looks_like_chat(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt begins with an added token that is more than a BOS."""
        start = int(bool(prompt_ids) and prompt_ids[0] == self.tokenizer.bos_token_id and self.bos_once)
        return len(prompt_ids) > start and prompt_ids[start] in self._atoms

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """A string for each id; an added token's is one private character."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(ids))
        return [self._atoms.get(i) or token or "\ufffd" for i, token in zip(ids, tokens, strict=True)]

    def _at(self, ids: Sequence[int], start: int) -> Place | None:
        head = "".join(self.pieces(ids[start : start + self._longest]))
        matching = [opener for opener in (*self.openers, *self.system_openers) if head.startswith(opener)]
        if not matching:
            return None
        opener = max(matching, key=len)
        pieces = self.pieces(ids[start : start + self._longest + 1])
        begin = self._cut(pieces, start, len(opener), strip_left=self.openers.get(opener, self._strips_system))
        if opener not in self.system_openers:
            return begin
        end = self._end_of_system(ids, start, len(opener), begin.start)
        if end is None and opener in ("", self._bos):
            return None  # nothing says that this is a system message
        return end or begin  # one that does not end takes the preference where it begins

    def _end_of_system(self, ids: Sequence[int], start: int, begin: int, first: int) -> Place | None:
        """``begin``: where the content may begin, in characters after ``start``; ``first``: its first token."""
        end = len(ids)
        if self._closing_atoms:
            # The first one ends the message, also where a content spells it: so the model reads it.
            end = next((i for i in range(first, end) if ids[i] in self._closing_atoms), end)
        pieces = self.pieces(ids[start : end + 1])
        text = "".join(pieces)
        found = [at for closer in self.closers if (at := text.find(closer, begin)) >= 0]
        if not found and end < len(ids):
            found = [len(text) - 1]  # without the text that the template has before the token
        if not found:
            return None
        at = min(found)
        body = text[begin:at]
        # Stripped, an empty content leaves what the template itself writes before it.
        empty = not body or (self._strips_system and self._text(body)[-1:].isspace())
        place = self._cut(
            pieces,
            start,
            at,
            lead="" if empty else SEPARATOR,
            strip_left=empty and self._strips_system,
            strip_right=self._strips_system,
        )
        return place._replace(ends_system=True)

    def _cut(self, pieces: list[str], start: int, at: int, **seam: Any) -> Place:
        """The place ``at`` characters into ``pieces``, of which the first is token ``start``."""
        for piece in pieces:
            if at < len(piece):
                break
            at, start = at - len(piece), start + 1
        else:
            at = 0
        if at == 0:
            return Place(start, start, Seam(**seam))
        left, right = self._text(piece[:at]), self._text(piece[at:])
        if "\ufffd" in left + right:
            return Place(start, start, Seam(**seam))
        return Place(start, start + 1, Seam(left=left, right=right, **seam))

    def _text(self, pieces: str) -> str:
        """The text of pieces without added tokens."""
        if self._byte_level:
            return decoders.ByteLevel().decode([pieces])
        return re.sub("<0x([0-9A-F]{2})>", lambda byte: chr(int(byte[1], 16)), pieces).replace("▁", " ")

    def _derive_heads(self) -> dict[str, str]:
        """What stands before the content of a first message, by role."""
        heads = {}
        for role in ROLES:
            message = {"role": role, "content": FIRST}
            parts = self._split([message], FIRST) or self._split([message, {"role": "user", "content": SECOND}], FIRST)
            if parts is not None and self._says_something(parts[0]):
                heads[role] = parts[0]
        return heads

    def _derive_system(self, heads: dict[str, str]) -> None:
        """Find what opens and closes a system message; takes from ``heads`` those that begin with one that the
        template writes by itself."""
        follows: dict[str, str] = {}
        for role in ROLES:
            parts = self._between(role)
            if parts is not None:
                opener, follows[role] = parts
        if "user" not in follows or "user" not in heads or not follows["user"]:
            return
        closers = set(follows.values())
        alone = self._split([{"role": "system", "content": FIRST}], FIRST)
        if alone is not None and alone[1]:
            closers.add(alone[1])
        opener = self._between("user")[0]
        for variants in (VARIANTS, DATES, ()):
            others = [parts[0] for variant in variants if (parts := self._between("user", **variant)) is not None]
            stable = opener[: num_common(opener, *others)]
            written = {
                role for role, head in heads.items() if self._is_written(head, stable, follows.get(role, "\ufffd"))
            }
            # It must say more than what opens other messages, unless a system message has no opener.
            if stable in ("", self._bos):
                if stable == opener:
                    break
            elif not any(heads[role].startswith(stable) for role in heads.keys() - written):
                break
        else:
            return  # merged into another message
        for role in written:
            head = self._bare(heads.pop(role), stable, follows[role])
            if head is not None:
                heads[role] = head
        self.system_openers = (stable,) if stable == "" else self._with_and_without_bos(stable)
        self.closers = tuple({self._to_first_atom(closer) for closer in closers})
        self._strips_system = self._strips("system", "right")

    def _says_something(self, head: str) -> bool:
        """Whether it is more than BOS and white space."""
        words = head.removeprefix(self._bos)
        return any(ord(c) >= ATOM for c in words) or bool(self._text(words).strip())

    def _is_written(self, head: str, opener: str, follows: str) -> bool:
        """Whether ``head``, of a conversation without a system message, begins with one all the same."""
        rest = head.removeprefix(opener)
        own = opener not in ("", self._bos) or rest != follows
        return head.startswith(opener) and rest.endswith(follows) and own

    def _bare(self, head: str, opener: str, follows: str) -> str | None:
        """``head`` without the system message before it, which another template might not have written: from the added
        token with which messages begin."""
        bos = self._bos if self.bos_once and head.startswith(self._bos) else ""
        first = opener.removeprefix(bos)[:1]
        at = follows.rfind(first) if first and ord(first) >= ATOM else -1
        return bos + follows[at:] if at >= 0 else None

    def _between(self, role: str, **variant: Any) -> tuple[str, str] | None:
        """Before the content of a system message, and between it and that of the next."""
        messages = [{"role": "system", "content": FIRST}, {"role": role, "content": SECOND}]
        parts = self._split(messages, FIRST, **variant)
        if parts is None or parts[1].count(SECOND) != 1:
            return None
        return parts[0], parts[1].partition(SECOND)[0]

    def _strips(self, role: str, side: str) -> bool:
        content = f" \n {FIRST}" if side == "left" else f"{FIRST} \n "
        rest = [{"role": "user", "content": SECOND}] if role == "system" else []
        rendered = [self._pieces_of([{"role": role, "content": text}, *rest]) for text in (content, FIRST)]
        return rendered[0] is not None and rendered[0] == rendered[1]

    def _split(self, messages: list[dict], content: str, **variant: Any) -> tuple[str, str] | None:
        """What a rendered conversation has before and after a content; None where the template has no place for it."""
        text = self._pieces_of(messages, **variant)
        if text is None or text.count(content) != 1:
            return None
        before, _, after = text.partition(content)
        return before, after

    def _pieces_of(self, messages: list[dict], **variant: Any) -> str | None:
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        for form in (messages, parts):  # some templates read texts, some lists of parts
            try:
                text = self.tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=True, **variant)
                pieces = "".join(self.pieces(self._encode(text)))
            except Exception:  # a template raises what it likes
                continue
            if all(m["content"].strip() in pieces for m in messages):
                return pieces
        return None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _to_first_atom(self, closer: str) -> str:
        at = next((i for i, c in enumerate(closer) if ord(c) >= ATOM), None)
        return closer if at is None else closer[: at + 1]

    def _with_and_without_bos(self, opener: str) -> tuple[str, ...]:
        bare = opener.removeprefix(self._bos)
        return (opener, bare) if self._bos and self.bos_once and bare and bare != opener else (opener,)


def num_common(*sequences: Sequence) -> int:
    """How long a beginning they have in common."""
    columns = zip(*sequences, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """The format of a tokenizer's chat template; None where there is no template, or it hides its messages."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return ChatFormat(tokenizer)
    except Exception as error:  # whatever the template or the tokenizer raises, prompts are composed as plain text
        logger.warning(
            "Where the chat template puts messages cannot be found (%s), so a preference goes to the head of a prompt, "
            "after BOS; pad.insert_after says where else.",
            " ".join(str(error).split()) or repr(error),
        )
        return None
