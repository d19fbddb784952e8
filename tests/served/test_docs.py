"""Every command of the README and the documentation, as it stands there, on the tests' models."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import pytest

from pad_vllm.loopback import free_port, wait_until_healthy
from tests.support.command import run_command, run_python
from tests.support.engine import OFFLINE
from tests.support.fixtures import HEADS
from tests.support.models import make_adapter, make_heads, make_model
from tests.support.server import Server

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PIP = 'pip() { [ -e installed ] || python -m pip --quiet "$@" --no-build-isolation --target installed; }\n'
"""pip installs into a folder here, and not over the environment that the tests run in; what every document asks for,
once."""
PORT = 8000
"""Of ``vllm serve``, where nothing else is said."""
MAX_TOKENS = 16
"""The tests' models never end an answer."""
NAMED = {
    "Qwen/Qwen3-8B": "base-model",
    "Qwen/Qwen3-0.6B": "reward-model",
    "meta-llama/Llama-3.1-8B-Instruct": "base-model",
    "meta-llama/Llama-3.2-1B-Instruct": "reward-model",
}
"""What stands here for the models that the README names: the one thing that is put in place of what is typed."""
RUN_ELSEWHERE = ["make demo", "make quick", "make test"]
"""test_demo_served.py runs what the first runs; this is the others."""
DOCUMENTS = [
    "CONTRIBUTING.md",
    "README.md",
    "benchmarks/README.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, text) of a document's fenced blocks."""
    text = (ROOT / document).read_text()
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, re.M | re.S)
    return [(language, textwrap.dedent(body)) for _, language, body in found]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory) -> Path:
    """The repository beside a base model and a reward model, under the names that the documents give them."""
    folder = tmp_path_factory.mktemp("docs") / "checkout"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "results")
    shutil.copytree(ROOT, folder, ignore=ignore)
    base = folder / "base-model"
    base.mkdir()
    for file in models.base.iterdir():
        (base / file.name).symlink_to(file)
    (base / "generation_config.json").unlink(missing_ok=True)
    # Clients of the README set no limit, and the model never ends an answer.
    (base / "generation_config.json").write_text(json.dumps({"max_new_tokens": MAX_TOKENS}))
    reward = make_model(folder / "reward-model", seed=1, max_position_embeddings=4096)
    make_heads(reward / "heads.safetensors", HEADS)
    for seed, name in enumerate(("brief", "formal", "careful", "warm", "terse")):
        make_adapter(folder / "adapters" / name, base, seed, rank=4, targets=["q_proj", "up_proj"])
    return folder


def write_pairs(folder: Path, record: str) -> None:
    """Comparisons of the form that is shown, by several users and by one, and models to begin with."""
    template = json.loads(record)
    rng = random.Random(0)

    def comparison(chosen: str, rejected: str) -> dict:
        words = " ".join(rng.choice("abcdefgh") for _ in range(6))
        return template | {"prompt": words, "chosen": f"{words} {chosen}", "rejected": f"{words} {rejected}"}

    pairs = [comparison("a", "b"), *(comparison(rng.choice("ab"), rng.choice("cd")) for _ in range(40))]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "ada.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:20]))
    (folder / "pool.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs[20:]))
    (folder / "small-model").symlink_to(folder / "base-model")
    released = make_model(folder / "checkpoint", seed=2)
    make_heads(released / "value_head.safetensors", ["v_head.summary"])


def write_evaluation(folder: Path, text: str) -> None:
    (folder / "evaluation.yaml").write_text(text + f"max_tokens: {MAX_TOKENS}\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "a b"}\n{"prompt": "b c"}\n')
    (folder / "my_module.py").write_text(
        "from pad_vllm.evaluation.judgement import Judgement\n"
        "def check(text, prompt, user):\n"
        "    return Judgement({'length': float(len(text) < 50)}, True)\n"
    )


def write_yaml(folder: Path, text: str) -> None:
    first = text.partition("\n")[0]
    if first == "# attributes.yaml":
        (folder / "attributes.yaml").write_text(text)
    else:
        write_evaluation(folder, text)


def write_json(folder: Path, text: str) -> None:
    if "trace" not in json.loads(text):
        return write_pairs(folder, text)
    (folder / "FOLDER").mkdir()
    (folder / "FOLDER" / "pad-traces-0-1.jsonl").write_text(text.strip() + "\n")
    return None


FILES = {"json": write_json, "yaml": write_yaml}
"""What the documents show of a file, for the commands that read it."""


def environment(multiprocess: bool = True) -> dict[str, str]:
    path = f"{BIN}:{os.environ['PATH']}"
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocess))}
    settings["VLLM_CPU_CI_ENV"] = "1"  # the documents leave compilation on, which takes a minute here
    return os.environ | OFFLINE | {"PATH": path} | settings


