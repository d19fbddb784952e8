"""``pad-vllm fit --update``: a persona, written into a file that servers read and others write."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest

from pad_vllm import updating
from pad_vllm.cli import main
from pad_vllm.config import PADConfig, read_file
from pad_vllm.updating import update_personas
from tests.unit.test_sliders import write_comparisons

ADA = {"pad_preference": ["Be brief.", "Be kind."], "pad_preference_weights": [1.0, -0.5], "pad_reference": "neutral"}
AS_WRITTEN = {key.removeprefix("pad_"): value for key, value in ADA.items()}
YAML = """\
# Ours.
terse:  # as the paper has it
  preference: Be concise.
  beta: 1.2

# Of yesterday.
ada: &ada
  preference: |
    Be playful.
    # no comment
  beta: 0.8

# The last.
mixed: {weights: [0.5, 0.2], top_k: 8}  # by heads
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "personas.yaml"
    path.write_text(YAML)
    return path


def test_other_personas_stay_as_they_are_and_so_do_comments(file):
    before = read_file("", str(file))
    update_personas(file, "ada", ADA)
    after = read_file("", str(file))
    assert after == before | {"ada": {**AS_WRITTEN, "beta": 0.8}}
    text = file.read_text()
    old = YAML[YAML.index("ada: &ada") : YAML.index("\n# The last.")]
    new = """\
ada:
  preference: [Be brief., Be kind.]
  preference_weights: [1.0, -0.5]
  reference: neutral
  beta: 0.8
"""
    assert text == YAML.replace(old, new)
    update_personas(file, "ben", {"weights": [1, 0.5]})
    assert read_file("", str(file)) == after | {"ben": {"weights": [1, 0.5]}}
    assert file.read_text().startswith(text)
    assert list(after) == list(before)
    assert [path.name for path in file.parent.iterdir()] == ["personas.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing yet\n",
        "{ada: {beta: 1}, ben: {beta: 2}}\n",
        "---\nben:\n  beta: 2\n...\n",
        "  ada:\n    beta: 1\n  ben:\n    beta: 2",
        "ada: &x\n  beta: 1\nben: *x\n",
        "ben:\n  preference: |\n    A text\n    # of two lines\nada: {beta: 1}",
        '"ada":\n  beta: 1\n\n\n',
    ],
)
def test_whatever_yaml_it_is(text, file):
    file.write_text(text)
    before = read_file("", str(file)) or {}
    update_personas(file, "ada", ADA)
    kept = {"beta": 1.0} if "ada" in before else {}
    assert read_file("", str(file)) == before | {"ada": AS_WRITTEN | kept}


def test_the_strength_and_its_bound_stay(file):
    own = {"beta": 0.8, "max_divergence": 0.4, "top_k": 12, "cache_salt": "hers"}
    file.write_text(json.dumps({"ada": {"weights": [1, 2], **own}}))
    update_personas(file, "ada", ADA)
    assert read_file("", str(file)) == {"ada": AS_WRITTEN | own}


def test_json_and_a_file_that_is_not_there_yet(tmp_path):
    path = tmp_path / "personas.json"
    update_personas(path, "ada", ADA)
    update_personas(path, "Zoë", {"beta": 2})
    assert json.loads(path.read_text()) == {"ada": AS_WRITTEN, "Zoë": {"beta": 2}}
    assert "Zoë" in path.read_text()
    personas = PADConfig.from_pad({"reward_model": "/nowhere", "personas": str(path)}).personas
    assert personas["ada"].preference_weights == (1.0, -0.5)


def test_nobody_else_reads_a_private_file_while_it_is_written(file, monkeypatch):
    file.chmod(0o600)
    sync, seen = os.fsync, []

    def look(written: int) -> None:
        seen.extend(stat.S_IMODE(one.stat().st_mode) for one in file.parent.iterdir())
        sync(written)

    chown = os.fchown
    monkeypatch.setattr(updating.os, "fchown", lambda written, *owner: (look(written), chown(written, *owner)))
    update_personas(file, "ada", ADA)
    assert seen == [0o600] * 2


def test_permissions_and_links_stay(file, tmp_path):
    file.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    update_personas(link, "ada", ADA)
    assert link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert "Be kind." in file.read_text()


