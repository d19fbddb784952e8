"""Machines of a deployment, played by processes of this one that share no temporary folder, cache or announcements but
what they are told to."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pad_vllm.channel
from pad_vllm.channel import ANNOUNCE_DIR, Announcement
from pad_vllm.params import PAD
from pad_vllm.personas import Personas, show_personas
from tests.support.engine import CORES, PLUGIN
from tests.support.fixtures import MIX, Models
from tests.support.server import Server

PERSONAS = """
terse:
  preference: "concise, formal"
  beta: 1.5
two:
  preference: [formal, playful]
  preference_weights: [1, -0.5]
  reference: neutral
"""
MAX_TOKENS = 24
ASKED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"pad_preference": "playful"}, {"preference": "playful"}),
    ({"pad_persona": "terse"}, {"preference": "concise, formal", "beta": 1.5}),
    (
        {"pad_persona": "two"},
        {"preference": ["formal", "playful"], "preference_weights": [1, -0.5], "reference": "neutral"},
    ),
    ({"pad_weights": list(MIX), "pad_beta": 0.7}, {"head": "mixed", "beta": 0.7}),
]
"""Arguments of guided requests, and what the oracle is asked."""


class Node:
    """A machine: folders of its own, and one core. ``shared``: a folder that others have too, which need not be there
    yet."""

    def __init__(self, root: Path, rank: int, shared: Path | None = None) -> None:
        self.folder = root / f"node{rank}"
        self.log = self.folder / "log"
        # A socket's path has room for few characters.
        self._temporary = tempfile.TemporaryDirectory(prefix=f"n{rank}-", ignore_cleanup_errors=True)
        self.temporary = self._temporary.name
        for name in ("cache", "home"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "personas.yaml").write_text(PERSONAS)
        core = str(CORES[rank % len(CORES)])
        self.environment = {
            "TMPDIR": self.temporary,
            "HOME": str(self.folder / "home"),
            "PAD_VLLM_CACHE": str(self.folder / "cache"),
            "VLLM_CACHE_ROOT": str(self.folder / "cache"),
            "VLLM_CPU_OMP_THREADS_BIND": core,
            "VLLM_HOST_IP": "127.0.0.1",
        }
        if shared is not None:
            self.environment[ANNOUNCE_DIR] = str(shared)

    def pad(self, reward_model: Path, **settings: Any) -> list[str]:
        """Flags that guide; the personas are this machine's file."""
        pad = {"reward_model": str(reward_model), "personas": str(self.folder / "personas.yaml"), **settings}
        return ["--logits-processors", *PLUGIN, "--additional-config", json.dumps({"pad": pad})]

    def announcements(self) -> list[Path]:
        """Of engines that announced themselves to this machine alone."""
        return list(Path(self.temporary).glob("pad-vllm-*/*.json"))


def own_address() -> str:
    """Of this machine, as others know it; loopback where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # asks for the way there, and sends nothing
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


@contextmanager
def another_server(shared: Path) -> Iterator[None]:
    """The engine of another server, which announces to the same folder."""

    class Engine:
        pass

    engine, before = Engine(), os.environ.get(ANNOUNCE_DIR)
    os.environ[ANNOUNCE_DIR] = str(shared)
    try:
        its = Announcement(True, instance_id="theirs", data_parallel_address="192.0.2.1:1")
        path = pad_vllm.channel.announce(its, engine)
        assert path is not None
        show_personas(path, Personas.of({"theirs": PAD(beta=1.0)}))
        yield
    finally:
        del engine
        if before is None:
            del os.environ[ANNOUNCE_DIR]
        else:
            os.environ[ANNOUNCE_DIR] = before


def complete(server: Server, prompt: list[int], max_tokens: int = MAX_TOKENS, **body: Any) -> list[int]:
    """The ids of a greedy answer; the server must run with ``--return-tokens-as-token-ids``."""
    headers = {"X_data_parallel_rank": str(body.pop("rank"))} if "rank" in body else {}
    asked = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    status, answer = server.post("/v1/completions", asked | body, **headers)
    assert status == 200, answer
    return [int(token.removeprefix("token_id:")) for token in answer["choices"][0]["logprobs"]["tokens"]]


def check_answers(server: Server, models: Models, encode: Any, expect: Any, **body: Any) -> None:
    """Guided and unguided answers equal the oracle's."""
    prompt = encode("say why " * 6)
    for xargs, asked in ASKED:
        out = complete(server, prompt, vllm_xargs=xargs, **body)
        assert out == expect(prompt, max_tokens=MAX_TOKENS, **asked), xargs
    assert complete(server, prompt, **body) == models.ask(tuple(prompt), None, None, False, max_tokens=MAX_TOKENS)


def guided_requests(server: Server) -> dict[str, float]:
    """Of each engine, under ``/metrics``."""
    text = server.get("/metrics")[1]
    shown = re.findall(r'^pad_guided_requests_total\{engine="(\d)",model_name="base"\} (\S+)$', text, re.M)
    return {engine: float(number) for engine, number in shown}


def check_own_alone(server: Server) -> None:
    """Another server's engines, in the same folder, are none of this one's."""
    asked = {"prompt": "a", "max_tokens": 1, "vllm_xargs": {"pad_persona": "theirs"}}
    status, answer = server.post("/v1/completions", asked)
    assert status == 400
    assert "pad_persona='theirs': no such persona" in answer["error"]["message"]
