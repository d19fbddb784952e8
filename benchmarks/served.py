"""What guidance costs a server under load: time to the first token, time between tokens, throughput, up to saturation.

    python -m benchmarks.served [--base ... --reward ...] [--rates 0.3 0.6 ...] [--output FOLDER [--resume]]

Two servers stand side by side, ``vllm serve`` without the plugin and with it, and vLLM's own client sends them
requests (``vllm bench serve``; ``benchmarks/served_client.py`` says what it needs of us). Only one of them has requests
at a time. Four configurations: no plugin; the plugin and no guided request, half of them, all of them. A guided request
names one of 100 personas.

First comes what each configuration does when all requests are there at once (``saturation``). Then requests arrive at
random, at shares of what the first configuration did (``rates``), at the same moments for each. A repeat runs all
configurations one after the other, every other one goes backwards, and ratios are those of a repeat. Models are given
or made, as in ``benchmarks/throughput.py``; greedy, ``ignore_eos``, prompts that no cache has seen. Client, API servers
and engines share the machine; what other processes took of it stands in each row of the record.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from pad_vllm.loopback import free_port, wait_until_healthy

from .methods import Workload, random_prompts
from .models import add_model_arguments, make_models
from .served_record import ServedRecord

PERSONAS = {f"p{i}": " ".join(f"w{1000 + 20 * i + j}" for j in range(16)) for i in range(100)}
"""Preferences of 16 words, none of which two have in common."""
BASE_OF_42M = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
REWARD_OF_11M = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
"""With 32,000 tokens: of 42M weights that a token multiplies, and of 3M besides the lm_head. On a machine of two cores
vLLM computes on one, and leaves the other to the API server."""
CONFIGURATIONS = {"no plugin": None, "0% guided": 0.0, "50% guided": 0.5, "100% guided": 1.0}
"""Name -> the share of guided requests; None: a server without the plugin."""
PRELUDE_TOKENS = 8
"""Of an answer, before anything is measured."""
UP_SECONDS = 600
CLIENT_SECONDS = 600
LEAST_REQUESTS = 20
"""Of a run, however low its rate is."""
FIGURES = {
    "duration": "s",
    "completed": "requests",
    "request_throughput": "requests_per_s",
    "output_throughput": "tokens_per_s",
    **{
        f"{kind}_{name}_ms": f"{name}_{kind}_ms"
        for name in ("ttft", "tpot", "itl")
        for kind in ("mean", "median", "p90", "p99")
    },
    "max_concurrent_requests": "most_at_once",
}
"""Of the client's results, those that are kept, and under which names."""
OFFLINE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


