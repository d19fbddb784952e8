"""Two engines behind one server, a reward model in each."""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pad_vllm.params import PAD
from pad_vllm.personas import Personas, prefixed
from tests import oracle
from tests.support.engine import A_CORE_EACH
from tests.support.server import Server

PREFERENCE = "concise, formal"
MAX_TOKENS = 24
SETTINGS = [  # of a persona that changes: which of them are of one version must show in an answer
    {"preference": "concise, formal", "beta": 1.2, "top_k": 3},
    {"preference": "Please be playful, and give an example.", "beta": 0.8, "top_k": 8},
    {"preference": "say why, in detail", "beta": 1.6, "top_k": 30},
]


@pytest.fixture(scope="module")
def personas(tmp_path_factory) -> PersonasFile:
    return PersonasFile(tmp_path_factory.mktemp("personas") / "personas.yaml")


@pytest.fixture(scope="module")
def server(models, tmp_path_factory, personas):
    personas.replace({"terse": {"preference": PREFERENCE, "beta": 1.5}})
    pad = {"reward_model": str(models.named), "personas": str(personas.path)}
    server = Server(
        models.base,
        tmp_path_factory.mktemp("server") / "log",
        *("--data-parallel-size", "2", "--max-model-len", "256", "--return-tokens-as-token-ids"),
        *("--logits-processors", "pad_vllm:PADLogitsProcessor", "--additional-config", json.dumps({"pad": pad})),
        timeout=300,
        VLLM_CPU_OMP_THREADS_BIND=A_CORE_EACH,
    )
    yield server
    server.close()