def readers_environment(compiled: bool) -> dict[str, str]:
    """What somebody has who has read the README, and set nothing but what it says of a CPU. Not ``compiled``: and has
    turned compilation off, which takes minutes."""
    assert "`export VLLM_CPU_KVCACHE_SPACE=4`" in (ROOT / "README.md").read_text()
    of_tests = ("VLLM", "PAD_VLLM", "OMP", "TRITON")
    theirs = {key: value for key, value in os.environ.items() if not key.startswith(of_tests)}
    ours = {"VLLM_CPU_KVCACHE_SPACE": "1", **({} if compiled else {"VLLM_CPU_CI_ENV": "1"})}
    return theirs | OFFLINE | {"PATH": f"{BIN}:{os.environ['PATH']}"} | ours


def run_as_it_stands(folder: Path, body: str, compiled: bool) -> str:
    """Python of the README, saved to a file and run, with nothing imported or set beforehand; what it printed."""
    (folder / "readme.py").write_text(body)
    command, environ = [sys.executable, "readme.py"], readers_environment(compiled)
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{body}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.stdout.strip()
    return done.stdout


def run(folder: Path, language: str, body: str) -> str:
    """Run a block to its end; what it printed. Python and our own commands run in a process that has vLLM already."""
    if language == "python":
        script = folder / "block.py"
        script.write_text(body)
        return run_python([str(script)], folder, environment(multiprocess=False))
    printed = []
    for line in body.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program == "python":
            printed.append(run_python(arguments, folder, environment(multiprocess=False)))
        elif program == "pad-vllm":
            printed.append(run_command(arguments, folder, environment(multiprocess=False)))
        else:
            command = ["bash", "-c", f"set -euo pipefail\n{PIP}{line}"]
            done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            printed.append(done.stdout)
    return "".join(printed)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_runs(folder, document):
    run_commands(folder, document)


@pytest.mark.weekly
def test_every_command_of_the_readme_runs_compiled(folder):
    """As it does for its readers."""
    run_commands(folder, "README.md", compiled=True)


def run_commands(folder: Path, document: str, compiled: bool = False) -> None:
    server: TypedServer | Server | None = None
    try:
        for language, body in blocks(document):
            if not language:
                continue  # a formula
            if language in ("json", "yaml"):
                FILES[language](folder, body)
                continue
            assert language in ("bash", "python"), language
            for name, ours in NAMED.items():
                body = body.replace(name, ours)
            if all(line.partition("#")[0].strip() in RUN_ELSEWHERE for line in body.splitlines()):
                subprocess.run(
                    ["make", "--dry-run", "demo", "quick", "test"], cwd=ROOT, check=True, capture_output=True
                )
            elif body.startswith("pad-vllm playground"):
                look_at_playground(folder, body, server)
            elif "--speculative-config" in body:
                serve_with_drafts(folder, body)
            elif body.startswith("vllm serve"):
                if server is not None:
                    server.close()
                # One is typed into a shell, in a minute; the others say nothing more.
                is_typed = document == "README.md" and server is None
                server = TypedServer(folder, body, compiled) if is_typed else forked_server(folder, body)
            else:
                if server is not None and server.port != PORT:
                    body = body.replace(f"localhost:{PORT}", f"localhost:{server.port}")
                    body = body.replace("examples/client.py", f"examples/client.py http://localhost:{server.port}/v1")
                as_it_stands = document == "README.md" and language == "python"
                out = run_as_it_stands(folder, body, compiled) if as_it_stands else run(folder, language, body)
                if "examples/client.py" in body:
                    assert "a typing error: pad_persona='tense': no such persona; did you mean 'terse'?" in out
    finally:
        if server is not None:
            server.close()


