"""Between the processes: what an engine accepts, for the frontend that must refuse the rest, and its numbers.

vLLM hands a frontend nothing of a logits processor in an engine's worker. So an engine that starts announces what it
accepts in a file of a folder whose name every process finds in its environment: the ``vllm.general_plugins`` hook puts
it there before vLLM starts the others. Beside the announcement lie the numbers of :class:`~pad_vllm.stats.Stats`.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import logging
import os
import shutil
import tempfile
import uuid
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(f"vllm.{__name__}")

ANNOUNCE_DIR = "PAD_VLLM_ANNOUNCE_DIR"
"""Environment: the folder. Set it by hand to one that all machines share when frontend and engine are on different
machines."""
RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
FOLDER_PREFIX = "pad-vllm-"
OWNER = "owner.lock"


@dataclass(frozen=True)
class Announcement:
    """What an engine accepts. ``configured`` false: it runs without a reward model and accepts no guidance."""

    configured: bool
    personas: tuple[str, ...] = ()
    head_names: tuple[str, ...] = ()
    max_top_k: int = 0
    max_preference_tokens: int = 0
    tokenizer: dict[str, Any] | None = None
    """Arguments of ``AutoTokenizer.from_pretrained``; None: no tokenizer, and so no text preferences."""
    base_tokenizer: dict[str, Any] | None = None
    """Likewise of the base model, where that is another one."""
    max_context_len: int = 0
    """Tokens that a context of the reward model holds."""
    prompt_template: str = ""
    num_preferences: tuple[int, ...] = ()
    """Of each persona."""
    num_preference_tokens: tuple[int, ...] = ()
    """That the longest preference of each persona adds to a prompt."""
    default_persona: str | None = None
    """That of requests which ask for nothing."""
    instance_id: str = ""
    """vLLM's id of the engine, which its frontend on the same machine knows too."""
    labels: tuple[str, str] = ("", "")
    """The engine's labels in metrics: name of the base model, number of the engine."""

    @property
    def guides_all(self) -> bool:
        """Whether requests that ask for nothing are guided too."""
        return self.default_persona is not None


def make_folder() -> None:
    """Make the folder of announcements, once for a frontend and its engines."""
    if ANNOUNCE_DIR in os.environ:
        return
    try:
        _sweep(Path(tempfile.gettempdir()))
        folder, owner = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX)), os.getpid()
        lock = _locked(folder / OWNER)
    except OSError as error:
        logger.warning("No folder for announcements of PAD engines: %s", error)
        return
    os.environ[ANNOUNCE_DIR] = str(folder)
    also = os.environ.get(RAY_COPIES)  # or Ray's workers would not know the folder
    os.environ[RAY_COPIES] = f"{also},{ANNOUNCE_DIR}" if also else ANNOUNCE_DIR

    def remove() -> None:
        lock.close()
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def _sweep(root: Path) -> None:
    """Remove the folders of processes that were killed before they could."""
    for folder in root.glob(f"{FOLDER_PREFIX}*"):
        locks = [folder / OWNER, *folder.glob("*.json")]
        with contextlib.suppress(OSError):  # another user's, or without an owner's lock: let it be
            if all(_is_abandoned(path) for path in locks):
                shutil.rmtree(folder, ignore_errors=True)


def _locked(path: Path, text: str = "") -> TextIO:
    """A new file with a lock that is held until it is closed, or its process and all forked from it have ended."""
    part = path.with_suffix(".part")
    file = part.open("w")
    with contextlib.suppress(OSError):  # some file systems have no locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.write(text)
    file.flush()
    part.rename(path)
    return file


def _is_abandoned(path: Path) -> bool:
    """Whether nobody holds a file's lock: its process is gone, in whatever namespace it ran. OSError if it is not
    there."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # held, or a file system without locks
            return False
    return True


def announce(announcement: Announcement, engine: object) -> Path | None:
    """Tell the frontends what ``engine`` accepts, for as long as the object and its process live.

    Returns:
        The announcement's file; None where an engine that does not guide found no place for one.

    Raises:
        ValueError: an engine that guides cannot write where its frontends would look.
    """
    try:
        make_folder()
        folder = Path(os.environ.get(ANNOUNCE_DIR, os.devnull))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}.json"
        file = _locked(path, json.dumps(asdict(announcement)))
    except OSError as error:
        if not announcement.configured:
            return None  # without it, the frontend refuses guidance all the same
        raise ValueError(
            f"pad cannot tell the frontend what it accepts ({error}); set {ANNOUNCE_DIR} to a writable folder"
        ) from error
    owner = os.getpid()  # a forked child inherits the finalizer, and is not the engine

    def withdraw() -> None:
        file.close()
        if os.getpid() == owner:
            path.unlink(missing_ok=True)
            stats_path(path).unlink(missing_ok=True)

    weakref.finalize(engine, withdraw)
    return path


def stats_path(announcement: Path) -> Path:
    """Where an engine's first rank shows its numbers, beside its announcement."""
    return announcement.with_suffix(".stats")


def announced() -> dict[Path, Announcement]:
    """What the living engines of this frontend accept, by their files."""
    folder = Path(os.environ.get(ANNOUNCE_DIR, "/nonexistent"))
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError:
        return {}
    return {path: announcement for path in paths if (announcement := _read(path)) is not None}


@functools.lru_cache(maxsize=64)
def _parse(path: Path) -> Announcement:
    record: dict[str, Any] = json.loads(path.read_text())
    record = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    return Announcement(**record)


def _read(path: Path) -> Announcement | None:
    """A living engine's announcement; None for one withdrawn, left by an engine that was killed, or unreadable."""
    try:
        return None if _is_abandoned(path) else _parse(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("Cannot read the announcement %s of a PAD engine: %r", path, error)
        return None
