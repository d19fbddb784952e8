"""Records from files of JSON lines and from folders of ``datasets``, with their places; and into files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pad_vllm.reading import read_json


class DataError(ValueError):
    """A record that cannot be used; the message names the file, the line and the field."""


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records as JSON lines: the whole file, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        part.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def read_records(path: Path) -> list[Any]:
    """What :func:`write_records` wrote. Raises DataError for a line that is not JSON."""
    return [record for _, record in json_lines(path)]


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The place and the value of each line. Raises DataError for one that is not JSON."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = read_json(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
            except ValueError as error:
                raise DataError(f"{where}: {error}") from None
            yield where, record


def folder_rows(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """The place and the value of each row of one of a folder's splits. Raises DataError."""
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


def say(value: Any) -> str:
    """A value for an error message, no longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # of an integer of 5,000 digits, which datasets may hold
        text = f"a number of {value.bit_length():,} bits"
    return text if len(text) <= 60 else text[:57] + "..."