class VllmServer:
    """``vllm serve`` on a free port of loopback, in a process of its own; made once it answers.

    Args:
        arguments: of the command, model first.
        log: a file.
        environment: added to this process's.

    Raises:
        RuntimeError: it did not come up; with the end of its log.
    """

    def __init__(self, arguments: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | OFFLINE | environment
            )

    def wait(self) -> None:
        wait_until_healthy(lambda: self.process.poll() is None, self.port, self.log, UP_SECONDS)

    def counted(self, name: str) -> float | None:
        """A counter of the plugin's, as ``/metrics`` shows it; None without the plugin."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            found = re.findall(rf"^pad_{name}_total{{.*?}} (\S+)$", response.read().decode(), re.M)
        return sum(map(float, found)) if found else None

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class ServedBench:
    """Servers, and runs of the client against them. A context: it ends the servers."""

    def __init__(self, base: Any, reward: Any, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.base = args, folder, base
        self.servers: dict[bool, VllmServer] = {}
        """With the plugin, and without it"""
        self._ends = contextlib.ExitStack()
        # Importing vLLM takes a client longer than many a run: each one's process is forked from one that has it.
        self._clients = multiprocessing.get_context("forkserver")
        self._clients.set_forkserver_preload([f"{__package__}.served_client"])
        (folder / "personas.json").write_text(json.dumps({name: {"preference": p} for name, p in PERSONAS.items()}))
        pad = {"reward_model": str(reward), "personas": "personas.json", "reference": "base", "top_k": args.top_k}
        (folder / "pad.json").write_text(json.dumps(pad))

    def __enter__(self) -> ServedBench:
        try:
            shares = [CONFIGURATIONS[name] for name in self.args.configurations]
            for with_plugin in sorted({share is not None for share in shares}):
                self.servers[with_plugin] = self._start(with_plugin)
                self._ends.callback(self.servers[with_plugin].close)
            self._clients.Process(target=int).start()  # vLLM is imported while the servers come up
            for server in self.servers.values():
                server.wait()
            self._warm_up()
        except BaseException:
            self._ends.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def _start(self, with_plugin: bool) -> VllmServer:
        args = self.args
        arguments = [str(self.base), "--served-model-name", "base", "--dtype", args.dtype]
        arguments += ["--load-format", args.load_format, "--max-num-seqs", str(args.max_num_seqs)]
        arguments += ["--max-model-len", str(args.max_model_len)]
        arguments += ["--kv-cache-memory-bytes", str(args.kv_cache_memory_bytes)]
        arguments += ["--enforce-eager"] * args.enforce_eager + shlex.split(args.vllm_args)
        environment = {}
        if with_plugin:
            arguments += ["--logits-processors", "pad_vllm:PADLogitsProcessor"]
            arguments += ["--additional-config", json.dumps({"pad": str(self.folder / "pad.json")})]
        else:
            environment["VLLM_PLUGINS"] = ""  # it is installed, and is not loaded
        return VllmServer(arguments, self.folder / f"server-{'with' if with_plugin else 'without'}.log", environment)

    def _warm_up(self) -> None:
        """In each server the last of its configurations: every persona, and a batch as large as there will be."""
        last = {CONFIGURATIONS[name] is not None: name for name in self.args.configurations}
        for name in last.values():
            self.run(name, max(len(PERSONAS), self.args.max_num_seqs), None, "warm up", output_len=PRELUDE_TOKENS)

    def run(
        self,
        configuration: str,
        requests: int,
        rate: float | None,
        seed: str,
        when: int = 0,
        output_len: int | None = None,
    ) -> dict[str, Any]:
        """The figures of one run of the client.

        Args:
            rate: requests a second; None: all at once.
            seed: of prompts and personas.
            when: the seed of the moments at which requests arrive.
            output_len: tokens of an answer, if not as the arguments say.

        Raises:
            RuntimeError: a request failed, or another number of them was guided than should be.
        """
        share = CONFIGURATIONS[configuration]
        server = self.servers[share is not None]
        shape = self.args.prompt_len, output_len or self.args.output_len
        lines = list(requests_of(share or 0.0, requests, seed, *shape))
        dataset, result = self.folder / "requests.jsonl", self.folder / "result.json"
        dataset.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        result.unlink(missing_ok=True)
        arguments = ["--base-url", server.url, "--model", "base", "--tokenizer", str(self.base)]
        arguments += ["--dataset-name", "custom", "--dataset-path", str(dataset), "--num-prompts", str(requests)]
        arguments += ["--request-rate", str(rate or "inf"), "--seed", str(when), "--temperature", "0", "--ignore-eos"]
        arguments += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "90,99", "--disable-tqdm"]
        arguments += ["--save-result", "--result-dir", str(self.folder), "--result-filename", result.name]
        before = [server.counted(name) for name in ("guided_requests", "failed_requests")]
        used = CpuUse()
        self._run_client(arguments)
        others = used.share_of_others()
        after = [server.counted(name) for name in ("guided_requests", "failed_requests")]
        guided, failed = (None if n is None else int(n - (m or 0)) for m, n in zip(before, after, strict=True))
        found = json.loads(result.read_text())
        asked = None if share is None else sum("request_overrides" in line for line in lines)
        if found["completed"] != requests or guided != asked or failed:
            raise RuntimeError(
                f"{configuration}: {found['completed']} of {requests} requests were answered; {guided} were guided "
                f"instead of {asked}, of which {failed} failed:\n{server.log.read_text()[-4000:]}"
            )
        figures = {name: round(found[key], 3) for key, name in FIGURES.items()}
        shown = {"configuration": configuration, "offered_per_s": rate, "guided": guided}
        return shown | figures | {"others": round(others, 3)}

    def _run_client(self, arguments: list[str]) -> None:
        log = self.folder / "client.log"
        process = self._clients.Process(target=run_client, args=(arguments, log))
        process.start()
        process.join(CLIENT_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode:
            raise RuntimeError(f"vllm bench serve failed:\n{log.read_text()[-4000:]}")


class CpuUse:
    """Of the machine's processors, from now on."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = time.monotonic(), *self._seconds()

    @staticmethod
    def _seconds() -> tuple[float, float]:
        """Of all processes and of the host's others, and of this process with all that it started."""
        times = psutil.cpu_times()
        own = 0.0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                own += sum(process.cpu_times()[:4])  # with those of its children that have ended
        return times.user + times.nice + times.system + times.irq + times.softirq + times.steal, own

    def used(self) -> tuple[float, float]:
        """Seconds of all processes, and of our own."""
        busy, own = self._seconds()
        return busy - self.busy, own - self.own

    def share_of_others(self) -> float:
        """Of all processors' time, what neither servers nor client took; from 0 to 1."""
        busy, own = self.used()
        return max(0.0, busy - own) / (time.monotonic() - self.began) / (psutil.cpu_count() or 1)


