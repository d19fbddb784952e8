"""``pad-vllm demo --serve``: an OpenAI-compatible server on loopback, and two of its users, side by side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from pad_vllm.demo import world
from pad_vllm.demo.client import stream_side_by_side
from pad_vllm.demo.models import DemoModels, build
from pad_vllm.demo.show import MAX_TOKENS, USERS

MODEL = "demo"
START_SECONDS = 300


def serve(beta: float = 1.0, top_k: int = 10, seed: int = 0, cache_dir: str | None = None) -> int:
    """Start the server, ask it the same questions for two users, print both answers as they come, and stop it.

    Returns:
        Exit status: 0 where every answer shows all that its user wants.
    """
    console = Console(width=None if os.isatty(1) else 120)
    console.rule("[bold]pad-vllm: one server, each user's taste")
    models = build(cache_dir, seed)
    rng = random.Random(seed)
    wants = {name.lower(): USERS[name] for name in ("Ada", "Ben")}
    personas = {
        name: {"preference": world.preference(wanted, rng), "beta": beta, "top_k": top_k}
        for name, wanted in wants.items()
    }
    questions = [rng.choice(world.HELD_OUT_QUESTIONS).format(topic.task) for topic in rng.sample(world.TOPICS, 2)]
    satisfied = True
    with tempfile.TemporaryDirectory(prefix="pad-vllm-demo-") as folder:
        config = Path(folder, "pad.json")
        config.write_text(json.dumps({"reward_model": str(models.reward), "personas": personas}, indent=1))
        console.print("The server's personas, of which a client names one:")
        for name, persona in personas.items():
            console.print(f"  [bold]{name}[/]: {persona['preference']}")
        with start(console, models, config, Path(folder, "log")) as base_url:
            for question in questions:
                asked = stream_side_by_side(
                    console, base_url, MODEL, question, list(personas), max_tokens=MAX_TOKENS, temperature=0
                )
                for name, answer in asyncio.run(asked).items():
                    satisfied &= world.satisfaction(answer, wants[name]) == 1
    console.print("Both got what they wanted." if satisfied else "Not every answer shows all that its user wanted.")
    return 0 if satisfied else 1


@contextlib.contextmanager
def start(console: Console, models: DemoModels, config: Path, log: Path) -> Iterator[str]:
    """A server on a free port of loopback, for as long as the context lasts: its base URL.

    Raises:
        RuntimeError: it did not come up; the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256"]
    options += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20)]
    options += ["--logits-processors", "pad_vllm:PADLogitsProcessor"]
    options += ["--additional-config", json.dumps({"pad": str(config)})]
    console.print(f"[dim]$ vllm serve {models.base} {shlex.join(options)}", soft_wrap=True)
    offline = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(models.base), *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=offline | os.environ,
        )
    try:
        with console.status("Starting the server ..."):
            deadline = time.monotonic() + START_SECONDS
            while not _is_healthy(port):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not come up:\n{log.read_text()[-4000:]}")
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
