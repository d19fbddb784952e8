"""Use a wheel as its first user would: ``python -m release.first_use WHEEL...``, by the development environment.

The wheels go into an environment of their own, which has vLLM and what it needs, and nothing of this repository. There
``pad-vllm check`` runs, by itself and with two small models; then vLLM guides a request, and its tokens must be the
oracle's (``tests/oracle.py``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("pad_vllm", "__editable__")
"""What the development environment has of this repository, by the beginnings of its names."""
PREFERENCE = "concise"
MAX_TOKENS = 16
GUIDE = """
import json, sys
from vllm import LLM
import pad_vllm
from pad_vllm import PAD, SamplingParams

if __name__ == "__main__":
    pad, prompt, preference, max_tokens = json.loads(sys.argv[1])
    llm = LLM(
        "base-model", logits_processors=["pad_vllm:PADLogitsProcessor"], additional_config={"pad": pad},
        dtype="float32", max_model_len=256, enforce_eager=True,
    )
    common = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    params = [
        SamplingParams(**common),
        SamplingParams(**common, logits_processors=[PAD(preference=preference)]),
    ]
    answers = llm.generate([{"prompt_token_ids": prompt}] * 2, params)
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    with open("answers.json", "w") as file:
        json.dump({"file": pad_vllm.__file__, "version": pad_vllm.__version__, "tokens": tokens}, file)
"""


def make_environment(folder: Path, wheels: Sequence[Path]) -> Path:
    """An environment with the wheels, beside links to all that the development environment has from elsewhere; its
    folder of commands. A ``.pth`` file there is not read, so the editable installation is not found."""
    venv.create(folder, with_pip=False, symlinks=True)
    beside = folder / "beside"
    beside.mkdir()
    for there in Path(sysconfig.get_path("purelib")).iterdir():
        if there.suffix != ".pth" and not there.name.startswith(OURS):
            (beside / there.name).symlink_to(there)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    (packages / "beside.pth").write_text(f"{beside}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", *map(str, wheels)], check=True)
    return folder / "bin"


def make_models(folder: Path, prompt: str) -> tuple[list[int], list[list[int]]]:
    """Two small models, ``base-model`` and ``reward-model``; the prompt's token ids, and what the oracle says to it
    unguided and guided."""
    from transformers import AutoModelForCausalLM

    from pad_vllm.reward.template import PromptTemplate
    from tests import oracle
    from tests.support.models import make_model, make_tokenizer

    base, reward = (
        AutoModelForCausalLM.from_pretrained(make_model(folder / name, seed))
        for seed, name in enumerate(("base-model", "reward-model"))
    )
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(f"<s>{prompt}")
    composed = PromptTemplate(tokenizer).compose(ids, PREFERENCE)
    unguided = oracle.generate(base, ids, MAX_TOKENS)
    return ids, [unguided, oracle.generate(base, ids, MAX_TOKENS, reward=reward, reward_prompt_ids=composed)]


def main(wheels: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        prompt, expected = make_models(folder, "The quick brown fox")
        commands = make_environment(folder / "environment", [Path(wheel).resolve() for wheel in wheels])
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PAD_VLLM"))}
        settings = {"PATH": f"{commands}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1"}
        settings |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

        def run(*command: str) -> None:
            print(f"$ {' '.join(command[:2])}", flush=True)
            subprocess.run(
                [commands / command[0], *command[1:]], cwd=folder, env=keep | settings, check=True, timeout=600
            )

        pad = {"reward_model": "reward-model", "reference": "base"}
        run("python", "-c", "from pad_vllm.demo.smollm import adapter_folder; print(adapter_folder())")
        run("pad-vllm", "check")
        run("pad-vllm", "check", json.dumps(pad), "--model", "base-model", "--max-model-len", "256")
        (folder / "guide.py").write_text(GUIDE)
        run("python", "guide.py", json.dumps([pad, prompt, PREFERENCE, MAX_TOKENS]))
        answered = json.loads((folder / "answers.json").read_text())
        assert Path(answered["file"]).is_relative_to(folder), answered["file"]
        assert answered["tokens"] == expected, f"generated {answered['tokens']}, and the oracle {expected}"
        assert expected[0] != expected[1]
        print(f"pad-vllm {answered['version']}: {MAX_TOKENS} guided tokens are the oracle's")


if __name__ == "__main__":
    main(sys.argv[1:])
