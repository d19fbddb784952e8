"""Between the processes: what an engine accepts, for the frontend that must refuse the rest, and its numbers.

vLLM hands a frontend nothing of a logits processor in an engine's worker. So an engine that starts announces what it
accepts in a file of a folder whose name every process finds in its environment: the ``vllm.general_plugins`` hook puts
it there before vLLM starts the others. Beside the announcement lie the numbers of :class:`~pad_vllm.stats.Stats`,
and the personas (:mod:`pad_vllm.personas`), which may change.

Other users may share the machine, and its temporary directory. So a folder counts, and a file in it, only where it is
one's own and nobody else may write it; a file is opened without following links and without waiting, and what it says
never decides which code runs (:mod:`pad_vllm.frontend.engines`). Every process that knows a folder which the hook made
holds a shared lock in it, and who gets the exclusive one may remove it: nobody is there any more.
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
import stat
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

ANNOUNCE_DIR = "PAD_VLLM_ANNOUNCE_DIR"
"""Environment variable: the folder of announcements. If frontend and engine run on different machines, set it to a
folder that all of them share; such a folder is never removed."""
LAUNCH = "PAD_VLLM_LAUNCH"
"""Environment variable: an id that all processes of one launch share. The first process in which the hook runs makes
it, and a server's engines and API servers inherit it."""
RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
FOLDER_PREFIX = "pad-vllm-"
OWNER = "owner.lock"
"""The file that a process locks while it uses a folder that the hook made."""
NO_HOOK = (
    "pad: vLLM has not run pad-vllm's plugin hook, and requests could go unguided in silence; install the package, and "
    "where VLLM_PLUGINS is set, add 'pad' to it"
)
JOIN_TRIES = 200
"""How often to try to join a folder that others are removing; with pauses, this takes a second or two."""


@dataclass(frozen=True)
class Announcement:
    """What an engine accepts. If ``configured`` is false, it runs without a reward model and accepts no guidance."""

    configured: bool
    head_names: tuple[str, ...] = ()
    max_top_k: int = 0
    max_preference_tokens: int = 0
    tokenizer: dict[str, Any] | None = None
    """Arguments of ``AutoTokenizer.from_pretrained``; None if there is no tokenizer, and so no text preferences."""
    prompt_template: str = ""
    default_persona: str | None = None
    instance_id: str = ""
    """vLLM's id of the engine, which its frontend on the same machine knows too."""
    data_parallel_address: str = ""
    """Where the server's machines meet under data parallelism; the frontends on all machines know it."""
    labels: tuple[str, str] = ("", "")
    """The engine's labels in metrics: name of the base model, number of the engine."""
    base_tokenizer: dict[str, Any] | None = None
    """Like ``tokenizer``, of the base model, if the two differ."""
    max_context_len: int = 0
    """Tokens that a context of the reward model holds; 0 if unknown."""
    chat: str = "auto"
    insert_after: str | None = None
    launch: str = ""
    traces: bool = False
    adapters: tuple[str, ...] = ()
    about: dict[str, Any] | None = None
    """The engine's guidance as clients see it: :func:`pad_vllm.worker.start.about_guidance`."""

    @property
    def guides_all(self) -> bool:
        """Whether requests without guidance of their own are guided too."""
        return self.default_persona is not None


def data_parallel_address(vllm_config: VllmConfig) -> str:
    """Where the machines of a data-parallel server meet, or would: engines of dense models do not know of each other,
    since vLLM sets their ``data_parallel_size`` to 1. "" where that is this machine."""
    parallel = vllm_config.parallel_config
    address = parallel.data_parallel_master_ip
    is_here = address in ("localhost", "::1", "0.0.0.0") or address.startswith("127.")
    return "" if is_here else f"{address}:{parallel.data_parallel_rpc_port}"


_locks: dict[Path, int] = {}
"""Folders of which this process, or one that it was forked from, holds the lock."""
_failure = ""  # why this process has no folder
_served: set[str] = set()
"""Ids of the engines whose frontend this process is, without data-parallel ranks. They end with this process."""


