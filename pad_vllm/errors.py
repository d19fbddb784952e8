"""Errors as one line of text."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_IN_WORDS = re.compile(r"\(os error (\d+)\)|inline_container")
"""How safetensors, and torch, say that a file could not be written."""


def one_line(error: BaseException) -> str:
    """An error's own words without line breaks, and without the frame that pydantic puts around them."""
    errors = getattr(error, "errors", None)
    words = errors()[0]["msg"] if type(error).__name__ == "ValidationError" and callable(errors) else str(error)
    return " ".join(words.split()) or type(error).__name__


@contextlib.contextmanager
def writing(folder: Path, kept: str) -> Iterator[None]:
    """Raise OSError, one line that names ``folder`` and says what is ``kept``, if a disk is full; whatever error the
    writing library raised."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        causes: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in causes:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        found = next((line for c in causes if (line := _of_a_disk(c)) is not None), None)
        if found is None:
            raise
        raise OSError(f"{folder} cannot be written: {found}. {kept}") from error


def _of_a_disk(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return (error.strerror or one_line(error)) if error.errno in _OF_DISKS else None
    words = _IN_WORDS.search(str(error))
    return one_line(error)[:200] if words and int(words[1] or errno.EIO) in _OF_DISKS else None
