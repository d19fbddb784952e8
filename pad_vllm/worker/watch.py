"""Looking at the personas' file while the engine runs.

The file is looked at once a second, by its inode, size and times: no more is needed, and it works on every file system.
A file that was put in place of another is whole and is read at once; one that is written where it lies may be half of
itself, so it is read when it has rested from one look to the next. A version that the start would have refused changes
nothing. A valid one is shown to the frontends (:mod:`pad_vllm.personas`), which send it along with the requests that
come from then on; the engine itself goes by what comes with a request, and never by the file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from vllm.logger import init_logger

from pad_vllm.config import parse_file
from pad_vllm.errors import one_line
from pad_vllm.personas import show_personas, shown_version
from pad_vllm.stats import NAMES, Stats
from pad_vllm.worker.board import Board, every
from pad_vllm.worker.compatibility import Fit

logger = init_logger(f"vllm.{__name__}")

INTERVAL = 1.0
"""Seconds between two looks."""
MAX_BYTES = 2**26
"""Of the file."""


class Look(NamedTuple):
    """What the file system says of a file; zeros if there is no file."""

    inode: int = 0
    size: int = 0
    written: int = 0
    """mtime, in nanoseconds"""
    changed: int = 0
    """ctime: of its contents, or of its name"""

    @classmethod
    def of(cls, status: os.stat_result) -> Look:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @classmethod
    def at(cls, path: str) -> Look:
        try:
            return cls.of(os.stat(path))
        except OSError:
            return cls()

    def is_whole_after(self, last: Look) -> bool:
        """Whether this is another file than ``last``, which was written before it got its name."""
        return self.inode != last.inode and self.written < self.changed


def watch_personas(fits: Fit, announcement: Path, board: Board, stats: Stats) -> None:
    """Show the frontends an engine's personas; and, where they are from a file, each valid version of it from now on.

    Args:
        announcement: the engine's.
        board: shows which version it is, as long as somebody has it.
        stats: the engine's.

    Raises:
        ValueError: they cannot be shown.
    """
    watch = PersonasWatch(fits, announcement, board.values, stats)
    parallel = fits.vllm_config.parallel_config
    # Launched by others, each rank is an engine with a frontend of its own, and all must go by one version.
    if fits.config.personas_file is not None and parallel.distributed_executor_backend != "external_launcher":
        every(INTERVAL, board.closed, watch.look)


class PersonasWatch:
    """Holds nothing that an engine frees when it ends.

    Args:
        fits: an engine's reward model, with the personas of its start.
        announcement: the engine's.
        values: of its board.
        stats: its own.
    """

    def __init__(self, fits: Fit, announcement: Path, values: np.ndarray, stats: Stats) -> None:
        self.fits, self.announcement, self.values, self.stats = fits, announcement, values, stats
        self.path = fits.config.personas_file or ""
        self.taken = self.seen = Look()
        """Of the file that was read last, and of the last look"""
        self.refused = b""
        """Digest of the version that was refused last"""
        # Now, since everybody waits while a tokenizer is copied.
        self.checked_by = fits if fits.config.personas_file is None else fits.on_another_thread()
        try:
            self.show(fits)
        except OSError as error:
            raise ValueError(f"pad cannot tell the frontend its personas: {one_line(error)}") from error

    def show(self, fits: Fit) -> None:
        """Let the frontends go by the personas of ``fits``. Raises OSError where they cannot be told."""
        personas = fits.personas()
        show_personas(self.announcement, personas)
        self.version, self.names = personas.version, set(personas.arguments)
        self.count(errors=0)

    def count(self, errors: int) -> None:
        """Of the numbers under ``/metrics``; the engine's thread writes the others."""
        self.stats.personas_errors += errors
        self.stats.personas_version = self.version
        for name in ("personas_errors", "personas_version"):
            self.values[NAMES.index(name)] = getattr(self.stats, name)

    def look(self) -> None:
        """Take the file if it is another one, and at rest. Never raises."""
        try:
            now, last = Look.at(self.path), self.seen
            self.seen = now
            if now != self.taken and (now == last or now.is_whole_after(self.taken)):
                content = self.read(now)
                if content is not None:
                    self.taken = now
                    self.take(content)
            self.count(errors=0)  # again: the engine's thread may have written what was true before
        except Exception as error:
            self.refuse(b"", error)

    def read(self, expected: Look) -> bytes | None:
        """What the file says; b"" where there is none; None where it is another one already.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return b"" if expected == Look() else None
        with open(file, "rb") as opened:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ValueError("it is no regular file")
            if expected.size > MAX_BYTES:
                raise ValueError(f"{expected.size} bytes, at most {MAX_BYTES} are read")
            content = opened.read(MAX_BYTES)
            return content if Look.of(os.fstat(file)) == expected == Look.at(self.path) else None

    def take(self, content: bytes) -> None:
        """Let requests that come from now on go by this version, if it is valid and another one."""
        try:
            if self.taken == Look():
                raise ValueError(f"pad.personas={self.path!r}: the file is gone")
            new = self.checked_by.with_personas(parse_file("pad.personas", self.path, content))
        except Exception as error:  # whatever a parser raises
            return self.refuse(content, error)
        before, version = self.names, self.version
        try:
            self.show(new)
        except OSError:
            self.taken = Look()  # and try again
            raise
        self.refused = b""
        if self.version != version:
            logger.info(
                "PAD: new requests get version %s of the personas (%s): %d personas, %d added, %d removed.",
                shown_version(self.version),
                self.path,
                len(self.names),
                len(self.names - before),
                len(before - self.names),
            )
        return None

    def refuse(self, content: bytes, error: Exception) -> None:
        """Say once of each version that it is broken."""
        digest = hashlib.sha256(content + one_line(error).encode()).digest()
        if digest == self.refused:
            return
        self.refused = digest
        self.count(errors=1)
        logger.error(
            "PAD: the new version of the personas is refused: %s. Requests still get version %s.",
            one_line(error),
            shown_version(self.version),
        )
