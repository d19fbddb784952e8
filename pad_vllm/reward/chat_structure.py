"""The structure of a tokenizer's chats, learned from renderings of conversations whose contents are known.

What never changes between renderings, whatever the day and the request say, is structure; all else is text.
:mod:`~pad_vllm.reward.chat` finds by it where a preference stands, :mod:`~pad_vllm.reward.translation` the messages of
a prompt that is to be written in another template.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pad_vllm.reward.chat_parser import INSERTED, UNKNOWN, WRITTEN, Grammar, Message
from pad_vllm.reward.marked_text import ATOMS, MarkedText, first_marker, has_text, is_marker, num_common
from pad_vllm.reward.renderings import render, variants

CONTENTS = tuple(f"qzxjkvq{letter}" for letter in "bdfghm")
"""That no template writes: lowercase ASCII is the same in every vocabulary."""
TALKS = (
    ("user", "assistant", "user"),
    ("user",),
    ("system", "user", "assistant", "user"),
    ("system", "user"),
    ("system",),
    ("user", "assistant"),
    ("developer", "user"),
    ("developer",),
    ("assistant", "user"),
)
VARIED = (("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"))
"""Conversations that are rendered under all variables."""
MIN_LITERAL = 4
"""Characters by which a message that the template writes can be told from one of the user's."""


KIND_CHARACTERS, KIND_MARKERS = 512, 4
"""Prompts are of one kind if in their first so many characters they have the same first markers, so many of them."""


class Rendering(NamedTuple):
    """A conversation as the template writes it: what stands before, between and behind the contents."""

    roles: tuple[str, ...]
    generate: bool
    parts: tuple[str, ...]
    is_plain: bool
    """No variable was given."""
    has_tools: bool = False

    @property
    def head(self) -> str:
        return self.parts[0]

    @property
    def text(self) -> str:
        contents = (*CONTENTS[: len(self.roles)], "")
        return "".join(part + content for part, content in zip(self.parts, contents, strict=True))