class PersonasFile:
    """Of the server, as its operator and others write it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def text(personas: dict[str, dict]) -> str:
        """YAML with a line for each persona."""
        return "".join(f"{json.dumps(name)}: {json.dumps(one)}\n" for name, one in personas.items())

    def replace(self, personas: dict[str, dict]) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(self.text(personas))
        os.replace(part, self.path)

    def write_torn(self, text: str) -> None:
        """Where it lies, in two parts with a pause between them.

        The first part ends within the second persona, and is refused if an engine takes it: on a busy machine the pause
        may last for seconds, after which the file looks whole.
        """
        middle = text.index("{", text.index("\n")) + 1
        with self.path.open("w") as file:
            for part in (text[:middle], text[middle:]):
                file.write(part)
                file.flush()
                time.sleep(0.15)


class Load:
    """Clients that ask again and again, of both engines. An answer: when it was asked for, its status, what it is."""

    def __init__(self, server: Server, prompt: list[int], num_clients: int = 4) -> None:
        self.answers: list[tuple[float, int, Any]] = []
        self.stopped = threading.Event()

        def ask(rank: int) -> None:
            body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 1}
            while not self.stopped.is_set():
                began = time.monotonic()
                status, answer = server.post(
                    "/v1/completions", body | {"vllm_xargs": {"pad_persona": "terse"}}, X_data_parallel_rank=str(rank)
                )
                self.answers.append((began, status, ids_of(answer) if status == 200 else answer["error"]["message"]))

        self.clients = [threading.Thread(target=ask, args=(i % 2,)) for i in range(num_clients)]
        for client in self.clients:
            client.start()

    def wait_for(self, is_it: Callable[[int, Any], bool], seconds: float = 60) -> float:
        """When the first answer came of those that were asked for from now on and are so."""
        since = deadline = time.monotonic()
        while time.monotonic() < deadline + seconds:
            if any(began > since and is_it(status, what) for began, status, what in list(self.answers)):
                return time.monotonic()
            time.sleep(0.05)
        raise AssertionError(f"no such answer among {len(self.answers)}")

    def stop(self) -> None:
        self.stopped.set()
        for client in self.clients:
            client.join()


def ids_of(answer: dict[str, Any]) -> list[int]:
    return [int(token.removeprefix("token_id:")) for token in answer["choices"][0]["logprobs"]["tokens"]]


def metric_of_each(server: Server, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"^pad_{name}\{{.*\}} (\S+)$", server.get("/metrics")[1], re.M)]


def complete(server: Server, prompt: list[int], rank: int, **body) -> list[int]:
    status, answer = server.post(
        "/v1/completions",
        {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 1} | body,
        X_data_parallel_rank=str(rank),
    )
    assert status == 200, answer
    return ids_of(answer)


def test_each_engine_answers_as_the_oracle(models, encode, expect, server):
    for rank in (0, 1):
        for text in ("a", "say why " * 12):
            prompt = encode(text)
            for xargs, asked in (
                ({"pad_preference": "playful"}, {"preference": "playful"}),
                ({"pad_persona": "terse"}, {"preference": PREFERENCE, "beta": 1.5}),
            ):
                out = complete(server, prompt, rank, vllm_xargs=xargs)
                assert out == expect(prompt, max_tokens=MAX_TOKENS, **asked)
            assert complete(server, prompt, rank) == oracle.generate(models.base_model, prompt, MAX_TOKENS)
    log = server.log.read_text()
    assert log.count("PAD guidance by") == 2
    for rank in (0, 1):
        assert f"EngineCore_DP{rank}" in log


def test_both_engines_show_in_the_metrics_of_both_api_servers(encode, server):
    """Data parallelism has an API server for each engine, which collect what they count from files."""
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    for rank in (0, 1):
        complete(server, encode("a"), rank, vllm_xargs={"pad_persona": "terse"})
    for _ in range(4):  # whichever answers
        text = server.get("/metrics")[1]
        shown = dict(re.findall(r'^pad_guided_requests_total\{engine="(\d)",model_name="base"\} (\S+)$', text, re.M))
        assert set(shown) == {"0", "1"}
        assert all(float(number) >= 1 for number in shown.values())
        assert len(re.findall(r"^pad_kv_cache_usage_perc\{", text, re.M)) == 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_beam_search_with_guidance_is_refused(server, path):
    """vLLM would drop the arguments, and answer unguided."""
    prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    beams = prompt | {"use_beam_search": True, "n": 2, "max_tokens": 4}
    assert server.post(path, beams)[0] == 200
    status, answer = server.post(path, beams | {"vllm_xargs": {"pad_preference": "formal"}})
    assert status == 400
    assert "pad_preference: beam search cannot be guided" in answer["error"]["message"]
    status, answer = server.post(path, prompt | {"max_tokens": 4, "vllm_xargs": {"pad_prefrence": "formal"}})
    assert status == 400
    assert "did you mean 'pad_preference'" in answer["error"]["message"]


def wait_for_version(server: Server, personas: dict[str, PAD]) -> None:
    """Until both engines show these personas."""
    expected, deadline = Personas.of(personas).version, time.monotonic() + 60
    while metric_of_each(server, "personas_version") != [expected] * 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def refusals(server: Server, why: str = "") -> list[str]:
    """Lines of the log, one of each engine for each version that it refused."""
    refused = "the new version of the personas is refused: pad.personas"
    return [line for line in server.log.read_text().splitlines() if refused in line and why in line]


def test_personas_change_under_load(encode, expect, server, personas):
    """On both engines and by both API servers: no request is lost, each is guided by one version, none by an older one
    than another before it, and a broken version changes nothing."""
    prompt = encode("say why " * 3)
    answers = [expect(prompt, max_tokens=MAX_TOKENS, **settings) for settings in SETTINGS]
    for one, other in ((0, 1), (1, 2), (2, 0)):  # what a mixture would say
        for key in ("preference", "beta", "top_k"):
            mixed = SETTINGS[one] | {key: SETTINGS[other][key]}
            assert expect(prompt, max_tokens=MAX_TOKENS, **mixed) not in answers
    versions = [{"guest": {"beta": 1.0 + i}, "terse": settings} for i, settings in enumerate(SETTINGS)]
    personas.replace(versions[0])
    wait_for_version(server, {name: PAD.from_extra_args(prefixed(one)) for name, one in versions[0].items()})
    load, taken = Load(server, prompt), []  # (version, when an answer by it was there)

    def take(number: int) -> None:
        taken.append((number, load.wait_for(lambda status, what: what == answers[number])))

    try:
        take(0)
        for number in (1, 2, 0, 1):
            personas.replace(versions[number])
            take(number)
        for number in (2, 0):
            personas.write_torn(personas.text(versions[number]))
            take(number)
        before = metric_of_each(server, "personas_errors_total")
        personas.write_torn(personas.text(versions[1]) + "terse: {}\n")
        deadline = time.monotonic() + 30
        while len(refusals(server, "'terse' is given twice")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        take(0)  # as before
        errors = metric_of_each(server, "personas_errors_total")
        assert all(now > n for now, n in zip(errors, before, strict=True))
        assert sum(errors) == len(refusals(server))  # each counted once
        for i in range(12):  # faster than anybody looks
            personas.replace(versions[i % 3])
            time.sleep(0.15)
        take(2)
        took_all = time.monotonic()
        personas.replace({"guest": {"beta": 1.0}})
        gone = load.wait_for(lambda status, what: status == 400)
        time.sleep(0.5)
    finally:
        load.stop()
    assert len(load.answers) > 50
    for began, status, what in load.answers:
        if status == 200:
            assert what in answers
            assert began < gone
        else:
            assert began > took_all
            assert (status, "pad_persona='terse': no such persona" in what) == (400, True)
    for (one, since), (other, until) in itertools.pairwise(taken[:-1]):
        allowed = [answers[one], answers[other]]
        assert all(what in allowed for began, _, what in load.answers if since < began < until)
    personas.replace({"terse": {"preference": PREFERENCE, "beta": 1.5}})  # of the other tests
    wait_for_version(server, {"terse": PAD(preference=PREFERENCE, beta=1.5)})
    # Of a torn version a part is refused too, if this process was held up for seconds as it wrote it.
    refused = refusals(server)
    parts = refusals(server, "pad.personas=None") + refusals(server, "flow node")
    assert len(refusals(server, "'terse' is given twice")) == 2, refused
    assert len(refused) == 2 + len(parts), refused
