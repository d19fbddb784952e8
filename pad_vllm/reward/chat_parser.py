"""The messages of a prompt, found by what a chat template writes around them."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pad_vllm.reward.marked_text import ATOMS, first_marker, has_text, is_marker

WRITTEN = "written"
"""The role of a message that the template writes by itself, before the user's own system message."""
INSERTED = "inserted"
"""Of what it writes for some requests only, such as a declaration of tools."""
UNKNOWN = "unknown"
"""Of what stands between messages and is none that was seen."""


class Message(NamedTuple):
    """Where a message stands in a prompt, in characters.

    ``begin``: behind what opens it. ``start``: behind the markers that the template may put before a content. ``end``:
    of the content; None where nothing closes the message, as an answer that is to be written.
    """

    role: str
    begin: int
    start: int
    end: int | None

    def end_or(self, text: str) -> int:
        return len(text) if self.end is None else self.end


@dataclass
class Grammar:
    """What a chat template writes around messages, in marked text.

    Only what is the same in every rendering stands here. Call :meth:`compile` after a change.
    """

    bos: str = ""
    bos_once: bool = True
    """BOS stands before a prompt; where every message begins with it (ChatML), it belongs to the openers."""
    openers: dict[str, str] = field(default_factory=dict)
    """What opens a message -> its role."""
    head_openers: dict[str, str] = field(default_factory=dict)
    """What does at the head of a prompt only."""
    closers: dict[str, str] = field(default_factory=dict)
    """By role: what closes a message."""
    direct: dict[str, dict[str, str]] = field(default_factory=dict)
    """By role: what closes a message and opens the next where the two cannot be told apart -> the next one's role."""
    generation: dict[str, set[str]] = field(default_factory=dict)
    """By the last message's role: what is written behind its closer for an answer to follow."""
    endings: set[str] = field(default_factory=set)
    """What may stand behind the last closer of a finished conversation."""
    preambles: dict[str, set[str]] = field(default_factory=dict)
    """By role: markers that may stand before a content."""
    shapes: list[tuple[str, str]] = field(default_factory=list)
    """What openers have before and behind a role's name."""

    def compile(self) -> None:
        every = self.openers | self.head_openers
        self._between = alternatives(self.openers)
        # White space is an opener only where one must stand.
        self._anywhere = alternatives(opener for opener in every if first_marker(opener) or has_text(opener))
        self._ends = {role: self._end_of(role) for role in {*every.values(), *self.closers, *self.direct}}
        closers = {first_marker(self.closers.get(role, "")) for role in ("system", "user")} - {""}
        behind = f"\\s*(?={ATOMS}|\\Z)"
        self._closing = re.compile(f"[{''.join(closers)}]{behind}" if closers else r"(?!)")
        self._roles = every

    def _end_of(self, role: str) -> re.Pattern[str]:
        """Of the closer of a message where the template goes on behind it; a content may spell it otherwise."""
        parts = [re.escape(literal) for literal in sorted(self.direct.get(role, ()), key=len, reverse=True)]
        parts = [f"(?P<direct{n}>{part})" for n, part in enumerate(parts)]
        closer = self.closers.get(role)
        if closer is not None:
            following = {opener for opener, of in self.openers.items() if of not in (role, WRITTEN, INSERTED)}
            last = [f"{re.escape(g)}\\Z" for g in (*self.generation.get(role, ()), *self.endings)]
            if first_marker(closer):
                at = closer.index(first_marker(closer))
                before, marker, behind = map(re.escape, (closer[:at], closer[at], closer[at + 1 :]))
                goes_on = "|".join([ATOMS, r"\Z", *map(re.escape, filter(None, following)), *last])
                goes_on = "" if self.openers.get("") == "assistant" else f"(?={goes_on})"
                parts.append(f"(?:{before})?{marker}(?:{behind})?{goes_on}")
            else:
                behinds = [*map(re.escape, filter(None, following)), *(g for g in last if closer or g != r"\Z")]
                if behinds:
                    parts.append(f"{re.escape(closer)}(?={'|'.join(behinds)})")
        return re.compile("|".join(parts) or r"(?!)")

    def messages(self, text: str) -> Iterator[Message]:
        """The messages of a prompt; none where it does not begin as the template's prompts do."""
        match = self._opener(text)
        if match is not None:
            role, begin = self._roles[match[0]], match.end()
        elif self._needs_no_opener:
            role, begin = "system", int(self._has_bos(text))
            if self._ends[role].search(text, begin) is None:
                return  # nothing says that this is a system message
        else:
            return
        while True:
            start = begin + max((len(p) for p in self.preambles.get(role, ()) if text.startswith(p, begin)), default=0)
            end, position, following = self._end(role, text, start)
            yield Message(role, begin, start, end)
            if end is None:
                return
            if following is not None:
                role, begin = following, position
                continue
            skipped = yield from self._skip(role, text, position)
            if skipped is None:
                return
            role, begin = skipped

    def opens(self, text: str) -> bool:
        """Whether a prompt begins with what opens a message, or its first message may do without."""
        return self._needs_no_opener or self._opener(text) is not None

    @property
    def _needs_no_opener(self) -> bool:
        return self.openers.get("") == "system" or self.head_openers.get("") == "system"

    def _has_bos(self, text: str) -> bool:
        return bool(self.bos) and text.startswith(self.bos)

    def _opener(self, text: str) -> re.Match[str] | None:
        starts = (0, 1) if self._has_bos(text) else (0,)
        matches = [match for start in starts if (match := self._anywhere.match(text, start))]
        return max(matches, key=lambda match: match.end(), default=None)

    def _end(self, role: str, text: str, start: int) -> tuple[int | None, int, str | None]:
        """Where a content ends, where what closes it ends, and the next message's role where that is known by it."""
        if role in (WRITTEN, INSERTED):
            # Each looks no further than it must: thousands of such messages may stand in a prompt.
            following = self._anywhere.search(text, start)
            match = self._closing.search(text, start, following.end() if following else len(text))
            if match is not None:
                end = start + len(text[start : match.start()].rstrip())  # a pattern would try every beginning of a run
                if following is None or end < following.start():
                    return end, match.end(), None
            if following is None:
                return None, len(text), None
            end = following.start()
            while end > start and (is_marker(text[end - 1]) or text[end - 1].isspace()):
                end -= 1
            return end, following.start(), None
        match = self._ends[role].search(text, start)
        if match is None:
            return None, len(text), None
        return match.start(), match.end(), self.direct[role][match[0]] if match.lastgroup else None

    def _skip(self, role: str, text: str, at: int) -> Generator[Message, None, tuple[str, int] | None]:
        """To where the next message begins: its role and that; None where there is none. Yields what stands before."""
        while True:
            rest = len(text) - at
            generation = self.generation.get(role, set())
            if any(len(g) == rest and text.startswith(g, at) for g in generation):
                yield Message("assistant", len(text), len(text), None)
                return None
            if any(len(ending) == rest and text.startswith(ending, at) for ending in ("", *self.endings)):
                return None
            if match := self._between.match(text, at):
                return self._roles[match[0]], match.end()
            if self.openers.get("") == "assistant" and role == "user":
                return "assistant", at
            if begun := max((g for g in generation if g and text.startswith(g, at)), key=len, default=""):
                yield Message("assistant", at + len(begun), at + len(begun), None)
                return None
            match = self._anywhere.search(text, at + 1)
            end = match.start() if match else len(text)
            yield Message(UNKNOWN, at, at, end)
            if match is None:
                return None
            at = end


def alternatives(literals: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of some texts; an empty one never."""
    ordered = sorted(filter(None, literals), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
