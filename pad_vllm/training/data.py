"""Preference sets: read, checked, and encoded as the reward model will read them in serving.

A record is one comparison:

    {"prompt": "How do I poach an egg?", "preference": "Be brief.", "chosen": "...", "rejected": "...",
     "labels": {"concise": 1, "formal": -1}}

``prompt`` is text or a list of chat messages; ``chosen`` and ``rejected`` are text, or messages of which the last is
the answer, and those before it the conversation, the same in both. ``system`` is the conversation's system message, and
``input`` what an ``instruction`` is about. ``preference`` is what this user asked for. ``labels`` says for each
dimension which answer shows more of it: above 0 the chosen one, below 0 the rejected one.

What an answer was written for is read whole, or the record is refused: where two fields say it differently, where one
holds what is not read here (:data:`NOT_READ`), where an answer is a transcript.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pad_vllm.reward.chat_structure import CONTENTS
from pad_vllm.reward.heads import check_head_name
from pad_vllm.reward.rendering import bounded_render
from pad_vllm.reward.renderings import render
from pad_vllm.training.records import DataError, folder_rows, json_lines, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pad_vllm.reward.template import PromptTemplate

COLUMNS = {
    "prompt": ("prompt", "question", "instruction", "query"),
    "preference": ("preference", "principle", "guideline"),
    "chosen": ("chosen", "chosen_response", "answer_chosen"),
    "rejected": ("rejected", "rejected_response", "answer_rejected"),
    "labels": ("labels",),
    "system": ("system", "system_prompt", "system_message"),
    "input": ("input",),
}
"""The names under which a field is looked for, in this order."""
NOT_READ = ("history", "context", "conversation", "conversations", "dialogue", "tools", "documents", "images")
"""Fields by which other tools give more of what an answer was written for. They are not read here."""
NOT_READ_OF_MESSAGES = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "images")
Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt. A user with ``preference`` chose one of them. ``where`` is the comparison's place in
    its file."""

    prompt: str | Messages
    chosen: str
    rejected: str
    preference: str | None = None
    labels: Mapping[str, float] = field(default_factory=dict)
    where: str = ""


class Example(NamedTuple):
    """A prompt and an answer, token ids; the answer ends with EOS, unless it was cut."""

    prompt: list[int]
    answer: list[int]


class PairExample(NamedTuple):
    """A comparison as token ids; the answers end with their end token, unless they were cut.

    ``prompt`` has the preference in it and is what the reward model reads. ``ref_prompt`` is the plain prompt, what
    the reference reads.
    """

    prompt: list[int]
    ref_prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    labels: Mapping[str, float]
    reference: tuple[list[int], list[int], list[int]] | None = None
    """plain prompt, chosen and rejected, in the tokens of a reference with another tokenizer"""


def read_comparisons(
    path: str | Path, columns: Mapping[str, str] | None = None, split: str = "train"
) -> list[Comparison]:
    """The comparisons of a preference set.

    Args:
        path: a file of JSON lines, or a folder: written by ``datasets``' ``save_to_disk``, or of files that its
            ``load_dataset`` reads.
        columns: names of fields where they are other than :data:`COLUMNS`, as ``{"prompt": "my_column"}``.
        split: of a folder that has several.

    Raises:
        DataError: with the file, the line and the field.
    """
    path = Path(path)
    if unknown := set(columns or ()) - set(COLUMNS):
        raise DataError(f"columns: {', '.join(sorted(unknown))}: the fields are {', '.join(COLUMNS)}")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    named = columns or {}
    names = {name: (named[name],) if name in named else known for name, known in COLUMNS.items()}
    rows = folder_rows(path, split) if path.is_dir() else json_lines(path)
    comparisons = [_comparison(record, names, where) for where, record in rows]
    if not comparisons:
        raise DataError(f"{path}: empty")
    return comparisons


def _comparison(record: Any, names: Mapping[str, Sequence[str]], where: str) -> Comparison:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object with fields, found {say(record)}")

    def find(name: str) -> tuple[str, Any]:
        """The field's name in this record, and its value."""
        found = [(n, record[n]) for n in names[name] if record.get(n) is not None]
        if strange := [n for n, value in found if value != found[0][1]]:
            raise DataError(
                f"{where}, fields {found[0][0]!r} and {strange[0]!r}: both mean {name!r}, but they differ; remove one"
            )
        return found[0] if found else (names[name][0], None)

    read = {n for known in names.values() for n in known}
    if foreign := next((n for n in NOT_READ if record.get(n) and n not in read), None):
        raise DataError(
            f"{where}, field {foreign!r}: is not read, although the answers may depend on it; write everything that "
            "they answer into 'prompt', as messages, and remove the field"
        )

    def split(name: str) -> tuple[Messages, str]:
        key, value = find(name)
        return _split_answer(value, f"{where}, field {key!r}")

    (head, chosen), (other_head, rejected) = split("chosen"), split("rejected")
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are the same text")
    _refuse_transcripts(chosen, rejected, where)
    prompt = _prompt(find, (head, other_head), where)
    key, preference = find("preference")
    if preference is not None and not isinstance(preference, str):
        raise DataError(f"{where}, field {key!r}: expected text, found {say(preference)}")
    _check_encodable(preference or "", f"{where}, field {key!r}")
    key, labels = find("labels")
    return Comparison(prompt, chosen, rejected, (preference or "").strip() or None, _labels(labels, key, where), where)