class TypedServer:
    """``vllm serve`` as it is typed into a shell; on another port only where its own is taken."""

    def __init__(self, folder: Path, body: str, compiled: bool) -> None:
        line, self.port = body.rstrip(), PORT
        with socket.socket() as free:
            try:
                free.bind(("", PORT))
            except OSError:
                self.port = free_port()
                line = f"{line} --port {self.port}"
        where = {"cwd": folder, "env": readers_environment(compiled)}
        with (folder / "log").open("w") as log:
            command = ["bash", "-c", f"exec {line}"]
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **where)
        try:
            wait_until_healthy(lambda: self._process.poll() is None, self.port, folder / "log", timeout=400)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)


def forked_server(folder: Path, body: str) -> Server:
    """The same from a process that has vLLM already."""
    _, _, model, *arguments = shlex.split(body.replace("\\\n", " "))
    arguments += ["--served-model-name", model, "--override-generation-config.max_new_tokens", str(MAX_TOKENS)]
    return Server(model, folder / "log", *arguments, folder=folder)


def serve_with_drafts(folder: Path, body: str) -> None:
    """On Model Runner V2, which on a CPU takes the tests' interpreter, and so their server."""
    body = re.sub(r"\b(base|reward)-model\b", rf"{folder}/\g<0>", body.replace("\\\n", " "))
    _, _, model, *arguments = shlex.split(body)
    server = Server(model, folder / "log", *arguments, runner="v2")
    try:
        ask = {"prompt": "a b", "max_tokens": 4, "temperature": 0, "vllm_xargs": {"pad_preference": "c"}}
        assert server.post("/v1/completions", ask)[0] == 200
        assert "the reward model drafts 4 tokens at a time" in (folder / "log").read_text()
    finally:
        server.close()


def look_at_playground(folder: Path, body: str, server: TypedServer | Server | None) -> None:
    """Its page, and what it says of the document's server, or that there is none."""
    port = PORT if server is None else server.port
    line = body.rstrip().replace(f"localhost:{PORT}", f"127.0.0.1:{port}") + " --port 0"
    command = ["bash", "-c", f"exec {line}"]
    process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        page = re.search(r": (http://\S+/) ", process.stdout.readline())[1]
        with urllib.request.urlopen(page, timeout=60) as answer:
            assert b"<title>pad-vllm playground</title>" in answer.read()
        if server is not None:
            with urllib.request.urlopen(f"{page}v1/pad", timeout=60) as answer:
                assert json.load(answer)["guides"]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_the_offline_example(folder):
    out = run(folder, "bash", "python examples/offline.py")
    assert [json.loads(f"[{n}]")[0] for n in re.findall(r"'pad_beta': ([\d.]+)", out)] == [0.8]
    assert "pad_persona" in out


def test_the_demos_model_is_a_package_of_its_own(folder):
    find = "from pad_vllm.demo.smollm import adapter_folder; print(adapter_folder())"
    settings = {"cwd": folder / "examples", "text": True, "capture_output": True}
    python, environ = [sys.executable, "-c", find], os.environ | {"PYTHONPATH": str(folder / "installed")}
    run(folder, "bash", "pip install --no-deps .")
    missing = subprocess.run(python, env=environ, **settings)
    assert "`pip install ./demo_model` in a clone" in missing.stderr
    install = "python -m pip --quiet install --no-deps --no-build-isolation --target installed-model ./demo_model"
    subprocess.run(["bash", "-c", install], cwd=folder, env=environment(), check=True)
    environ["PYTHONPATH"] += f":{folder / 'installed-model'}"
    found = Path(subprocess.run(python, env=environ, check=True, **settings).stdout.strip())
    assert found.is_relative_to(folder / "installed-model")
    assert {file.name for file in found.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}


def test_what_is_installed(folder):
    """The wheel has the kernels, and the entry points by which vLLM finds the plugin."""
    run(folder, "bash", "pip install --no-deps .")
    installed = folder / "installed"
    assert (installed / "pad_vllm" / "kernels" / "fused.py").exists()
    assert (installed / "pad_vllm" / "demo" / "serve.py").exists()
    assert (installed / "pad_vllm" / "playground" / "page" / "playground.js").exists()
    assert (installed / "pad_vllm" / "py.typed").exists()
    assert not (installed / "tests").exists()
    assert not (installed / "pad_vllm" / "synthetic").exists()
    assert sum(file.stat().st_size for file in installed.rglob("*") if "__pycache__" not in file.parts) < 2 << 20
    (entry_points,) = installed.glob("pad_vllm-*.dist-info/entry_points.txt")
    assert "pad = pad_vllm:PADLogitsProcessor" in entry_points.read_text()
