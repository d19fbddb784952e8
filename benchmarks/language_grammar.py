"""Faults of grammar in answers, by Harper, where it is installed.

``npm install harper.js`` brings this checker whole (Apache-2.0): it runs in Node.js, and loads nothing more.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

FAULTS = (
    "Agreement",
    "BoundaryError",
    "Grammar",
    "Miscellaneous",
    "Nonstandard",
    "Punctuation",
    "Repetition",
    "Typo",
    "Usage",
    "WordChoice",
)
"""What counts, of Harper's kinds: not spelling, which takes names for faults, and not style."""
TEXTS_AT_ONCE = 500
_SCRIPT = """
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
const [, folder] = process.argv;
const load = (name) => import(pathToFileURL(`${folder}/dist/${name}.js`));
const { LocalLinter } = await load("index");
const { binaryInlined } = await load("binaryInlined");
const linter = new LocalLinter({ binary: binaryInlined });
const found = [];
for (const text of JSON.parse(readFileSync(0, "utf8")))
    found.push((await linter.lint(text, { language: "plaintext" })).map((lint) => lint.lint_kind()));
process.stdout.write(JSON.stringify(found), () => process.exit(0));
"""


class Harper:
    """The checker, and what it found so far.

    Args:
        folder: of the package ``harper.js``.
        kept: a file of what it found, by text.
    """

    def __init__(self, folder: Path, kept: Path) -> None:
        self.folder, self.kept = folder.absolute(), kept
        self.found: dict[str, int] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}

    def faults_per_hundred_words(self, texts: Sequence[str]) -> list[float]:
        """Of each text.

        Raises:
            ValueError: the checker cannot be run.
        """
        missing = [text for text in dict.fromkeys(texts) if text not in self.found]
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            some = missing[start : start + TEXTS_AT_ONCE]
            self.found.update(zip(some, map(_count, self._check(some)), strict=True))
            self.kept.write_text(json.dumps(self.found), "utf-8")
        return [100 * self.found[text] / max(len(text.split()), 1) for text in texts]

    def _check(self, texts: Sequence[str]) -> list[list[str]]:
        command = ["node", "--input-type=module", "--eval", _SCRIPT, str(self.folder)]
        try:
            done = subprocess.run(command, input=json.dumps(texts), capture_output=True, check=True, encoding="utf-8")
        except FileNotFoundError:
            raise ValueError("--harper: Node.js is not installed") from None
        except subprocess.CalledProcessError as error:
            raise ValueError(f"--harper={self.folder}: {error.stderr.strip()}") from None
        return json.loads(done.stdout)


def _count(kinds: Sequence[str]) -> int:
    return sum(kind in FAULTS for kind in kinds)