def _prompt(find: Callable[[str], tuple[str, Any]], heads: Sequence[Messages], where: str) -> str | Messages:
    """All that the answers were written for: of the prompt, what stands before the answers (``heads``), the system
    message and an instruction's input. Raises DataError where these say different things."""
    head = heads[0] or heads[1]
    if heads[0] and heads[1] and heads[0] != heads[1]:
        raise DataError(
            f"{where}, field {find('rejected')[0]!r}: the messages before its answer differ from those of "
            f"{find('chosen')[0]!r}; both answers must continue the same conversation"
        )
    key, prompt = find("prompt")
    place = f"{where}, field {key!r}"
    if prompt is None:
        if not head:
            raise DataError(f"{place}: missing, and the answers do not begin with one conversation")
        prompt = head
    elif isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{place}: empty")
        _check_encodable(prompt, place)
        prompt = _with_input(prompt, key, find, where)
        if head and not any(message["content"].strip() == prompt.strip() for message in head):
            raise DataError(f"{place}: is not among the messages before the answers; remove one of the two")
        prompt = head or prompt  # a conversation says more than one turn
    else:
        prompt = _messages(prompt, place)
        if head[-len(prompt) :] == prompt:
            prompt = head  # with what comes before
        elif head and prompt[-len(head) :] != head:
            raise DataError(f"{place}: ends differently from the messages before the answers; remove one of the two")
    return _with_system(prompt, find, where)


def _with_input(prompt: str, key: str, find: Callable[[str], tuple[str, Any]], where: str) -> str:
    """An instruction and what it is about, as Alpaca's records have them."""
    name, about = find("input")
    if about is None or about == "" or about == prompt:
        return prompt
    if not isinstance(about, str):
        raise DataError(f"{where}, field {name!r}: expected text, found {say(about)}")
    if key != "instruction":
        raise DataError(
            f"{where}, field {name!r}: is read only beside 'instruction', but the answers may depend on it; write it "
            f"into {key!r}, or remove it"
        )
    _check_encodable(about, f"{where}, field {name!r}")
    return f"{prompt}\n{about}"


def _with_system(prompt: str | Messages, find: Callable[[str], tuple[str, Any]], where: str) -> str | Messages:
    """The prompt after the system message of the record's own field."""
    name, content = find("system")
    if content is None or content == "":
        return prompt
    if not isinstance(content, str):
        raise DataError(f"{where}, field {name!r}: expected text, found {say(content)}")
    _check_encodable(content, f"{where}, field {name!r}")
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    own = messages[0]["content"] if messages[0]["role"] == "system" else content
    if own != content:
        raise DataError(f"{where}, field {name!r}: differs from the system message with which the conversation begins")
    return messages if messages[0]["role"] == "system" else ({"role": "system", "content": content}, *messages)


_TRANSCRIPT = re.compile(
    r"\s*(?:(?P<special><\|(?:im_start|start_header_id|user|system)\|>|<start_of_turn>|\[INST\])|"
    r"(?P<turn>(?:#+ *)?(?:human|user|instruction)\s*:.*?)\n[ \t]*(?:#+ *)?(?:assistant|response)\s*:)",
    re.DOTALL | re.IGNORECASE,
)
"""How a text begins that is a conversation, from a user's turn on."""


def _refuse_transcripts(chosen: str, rejected: str, where: str) -> None:
    """Raise DataError if both answers begin with the same turn: they are then transcripts, not answers."""
    first, second = (_TRANSCRIPT.match(answer) for answer in (chosen, rejected))
    if first and second and (first["special"] or first["turn"] == second["turn"]):
        raise DataError(
            f"{where}: the answers are transcripts, which begin with a user's turn; give messages, as "
            '[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]'
        )


def _split_answer(value: Any, where: str) -> tuple[Messages, str]:
    """The messages before an answer, and the answer."""
    if value is None:
        raise DataError(f"{where}: missing")
    head: Messages = ()
    answer = value
    if not isinstance(value, str):
        *before, last = _messages(value, where)
        if last["role"] != "assistant":
            raise DataError(f"{where}: the last message is of role {last['role']!r}, not 'assistant'")
        head, answer = tuple(before), last["content"]
    if not answer.strip():
        raise DataError(f"{where}: empty")
    _check_encodable(answer, where)
    return head, answer


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):x} at character {error.start + 1}"
        raise DataError(f"{where}: contains a lone surrogate, which is not text ({found})") from None


