"""Write a persona into a file of personas that servers read, and that others may write at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import textwrap
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pad_vllm.checks import check_text
from pad_vllm.config import MAX_TOP_K, parse_file
from pad_vllm.params import PREFIX
from pad_vllm.personas import read_personas

KEPT = ("beta", "max_divergence", "top_k", "cache_salt")
"""Arguments that an update keeps from the old persona: a fit finds neither the strength of guidance, nor its bound, nor
the cache salt."""
MAX_WAIT = 30.0
"""Seconds for the file's lock, which its writers hold for milliseconds."""


def update_personas(path: str | Path, name: str, arguments: Mapping[str, Any]) -> None:
    """Put a persona into a JSON or YAML file, which is made where it is missing. The other personas stay as they are,
    and so do the file's permissions; of YAML in blocks its comments too.

    The file is locked, read, checked as a server checks it, written beside itself and put in its place, all of it on
    the disk: who reads it finds the one version or the other, and of two updates at once none is lost.

    Args:
        path: of the file, or of a link to it.
        name: of the persona.
        arguments: a request's, with or without their prefix. What the persona had of :data:`KEPT`, and these do not
            say, stays.

    Raises:
        ValueError: the file, or what would become of it, is no file of personas: nothing is changed.
        OSError: it cannot be locked or written.
    """
    check_text("--name", name)
    target = Path(os.path.realpath(path))
    while True:
        with _locked(target) as file:
            status = None if file is None else os.fstat(file)
            content = b"" if status is None else target.read_bytes()
            if _replace(target, status, with_persona(str(target), content, name, arguments)):
                return


def with_persona(path: str, content: bytes, name: str, arguments: Mapping[str, Any]) -> bytes:
    """``content`` of a file of personas, with one more, or another one. Raises ValueError as
    :func:`update_personas`."""
    personas: Any = parse_file("--update", path, content) if content.strip() else {}
    personas = {} if personas is None else personas  # nothing but comments
    try:
        old = read_personas(personas, MAX_TOP_K).get(name)
        persona = {key.removeprefix(PREFIX): value for key, value in arguments.items()}
        for key in KEPT:
            if (value := getattr(old, key, None)) is not None:
                persona.setdefault(key, value)
        wanted = {**personas, name: persona}
        read_personas(wanted, MAX_TOP_K)
    except ValueError as error:
        raise ValueError(f"--update={path!r}: {error}; nothing was changed") from None
    for text in _texts(path, content.decode(), name, persona, wanted):
        with contextlib.suppress(ValueError):
            if parse_file("--update", path, text.encode()) == wanted:
                return text.encode()
    raise ValueError(f"--update={path!r}: it cannot be written so that it reads the same; nothing was changed")


def _texts(path: str, text: str, name: str, persona: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """What the file could be, the best first."""
    if path.endswith(".json"):
        yield json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
        return
    style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None, "width": 120}
    with contextlib.suppress(yaml.YAMLError):
        yield edited(text, name, yaml.safe_dump({name: persona}, **style))
    yield yaml.safe_dump(wanted, **style)


def edited(text: str, name: str, entry: str) -> str:
    """YAML with an entry of its outermost mapping replaced, or one more at its end, and all else as it stands.

    Whether it reads as it should is for the caller to see: it does not where that mapping is no block, or where others
    refer to what was replaced.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return f"{text.rstrip()}\n{entry}".lstrip()
    entry = textwrap.indent(entry, " " * root.start_mark.column)
    for key, value in root.value:
        if key.value == name:
            start, end = key.start_mark.index - key.start_mark.column, value.end_mark.index
            lines = text[start:end].splitlines(keepends=True)
            while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
                lines.pop()  # it belongs to what follows
            old = "".join(lines)
            rest = text[start + len(old) :]
            return text[:start] + entry + (rest if old.endswith("\n") else rest.removeprefix("\n"))
    return f"{text.rstrip()}\n{entry}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """The descriptor of a file with its lock, which whoever replaces it holds; None where there is no file."""
    deadline = time.monotonic() + MAX_WAIT
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            yield None
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(os.fstat(file), path):
                yield file
                return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} is locked by another process") from None
        finally:
            os.close(file)
        time.sleep(0.005)


def _is_at(status: os.stat_result, path: Path) -> bool:
    """Whether a file is the one at ``path``, and as it was."""
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    return all(getattr(now, one) == getattr(status, one) for one in ("st_dev", "st_ino", "st_mtime_ns", "st_size"))


def _replace(path: Path, status: os.stat_result | None, content: bytes) -> bool:
    """Whether ``content`` is at ``path`` now; not, if somebody who takes no lock has written there meanwhile.

    Args:
        status: of what is there, and locked, when it was read; None where there was nothing.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    mode = 0o666 if status is None else 0o600  # others read it when it has the permissions of what is there
    written = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(written, "wb") as opened:
            opened.write(content)
            opened.flush()
            if status is not None:
                with contextlib.suppress(PermissionError):  # another's, that this user may write
                    os.fchown(written, status.st_uid, status.st_gid)
                os.fchmod(written, stat.S_IMODE(status.st_mode))
            os.fsync(written)
        if status is None:
            os.link(part, path)
        elif _is_at(status, path):
            os.rename(part, path)
        else:
            return False
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True