def run_client(arguments: list[str], log: Path) -> None:
    """The client's command line, in a process of its own."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(OFFLINE)
    from .served_client import main as bench_serve

    sys.argv = ["served_client", *arguments]
    try:
        bench_serve()
    finally:
        sys.stdout.flush()


def requests_of(share: float, number: int, seed: str, prompt_len: int, output_len: int) -> Iterator[dict[str, Any]]:
    """What the client is to send: the guided ones are spread evenly, and take the personas in an order of their own."""
    rng = random.Random(seed)
    cell = Workload(batch=number, prompt_len=prompt_len)
    names: list[str] = []
    for i, prompt in enumerate(random_prompts(cell, rng.getrandbits(64))):
        line: dict[str, Any] = {"prompt": prompt, "output_tokens": output_len}
        if int((i + 1) * share) > int(i * share):
            names = names or rng.sample(list(PERSONAS), len(PERSONAS))
            line["request_overrides"] = {"vllm_xargs": {"pad_persona": names.pop()}}
        yield line


def measure_load(bench: ServedBench, record: ServedRecord, args: argparse.Namespace) -> None:
    """Run all that the record does not have, and keep each repeat as it ends."""

    def repeat(section: str, part: str, number: int, rate: float | None, when: int, backwards: bool) -> list[Any]:
        names = args.configurations[:: -1 if backwards else 1]
        for attempt in itertools.count():
            rows: list[Any] = []
            for name in names:
                figures = bench.run(name, number, rate, f"{section} {part} {name} {attempt}", when)
                rows.append({"part": part} | figures)
                print(
                    f"{section:10} {part:7} {name:11} {figures['tokens_per_s']:9.1f} tok/s  first token "
                    f"{figures['ttft_median_ms']:8.1f} ms, between tokens {figures['itl_median_ms']:7.1f} ms, "
                    f"others took {figures['others']:.0%} of the machine",
                    flush=True,
                )
                if figures["others"] > args.most_others:
                    break
            if len(rows) == len(names) and rows[-1]["others"] <= args.most_others:
                break
        return rows

    def rows_of(section: str) -> tuple[list[Any], set[str]]:
        rows = list(record.results.get(section, {}).get("rows", []))
        return rows, {row["part"] for row in rows}

    rows, done = rows_of("saturation")
    for n in range(args.repeats):
        if f"{n}" not in done:
            rows += repeat("saturation", f"{n}", args.requests, None, len(rows), n % 2 == 1)
            record.add("saturation", rows, is_whole=n + 1 == args.repeats)
    most = statistics.median(r["requests_per_s"] for r in rows if r["configuration"] == args.configurations[0])
    rows, done = rows_of("rates")
    parts = [(n, share) for n in range(args.repeats) for share in args.rates]
    for n, share in parts:
        if f"{n} {share}" not in done:
            rate = round(share * most, 3)
            number = max(LEAST_REQUESTS, round(rate * args.seconds))
            rows += repeat("rates", f"{n} {share}", number, rate, len(rows), n % 2 == 1)
            record.add("rates", rows, is_whole=(n, share) == parts[-1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.set_defaults(base_config=BASE_OF_42M, reward_config=REWARD_OF_11M)
    parser.add_argument("--max-num-seqs", type=int, default=32, help="(default %(default)s)")
    parser.add_argument("--max-model-len", type=int, default=2048, help="(default %(default)s)")
    parser.add_argument("--vllm-args", default="", help="more of vllm serve's, for both servers, as one string")
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--requests", type=int, default=64, help="that come at once (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=7, help="of a run at a rate (default %(default)s)")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.3, 0.6, 0.9], help="shares of the first one's saturation"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--most-others",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the processors' time that others may take in a run; above it the repeat begins again",
    )
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--output", type=Path, help="folder of served.json, .md and .png")
    parser.add_argument(
        "--folder",
        type=Path,
        help="of random models and logs; vLLM compiles models of the same path once (default: a temporary one)",
    )
    parser.add_argument("--resume", action="store_true", help="leave out what --output has already")


def main(args: argparse.Namespace) -> None:
    if bool(args.base) != bool(args.reward):
        raise ValueError("--base and --reward: give both, or none")
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "resume", "folder")}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `timeout`: the servers end too
    record = ServedRecord(args.output, settings | {"vllm": version("vllm")}, dict.fromkeys(("saturation", "rates"), ""))
    if not args.resume:
        record.results = {}
    if any(record.results.get(name, {"unfinished": True}).get("unfinished") for name in record.sections):
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            base, reward = (args.base, args.reward) if args.base else make_models(folder, args)
            with ServedBench(base, reward, args, folder) as bench:
                measure_load(bench, record, args)
    for line in record.report():
        print(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    main(parser.parse_args())