def _messages(value: Any, where: str) -> Messages:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise DataError(f"{where}: expected text or a list of messages, found {say(value)}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"{where}, message {number}: expected texts under 'role' and 'content'")
        if strange := next((key for key in NOT_READ_OF_MESSAGES if message.get(key)), None):
            raise DataError(
                f"{where}, message {number}: {strange!r} is not read; write it into its content, or drop it"
            )
        for key in ("role", "content"):
            _check_encodable(message[key], f"{where}, message {number}")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _labels(value: Any, key: str, where: str) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"{where}, field {key!r}: expected an object of numbers, found {say(value)}")
    labels = {}
    for name, label in value.items():
        place = f"{where}, field {key!r}, {say(name)}"
        if label is None:  # datasets fills what a record lacks
            continue
        number = math.nan
        if not isinstance(label, bool) and isinstance(label, int | float):
            with contextlib.suppress(OverflowError):  # an integer of 400 digits
                number = float(label)
        if not math.isfinite(number):
            raise DataError(f"{place}: expected a finite number, found {say(label)}")
        if number:
            _check_encodable(name, place)
            try:
                check_head_name(name)
            except ValueError as error:
                raise DataError(f"{place}: {error}") from None
            labels[name] = number
    return labels


def encode(
    comparisons: Sequence[Comparison],
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    max_length: int,
    reference_tokenizer: PreTrainedTokenizerBase | None = None,
    max_answer: int | None = None,
) -> list[PairExample]:
    """Token ids of the comparisons of at most ``max_length`` tokens; longer ones are left out.

    ``reference_tokenizer``: of a reference that has another, and its own chat template: likelihoods are of texts.
    ``max_answer``: tokens of an answer that are kept, its first ones; one that was cut has no end token.

    A prompt that is text is a user's turn where the tokenizer has a chat template, and text as it stands where not.

    Raises:
        DataError: the tokenizer refuses a prompt, or every comparison is too long.
    """
    examples = []
    for c in comparisons:
        ids = prompt_ids(c.prompt, tokenizer, c.where)
        prompt = template.compose(ids, c.preference) if c.preference else ids
        chosen, rejected = (answer_ids(text, tokenizer)[:max_answer] for text in (c.chosen, c.rejected))
        read = [len(prompt) + max(len(chosen), len(rejected))]
        theirs: tuple[list[int], list[int], list[int]] | None = None
        if reference_tokenizer is not None:
            own_prompt = prompt_ids(c.prompt, reference_tokenizer, c.where)
            own_chosen, own_rejected = (answer_ids(text, reference_tokenizer) for text in (c.chosen, c.rejected))
            theirs = own_prompt, own_chosen, own_rejected
            read.append(len(own_prompt) + max(len(own_chosen), len(own_rejected)))
        if max(read) <= max_length:
            examples.append(PairExample(prompt, ids, chosen, rejected, c.labels, theirs))
    if not examples:
        raise DataError(f"all {len(comparisons)} comparisons are longer than {max_length} tokens")
    return examples


def prompt_ids(
    prompt: str | Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, where: str = "prompt"
) -> list[int]:
    """The ids that a server makes of a prompt: of a chat's messages, or of text."""
    if isinstance(prompt, str):
        if not tokenizer.chat_template:
            return tokenizer.encode(prompt)
        prompt = ({"role": "user", "content": prompt},)
    if not tokenizer.chat_template:
        raise DataError(f"{where}: the prompt is a list of messages, but the tokenizer has no chat template; give text")
    try:
        text = bounded_render(tokenizer, prompt, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:
        raise DataError(f"{where}: the chat template refuses the prompt ({error})") from None


def answer_ids(answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of an answer and its end token."""
    return [*tokenizer.encode(answer, add_special_tokens=False), end_token(tokenizer)]


@lru_cache(maxsize=8)
def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What ends an answer: EOS, or what the chat template puts behind an assistant's text instead, as Gemma's
    ``<end_of_turn>``, where the model's generation configuration says that it ends one.

    Raises:
        DataError: there is neither.
    """
    if getattr(tokenizer, "chat_template", None) and (ends := _ends(tokenizer.name_or_path)):
        talk = [{"role": "user", "content": CONTENTS[0]}, {"role": "assistant", "content": CONTENTS[1]}]
        behind = (render(tokenizer, talk, generate=False) or "").partition(CONTENTS[1])[2]
        ids = tokenizer.encode(behind.lstrip(), add_special_tokens=False)
        if ids and ids[0] in ends:
            return ids[0]
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer {tokenizer.name_or_path!r} has no end token (eos_token), as answers end with")
    return tokenizer.eos_token_id


def _ends(path: str) -> list[int]:
    """Of a model's generation configuration."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else [] if found is None else [found]
