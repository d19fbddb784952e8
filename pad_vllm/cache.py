"""The folder in which pad-vllm keeps models and tables that it has made."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from pad_vllm.errors import writing


def cached(cache_dir: str | os.PathLike | None, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name`` of the cache, made now unless it is there.

    A folder appears in one rename after everything is in it: a build that was killed leaves nothing that a later one
    would use.

    Args:
        cache_dir: root of the cache; ``$PAD_VLLM_CACHE``, else ``~/.cache/pad-vllm``.
        make: writes the folder that it is given.
    """
    root = Path(cache_dir or os.environ.get("PAD_VLLM_CACHE") or Path.home() / ".cache" / "pad-vllm")
    folder = root / name
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):  # another process may be at the same build: its result will do
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=root, ignore_cleanup_errors=True) as unfinished:
                made = Path(unfinished, name)
                with writing(folder, "Nothing is left of it"):
                    make(made)
                made.rename(folder)
    return folder
