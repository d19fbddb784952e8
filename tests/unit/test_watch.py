"""A personas' file that changes while an engine runs: which versions are taken, and which are not."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pad_vllm import channel
from pad_vllm.channel import ANNOUNCE_DIR, Announcement
from pad_vllm.config import PADConfig
from pad_vllm.params import PAD
from pad_vllm.personas import Personas, personas_path, personas_shown
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.stats import NAMES, Stats
from pad_vllm.worker import watch
from pad_vllm.worker.compatibility import Fit, Weights
from pad_vllm.worker.tokens import SharedTokens
from pad_vllm.worker.watch import PersonasWatch

FIRST = {"a": {"preference": "brief"}, "b": {"beta": 2, "top_k": 3}}
SECOND = {"a": {"preference": "kind", "beta": 0.5}, "c": {"weights": [1.0, 0.5]}}


class Watched:
    """An engine's watch of a file, a look at a time."""

    def __init__(self, models, folder: Path, suffix: str = ".json", **pad) -> None:
        self.file = folder / f"personas{suffix}"
        self.replace(json.dumps(FIRST))
        config = PADConfig.from_pad({"reward_model": str(models.named), "personas": str(self.file), **pad})
        template = PromptTemplate(models.tokenizer)
        template.max_preference_tokens = 64
        heads = SimpleNamespace(names=("x", "y"))
        engine = SimpleNamespace(parallel_config=None)
        tokens = SharedTokens(models.tokenizer)
        fits = Fit(config, engine, tokens, {}, 512, template, 0, heads, Weights(frozenset(), ()), None)
        self.announcement = channel.announce(Announcement(True), self)
        self.values, self.stats = np.zeros(len(NAMES)), Stats()
        self.watch = PersonasWatch(fits, self.announcement, self.values, self.stats)

    def replace(self, text: str) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(text)
        time.sleep(0.01)  # a file system's clock may stand still for some milliseconds
        os.replace(part, self.file)

    def look(self, times: int = 1) -> dict[str, dict]:
        """What a frontend finds after a look."""
        for _ in range(times):
            self.watch.look()
        shown = personas_shown(self.announcement)
        assert self.number("personas_version") == shown.version == self.stats.personas_version
        return {name: dict(arguments) for name, arguments in shown.arguments.items()}

    def number(self, name: str) -> float:
        return self.values[NAMES.index(name)]


def as_shown(personas: dict) -> dict:
    return {
        name: PAD.from_extra_args({f"pad_{k}": v for k, v in one.items()}).extra_args()
        for name, one in personas.items()
    }


@pytest.fixture
def watched(models, tmp_path, monkeypatch):
    monkeypatch.setenv(ANNOUNCE_DIR, str(tmp_path / "announced"))
    (tmp_path / "personas").mkdir()

    def start(**pad) -> Watched:
        return Watched(models, tmp_path / "personas", **pad)

    return start


def test_what_replaces_the_file_is_taken_at_once(watched, log):
    one = watched()
    assert one.look(3) == as_shown(FIRST)
    version = one.number("personas_version")
    assert "PAD" not in log.text
    one.replace(json.dumps(SECOND))
    assert one.look() == as_shown(SECOND)
    assert "1 added, 1 removed" in log.text
    one.replace(json.dumps(FIRST, indent=3))
    assert one.look() == as_shown(FIRST)
    assert one.number("personas_version") == version
    assert one.number("personas_errors") == 0
    other = Personas.of({name: PAD.from_extra_args(args) for name, args in as_shown(FIRST).items()})
    assert version == other.version > 2**32


def test_what_is_written_where_it_lies_is_taken_when_it_rests(watched):
    """Of a torn text, what is there so far may be valid: YAML that ends after one of its personas."""
    one = watched(suffix=".yaml")
    assert one.look(2) == as_shown(FIRST)
    text = "a:\n  preference: kind\n  beta: 0.5\nc:\n  weights: [1.0, 0.5]\n"
    with one.file.open("w") as file:
        for line in text.splitlines(keepends=True):
            file.write(line)
            file.flush()
            assert one.look() == as_shown(FIRST)
    assert one.look() == as_shown(SECOND)
    assert one.number("personas_errors") == 0


