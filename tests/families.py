"""Engine against oracle with the families' own tokenizers: what `make families` adds to the page.

    python -m tests.families [--resume] [--output FOLDER] [--page docs/families.md]

Random models with real vocabularies, greedy, in float32. The oracle reads what the reward model's own template writes
of the conversation, with the preference as a part of its contents; it is tokenized here, in plain calls.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.config import ModelConfig

from benchmarks.families import ENGINES, FAMILIES, PAGE, RESULTS, Results, tokenizer_folder
from benchmarks.family_checks import (
    MARKERS,
    SYSTEM,
    USER,
    as_shown,
    chat,
    conversation,
    encode_text,
    encodes_as_one,
    has_system_turn,
    markers,
    render_prompt,
)
from pad_vllm.config import PADConfig
from pad_vllm.reward.token_tables import NO_KEY, TokenTables
from pad_vllm.worker.tokens import load_shared_tokens
from tests import oracle
from tests.support.engine import PLUGIN, Engine, guided, pad_config, preload_processes, set_environment
from tests.support.models import make_model

MAX_TOKENS = 12
GREEDY = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
TEMPLATE = "{preference}\n\n{prompt}"
CODE = "def f(x):\n\tif x:\n        return {'a':  1}\n\n\n"
PAGE_OF_HTML = "<table>\n  <tr><td>東京 naïve</td></tr>\n</table> <b>Привет</b> مرحبا नमस्ते 😀"
BIASED = ("    ", "        ", "\n\n", "\t\t", "</", "的", "при", "ال", "<think>", "</table>", "return", "�")
"""Tokens that a bias makes likely: what is rare among a random model's candidates, and common in texts."""
MASK = 0xE000
SEAM = chr(MASK - 1)
"""In a content: what stands before it and what stands behind it are encoded by themselves."""
"""Private characters stand for the markers that a user spells."""


class Prompt(NamedTuple):
    """Of both models, and the reward model's under a preference."""

    base: list[int]
    reward: list[int]
    composed: dict[str, list[int]]


