"""Personas: reading them, their versions, and the one of a request.

An engine's first rank looks at the personas' file (:mod:`pad_vllm.worker.watch`) and shows each valid version beside
its announcement. Admission, in the frontend, looks a request's persona up there, once, and sends what it says along
with the request: whichever engine, rank or runner then guides it, and however long it waits, goes by that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pad_vllm.channel import open_own_file, opened_folder, write_whole
from pad_vllm.checks import check_int, check_text, shown
from pad_vllm.params import ADMITTED, PAD, PREFIX, check_adapters, check_persona

VERSION_BYTES = 6
"""Of a version: a metric is a float64, which holds integers of up to 53 bits."""


def read_personas(personas: Any, max_top_k: int, adapters: Collection[str] | None = None) -> dict[str, PAD]:
    """What a configuration, or a file of personas, says: name -> request arguments, with or without their prefix.

    Args:
        max_top_k: most candidates that a request may ask for.
        adapters: names of the server's adapters; None: nobody knows them here.

    Raises:
        ValueError: naming the persona, the argument, its value and what is allowed.
    """
    if not isinstance(personas, Mapping):
        raise ValueError(f"pad.personas={shown(personas)}: must be an object of name -> request arguments")
    read: dict[str, PAD] = {}
    for name, arguments in personas.items():
        key = f"pad.personas[{shown(name)}]"
        check_text("pad.personas: a name", name)
        if not isinstance(arguments, Mapping) or not arguments:
            raise ValueError(f"{key}={shown(arguments)}: must be an object with at least one request argument")
        try:
            persona = PAD.from_extra_args(prefixed(arguments)) or PAD()
            if persona.persona is not None:
                raise ValueError("pad_persona: a persona cannot name another")
            if persona.top_k is not None:
                check_int("pad_top_k", persona.top_k, 1, max_top_k)
            persona.over(PAD())  # weights without preferences
            if adapters is not None:
                check_adapters(persona.adapters, adapters)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        read[name] = persona
    return read


def prefixed(arguments: Mapping[Any, Any]) -> dict[str, Any]:
    """A persona's arguments with their prefix. Raises ValueError for one that is given both with and without it."""
    found = {k if str(k).startswith(PREFIX) else f"{PREFIX}{k}": v for k, v in arguments.items()}
    if len(found) < len(arguments):
        raise ValueError(f"an argument is given twice, with the prefix {PREFIX} and without it")
    if ADMITTED in found:
        raise ValueError(f"{ADMITTED}: no such argument")
    return found


class Admitted(dict):
    """A request's persona as it was when the request was admitted: its ``name`` and ``arguments``, and the ``version``
    of the personas that it is of.

    It travels in the request's own arguments, under :data:`~pad_vllm.params.ADMITTED`. Only admission makes one: what
    comes from a client is of another type.
    """


def admitted_persona(extra_args: Mapping[str, Any] | None) -> PAD | None:
    """The persona that admission sent along with a request; None where it has none."""
    admitted = (extra_args or {}).get(ADMITTED)
    return None if admitted is None else PAD.from_extra_args(admitted["arguments"])


def over_persona(asked: PAD, admitted: Admitted | None) -> PAD:
    """A request's own fields over those of its persona."""
    persona = None if admitted is None else PAD.from_extra_args(admitted["arguments"])
    return asked.over(persona or PAD())


@dataclass(frozen=True)
class Personas:
    """A version of a server's personas."""

    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> request arguments."""
    version: int = 0
    """The first 48 bits of their SHA-256: equal personas have equal versions, in every engine of every server."""

    @classmethod
    def of(cls, personas: Mapping[str, PAD]) -> Personas:
        arguments = {name: persona.extra_args() for name, persona in personas.items()}
        digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).digest()
        return cls(arguments, int.from_bytes(digest[:VERSION_BYTES], "big"))

    def admit(self, name: str) -> Admitted:
        """Raises ValueError for an unknown persona."""
        arguments = dict(self.arguments[check_persona(name, self.arguments)])
        return Admitted(name=name, arguments=arguments, version=self.version)


def shown_version(version: int) -> str:
    """As logs say it."""
    return f"{version:0{2 * VERSION_BYTES}x}"


def personas_path(announcement: Path) -> Path:
    """Where an engine's first rank shows its personas, beside its announcement."""
    return announcement.with_suffix(".personas")


def show_personas(announcement: Path, personas: Personas) -> None:
    """Let the frontends go by a version, for requests that come from now on. Raises OSError where it cannot be
    written."""
    path = personas_path(announcement)
    content = {"arguments": personas.arguments, "version": personas.version}
    with opened_folder(path.parent) as folder:
        os.close(write_whole(path.name, folder, json.dumps(content).encode()))


_shown: dict[Path, tuple[tuple[int, int, int], Personas]] = {}
"""By an engine's file: its inode, time and size when it was read last, and the personas in it."""


def personas_shown(announcement: Path) -> Personas | None:
    """The version that an engine shows, or, where the file cannot be read now, showed last; None where it shows none:
    another rank than its first, or just withdrawn."""
    path = personas_path(announcement)
    try:
        with opened_folder(path.parent) as folder, open(open_own_file(path.name, folder), "rb") as file:
            status = os.fstat(file.fileno())
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            found = _shown.get(path)
            if found is None or found[0] != stamp:
                found = stamp, Personas(**json.load(file))
                _shown[path] = found
            return found[1]
    except FileNotFoundError:
        _shown.pop(path, None)
    except (OSError, ValueError, TypeError):  # this process has no descriptor left, say
        pass
    found = _shown.get(path)
    return None if found is None else found[1]
