"""Preference sets: read, checked, and encoded as the reward model will read them in serving.

A record is one comparison:

    {"prompt": "How do I poach an egg?", "preference": "Be brief.", "chosen": "...", "rejected": "...",
     "labels": {"concise": 1, "formal": -1}}

``prompt`` is text or a list of chat messages; ``chosen`` and ``rejected`` are text, or messages of which the last is
the answer (those before it are then the prompt, where no ``prompt`` is given). ``preference`` is what this user asked
for. ``labels`` says for each dimension which answer shows more of it: above 0 the chosen one, below 0 the rejected one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pad_vllm.reward.template import PromptTemplate

COLUMNS = {
    "prompt": ("prompt", "question", "instruction", "query"),
    "preference": ("preference", "principle", "guideline"),
    "chosen": ("chosen", "chosen_response", "answer_chosen"),
    "rejected": ("rejected", "rejected_response", "answer_rejected"),
    "labels": ("labels",),
}
"""The names under which a field is looked for, in this order."""


class DataError(ValueError):
    """A record that cannot be used; the message names the file, the line and the field."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt, of which a user with ``preference`` chose one. ``where`` is its place in its file."""

    prompt: str | tuple[Mapping[str, str], ...]
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
    """A comparison as token ids; the answers end with EOS, unless they were cut.

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
    names = {name: (columns[name],) if name in (columns or ()) else known for name, known in COLUMNS.items()}
    rows = _folder_rows(path, split) if path.is_dir() else _json_lines(path)
    comparisons = [_comparison(record, names, where) for where, record in rows]
    if not comparisons:
        raise DataError(f"{path}: empty")
    return comparisons


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records as JSON lines: the whole file, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    part.rename(path)
    return path


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode().rstrip())
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None


def _folder_rows(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path} is a folder: reading it takes `pip install 'pad-vllm[train]'`") from None
    try:
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        found = datasets.load_from_disk(path) if saved else datasets.load_dataset(str(path))
    except Exception as error:
        raise DataError(f"{path}: not a folder that datasets reads ({error})") from None
    if isinstance(found, Mapping):
        if split not in found:
            raise DataError(f"{path}: no split {split!r}; there are {', '.join(map(str, found))}")
        found = found[split]
    for number, record in enumerate(found, 1):
        yield f"{path}, row {number}", record


def _comparison(record: Any, names: Mapping[str, Sequence[str]], where: str) -> Comparison:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object with fields, found {_say(record)}")

    def find(name: str) -> tuple[str, Any]:
        """The field's name in this record, and its value."""
        return next(((n, record[n]) for n in names[name] if record.get(n) is not None), (names[name][0], None))

    heads, answers = [], []
    for name in ("chosen", "rejected"):
        key, value = find(name)
        head, answer = _split_answer(value, f"{where}, field {key!r}")
        heads.append(head)
        answers.append(answer)
    if answers[0] == answers[1]:
        raise DataError(f"{where}: chosen and rejected are the same text")
    key, prompt = find("prompt")
    if prompt is None:
        if not heads[0] or heads[0] != heads[1]:
            raise DataError(f"{where}, field {key!r}: missing, and the answers do not begin with one conversation")
        prompt = heads[0]
    elif isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{where}, field {key!r}: empty")
        prompt = heads[0] or prompt  # a conversation says more than its last turn
    else:
        prompt = _messages(prompt, f"{where}, field {key!r}")
    key, preference = find("preference")
    if preference is not None and not isinstance(preference, str):
        raise DataError(f"{where}, field {key!r}: expected text, found {_say(preference)}")
    return Comparison(
        prompt, *answers, (preference or "").strip() or None, _labels(*find("labels")[::-1], where), where
    )


def _split_answer(value: Any, where: str) -> tuple[tuple[Mapping[str, str], ...], str]:
    """The messages before an answer, and the answer."""
    if value is None:
        raise DataError(f"{where}: missing")
    if not isinstance(value, str):
        *head, last = _messages(value, where)
        if last["role"] != "assistant":
            raise DataError(f"{where}: the last message is of role {last['role']!r}, not 'assistant'")
        head, value = tuple(head), last["content"]
    else:
        head = ()
    if not value.strip():
        raise DataError(f"{where}: empty")
    return head, value


def _messages(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, Sequence) or not value:
        raise DataError(f"{where}: expected text or a list of messages, found {_say(value)}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"{where}, message {number}: expected texts under 'role' and 'content'")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _labels(value: Any, key: str, where: str) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"{where}, field {key!r}: expected an object of numbers, found {_say(value)}")
    labels = {}
    for name, label in value.items():
        if label is None:  # datasets fills what a record lacks
            continue
        if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
            raise DataError(f"{where}, field {key!r}, {name!r}: expected a finite number, found {_say(label)}")
        if label:
            labels[name] = float(label)
    return labels


def _say(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
    ``max_answer``: tokens of an answer that are kept, its first ones; one that was cut has no EOS.

    A prompt that is text is a user's turn where the tokenizer has a chat template, and text as it stands where not.

    Raises:
        DataError: the tokenizer refuses a prompt, or every comparison is too long.
    """
    examples = []
    for c in comparisons:
        ids = prompt_ids(c.prompt, tokenizer, c.where)
        prompt = template.compose(ids, c.preference) if c.preference else ids
        answers = [answer_ids(text, tokenizer)[:max_answer] for text in (c.chosen, c.rejected)]
        read, theirs = [len(prompt) + max(map(len, answers))], None
        if reference_tokenizer is not None:
            theirs = prompt_ids(c.prompt, reference_tokenizer, c.where)
            theirs = (theirs, *(answer_ids(text, reference_tokenizer) for text in (c.chosen, c.rejected)))
            read.append(len(theirs[0]) + max(map(len, theirs[1:])))
        if max(read) <= max_length:
            examples.append(PairExample(prompt, ids, *answers, c.labels, theirs))
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
    try:
        return tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False)
    except Exception as error:
        raise DataError(f"{where}: the chat template refuses the prompt ({error})") from None


def answer_ids(answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of an answer and its EOS."""
    return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