@pytest.mark.parametrize(
    ("text", "name", "arguments", "words"),
    [
        ("a: {bata: 1}\n", "ada", ADA, r"pad.personas\['a'\]: pad_bata: no such argument.*; nothing was changed"),
        ("[1]\n", "ada", ADA, "must be an object of name -> request arguments; nothing was changed"),
        ("a: {\n", "ada", ADA, "line 2"),
        (YAML, "ada", {"pad_beta": -1}, r"pad.personas\['ada'\]: pad_beta=-1"),
        (YAML, " ", ADA, "--name=' ': must not be empty"),
    ],
)
def test_what_a_server_would_refuse_is_not_written(file, text, name, arguments, words):
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        update_personas(file, name, arguments)
    assert file.read_text() == text
    assert len(list(file.parent.iterdir())) == 1


def test_a_failure_leaves_the_file_as_it_was(file, monkeypatch):
    monkeypatch.setattr(updating.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        update_personas(file, "ada", ADA)
    assert file.read_text() == YAML
    assert len(list(file.parent.iterdir())) == 1


def test_a_lock_that_stays_is_named(file, monkeypatch):
    monkeypatch.setattr(updating, "MAX_WAIT", 0.1)
    with updating._locked(file), pytest.raises(TimeoutError, match=r"personas\.yaml is locked by another process"):
        update_personas(file, "ada", ADA)
    update_personas(file, "ada", ADA)


def test_who_takes_no_lock_loses_nothing_either(file, monkeypatch):
    """An editor saves while a persona is being written."""
    real, edits = updating.with_persona, iter(["eve: {beta: 3}\n"])

    def slow(*args):
        content = real(*args)
        if edit := next(edits, None):
            with file.open("a") as opened:
                opened.write(edit)
        return content

    monkeypatch.setattr(updating, "with_persona", slow)
    update_personas(file, "ada", ADA)
    found = read_file("", str(file))
    assert found["eve"] == {"beta": 3}
    assert found["ada"]["preference"] == ADA["pad_preference"]


def update_six(path: Path, who: str, all_ready) -> None:
    all_ready.wait(60)
    for i in range(6):
        update_personas(path, f"{who}{i}", {"pad_preference": f"text {i}", "pad_beta": i / 10})
    update_personas(path, "both", {"pad_preference": who})


@pytest.mark.parametrize("name", ["new.json", "new.yaml"])
def test_of_updates_at_once_none_is_lost(tmp_path, name):
    """From the first, which makes the file; and who reads finds a whole version at any time."""
    path, seen, fork = tmp_path / name, [], multiprocessing.get_context("fork")
    all_ready = fork.Barrier(4)
    writers = [fork.Process(target=update_six, args=(path, who, all_ready)) for who in "xyz"]
    for writer in writers:
        writer.start()
    all_ready.wait(60)
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            seen.append(len(read_file("", str(path))))
        time.sleep(0.002)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    found = read_file("", str(path))
    assert set(found) == {"both"} | {f"{who}{i}" for who in "xyz" for i in range(6)}
    assert found["y5"] == {"preference": "text 5", "beta": 0.5}
    assert found["both"]["preference"] in ("x", "y", "z")
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert os.listdir(tmp_path) == [name]


def test_the_command_writes_a_persona(models, tmp_path, capsys, file):
    own = write_comparisons(tmp_path / "own.jsonl", 20)
    attributes = Path(tmp_path / "attributes.json")
    attributes.write_text(json.dumps(["be brief", "be kind"]))
    command = ["fit", str(own), "--reward-model", str(models.reward), "--attributes", str(attributes)]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--update", str(file), "--name", "ada"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert out.endswith(f"'ada' is in {file}.\n")
    printed = json.loads(out.splitlines()[-2])["ada"]
    found = read_file("", str(file))
    assert found["ada"] == {key.removeprefix("pad_"): value for key, value in printed.items()} | {"beta": 0.8}
    assert set(found) == {"terse", "ada", "mixed"}
    with pytest.raises(SystemExit):
        main([*command, "--update", str(file)])
    assert "say whose persona it is by --name" in capsys.readouterr().err
