"""``pad-vllm demo --serve``: an OpenAI-compatible server on loopback, its users, side by side, and the playground."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from pad_vllm.demo.client import stream_side_by_side
from pad_vllm.demo.measures import measures_of
from pad_vllm.demo.show import ENGINE, MAX_TOKENS, TEMPERATURE
from pad_vllm.demo.smollm import DemoModels, build
from pad_vllm.demo.users import DEMO_QUESTIONS, USERS
from pad_vllm.loopback import free_port, wait_until_healthy
from pad_vllm.playground.server import playground

MODEL = "smollm2"
SERVED_USERS = ("Omar", "Noor")
NOBODY = "nobody"
START_SECONDS = 300


def serve(beta: float, top_k: int, seed: int = 0, cache_dir: str | None = None) -> int:
    """Start the server, ask it the same questions for users and for nobody, and print answers as they come.

    The playground is beside it, and where somebody sits at the terminal, both stay until Enter.

    Returns:
        Exit status: 0 where everybody was answered.
    """
    console = Console(width=None if os.isatty(1) else 120)
    console.rule("[bold]pad-vllm: one server, each user's taste")
    with console.status("Making SmolLM2-135M-Instruct ..."):
        models = build(cache_dir)
    users = {name.lower(): USERS[name] for name in SERVED_USERS}
    strength = {"beta": beta, "top_k": top_k}
    personas = {name: {**user.persona, **strength} for name, user in users.items()}
    texts: dict[str, list[str]] = {name: [] for name in (NOBODY, *users)}
    with tempfile.TemporaryDirectory(prefix="pad-vllm-demo-") as folder:
        config = Path(folder, "pad.json")
        config.write_text(json.dumps({"reward_model": str(models.reward), "personas": personas}, indent=1))
        console.print("The server's personas, of which a client names one, or none:")
        for name, user in users.items():
            console.print(f"  [bold]{name}[/]: {user.say()}")
        log = Path(folder, "log")
        with start_server(console, models, config, log) as base_url, playground(base_url) as page:
            console.print(f"The playground, for prompts and preferences of your own: [bold]{page}", soft_wrap=True)
            for question in DEMO_QUESTIONS:
                settings = {"max_tokens": MAX_TOKENS, "temperature": TEMPERATURE, "seed": seed}
                asked = stream_side_by_side(
                    console, base_url, MODEL, question, {NOBODY: None} | {n: n for n in users}, **settings
                )
                for name, answer in asyncio.run(asked).items():
                    texts[name].append(answer)
            print_measures(console, texts)
            if sys.stdin.isatty():
                console.print(f"The playground stays: [bold]{page}[/]  Enter ends it, and the server.", soft_wrap=True)
                with contextlib.suppress(KeyboardInterrupt):
                    sys.stdin.readline()
    return 0 if all(answer for own in texts.values() for answer in own) else 1


def print_measures(console: Console, texts: dict[str, list[str]]) -> None:
    """What each user's answers have more, or less, of than nobody's."""
    before = measures_of("\n\n".join(texts[NOBODY]))
    for user in SERVED_USERS:
        name = user.lower()
        after = measures_of("\n\n".join(texts[name]))
        for dimension, moved in USERS[user].has(before, after).items():
            mark = "[green]✓[/]" if moved else "[red]✗[/]"
            console.print(f"{name}: {dimension} {before[dimension]:.1f} > {after[dimension]:.1f} {mark}")


@contextlib.contextmanager
def start_server(console: Console, models: DemoModels, config: Path, log: Path) -> Iterator[str]:
    """A server on a free port of loopback, for as long as the context lasts: its base URL.

    Raises:
        ChildProcessError: it did not come up; the end of its log.
    """
    port = free_port()
    options = ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    options += ["--max-model-len", str(ENGINE["max_model_len"]), "--dtype", "float32", "--enforce-eager"]
    options += ["--kv-cache-memory-bytes", str(ENGINE["kv_cache_memory_bytes"])]
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
            wait_until_healthy(lambda: server.poll() is None, port, log, START_SECONDS)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
