"""How answers go to the grammar checker and back. Harper itself is an npm package that tests do not have: a script of
its interface stands in, which finds what its text says."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.language_grammar import Harper

INTERFACE = """
export class LocalLinter {
    constructor({ binary }) { this.binary = binary; }
    async setup() {}
    async lint(text, { language }) {
        if (language !== "plaintext" || this.binary !== 7) throw new Error("not as it was asked for");
        const kinds = text.split(" ").filter((word) => word.endsWith("!")).map((word) => word.slice(0, -1));
        return kinds.map((kind) => ({ lint_kind: () => kind }));
    }
}
"""
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="without Node.js there is no Harper")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "index.js").write_text(INTERFACE)
    (tmp_path / "dist" / "binaryInlined.js").write_text("export const binaryInlined = 7;")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    return tmp_path


def test_faults_are_counted_by_kind_and_kept(folder):
    texts = ["one two Agreement! Typo!", "Spelling! is no fault here", "", "one two Agreement! Typo!"]
    harper = Harper(folder, folder / "kept.json")
    assert harper.faults_per_hundred_words(texts) == [50, 0, 0, 50]
    shutil.rmtree(folder / "dist")
    assert Harper(folder, folder / "kept.json").faults_per_hundred_words(texts) == [50, 0, 0, 50]


def test_a_checker_that_is_not_there_is_named(folder):
    shutil.rmtree(folder / "dist")
    with pytest.raises(ValueError, match=r"(?s)--harper=.*Cannot find module"):
        Harper(folder, folder / "kept.json").faults_per_hundred_words(["one"])
