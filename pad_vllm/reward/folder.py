"""Files beside a reward model in its folder or repository; among them ``pad.json``, which says how to use the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from pad_vllm.reading import read_json

DEFAULTS_FILE = "pad.json"
DEFAULT_KEYS = ("prompt_template", "insert_after", "reference", "beta", "max_divergence", "top_k")
"""Keys of the server's configuration for which a reward model may set its own defaults."""


def files_beside(
    reward_model: str, revision: str | None, names: Sequence[str], local_files_only: bool = False
) -> list[Path]:
    """Those of ``names`` that are files in a model's folder or repository; ``local_files_only``: that are here."""
    settings = dict.fromkeys(
        (
            "_raise_exceptions_for_missing_entries",
            "_raise_exceptions_for_connection_errors",
            "_raise_exceptions_for_gated_repo",
        ),
        False,
    )
    settings["local_files_only"] = local_files_only
    found = [cached_file(reward_model, name, revision=revision, **settings) for name in names]
    return [Path(path) for path in found if path is not None]


def locate_defaults(reward_model: str, revision: str | None = None) -> Path | None:
    """The file of a reward model's defaults, or None."""
    try:
        return next(iter(files_beside(reward_model, revision, (DEFAULTS_FILE,))), None)
    except (OSError, ValueError):  # no such model: loading it says so better
        return None


def read_defaults(path: Path) -> dict[str, Any]:
    """A reward model's defaults, of keys in :data:`DEFAULT_KEYS`.

    Raises:
        ValueError: the file cannot be read, or has another key; the values are for
            :class:`~pad_vllm.config.PADConfig` to check.
    """
    try:
        defaults = read_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(defaults, dict):
        raise ValueError(f"{path}: must be an object, not {type(defaults).__name__}")
    if strange := sorted(set(defaults) - set(DEFAULT_KEYS)):
        raise ValueError(f"{path}: {', '.join(strange)}: no such key; a reward model may set {', '.join(DEFAULT_KEYS)}")
    return {key: value for key, value in defaults.items() if value is not None}


def write_defaults(folder: Path, defaults: Mapping[str, Any]) -> None:
    (folder / DEFAULTS_FILE).write_text(json.dumps(dict(defaults), indent=2, ensure_ascii=False) + "\n")