BROKEN = {
    "torn": (json.dumps(SECOND)[:-20], "personas.json': "),
    "empty": ("", "personas.json': "),
    "a list": ("[1, 2]", r"pad.personas=\[1, 2\]: must be an object of name -> request arguments"),
    "a path": ('"other.json"', "pad.personas='other.json': must be an object"),
    "an argument": ('{"a": {"bata": 1}}', r"pad.personas\['a'\]: pad_bata: no such argument; did you mean 'pad_beta'"),
    "too long": (json.dumps(FIRST | {"z": {"preference": "word " * 500}}), r"pad.personas\['z'\]: pad_preference: "),
    "heads": ('{"a": {"weights": [1]}}', r"pad.personas\['a'\]: pad_weights: 1 weights for 2 value heads"),
    "adapters": ('{"a": {"adapter": "w"}}', r"pad.personas\['a'\]: pad_adapter='w': no such adapter"),
    "the default": (json.dumps({"b": {"beta": 1}}), "pad.default_persona='a': no such persona"),
    "twice": ('{"a": {"beta": 1}, "a": {"beta": 2}}', "'a' is given twice"),
    "sent": ('{"a": {"admitted": {}}}', r"pad.personas\['a'\]: pad_admitted: no such argument"),
}


def test_a_broken_version_changes_nothing_and_says_so_once(watched, log):
    one = watched(default_persona="a")
    one.look(2)
    for number, (text, words) in enumerate(BROKEN.values(), 1):
        log.clear()
        one.replace(text)
        assert one.look(3) == as_shown(FIRST)
        one.replace(text)  # once more
        assert one.look(3) == as_shown(FIRST)
        assert one.number("personas_errors") == number
        (record,) = log.records
        assert record.levelname == "ERROR"
        assert "is refused" in record.message
        assert re.search(words, record.message), record.message
    one.replace(json.dumps(SECOND))
    assert one.look() == as_shown(SECOND)


def test_what_is_small_and_long_when_it_is_written_out_is_refused(watched, log):
    """A few hundred bytes whose aliases stand for 9 ** 12 words."""
    one = watched(suffix=".yaml")
    one.look(2)
    lists = [f"&l{i} [{', '.join([f'*l{i - 1}' if i else 'x'] * 9)}]" for i in range(12)]
    one.replace(f"a: [{', '.join(lists)}]\n")
    assert one.look() == as_shown(FIRST)
    assert "must be an object with at least one request argument" in log.text
    assert len(log.text) < 1000


def test_a_file_that_is_gone_is_a_broken_version(watched, log):
    one = watched()
    one.look(2)
    one.file.unlink()
    one.look()
    one.replace(json.dumps(FIRST))  # as some editors save
    assert one.look(3) == as_shown(FIRST)
    assert one.number("personas_errors") == 0
    one.file.unlink()
    assert one.look(4) == as_shown(FIRST)
    assert one.number("personas_errors") == 1
    assert "the file is gone" in log.text
    os.mkfifo(one.file)  # which nobody writes: reading it would wait for ever
    assert one.look(4) == as_shown(FIRST)
    assert one.number("personas_errors") == 2
    one.replace(json.dumps(SECOND))
    assert one.look() == as_shown(SECOND)


def test_a_version_that_cannot_be_shown_is_tried_again(watched, log, monkeypatch):
    one = watched()
    one.look(2)
    with monkeypatch.context() as full:
        full.setattr(watch, "show_personas", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        one.replace(json.dumps(SECOND))
        assert one.look(3) == as_shown(FIRST)
    assert one.number("personas_errors") == 1
    assert "no space left" in log.text
    assert one.look() == as_shown(SECOND)


def test_a_version_that_cannot_be_read_now_is_the_last_one_that_was(watched, monkeypatch):
    """A frontend with no descriptor left guides as before. It is not as if nobody had a persona."""
    one = watched()
    assert one.look() == as_shown(FIRST)
    with monkeypatch.context() as full:
        full.setattr(os, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files")))
        assert personas_shown(one.announcement).arguments == as_shown(FIRST)
    personas_path(one.announcement).unlink()
    assert personas_shown(one.announcement) is None


def test_a_frontend_never_sees_two_versions_at_once(watched):
    """While a file is replaced, and written where it lies, as fast as it goes."""
    one = watched()
    one.look(2)
    versions, stop = [as_shown({"a": {"beta": i / 10}, "b": {"beta": i / 10}}) for i in range(1, 40)], threading.Event()

    def write() -> None:
        for i, version in enumerate(versions):
            text = json.dumps(version)
            if i % 3:
                one.replace(text)
            else:
                with one.file.open("w") as file:
                    for part in (text[:30], text[30:]):
                        file.write(part)
                        file.flush()
            one.watch.look()
        one.watch.look()
        stop.set()

    writer, seen = threading.Thread(target=write), []
    writer.start()
    while not stop.is_set():
        seen.append(personas_shown(one.announcement).arguments)
    writer.join()
    assert one.look(2) == versions[-1]
    assert all(found in [as_shown(FIRST), *versions] for found in seen)
    places = [versions.index(found) for found in seen if found in versions]
    assert places == sorted(places)
    assert len(set(places)) > 5
    assert one.number("personas_errors") == 0