def make_folder() -> None:
    """Make the folder of announcements, once for a frontend and its engines, or join the one that there is."""
    global _failure
    if LAUNCH not in os.environ:
        _export(LAUNCH, uuid.uuid4().hex)
    try:
        if named := os.environ.get(ANNOUNCE_DIR):
            folder = Path(named)
            ours = (folder / OWNER).exists() or not folder.exists()
            if not (ours and folder.name.startswith(FOLDER_PREFIX)):
                return  # named by hand: not ours to make, to lock or to remove
        else:
            _sweep(Path(tempfile.gettempdir()))
            folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        if folder not in _locks:
            _locks[folder] = _join(folder)
            atexit.register(_leave, folder)
    except OSError as error:
        _failure = str(error)
        logger.warning("No folder for announcements of PAD engines: %s", error)
        return
    if not named:
        _export(ANNOUNCE_DIR, str(folder))


def _export(name: str, value: str) -> None:
    """Pass the variables to all processes that this one starts; Ray's workers must be told separately."""
    os.environ[name] = value
    also = os.environ.get(RAY_COPIES)
    os.environ[RAY_COPIES] = f"{also},{name}" if also else name


def why_no_folder() -> str:
    """Why this process knows no folder of announcements, and what to change."""
    return f"pad: no folder for announcements could be made. {_what_to_change(_failure)}" if _failure else NO_HOOK


def _what_to_change(failure: object) -> str:
    return (
        f"{failure}; set TMPDIR or {ANNOUNCE_DIR} to a folder of your own that nobody else can write to, on a disk "
        "with free space"
    )


def _join(folder: Path) -> int:
    """The file descriptor of the lock of a folder, which is made where it is missing."""
    for _ in range(JOIN_TRIES):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError, BlockingIOError), opened_folder(folder) as opened:
            lock = open_own_file(OWNER, opened, os.O_RDWR | os.O_CREAT)
            try:
                with _without_locks():
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), os.stat(folder / OWNER, follow_symlinks=False)):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
        time.sleep(0.01)  # another process is removing it
    raise OSError(f"{folder} cannot be joined")


def without_rank(instance_id: str) -> str:
    """vLLM gives each rank of data parallelism an id of its own."""
    return instance_id.partition("_dp")[0]


def mark_served(instance_id: str) -> str:
    """Note that this process is an engine's frontend; returns the engine's id without its data-parallel rank."""
    _served.add(name := without_rank(instance_id))
    return name


def _leave(folder: Path) -> None:
    os.close(_locks.pop(folder))
    _remove_if_left(folder)
    # Engines of this process's own end with it, and may not come to remove anything.
    names = {without_rank(engine.instance_id) for path, engine in announced().items() if path.parent == folder}
    if names and names <= _served:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove the folders of processes that were killed before they could remove these themselves."""
    for folder in root.glob(f"{FOLDER_PREFIX}*"):
        _remove_if_left(folder)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of our making, unless somebody holds a lock in it: a process that knows it, or an engine."""
    try:
        with opened_folder(folder, os.O_NOFOLLOW) as opened, contextlib.ExitStack() as files:
            for name in (OWNER, *(name for name in os.listdir(opened) if name.endswith(".json"))):
                file = open_own_file(name, opened)
                files.callback(os.close, file)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is held, or where there are no locks
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return  # in use, or another user's, or not of our making


@contextlib.contextmanager
def _without_locks() -> Iterator[None]:
    """Some file systems have no locks: what is there then stays."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError:
        pass


@contextlib.contextmanager
def opened_folder(folder: Path, flags: int = 0) -> Iterator[int]:
    """A folder's file descriptor. Raises OSError unless the folder belongs to this user and nobody else may write
    it."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)
    try:
        _check_own(os.fstat(opened), f"{folder}")
        yield opened
    finally:
        os.close(opened)


def open_own_file(name: str, folder: int, flags: int = os.O_RDONLY) -> int:
    """The descriptor of a file in an opened folder; OSError unless it is regular, one's own, and nobody else may write
    it. Never waits, as opening another's FIFO would."""
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{name} is no regular file")
        _check_own(status, name)
    except OSError:
        os.close(file)
        raise
    return file


def _check_own(status: os.stat_result, name: str) -> None:
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{name} is user {status.st_uid}'s, and this process is user {os.geteuid()}'s")
    if status.st_mode & 0o022:
        raise PermissionError(f"others may write {name} (mode {stat.S_IMODE(status.st_mode):o}): chmod go-w")