class LastLogits:
    """A model as the oracle calls it, without the logits before the last: of 262k tokens they are most of its time."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path)
        self.vocab_size = self._model.config.vocab_size

    def __call__(self, token_ids: torch.Tensor) -> Any:
        return self._model(token_ids, logits_to_keep=1)


class FamilyPair:
    """Random models of two families on disk, and as the oracle reads them."""

    def __init__(self, root: Path, base: str, reward: str) -> None:
        self.base, self.base_tokenizer, ends = make(root / "base", base, seed=0)
        self.reward, self.reward_tokenizer, _ = make(root / "reward", reward, seed=1)
        self.base_model, self.reward_model = map(LastLogits, (self.base, self.reward))
        configs = [ModelConfig(model=str(path), dtype="float32") for path in (self.base, self.reward)]
        arguments = {"pretrained_model_name_or_path": str(self.reward)}
        pad = PADConfig(reward_model=str(self.reward))
        tables = load_shared_tokens(pad, arguments, *configs, configs[1].get_vocab_size()).pair.tables
        self.groups = groups_of(tables, self.base_model.vocab_size)
        self.bias = {
            i: 12.0
            for text in BIASED
            for i in encode_text(self.base_tokenizer, text)
            if tables.key[i] != NO_KEY and i not in ends
        }

    def prompts(self) -> list[tuple[list[dict[str, str]] | str, str]]:
        """Conversations where both have a template, and plain texts; each with a preference."""
        spelled = " ".join(m for m in MARKERS if not encodes_as_one(self.base_tokenizer, m))
        texts: list[Any] = [CODE, PAGE_OF_HTML, "The quick brown fox", "a", f"{CODE}{PAGE_OF_HTML}", "1,024 numbers"]
        if self.base_tokenizer.chat_template and self.reward_tokenizer.chat_template:
            texts[:4] = [chat(), chat(user=f"{USER} {spelled}"), conversation(USER), chat(user="Почему?")]
        return [(text, f"Prefer {n} words, é.") for n, text in enumerate(texts)]

    def read(self, text: list[dict[str, str]] | str, preference: str) -> Prompt:
        base, reward = self.base_tokenizer, self.reward_tokenizer
        if isinstance(text, str):
            ids = base.encode(text)
            bos = [reward.bos_token_id] if ids[0] == base.bos_token_id and reward.bos_token_id is not None else []
            plain = Running(reward)
            before = encode_text(reward, f"{preference}\n\n")
            read = plain.encode(text)
            return Prompt(ids, [*bos, *read], {preference: [*bos, *before, *read]})
        ids = encode_text(base, shown := render_prompt(base, text))
        messages = as_shown(base, text, shown)
        first, *rest = messages
        if first["role"] != "system":
            joined = f"{preference}\n\n{first['content']}"
        elif has_system_turn(reward):
            joined = f"{SYSTEM}{SEAM}\n\n{preference}\n\n"
        elif (text := render_prompt(reward, messages)).index(SYSTEM) < text.index(rest[0]["content"]):
            joined = f"{preference}\n\n{SYSTEM}"
        else:  # the system text stands in a later turn
            joined, rest[0] = SYSTEM, {**rest[0], "content": f"{preference}\n\n{rest[0]['content']}"}
        composed = written(reward, [{**first, "content": joined}, *rest])
        return Prompt(ids, written(reward, messages), {preference: composed})

    @torch.no_grad()
    def compare(self, runner: str) -> dict[str, Any]:
        """Engine and oracle: how many requests and tokens, and which differ."""
        asked = [
            {"beta": 1.5},
            {"top_k": 50, "reference": "neutral"},
            {"reference": "none", "beta": 0.7},
            {"top_k": 50, "beta": 0.5},
            {"top_k": 20, "beta": 2.0, "reference": "neutral"},
            {"top_k": 1},
        ]
        prompts, params, expected = [], [], []
        for i, (text, preference) in enumerate(self.prompts()):
            prompt = self.read(text, preference)
            for bias, with_preference in (({}, i % 2 == 0), (self.bias, i % 2 == 1 or i == 0)):
                prompts.append(prompt.base)
                extra = {"preference": preference} if with_preference else {}
                controls = {"logit_bias": bias} if bias else {}
                params.append(GREEDY | controls | guided(**asked[i], **extra))
                expected.append(
                    oracle.generate(
                        self.base_model,
                        prompt.base,
                        MAX_TOKENS,
                        reward=self.reward_model,
                        reward_prompt_ids=prompt.composed[preference] if with_preference else prompt.reward,
                        neutral_prompt_ids=prompt.reward,
                        groups=self.groups,
                        logit_bias=tuple(bias.items()),
                        **asked[i],
                    )
                )
        engine = Engine(
            runner,
            self.base,
            logits_processors=PLUGIN,
            max_model_len=1024,
            max_num_seqs=8,
            **pad_config(self.reward, prompt_template=TEMPLATE, reference="base"),
        )
        try:
            out = engine.generate(prompts, params)
        finally:
            engine.close()
        differ = [
            {"request": i, "engine": got, "oracle": want}
            for i, (got, want) in enumerate(zip(out, expected, strict=True))
            if got != want
        ]
        names = self.base_tokenizer.convert_ids_to_tokens
        return {
            "requests": len(out),
            "tokens": sum(map(len, expected)),
            "distinct": len({i for ids in expected for i in ids}),
            "differ": len(differ),
            "differences": [d | {"engine": names(d["engine"]), "oracle": names(d["oracle"])} for d in differ[:3]],
        }


def make(path: Path, name: str, seed: int) -> tuple[Path, Any, list[int]]:
    """A random model with a family's tokenizer; its tokenizer, and its end tokens."""
    folder = tokenizer_folder(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary[end] for end in FAMILIES[name].ends]
    size = -(-(1 + max(vocabulary.values())) // 64) * 64
    make_model(
        path,
        seed,
        vocab_size=size,
        max_position_embeddings=4096,
        eos_token_id=ends,
        bos_token_id=tokenizer.bos_token_id,
    )
    for file in [*path.glob("*token*"), *path.glob("*.jinja")]:
        file.unlink()
    for file in [*folder.glob("*token*"), *folder.glob("*.jinja")]:
        shutil.copy(file, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return path, AutoTokenizer.from_pretrained(path), ends


def groups_of(tables: TokenTables, num_tokens: int) -> oracle.Groups:
    """Tables as the oracle has them; ``num_tokens``: of the base's output head."""
    starts = tables.member_starts.tolist()
    return oracle.Groups(
        tables.key.tolist() + [NO_KEY] * (num_tokens - len(tables.key)),
        [tables.members[i:j].tolist() for i, j in itertools.pairwise(starts)],
        [tables.pieces_of([c]) for c in range(len(tables.key))],
        *([groups_of(tables.first, num_tokens)] if getattr(tables, "first", None) is not None else []),
    )


class Running:
    """A tokenizer to which only text is text: no token that marks, special or not, comes out of it."""

    def __init__(self, tokenizer: Any) -> None:
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        self.markers = markers(tokenizer)
        kept = [t for t in settings["added_tokens"] if t["content"] not in self.markers]
        vocabulary = settings["model"]["vocab"]
        assert all(token["content"] in vocabulary for token in kept), "or they would be numbered anew"
        settings |= {"added_tokens": kept, "post_processor": None}
        self.backend = Tokenizer.from_str(json.dumps(settings))
        self.ids = {marker: tokenizer.convert_tokens_to_ids(marker) for marker in self.markers}
        self.adds_space = self.backend.encode("a").tokens[0].startswith("▁")

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids


def written(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """The ids of a conversation in the tokenizer's own template, in whose contents no marker is one."""
    running = Running(tokenizer)
    masks = {marker: chr(MASK + n) for n, marker in enumerate(MARKERS)}
    masked = []
    for message in messages:
        content = message["content"]
        for marker, mask in masks.items():
            content = content.replace(marker, mask)
        masked.append({**message, "content": content})
    text = render_prompt(tokenizer, masked)
    ids: list[int] = []
    for part in re.split(f"({'|'.join(sorted(map(re.escape, running.markers), key=len, reverse=True))})", text):
        if part in running.ids:
            ids.append(running.ids[part])
            continue
        for marker, mask in masks.items():
            part = part.replace(mask, marker)
        for piece in filter(None, part.split(SEAM)):
            ids += running.encode(piece)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep what was found with the same versions")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--only", nargs="*", help="BASE/REWARD/RUNNER ...")
    args = parser.parse_args()
    results = Results(args.output, resume=True)
    for engine in ENGINES:
        key = " ".join(("engine", *engine))
        if (args.only and "/".join(engine) not in args.only) or (args.resume and not results.lacks(key)):
            continue
        with tempfile.TemporaryDirectory() as root:
            found = FamilyPair(Path(root), *engine[:2]).compare(engine[2])
        results.add(key, found)
        print(key, json.dumps(found, ensure_ascii=False), flush=True)
    results.write_page(args.page)


if __name__ == "__main__":
    set_environment("v1")
    preload_processes()
    main()
