"""``GET /v1/pad``, on the API server that the installed vLLM builds; no engine is behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from pad_vllm import channel
from pad_vllm.channel import Announcement
from pad_vllm.config import PADConfig
from pad_vllm.frontend import engines, patches
from pad_vllm.params import PAD
from pad_vllm.personas import Personas, prefixed, show_personas
from pad_vllm.worker.start import about_guidance

pytestmark = pytest.mark.every_release

PERSONAS = {"ann": {"preference": "a secret wish"}, "ben": {"weights": [1, 0]}}


class Engine:
    """The owner of an announcement."""

    def __init__(self, vllm_config: SimpleNamespace) -> None:
        self.vllm_config = vllm_config


@pytest.fixture
def client_of(tmp_path, monkeypatch) -> Iterator[Callable[..., TestClient]]:
    """A client of vLLM's API server, whose engine announces what it is given."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    monkeypatch.setenv(channel.ANNOUNCE_DIR, str(tmp_path))
    monkeypatch.setattr(engines, "_servers", set())
    patches.install()
    alive = []

    def client_of(announcement: Announcement | None, *args: str, **more: Any) -> TestClient:
        config = SimpleNamespace(
            instance_id="server",
            parallel_config=SimpleNamespace(
                local_engines_only=True, data_parallel_size=1, data_parallel_master_ip="127.0.0.1"
            ),
            model_config=SimpleNamespace(logprobs_mode="raw_logprobs", max_logprobs=20),
            additional_config={},
            **({"speculative_config": None, "use_v2_model_runner": False} | more),
        )
        if announcement is not None:
            alive.append(Engine(config))
            path = channel.announce(announcement, alive[-1])
            assert path is not None
            personas = {name: PAD.from_extra_args(prefixed(one)) or PAD() for name, one in PERSONAS.items()}
            show_personas(path, Personas.of(personas))
        app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args(list(args)), ("generate",))
        app.state.engine_client = SimpleNamespace(vllm_config=config)
        return TestClient(app)

    yield client_of
    engines.enter({})


def guiding() -> Announcement:
    config = PADConfig("reward", beta=0.8, top_k=12, max_top_k=20, personas=PERSONAS, adapters={"warm": "there"})
    return Announcement(
        True,
        head_names=("a", "b"),
        max_top_k=config.max_top_k,
        max_preference_tokens=300,
        tokenizer={"pretrained_model_name_or_path": "reward"},
        default_persona="ann",
        adapters=tuple(config.adapters),
        about=about_guidance(config),
    )


def test_a_client_learns_what_it_may_ask_for(client_of):
    told = client_of(guiding()).get("/v1/pad")
    assert told.status_code == 200
    assert "secret" not in told.text  # what a persona says is the server's business
    about = told.json()
    assert about.pop("arguments") == [f"pad_{name}" for name in PAD.__dataclass_fields__]
    assert about.pop("version")
    assert about == {
        "guides": True,
        "reward_model": {"name": "reward", "kind": "model"},
        "defaults": {"beta": 0.8, "top_k": 12, "reference": "base"},
        "personas": ["ann", "ben"],
        "default_persona": "ann",
        "heads": ["a", "b"],
        "adapters": ["warm"],
        "references": ["base", "neutral", "none"],
        "limits": {"beta": 100, "top_k": 20, "preferences": 8, "preference_chars": 8192, "preference_tokens": 300},
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": 20,
    }


@pytest.mark.parametrize(
    ("announcement", "more"),
    [(None, {}), (Announcement(False), {}), (guiding(), {"speculative_config": object()})],
    ids=["no engine", "no reward model", "vLLM drops the processor"],
)
def test_a_server_that_would_not_guide_says_so(client_of, announcement, more):
    about = client_of(announcement, **more).get("/v1/pad").json()
    assert set(about) == {"version", "guides", "arguments"}
    assert about["guides"] is False


def test_names_of_personas_are_behind_the_servers_key(client_of):
    client = client_of(guiding(), "--api-key", "secret", "--root-path", "/api")
    for path in ("/v1/pad", "/api/v1/pad"):
        refused = client.get(path)
        assert refused.status_code == 401
        assert "ann" not in refused.text
        assert client.get(path, headers={"Authorization": "Bearer secret"}).json()["personas"] == ["ann", "ben"]
    assert client.post("/v1/pad", headers={"Authorization": "Bearer secret"}).status_code == 405
