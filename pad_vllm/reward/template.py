"""How a preference enters the reward model: the prompt template, composed on token ids.

The released PAD code wraps the user's turn in text and tokenizes the result. A server sees token ids, not text, so
here the template is encoded once around its ``{prompt}`` hole and spliced into the base model's own ids: what the
base model read is what the reward model reads, whatever chat template made it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        raise ValueError(f"must contain {PREFERENCE}, or a preference could not enter the reward model's prompt")


class PromptTemplate:
    """Splices a preference into a base prompt's token ids.

    Args:
        tokenizer: the reward model's tokenizer (its ids are the base model's ids).
        template: text with one ``{prompt}`` and at least one ``{preference}``.
        insert_after: text whose ids, when they open the prompt, keep their place before the inserted ones; for
            putting the preference inside the user turn of a chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = DEFAULT_PROMPT_TEMPLATE,
        insert_after: str | None = None,
    ) -> None:
        check_prompt_template(template)
        self.tokenizer = tokenizer
        self.before, self.after = template.split(PROMPT)
        # Control tokens are not always marked special, as <think> and <tool_call>; runs of spaces are added too.
        self.special_tokens = frozenset(tokenizer.all_special_tokens) | {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()
        }
        self.special_ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(self.special_tokens)))
        self.insert_after = self._encode(insert_after) if insert_after else []
        self.max_preference_tokens: int | None = None
        """Bound of what a preference may add to the template's own tokens."""
        self._warned = False
        self._num_own = sum(map(len, self._encode_preference("")))
        # A server's users share a few preferences: encode each once. One too long raises, and is not kept.
        self.encode_preference = lru_cache(maxsize=4096)(self._encode_preference)

    def compose(self, prompt_ids: Sequence[int], preference: str) -> list[int]:
        """The reward model's prompt for a base prompt under a preference.

        Args:
            prompt_ids: the base model's prompt, token ids.
            preference: plain text; never becomes a special or an added token.

        Returns:
            ``bos? + insert_after? + before(preference) + rest of prompt_ids + after(preference)``. A preference is
            inserted after a leading BOS, and after the ids of ``insert_after`` where they follow it.
        """
        before, after = self.encode_preference(preference)
        at = self.insertion_point(prompt_ids)
        return [*prompt_ids[:at], *before, *prompt_ids[at:], *after]

    def num_shared_tokens(self, prompt_ids: Sequence[int], preference: str) -> int:
        """How many ids at the head of a composed prompt are the same for whatever the user says."""
        return self.insertion_point(prompt_ids) + len(self.encode_preference(preference)[0])

    def insertion_point(self, prompt_ids: Sequence[int]) -> int:
        """How many ids at the head of ``prompt_ids`` stay before the preference."""
        bos = int(bool(prompt_ids) and prompt_ids[0] == self.tokenizer.bos_token_id)
        head = self.insert_after
        for start in (0, bos):
            if head and list(prompt_ids[start : start + len(head)]) == head:
                return start + len(head)
        if head and not self._warned:
            self._warned = True
            logger.warning(
                "A prompt does not begin with insert_after=%r (ids %s): the preference goes to its head.",
                self.tokenizer.decode(head),
                head,
            )
        return bos

    def num_added_tokens(self, preference: str) -> int:
        """How many ids :meth:`compose` adds to a prompt."""
        return sum(map(len, self.encode_preference(preference)))

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
        before, after = self._fill(self.before, preference), self._fill(self.after, preference)
        if self.max_preference_tokens is not None:
            num_tokens = len(before) + len(after) - self._num_own
            if num_tokens > self.max_preference_tokens:
                raise ValueError(
                    f"pad_preference: {num_tokens} tokens, at most {self.max_preference_tokens} are allowed"
                )
        return before, after

    def _fill(self, template: str, preference: str) -> tuple[int, ...]:
        ids = self._encode(template.replace(PREFERENCE, preference))
        if self._num_special(ids) == sum(self._num_special(self._encode(t)) for t in template.split(PREFERENCE)):
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

    def _num_special(self, ids: Sequence[int]) -> int:
        return sum(i in self.special_ids for i in ids)

    def _split_special(self, text: str) -> list[str]:
        """``text`` cut at the special tokens it spells, longest match first."""
        pieces, start, i = [], 0, 0
        by_length = sorted(self.special_tokens, key=len, reverse=True)
        while i < len(text):
            token = next((t for t in by_length if text.startswith(t, i)), None)
            if token is None:
                i += 1
                continue
            pieces += [text[start:i], token]
            i += len(token)
            start = i
        return [*pieces, text[start:]]