class ChatStructure:
    """A chat template's grammar, and which messages it writes by itself.

    Args:
        marked: of the tokenizer whose chat template it is.

    Raises:
        ValueError: the template writes no user message in a way that could be found again.
    """

    def __init__(self, marked: MarkedText) -> None:
        self.marked = marked
        self.renderings = list(self._render())
        self._plain = [rendering for rendering in self.renderings if rendering.is_plain]
        self._heads: dict[str, str] = {}
        self._gaps: dict[tuple[str, str], str] = {}
        self._tails: dict[str, list[str]] = {}
        for roles, _, parts, *_ in self._plain:
            self._heads.setdefault(roles[0], parts[0])
            for pair, part in zip(itertools.pairwise(roles), parts[1:-1], strict=True):
                self._gaps.setdefault(pair, part)
            self._tails.setdefault(roles[-1], []).append(parts[-1])
        if "user" not in self._heads or not self._says_something(self._heads["user"]):
            raise ValueError("no user message that could be found again")
        after_first = next((r.parts[1] for r in self._plain if r.roles == ("user",) and r.generate), "")
        self.grammar = Grammar(bos=marked.bos, bos_once=not marked.bos or marked.bos not in after_first)
        self._starts = {first for head in self._heads.values() if is_marker(first := self._without_bos(head)[:1])}
        self._learn_turns()
        self._learn_system()
        self._learn_answers()
        self.grammar.compile()
        self._learn_own_messages()
        self.written = self._written_beginnings()
        """How messages begin that the template writes where the user's own system messages have their opener, too."""
        self.defaults = self._constant_messages()
        """Contents of messages that it writes by itself, and always the same."""
        self.strips_left = {role: self._strips(role, "left") for role in ("user", "assistant", "developer")}
        self.strips_system = self._strips("system", "right")
        """Whether the template takes the white space around contents away."""

    def looks_like_chat(self, text: str) -> bool:
        """Whether a prompt begins with a token that marks more than its beginning."""
        return is_marker(self._without_bos(text)[:1])

    def kind(self, text: str) -> str:
        """What prompts have in common that one template wrote: their first markers."""
        return "".join(filter(is_marker, text[:KIND_CHARACTERS]))[:KIND_MARKERS]

    @staticmethod
    def leading(messages: Iterable[Message]) -> tuple[list[Message], Message | None]:
        """The system messages at the head of a prompt, and the first message of another kind."""
        found: list[Message] = []
        for message in messages:
            if message.role not in ("system", WRITTEN, INSERTED):
                return found, message
            found.append(message)
        return found, None

    def own_system(self, text: str, leading: Sequence[Message]) -> Message | None:
        """Of the system messages at the head of a prompt the user's own; else the last that the template wrote."""
        system = [message for message in leading if message.role == "system"]
        own = [m for m in system if not text.startswith(self.written, m.begin)] if len(system) > 1 else system
        candidates = own[:1] or system[-1:] or [message for message in leading if message.role == WRITTEN][-1:]
        return candidates[0] if candidates else None

    def _render(self) -> Iterator[Rendering]:
        for roles, generate in itertools.product(TALKS, (True, False)):
            if (rendering := self._rendering(roles, generate)) is not None:
                yield rendering
        for variables, roles in itertools.product(variants(self.marked.tokenizer), VARIED):
            if (rendering := self._rendering(roles, True, **variables)) is not None:
                yield rendering

    def _rendering(self, roles: tuple[str, ...], generate: bool, **variables) -> Rendering | None:
        messages = [{"role": role, "content": content} for role, content in zip(roles, CONTENTS, strict=False)]
        text = render(self.marked.tokenizer, messages, generate, **variables)
        parts = None if text is None else split_at(self.marked.encode(text), CONTENTS[: len(roles)])
        if parts is None:
            return None
        return Rendering(roles, generate, tuple(parts), not variables, bool({"tools", "documents"} & variables.keys()))

    def _says_something(self, head: str) -> bool:
        """Whether it is more than BOS and white space."""
        words = head.removeprefix(self.marked.bos)
        return any(map(is_marker, words)) or bool(words.strip())

    def _without_bos(self, head: str) -> str:
        return head.removeprefix(self.marked.bos) if self.grammar.bos_once else head

    def _learn_turns(self) -> None:
        """Closers, and the openers of messages that may follow others."""
        grammar, gaps, tails = self.grammar, self._gaps, self._tails
        for role in dict.fromkeys(role for pair in gaps for role in pair):
            follows = [gap for (of, _), gap in gaps.items() if of == role] + tails.get(role, [])
            closer = follows[0][: num_common(*follows)]
            at = next((i for i, c in enumerate(closer) if c in self._starts), len(closer))
            grammar.closers[role] = closer[:at]
        openers = {}
        for role, before in (("user", "assistant"), ("assistant", "user")):
            if (before, role) in gaps:
                openers[role] = gaps[before, role][len(grammar.closers[before]) :]
        if "user" not in openers:
            openers["user"] = self._last_message(self._without_bos(self._heads["user"]))
        for (role, following), gap in gaps.items():
            opener = openers.get(following)
            if opener and gap.endswith(opener):
                closer = gap.removesuffix(opener)
                if len(closer) < len(grammar.closers[role]):
                    grammar.closers[role] = closer
        for role in ("user", "system", "assistant"):
            if role in grammar.closers and not self._is_constant(role):
                grammar.closers[role] = grammar.closers[role][
                    grammar.closers[role].index(first_marker(grammar.closers[role])) :
                ]
        grammar.shapes = [
            (opener[:at], opener[at + len(name) :])
            for opener in openers.values()
            for name in ("user", "assistant", "model")
            if (at := opener.find(name)) > 0 and first_marker(opener[:at])
        ]
        if "developer" in self._heads and self._heads["developer"] != self._heads.get("system"):
            opener = self._last_message(self._without_bos(self._heads["developer"]))
            closing = set(map(first_marker, grammar.closers.values())) - {""}
            if first_marker(opener) and not closing & set(opener):  # else it is no role that the template knows
                openers["developer"] = self._begin_of(opener, last=True)
        for role in ("developer", "assistant", "user"):
            if role in openers:
                grammar.openers[openers[role]] = role
        self._of_role = openers

    def _is_constant(self, role: str) -> bool:
        """Whether the text that a closer has before its marker is the same on every day, or it has none."""
        closer = self.grammar.closers[role]
        marker = first_marker(closer)
        before = closer.partition(marker)[0] if marker else ""
        return not before.strip() or all(
            part.startswith(before)
            for rendering in self.renderings
            if not rendering.has_tools
            for of, part in zip(rendering.roles, rendering.parts[1:], strict=True)
            if of == role
        )

    def _learn_system(self) -> None:
        """What opens a system message of its own, if the template has any."""
        grammar, heads = self.grammar, self._heads
        opener = None
        if "system" in heads and ("system", "user") in self._gaps and heads["system"] != heads["user"]:
            plain = self._last_message(self._without_bos(heads["system"]))
            others = [self._last_message(self._without_bos(r.head)) for r in self.renderings if r.roles[0] == "system"]
            others = [other for other in others if other[:1] == plain[:1] or not is_marker(plain[:1])]
            common = plain[: num_common(plain, *others)]
            opener = plain if common == plain else self._begin_of(common, last=True)
        if opener is not None and grammar.openers.get(opener) in ("user", "assistant"):
            opener = None  # merged into the user's, or taken for another role
        if opener is not None:
            grammar.openers[opener] = "system"
        elif "system" in heads:
            grammar.closers.pop("system", None)
        for (role, following), gap in self._gaps.items():
            if role == "system" and opener is None:
                continue
            if gap and gap != grammar.closers.get(role, "\0") + self._of_role.get(following, "\0"):
                grammar.direct.setdefault(role, {})[gap] = following
        if self.marked.bos and grammar.bos_once:
            for literal, role in grammar.openers.items():
                if literal.startswith(self.marked.bos) and len(literal) > 1:
                    grammar.head_openers[literal[1:]] = role

    def _learn_answers(self) -> None:
        """What is written for an answer to follow, and markers that may stand before contents."""
        grammar = self.grammar
        for roles, generate, parts, *_ in self.renderings:
            closer = grammar.closers.get(roles[-1])
            if closer is not None and parts[-1].startswith(closer):
                behind = parts[-1][len(closer) :]
                if generate and roles[-1] != "assistant":
                    grammar.generation.setdefault(roles[-1], set()).add(behind)
                elif not generate and behind:
                    grammar.endings.add(behind)
            for role, part in zip(roles, parts[:-1], strict=True):
                opener = next((o for o, of in grammar.openers.items() if of == role and o), "")
                at = part.rfind(opener) if opener else -1
                preamble = part[at + len(opener) :] if at >= 0 else ""
                if preamble and not has_text(preamble):
                    grammar.preambles.setdefault(role, set()).add(preamble)
        answers = self._of_role.get("assistant")
        for behind in itertools.chain(*grammar.generation.values()):
            if answers and behind.startswith(answers) and behind != answers and not has_text(behind[len(answers) :]):
                grammar.preambles.setdefault("assistant", set()).add(behind[len(answers) :])
        # What every conversation ends with, an answer to follow or not, is no sign that it has ended.
        grammar.endings -= set().union(*grammar.generation.values())

    def _learn_own_messages(self) -> None:
        """Openers of what the template writes by itself at the head of a prompt."""
        for rendering in sorted(self.renderings, key=lambda rendering: not rendering.is_plain):
            text, role = rendering.text, rendering.roles[0]
            where = len(rendering.head)
            if role == "system" and role not in self.grammar.openers.values():
                role = "user"  # of which it is a part
            for _ in range(4):
                messages = list(self.grammar.messages(text))
                unknown = next((m.begin for m in messages if m.role == UNKNOWN and m.begin < where), None)
                if unknown is None and any(m.role == role and m.begin <= where <= m.end_or(text) for m in messages):
                    break
                at = len(text) - len(self._without_bos(text)) if unknown is None else unknown
                opener = self._begin_of(text[at:where])
                if is_marker(opener[:1]) and opener not in self.grammar.openers:
                    self.grammar.openers[opener] = WRITTEN if rendering.is_plain else INSERTED
                elif rendering.is_plain and rendering.roles[0] == "user" and unknown is None and at < where:
                    self.grammar.head_openers[text[at:where]] = role
                else:
                    break
                self.grammar.compile()

    def _strips(self, role: str, side: str) -> bool:
        word = CONTENTS[0]
        content = f" \n {word}" if side == "left" else f"{word} \n "
        rest = [{"role": "user", "content": CONTENTS[1]}] if role == "system" else []
        rendered = [render(self.marked.tokenizer, [{"role": role, "content": c}, *rest]) for c in (content, word)]
        return rendered[0] is not None and rendered[0] == rendered[1]

    def _begin_of(self, text: str, last: bool = False) -> str:
        """Of a message's beginning what opens it: up to behind the role's name where it has the form that others have,
        else its first (``last``: its last) marker and the white space behind."""
        for before, behind in self.grammar.shapes:
            start = ATOMS if len(before) == 1 and first_marker(behind) else re.escape(before)  # one for each role
            if match := re.match(f"{start}\\w[\\w -]{{0,32}}?{re.escape(behind)}", text):
                return match[0]
        markers = [i for i, c in enumerate(text) if is_marker(c)]
        if not markers:
            return text
        at = markers[-1 if last else 0] + 1
        return text[: at + len(text[at:]) - len(text[at:].lstrip())] if last else text[:at]

    def _last_message(self, head: str) -> str:
        """The last message's opener, and what the template writes behind it, in what stands before a content."""
        at = max((i for i, c in enumerate(head) if c in self._starts), default=0)
        return head[at:]

    def _written_beginnings(self) -> tuple[str, ...]:
        found: list[str] = []
        for rendering in self.renderings:
            if rendering.roles[0] != "system":
                continue
            text, where = rendering.text, len(rendering.head)
            leading, _ = self.leading(self.grammar.messages(text))
            for message in leading:
                if message.role == "system" and message.end is not None and message.end < where:
                    content = text[message.begin : message.end]
                    same = next((f for f in found if num_common(f, content) >= MIN_LITERAL), None)
                    if same is None:
                        found.append(content)
                    else:
                        found[found.index(same)] = content[: num_common(same, content)]
        return tuple(beginning for beginning in found if len(beginning) >= MIN_LITERAL)

    def _constant_messages(self) -> frozenset[str]:
        found: dict[int, set[str]] = {}
        for rendering in self.renderings:
            if rendering.roles[0] == "user" and not rendering.has_tools:
                text = rendering.text
                leading, _ = self.leading(self.grammar.messages(text))
                for n, message in enumerate(leading):
                    if message.end is not None:
                        found.setdefault(n, set()).add(text[message.start : message.end])
        return frozenset(content for contents in found.values() if len(contents) == 1 for content in contents)


def split_at(text: str, marks: Sequence[str]) -> list[str] | None:
    """``text`` cut at each mark; None unless each stands there once, in order."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        part, _, text = text.partition(mark)
        parts.append(part)
    return [*parts, text]
