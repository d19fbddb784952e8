"""How a preference enters the reward model: the prompt template, composed on token ids.

The released PAD code wraps the user's turn in text and tokenizes the result. A server sees token ids, not text, so
here the template is encoded once around its ``{prompt}`` hole and spliced into the base model's own ids: what the
base model read is what the reward model reads, whatever chat template made it. :mod:`pad_vllm.reward.chat` finds where
in a chat that is.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pad_vllm.errors import one_line
from pad_vllm.params import MAX_PREFERENCE_TOKENS
from pad_vllm.reward.chat import Kinds, MisreadPromptError, Place, Seam, chat_format
from pad_vllm.reward.marked_text import num_common
from pad_vllm.reward.markers import marker_tokens
from pad_vllm.reward.memo import Memo, size_of
from pad_vllm.reward.rendering import bounded_render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pad_vllm.reward.translation import PromptTranslator

logger = logging.getLogger(f"vllm.{__name__}")

PROMPT = "{prompt}"
PREFERENCE = "{preference}"

DEFAULT_PROMPT_TEMPLATE = (
    "[Guidelines] Your task is to generate response by considering the following principle. "
    "[Principles] {preference} [Instruction] {prompt}"
)
"""The wrapping of the authors' released code."""


def check_prompt_template(template: str) -> None:
    """Raise ValueError unless ``template`` has exactly one ``{prompt}`` and at least one ``{preference}``."""
    if template.count(PROMPT) != 1:
        raise ValueError(f"must contain {PROMPT} exactly once, and contains it {template.count(PROMPT)} times")
    if PREFERENCE not in template:
        raise ValueError(f"must contain {PREFERENCE}, which marks where the preference goes")


SEAM_TOKENS = 8
"""How many tokens more a preference may take in a chat than in a plain prompt: a blank line, words cut in two."""
EXAMPLE = "How do I keep tomatoes fresh?"
CHUNK = 512
"""Characters of a preference that are read before it is known not to be too long."""
MAX_SPELLED = 16
"""Most special tokens that a preference may spell. Each splits the preference, and the parts are encoded one by one."""
CACHE_BYTES = 2**24
"""Of encoded preferences that are kept; as many again, of those in chats."""


class Composed(NamedTuple):
    """The reward model's prompt; ``shared``: after how many of its ids something ends that others may have in common,
    in ascending order: a system message, the preference."""

    ids: list[int]
    shared: tuple[int, ...]
    is_misread: bool = False
    """The prompt was not understood, and the preference stands at its head."""