def write_whole(name: str, folder: int, content: bytes) -> int:
    """The descriptor of a new file with a lock that is held until it is closed, or its process and all forked from it
    have ended. The file is there as a whole, or not at all."""
    part = f"{name}.part"
    file = open_own_file(part, folder, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with _without_locks():
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        while content:
            content = content[os.write(file, content) :]
        os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.close(file)
        os.unlink(part, dir_fd=folder)
        raise
    return file


def _is_abandoned(file: int) -> bool:
    """Whether nobody holds a file's lock, so that its process is gone; this also works across namespaces."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        return False
    return True


def announce(announcement: Announcement, engine: object) -> Path | None:
    """Tell the frontends what ``engine`` accepts, for as long as the object and its process live.

    Args:
        announcement: filled in with what ``engine.vllm_config`` says of whose engine it is.
        engine: the processor.

    Returns:
        The announcement's file; None where an engine that does not guide found no place for one.

    Raises:
        ValueError: an engine that guides cannot write where its frontends would look.
    """
    if (vllm_config := getattr(engine, "vllm_config", None)) is not None:
        whose = {"instance_id": vllm_config.instance_id, "launch": os.environ.get(LAUNCH, "")}
        announcement = replace(announcement, data_parallel_address=data_parallel_address(vllm_config), **whose)
    try:
        make_folder()
        if ANNOUNCE_DIR not in os.environ:
            raise OSError(_failure)
        folder = Path(os.environ[ANNOUNCE_DIR])
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}.json"
        with opened_folder(folder) as opened:
            file = write_whole(path.name, opened, json.dumps(asdict(announcement)).encode())
    except OSError as error:
        if not announcement.configured:
            return None  # without it, the frontend refuses guidance all the same
        raise ValueError(f"pad cannot tell the frontend what it accepts. {_what_to_change(error)}") from error
    owner = os.getpid()  # a forked child inherits the finalizer, and is not the engine

    def withdraw() -> None:
        os.close(file)
        if os.getpid() == owner:
            for beside in path.parent.glob(f"{path.stem}.*"):  # and itself
                beside.unlink(missing_ok=True)

    weakref.finalize(engine, withdraw)
    return path


def stats_path(announcement: Path) -> Path:
    """Where an engine's first rank shows its numbers, beside its announcement."""
    return announcement.with_suffix(".stats")


def make_stats(announcement: Path, num_bytes: int) -> Path:
    """The file of an engine's numbers, of zeros: all of it on the disk, or writing to its map could end the process.

    Raises:
        ValueError: there is no room for it.
    """
    path = stats_path(announcement)
    try:
        with opened_folder(path.parent) as folder:
            os.close(write_whole(path.name, folder, bytes(num_bytes)))
    except OSError as error:
        raise ValueError(f"pad cannot show its numbers. {_what_to_change(error)}") from error
    return path


def read_stats(announcement: Path) -> bytes:
    """What an engine's first rank shows. OSError where there is no such file: of another rank, or just withdrawn."""
    path = stats_path(announcement)
    with opened_folder(path.parent) as folder, open(open_own_file(path.name, folder), "rb") as file:
        return file.read()


def announced() -> dict[Path, Announcement]:
    """What the living engines that share this process's folder accept, by their files."""
    if ANNOUNCE_DIR not in os.environ:
        return {}
    folder = Path(os.environ[ANNOUNCE_DIR])
    try:
        with opened_folder(folder) as opened:
            names = sorted(name for name in os.listdir(opened) if name.endswith(".json"))
            found = {folder / name: _read(name, opened, folder) for name in names}
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            _warn_once(f"{ANNOUNCE_DIR}: {error}")
        return {}
    return {path: announcement for path, announcement in found.items() if announcement is not None}


def _read(name: str, opened: int, folder: Path) -> Announcement | None:
    """A living engine's announcement; None for one withdrawn, left by an engine that was killed, or unreadable."""
    try:
        file = open_own_file(name, opened)
        try:
            status = os.fstat(file)
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            return None if _is_abandoned(file) else _parse(folder / name, stamp)
        finally:
            os.close(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _warn_once(f"Cannot read the announcement {folder / name} of a PAD engine: {error!r}")
        return None


@functools.lru_cache(maxsize=64)
def _parse(path: Path, _stamp: tuple[int, int, int]) -> Announcement:
    with opened_folder(path.parent) as folder, open(open_own_file(path.name, folder), "rb") as file:
        record: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.load(file).items()}
    return Announcement(**record)


@functools.lru_cache(maxsize=64)
def _warn_once(words: str) -> None:
    logger.warning(words)
