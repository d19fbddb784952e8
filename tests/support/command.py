"""Commands as a user types them, in processes that have vLLM already."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.engine import Preloaded, fork_processes


def run_command(
    arguments: Sequence[Any], folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """``pad-vllm`` with these arguments; see :func:`run_python`."""
    return run_python([Path(sys.executable).with_name("pad-vllm"), *arguments], folder, environment)


def run_python(
    arguments: Sequence[Any],
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    status: int = 0,
) -> str:
    """A script, or ``-m`` and a module, to its end; what it printed. AssertionError where it ended with another status.
    ``environment`` is added to this one."""
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as work:
        log = Path(work) / "log"
        variables = os.environ | (environment or {})
        process = Preloaded("v1").Process(target=_run, args=(arguments, folder or Path.cwd(), log, variables))
        process.start()
        process.join()
        printed = log.read_text()
    assert process.exitcode == status, f"{arguments}\n{printed[-6000:]}"
    return printed


def _run(arguments: list[str], folder: Path, log: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    fork_processes()
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path[0] = str(folder)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sys.stdout.flush()
