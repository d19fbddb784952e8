"""Hold what is about to be published against ``release/contents.toml``: ``python -m release.contents ARCHIVE...``."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import tomllib

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".toml")


def faults(archive: Path, listed: Mapping[str, Mapping[str, Any]], root: Path = ROOT) -> Iterator[str]:
    """A line for each thing that is wrong with a wheel or a source distribution.

    Args:
        archive: its path.
        listed: the list; its keys are patterns of archives' names.
        root: of the repository that the archive was built from.
    """
    entry = next((entry for pattern, entry in listed.items() if archive.match(pattern)), None)
    if entry is None:
        yield f"{archive.name}: no such archive in {LIST.name}"
        return
    if (size := archive.stat().st_size) > entry["max_bytes"]:
        yield f"{archive.name}: {size:,} bytes, and at most {entry['max_bytes']:,} are allowed"
    names = members(archive)
    for name in sorted(names):
        if not any(matches(name, pattern) for pattern in entry["files"]):
            yield f"{archive.name}: {name} does not belong in it"
    for pattern in entry["files"]:
        if not any(matches(name, pattern) for name in names):
            yield f"{archive.name}: nothing in it is {pattern}"
        for missing in sorted(there(pattern, entry.get("sources", {}), root) - names):
            yield f"{archive.name}: {missing} is missing"


def members(archive: Path) -> set[str]:
    """The files of an archive; those of a source distribution without its one folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as source:
        return {member.name.partition("/")[2] for member in source.getmembers() if not member.isdir()}


def matches(name: str, pattern: str) -> bool:
    """Of whole paths, folder by folder."""
    return PurePosixPath(f"/{name}").match(f"/{pattern}")


def there(pattern: str, sources: Mapping[str, str], root: Path) -> set[str]:
    """What the repository has of a pattern, by the names that it has in the archive."""
    folder = str(PurePosixPath(pattern).parent)
    moved = next((inside for inside in sources if f"{folder}/".startswith(f"{inside}/")), None)
    if moved is None:
        return {str(path.relative_to(root)) for path in root.glob(pattern)}
    found = root.glob(sources[moved] + pattern.removeprefix(moved))
    return {moved + str(path.relative_to(root)).removeprefix(sources[moved]) for path in found}


def main(archives: Sequence[str]) -> None:
    listed = tomllib.loads(LIST.read_text())
    if found := [fault for archive in archives for fault in faults(Path(archive), listed)]:
        raise SystemExit("\n".join(found))
    if unbuilt := [pattern for pattern in listed if not any(Path(archive).match(pattern) for archive in archives)]:
        raise SystemExit(f"not there: {', '.join(unbuilt)}")
    for archive in archives:
        print(f"{Path(archive).name}: {len(members(Path(archive)))} files, {Path(archive).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
