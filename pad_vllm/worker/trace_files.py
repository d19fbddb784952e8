"""Traces on their way to files: a thread with a bounded queue, and files of bounded size and number.

Nothing here raises into an engine that runs, and nothing waits in it: a line that finds the queue full, or the folder
gone or the disk full, is lost and counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

MAX_QUEUED = 4096
"""Requests that are gone and wait for the thread."""
FILE_NAME = re.compile(r"pad-traces-(\d+)-(\d+)\.jsonl")
"""Of an engine's number, and that of the file."""
CLOSE_SECONDS = 5.0
"""That a process which ends waits for the lines that are left."""


class TraceFiles:
    """An engine's files in a folder, the newest of which grows.

    Args:
        folder: made if it is not there, now and later.
        engine: number of the engine among those of the server.
        max_bytes: of a file; the next one begins with the line that has no room in it.
        max_files: of this engine in the folder; the oldest are removed.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: str, engine: int, max_bytes: int, max_files: int) -> None:
        self.folder, self.engine, self.max_bytes, self.max_files = Path(folder), engine, max_bytes, max_files
        self._file: int | None = None
        self._size = 0
        try:
            # The first line begins a file. If each start began one, starts would remove old files for empty ones.
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ValueError(f"pad.trace={folder!r}: cannot be written ({error.strerror})") from None

    def write(self, line: bytes) -> None:
        """Append a line, which ends with its newline. Raises OSError, and leaves no part of it."""
        if self._file is None or os.fstat(self._file).st_nlink == 0 or self._size + len(line) > self.max_bytes:
            self._open()
        assert self._file is not None
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> None:
        """Begin the next file, and remove what is too many."""
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        number = max(self._numbers(), default=0)
        while self._file is None:
            number += 1
            with contextlib.suppress(FileExistsError):  # another server's
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
                self._file = os.open(self._path(number), flags, 0o600)
        self._size = 0
        for old in sorted(self._numbers())[: -self.max_files]:
            with contextlib.suppress(OSError):
                self._path(old).unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"pad-traces-{self.engine}-{number:06}.jsonl"

    def _numbers(self) -> list[int]:
        found = (FILE_NAME.fullmatch(name) for name in os.listdir(self.folder))
        return [int(match[2]) for match in found if match and int(match[1]) == self.engine]


class TraceWriter:
    """A thread that makes lines of what it is given, and writes them.

    Args:
        files: where to.
        make: a line of what was put, as JSON. It may wait for a device.
        max_queued: more than so many are lost.
    """

    def __init__(self, files: TraceFiles, make: Callable[[Any], dict[str, Any]], max_queued: int = MAX_QUEUED) -> None:
        self.files, self.make = files, make
        self.num_refused = 0
        """Lines lost because the queue was full"""
        self.num_failed = 0
        """Lines lost because they could not be made or written"""
        self.when_idle: Callable[[], None] | None = None
        """Called by the thread when nothing is left to write"""
        self._queue: queue.Queue[Any] = queue.Queue(max_queued)
        self._fails = False
        self._thread = threading.Thread(target=self._run, name="pad-traces", daemon=True)
        self._thread.start()

    @property
    def num_lost(self) -> int:
        return self.num_refused + self.num_failed

    def put(self, item: Any) -> None:
        """Have a line written, or count it as lost."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.num_refused += 1

    def close(self) -> None:
        """Let the thread write what is there, and end."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=CLOSE_SECONDS)
                self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                line = json.dumps(self.make(item), ensure_ascii=False, separators=(",", ":"))
                self.files.write(line.encode(errors="replace") + b"\n")
                self._fails = False
            except Exception as error:
                self.num_failed += 1
                if not self._fails:  # once, until it works again
                    logger.warning("PAD cannot write traces to %s: %r. Their lines are lost.", self.files.folder, error)
                self._fails = True
            del item
            if self.when_idle is not None and self._queue.empty():
                with contextlib.suppress(Exception):
                    self.when_idle()
        self.files.close()