class PromptTemplate:
    """Splices a preference into a base prompt's token ids.

    Args:
        tokenizer: the reward model's tokenizer (its ids are the base model's ids).
        template: text with one ``{prompt}`` and at least one ``{preference}``.
        insert_after: text whose ids, when they open the prompt, keep their place before the inserted ones; for
            putting the preference elsewhere than where the chat template's messages say.
        chat_tokenizer: the one whose chat template renders the prompts; ``tokenizer`` when absent.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = DEFAULT_PROMPT_TEMPLATE,
        insert_after: str | None = None,
        chat_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_prompt_template(template)
        self.tokenizer = tokenizer
        self.before, self.after = template.split(PROMPT)
        # Those that mark are not always marked special, as <think>; runs of spaces and HTML's tags are added too.
        markers = marker_tokens(tokenizer)
        if chat_tokenizer is not None and chat_tokenizer is not tokenizer:
            theirs, vocabulary = marker_tokens(chat_tokenizer), tokenizer.get_vocab()
            markers |= {token: i for token, i in theirs.items() if vocabulary.get(token) == i}
        self.special_tokens, self.special_ids = frozenset(markers), frozenset(markers.values())
        self._special_pattern = _any_of(self.special_tokens)
        self.insert_after = self._encode(insert_after) if insert_after else []
        self._chat_tokenizer = chat_tokenizer or tokenizer
        self.chat = None if insert_after else chat_format(self._chat_tokenizer)
        self.max_preference_tokens: int | None = None
        """Bound of what a preference may add to the template's own tokens."""
        self._kinds = Kinds()
        self._num_own = sum(map(len, self._encode_preference("")))
        # A server's users share a few preferences: encode each once. One too long raises, and is not kept.
        self.encode_preference = Memo(self._encode_preference, CACHE_BYTES, size_of)
        self._join = Memo(self._encode_seam, CACHE_BYTES, size_of)

    def on_another_thread(self) -> PromptTemplate:
        """The same with a tokenizer of its own, which two threads cannot share."""
        other = copy.copy(self)
        other.tokenizer = copy.deepcopy(self.tokenizer)
        other.encode_preference = Memo(other._encode_preference, CACHE_BYTES, size_of)
        other._join = Memo(other._encode_seam, CACHE_BYTES, size_of)
        return other

    def compose(self, prompt_ids: Sequence[int], preference: str) -> list[int]:
        """The reward model's prompt for a base prompt under a preference.

        Args:
            prompt_ids: the base model's prompt, token ids.
            preference: plain text; never becomes a special or an added token.

        Returns:
            In a chat (:mod:`pad_vllm.reward.chat`), the text before ``{prompt}`` stands at the end of a leading system
            message's content, after a blank line, or else at the start of the first message's. A plain prompt is
            ``bos? + insert_after? + before(preference) + rest of prompt_ids + after(preference)``.
        """
        return self.compose_shared(prompt_ids, preference).ids

    def compose_shared(self, prompt_ids: Sequence[int], preference: str) -> Composed:
        """As :meth:`compose`, with what of it others may share."""
        before, after = self.encode_preference(preference)
        place, num_shared = self._place(prompt_ids), len(before)
        if place.seam is not None:
            joined = self._join(preference, place.seam)
            if joined is None:
                place = place._replace(end=place.start)
            else:
                before, num_shared = joined
        ids = [*prompt_ids[: place.start], *before, *prompt_ids[place.end :], *after]
        shared = place.start + num_shared
        return Composed(ids, (place.start, shared) if place.ends_system else (shared,), place.is_misread)

    def example(self, preference: str, translator: PromptTranslator | None = None) -> str:
        """A composed prompt as text: a question in the chat template, or as it stands where there is none; in the
        base's, and translated, where the reward model has another tokenizer."""
        tokenizer = self._chat_tokenizer if translator is None else translator.base.tokenizer
        if getattr(tokenizer, "chat_template", None):
            message = {"role": "user", "content": EXAMPLE}
            try:
                text = bounded_render(tokenizer, [message], add_generation_prompt=True)
                ids = tokenizer.encode(text, add_special_tokens=False)
            except Exception as error:  # a template raises what it likes
                return f"the chat template refuses a question ({one_line(error)})"
        else:
            ids = tokenizer.encode(EXAMPLE)
        if translator is not None:
            ids = translator.translate(ids)
        return self.tokenizer.decode(self.compose(ids, preference))

    def _place(self, prompt_ids: Sequence[int]) -> Place:
        has_bos = bool(prompt_ids) and prompt_ids[0] == self.tokenizer.bos_token_id
        head, is_misread = self.insert_after, bool(self.insert_after)
        if self.chat is not None:
            try:
                if (place := self.chat.find(prompt_ids)) is not None:
                    return place
            except MisreadPromptError as error:
                is_misread = True
                self._warn(error.kind, str(error))
            except Exception as error:  # of a tokenizer, at an id that it does not know: nothing may raise here
                is_misread = True
                self._warn("", f"A prompt cannot be read as a chat ({error!r})")
        if (at := self._behind_head(prompt_ids)) is not None:
            return Place(at, at)
        if head:
            what = f"A prompt does not begin with insert_after={self.tokenizer.decode(head)!r} (ids {head})"
            self._warn(str(prompt_ids[: len(head)]), what)
        # A BOS that begins every message would be torn from the role behind it.
        at = int(has_bos and (self.chat is None or self.chat.bos_once))
        return Place(at, at, is_misread=is_misread)

    def _behind_head(self, prompt_ids: Sequence[int]) -> int | None:
        """Where ``insert_after`` ends, which opens the prompt or stands behind its BOS."""
        head = self.insert_after
        for start in (0, int(bool(prompt_ids) and prompt_ids[0] == self.tokenizer.bos_token_id)):
            if head and list(prompt_ids[start : start + len(head)]) == head:
                return start + len(head)
        return None

    def is_misread(self, prompt_ids: Sequence[int]) -> bool:
        """Whether :meth:`compose_shared` would not understand a prompt; in a bounded time, in which the first ids of a
        long one must say so."""
        if self.chat is None:
            return bool(self.insert_after) and self._behind_head(prompt_ids) is None
        try:
            return self.chat.is_misread(prompt_ids)
        except Exception:  # of a tokenizer, at an id that it does not know
            return True

    def _warn(self, kind: str, what: str) -> None:
        """Tell of a prompt of a kind that was not told of yet."""
        if self._kinds.is_new(kind):
            logger.warning("%s: PAD puts the preference at its start.", what)

    def check_preferences(self, preferences: Sequence[str]) -> None:
        """Raise ValueError for a preference that is too long, or too many tokens in all of them together."""
        num_tokens = sum(self.num_added_tokens(text) - self._num_own for text in preferences)
        if len(preferences) > 1 and num_tokens > MAX_PREFERENCE_TOKENS:
            raise ValueError(
                f"pad_preference: {num_tokens} tokens in {len(preferences)} preferences, at most "
                f"{MAX_PREFERENCE_TOKENS} are allowed together"
            )

    def num_added_tokens(self, preference: str) -> int:
        """How many ids :meth:`compose` adds to a plain prompt; to a chat, up to :attr:`num_seam_tokens` more."""
        return sum(map(len, self.encode_preference(preference)))

    @property
    def num_seam_tokens(self) -> int:
        return SEAM_TOKENS if self.chat is not None else 0

    def _encode(self, text: str, plain: bool = False) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)
        if plain and len(text) > 1 and self._num_special(ids):
            # Added tokens that are not marked special are found all the same: never show the tokenizer a whole one.
            return [i for part in self._cut(text) for i in self._encode(part, plain=True)]
        return ids

    def _cut(self, text: str) -> list[str]:
        """``text`` in parts, each special token that it spells divided after its first character."""
        parts = [""]
        for piece in self._split_special(text):
            if piece in self.special_tokens and len(piece) > 1:
                parts[-1] += piece[0]
                parts.append("")
                piece = piece[1:]
            parts[-1] += piece
        return parts if len(parts) > 1 else [text[: len(text) // 2], text[len(text) // 2 :]]

    def _encode_preference(self, preference: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids before and after the prompt.

        Raises:
            ValueError: the preference is longer than ``max_preference_tokens``.
        """
        if self.max_preference_tokens is not None:
            self._check_roughly(preference, self.max_preference_tokens)
        before, after = self._fill(self.before, preference), self._fill(self.after, preference)
        if self.max_preference_tokens is not None:
            num_tokens = len(before) + len(after) - self._num_own
            if num_tokens > self.max_preference_tokens:
                raise ValueError(
                    f"pad_preference: {num_tokens} tokens, at most {self.max_preference_tokens} are allowed"
                )
        return before, after

    def _check_roughly(self, preference: str, max_tokens: int) -> None:
        """Raise ValueError for a preference that is far too long before all of it is read: others are waiting."""
        num_tokens = num_special = 0
        for start in range(0, len(preference), CHUNK):
            ids = self._encode(preference[start : start + CHUNK])
            num_tokens += len(ids) - SEAM_TOKENS  # a word that is cut in two, or begins a text
            num_special += self._num_special(ids)
            if num_tokens > max_tokens:
                raise ValueError(f"pad_preference: over {max_tokens} tokens, at most {max_tokens} are allowed")
            if num_special > MAX_SPELLED:
                raise ValueError(
                    f"pad_preference: contains more than {MAX_SPELLED} of the reward model's special tokens, at most "
                    f"{MAX_SPELLED} are allowed"
                )

    def _encode_seam(self, preference: str, seam: Seam) -> tuple[tuple[int, ...], int] | None:
        """Ids of the text before the prompt with its seam, and how many of them do not hang on the text after it; None
        where they cannot be joined: the text before the prompt then stands as in a plain prompt."""
        plain = self.encode_preference(preference)[0]
        before = self.before.lstrip() if seam.strip_left else self.before
        before = before.rstrip() if seam.strip_right else before
        if before.startswith(PREFERENCE) and seam.strip_left:
            preference = preference.lstrip()
        if before.endswith(PREFERENCE) and seam.strip_right:
            preference = preference.rstrip()
        if not before.strip():
            return None
        text = seam.left + seam.lead + before
        whole = text + seam.right
        ids, joined = self._running(text, preference), self._running(whole, preference)
        fits = len(joined) <= len(plain) + SEAM_TOKENS + bool(seam.left or seam.right)
        # The prompt's own words spell neither a special token nor the hole, not even with the template's help.
        plain_words = whole.count(PREFERENCE) == before.count(PREFERENCE)
        if not (fits and plain_words and self._num_special(joined) == self._num_special(plain)):
            return None
        return joined, num_common(ids, joined)

    def _running(self, template: str, preference: str) -> tuple[int, ...]:
        """Ids of text that follows other text: without the space that some tokenizers write before a text."""
        if self.chat is None or not self.chat.adds_prefix:
            return self._fill(template, preference)
        newline, ids = tuple(self._encode("\n")), self._fill("\n" + template, preference)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._fill(template, preference)

    def _fill(self, template: str, preference: str) -> tuple[int, ...]:
        ids = self._encode(template.replace(PREFERENCE, preference))
        own = [i for literal in template.split(PREFERENCE) for i in self._specials(self._encode(literal))]
        if self._specials(ids) == own:
            return tuple(ids)
        # The preference spells a special token. Parse those the template itself spells, and nothing else.
        ids, plain = [], ""
        for i, literal in enumerate(template.split(PREFERENCE)):
            plain += preference if i else ""
            for piece in self._split_special(literal):
                if piece in self.special_tokens:
                    ids += self._encode(plain, plain=True) + self._encode(piece)
                    plain = ""
                else:
                    plain += piece
        return tuple(ids + self._encode(plain, plain=True))

    def _specials(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self.special_ids]

    def _num_special(self, ids: Sequence[int]) -> int:
        return len(self._specials(ids))

    def _split_special(self, text: str) -> list[str]:
        """``text`` cut at the special tokens it spells, longest match first."""
        pieces, start = [], 0
        for found in self._special_pattern.finditer(text):
            pieces += [text[start : found.start()], found[0]]
            start = found.end()
        return [*pieces, text[start:]]


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """A pattern of whichever text there is, the longest first. It branches only where texts differ: of thousands, a
    character is compared to a few."""
    tree: dict[str, dict] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}  # a text may end here
    try:
        return re.compile(_pattern(tree) if tree else r"(?!)")
    except RecursionError:  # one text begins another, which begins another, hundreds of times
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _pattern(tree: dict[str, dict]) -> str:
    head = ""
    while len(tree) == 1 and "" not in tree:
        ((character, tree),) = tree.items()
        head += re.escape(character)
    branches = [re.escape(character) + _pattern(inner) for character, inner in tree.items() if character]
    if not branches:
        return head
    return f"{head}(?:{'|'.join(branches)}){'?' if '' in tree else ''}"
