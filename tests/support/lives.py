"""Random requests, as users have them, and the oracle's word on each of their answers.

An answer is judged token by token: the rule after the prompt and the tokens that the engine had generated before it. So
a model reads an answer once, and a token that rounding could have made another one says nothing of those behind it.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pad_vllm.params import PAD
from pad_vllm.reward.template import PromptTemplate
from tests import oracle
from tests.support.engine import guided
from tests.support.models import CORPUS, make_heads, make_model
from tests.support.pairs import HEADS, Kind, TokenPair
from tests.support.tokenizers import MORE

TIE = 1e-4
"""How far apart two of the oracle's numbers may be that an engine's rounding may exchange, for each unit of what the
rule multiplies them with."""
WORDS = " ".join(CORPUS + MORE).split()
UNUSUAL = (
    *(
        "é",
        "e\u0301",
        "\u202eback",
        "a\u200db",
        "\ufeff",
        "ﬁ",
        "\t",
        "\n\n",
        "  ",
        "    ",
        "مرحبا",
        "नमस्ते",
        "👩\u200d🚀",
        "▁",
        "\ue000",
        "\0",
    ),
    *("<s>", "</s>", "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>", "<end_of_turn>", "<think>", "</think>"),
    *("{prompt}", "{preference}", "[Instruction]", "\\n", "%s", "{{ x }}"),
)
"""What a user may write in a preference: marks that combine, or turn the line; a marker's name, which marks nothing."""


class Prompt(NamedTuple):
    ids: list[int]
    read: list[int]
    """What the reward model reads of it, without a preference"""
    begins_answer: bool = False


class World:
    """A base and a reward model, on disk and as the oracle reads them."""

    base: Path
    reward: Path
    base_model: Any
    reward_model: Any
    groups: oracle.Groups | None = None
    positions: int
    """Of the reward model"""
    end: int
    """What ends an answer"""
    candidates: list[int]
    """Tokens that may be generated under guidance, special ones apart"""
    drafting: dict[str, Any]
    """Of ``speculative_config``, where the reward model drafts"""

    def prompts(self, rng: random.Random, number: int, longest: int) -> list[Prompt]:
        raise NotImplementedError

    def compose(self, prompt: Prompt, preference: str) -> list[int]:
        return self._template.compose(prompt.read, preference)

    @functools.cached_property
    def _template(self) -> PromptTemplate:
        return PromptTemplate(AutoTokenizer.from_pretrained(self.reward))

    @functools.cache  # noqa: B019 (as long as a part)
    def head(self, weights: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = load_file(self.reward / "heads.safetensors")
        return oracle.mixed_head(tensors, dict(zip(HEADS, weights, strict=True)))

    def preferences(self, rng: random.Random, number: int, longest: int = 48) -> list[str]:
        tokenizer = AutoTokenizer.from_pretrained(self.reward)
        texts: list[str] = []
        while len(texts) < number:
            words = rng.choices(WORDS, k=rng.choice([1, 2, 6, 14])) + rng.choices(UNUSUAL, k=rng.choice([0, 0, 1, 3]))
            rng.shuffle(words)
            text = rng.choice([" ", " ", ""]).join(words)
            if text.strip() and len(tokenizer.encode(text, add_special_tokens=False)) <= longest:
                texts.append(text)
        return texts


class SameTokenizer(World):
    """``near``: the reward model is the base with some noise, so that many of its drafts are accepted."""

    def __init__(self, root: Path, positions: int, near: bool = False) -> None:
        self.base = make_model(root / "base", seed=0)
        self.base_model = AutoModelForCausalLM.from_pretrained(self.base)
        self.reward = make_model(root / "reward", seed=1, max_position_embeddings=positions)
        if near:
            noisy = copy.deepcopy(self.base_model)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in noisy.parameters():
                    parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
            noisy.config.max_position_embeddings = positions
            noisy.save_pretrained(self.reward)
        make_heads(self.reward / "heads.safetensors", list(HEADS))
        self.reward_model = AutoModelForCausalLM.from_pretrained(self.reward)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.positions, self.end, self.candidates, self.drafting = positions, 1, list(range(5, 500)), {}

    def prompts(self, rng: random.Random, number: int, longest: int) -> list[Prompt]:
        """Tokens at random, markers among them; heads of a few long ones; chats."""
        long = [[0, *rng.choices(self.candidates, k=longest)] for _ in range(3)]
        prompts = []
        while len(prompts) < number:
            match rng.randrange(4):
                case 0:
                    ids = [0, *rng.choices(range(500), k=rng.choice([1, 3, 12, 40]))][rng.randrange(2) :]
                case 1 | 2:
                    ids = rng.choice(long)[: rng.choice([1, 8, 33, 64, 65, 90, 150, longest])]
                    ids = ids + rng.choices(self.candidates, k=rng.choice([0, 1, 7]))
                case _:
                    turns = rng.choice([1, 1, 3])
                    roles = ["user", "assistant"] * turns
                    messages = [{"role": role, "content": _text(rng)} for role in roles[:turns]]
                    text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                    ids = self.tokenizer.encode(text, add_special_tokens=False)
            if len(ids) <= longest:
                prompts.append(Prompt(ids, ids))
        return prompts


PAIRS: tuple[dict[str, Any], ...] = (
    {"base": Kind("like Qwen's", 606), "reward": Kind("like Gemma's", 907), "chats": True},
    {"base": Kind("like Gemma's", 907), "reward": Kind("like Qwen's", 606), "chats": True},
    {"base": Kind("metaspace", 700), "reward": Kind("byte-level", 900)},
    {"base": Kind("byte-level", 900), "reward": Kind("byte-level", 600)},
    {"base": Kind("byte-level", 600), "reward": Kind("metaspace", 800)},
)


class AnotherTokenizer(World):
    def __init__(self, root: Path, positions: int, base: Kind, reward: Kind, chats: bool = False) -> None:
        self.pair = pair = TokenPair(root, base, reward, positions)
        self.base, self.reward, self.groups = pair.base, pair.reward, pair.groups
        self.base_model, self.reward_model = pair.base_model, pair.reward_model
        self.positions, self.end, self.chats = positions, pair.base_tokenizer.eos_token_id, chats
        special = set(pair.base_tokenizer.all_special_ids)
        self.candidates = [i for i, key in enumerate(pair.groups.key) if key >= 0 and i not in special]
        self.drafting = {"use_heterogeneous_vocab": True}

    def prompts(self, rng: random.Random, number: int, longest: int) -> list[Prompt]:
        """Texts, heads of a few long ones, and chats where both have a template."""
        long, prompts = [_text(rng, 120) for _ in range(3)], []
        while len(prompts) < number:
            chat = self.chats and rng.random() < 0.4
            text = _text(rng) if chat or rng.random() < 0.5 else rng.choice(long)[: rng.choice([1, 9, 60, 150, 400])]
            if chat:
                prompt = Prompt(self.pair.chat(text), self.pair.chat(text, own=True), True)
            else:
                prompt = Prompt(self.pair.prompt(text), self.pair.read(text))
            if 0 < len(prompt.ids) <= longest and prompt.read:
                prompts.append(prompt)
        return prompts


def _text(rng: random.Random, num_words: int | None = None) -> str:
    return " ".join(rng.choices(WORDS, k=num_words or rng.choice([1, 2, 5, 15, 40])))


@dataclass
class Request:
    """One user's."""

    prompt: Prompt
    pad: dict[str, Any]
    """Request arguments, without their prefix; none: unguided"""
    controls: dict[str, Any]
    """Other sampling parameters"""
    max_tokens: int
    arrives: int
    """Steps after the one before"""
    abort_after: int | None
    """Tokens that this user waits for"""

    @property
    def is_guided(self) -> bool:
        return bool(set(self.pad) - {"cache_salt"})

    def sampling(self) -> dict[str, Any]:
        return {"temperature": 0.0, "max_tokens": self.max_tokens, **self.controls} | (
            guided(**self.pad) if self.pad else {}
        )


class Answer(NamedTuple):
    tokens: list[int]
    finished: bool
    """Else aborted, or refused"""
    refusal: str = ""


def make_personas(world: World, rng: random.Random) -> dict[str, dict[str, Any]]:
    texts = world.preferences(rng, 5)
    return {
        "terse": {"preference": texts[0], "beta": 1.5},
        "mixed": {"weights": _weights(rng, len(HEADS)), "top_k": 20},
        "two": {"preference": texts[1:3], "preference_weights": [1.0, -0.5], "reference": "none"},
        "neutral": {"preference": texts[3:5], "reference": "neutral", "beta": 0.7, "max_divergence": 0.2},
    }


def make_requests(
    world: World,
    personas: Sequence[str],
    number: int,
    rng: random.Random,
    longest: int,
    most: int,
    seeds: bool = True,
    bias: bool = True,
) -> list[Request]:
    """``longest``: a prompt, in tokens. ``most``: what nearly all requests generate. ``seeds``: whether those that
    sample have one. ``bias``: whether some have a logit bias."""
    prompts = world.prompts(rng, max(number // 3, 8), longest)
    texts = world.preferences(rng, 12)
    return [
        Request(
            prompt=rng.choice(prompts),
            pad=_ask(rng, personas, texts),
            controls=_controls(world, rng, seeds, bias),
            max_tokens=rng.choice([1, 2, most // 2, most, most]) if rng.random() < 0.98 else 256,
            arrives=rng.choice([0, 0, 0, 1, 1, 2, 4]),
            abort_after=rng.randrange(most) if rng.random() < 0.12 else None,
        )
        for _ in range(number)
    ]


def _ask(rng: random.Random, personas: Sequence[str], texts: list[str]) -> dict[str, Any]:
    salt = {"cache_salt": rng.choice(["one", "other"])} if rng.random() < 0.15 else {}
    asked: dict[str, Any] = {}
    match rng.choices(["unguided", "persona", "preference", "several", "prompt"], [15, 15, 35, 20, 15])[0]:
        case "unguided":
            return salt
        case "persona":
            asked["persona"] = rng.choice(personas)
        case "preference":
            asked["preference"] = rng.choice(texts)
        case "several":
            number = rng.choice([2, 2, 2, 2, 3, 3, 5, 8])
            asked["preference"] = rng.choices(texts, k=number)
            if rng.random() < 0.6:
                asked["preference_weights"] = rng.choice([_weights(rng, number), [1.0, *[-0.5] * (number - 1)]])
        case "prompt":
            asked["beta"] = 1.0
    if rng.random() < 0.5:
        asked["beta"] = rng.choice([0.0, 0.0, 0.3, 0.7, 1.0, 1.5, 2.5])
    if rng.random() < 0.5:
        asked["top_k"] = rng.choice([1, 2, 5, 20, 50, 64])
    if rng.random() < 0.2:
        asked["max_divergence"] = rng.choice([0.0, 0.05, 0.3, 1.0])
    if rng.random() < 0.3:
        asked["reference"] = rng.choice(["base", "neutral", "none"])
    if "persona" not in asked and rng.random() < 0.2:
        asked["weights"] = _weights(rng, len(HEADS))
    return asked | salt


def _weights(rng: random.Random, number: int) -> list[float]:
    return [rng.choice([-1.0, -0.4, 0.0, 0.3, 0.5, 1.0]) for _ in range(number)]


def _controls(world: World, rng: random.Random, seeds: bool, bias: bool) -> dict[str, Any]:
    controls: dict[str, Any] = {"ignore_eos": rng.random() < 0.6}
    if rng.random() < 0.25:
        controls["presence_penalty"] = rng.choice([0.0, 0.7, -0.5])
        controls["frequency_penalty"] = rng.choice([0.0, 0.4])
        controls["repetition_penalty"] = rng.choice([1.0, 1.3, 0.8])
    if bias and rng.random() < 0.25:
        biased = rng.sample(world.candidates, 4) + [world.end] * rng.randrange(2)
        controls["logit_bias"] = {token: rng.choice([-20.0, -3.0, 2.0, 6.0]) for token in biased}
    if rng.random() < 0.15:
        controls["stop_token_ids"] = rng.sample(world.candidates, 30)
    if rng.random() < 0.05:
        controls["allowed_token_ids"] = sorted(rng.sample(world.candidates, rng.choice([1, 5, 60])))
    if rng.random() < 0.1:
        controls["temperature"] = rng.choice([0.5, 1.0])
        if seeds:
            controls["seed"] = rng.randrange(2**31)
    return controls


class AtOnce:
    """A model as the oracle calls it, which reads whole sequences: what it says behind a head of one."""

    def __init__(self, model: Any, sequences: Sequence[list[int]]) -> None:
        self.lm_head, self._model = model.lm_head, model.model
        self._read = [(ids, self._model(torch.tensor([ids])).last_hidden_state) for ids in sequences]

    def model(self, token_ids: torch.Tensor) -> SimpleNamespace:
        ids = token_ids[0].tolist()
        for whole, hidden_states in self._read:
            if whole[: len(ids)] == ids:
                return SimpleNamespace(last_hidden_state=hidden_states[:, : len(ids)])
        raise AssertionError("the oracle reads what no answer begins with")

    def __call__(self, token_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.model(token_ids).last_hidden_state[:, -1:]))


@dataclass
class Verdict:
    tokens: int = 0
    """Compared, each with the oracle's choice"""
    sampled: int = 0
    """Tokens drawn at random, of which the oracle knows that they were candidates"""
    full: int = 0
    """End tokens of a context that is full"""
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)


class Judge:
    """The oracle's word on answers in a world.

    Args:
        reference: the server's.
        max_model_len: the engine's.
    """

    def __init__(self, world: World, personas: dict[str, Any], reference: str, max_model_len: int) -> None:
        self.world, self.personas, self.reference, self.max_model_len = world, personas, reference, max_model_len

    def asked(self, request: Request) -> dict[str, Any]:
        """With the persona's arguments, and the server's."""
        pad = {key: value for key, value in request.pad.items() if key != "cache_salt"}
        if not pad:
            return {}
        name = pad.pop("persona", None)
        return {"reference": self.reference, **(self.personas[name] if name else {}), **pad}

    def contexts(self, request: Request) -> tuple[list[list[int]], int]:
        """Of each preference, or the one without; and the length of the longest that is read."""
        asked, prompt = self.asked(request), request.prompt
        preferences = PAD(preference=asked.get("preference")).preferences
        contexts = [self.world.compose(prompt, text) for text in preferences] or [prompt.read]
        weights = asked.get("preference_weights") or [1 / len(contexts)] * len(contexts)
        counts: dict[tuple[int, ...], float] = {}
        pairs = list(zip(contexts, weights, strict=True))
        if asked.get("reference") == "neutral":
            pairs.append((prompt.read, -sum(weights)))
        for ids, weight in pairs:
            counts[tuple(ids)] = counts.get(tuple(ids), 0.0) + weight
        read = [ids for ids, weight in counts.items() if weight] or [tuple(prompt.read)]
        return contexts, max(map(len, read))

    def refused(self, request: Request) -> bool:
        """Whether a context has no place for the prompt."""
        return max(map(len, self.contexts(request)[0])) > self.world.positions

    @torch.no_grad()
    def judge(self, request: Request, got: list[int], finished: bool) -> Verdict:
        """``finished``: else aborted, and ``got`` is what had been seen."""
        asked, verdict = self.asked(request), Verdict()
        contexts, longest = self.contexts(request)
        num_guided = self._num_guided(got, longest, request.prompt.begins_answer) if asked else len(got)
        self._check_length(request, got, finished, verdict)
        controls = request.controls
        if num_guided < len(got):
            end = (controls.get("stop_token_ids") or [self.world.end])[0]
            verdict.full = len(got) - num_guided
            if got[num_guided:] != [end] * verdict.full:
                verdict.wrong.append(f"a full context's request went on by {got[num_guided:]}")
        z_prime = self._rows(request, got[:num_guided], contexts if asked else None)
        scale = 1 + self._factor(asked)
        for i, (token, row) in enumerate(zip(got, z_prime, strict=False)):
            drawn = controls.get("temperature", 0) > 0
            verdict.tokens, verdict.sampled = verdict.tokens + (not drawn), verdict.sampled + drawn
            best = int(row.argmax())
            if token == best or (drawn and row[token].isfinite()):
                continue
            gap = float(row[best] - row[token])
            is_tie = gap <= TIE * scale and not drawn
            if is_tie or (asked and self._is_at_edge(request, got[: i + 1], contexts, drawn, scale)):
                verdict.near_ties += 1
            else:
                verdict.wrong.append(f"token {i} is {token}, and {best} is {gap:.6f} better")
        return verdict

    def _factor(self, asked: dict[str, Any]) -> float:
        weights = asked.get("preference_weights") or [1.0]
        return asked.get("beta", 1.0) * 2 * sum(map(abs, weights)) if asked else 0.0

    def _num_guided(self, got: list[int], longest: int, begins_answer: bool) -> int:
        """How many tokens a context has room for; the last one has no place in it, and needs none."""
        groups = self._groups(begins_answer)
        for i in range(len(got)):
            if longest + len(oracle.reads(got[:i], groups, {})) > self.world.positions:
                return i
        return len(got)

    def _groups(self, begins_answer: bool) -> oracle.Groups | None:
        groups = self.world.groups
        return groups if groups is None or begins_answer else groups._replace(first=None)

    def _check_length(self, request: Request, got: list[int], finished: bool, verdict: Verdict) -> None:
        stops = set(request.controls.get("stop_token_ids", ()))
        stops |= set() if request.controls["ignore_eos"] else {self.world.end}
        limit = min(request.max_tokens, self.max_model_len - len(request.prompt.ids))
        if any(token in stops for token in got[:-1]):
            verdict.wrong.append("it went on behind what ends it")
        if len(got) > limit or (finished and len(got) < limit and not (got and got[-1] in stops)):
            verdict.wrong.append(f"{len(got)} tokens where {limit} were to come")

    def _rows(
        self, request: Request, got: list[int], contexts: list[list[int]] | None, **more: Any
    ) -> list[torch.Tensor]:
        """z' of each of these tokens; z where ``contexts`` is None."""
        rows: list[torch.Tensor] = []

        def keep(z: torch.Tensor) -> torch.Tensor:
            rows.append(z)
            return z

        world, controls, prompt = self.world, request.controls, request.prompt
        penalties = [controls.get(f"{name}_penalty", float(name == "repetition")) for name in PENALTIES]
        rule: dict[str, Any] = {}
        if contexts is not None and got:
            asked, groups = self.asked(request), self._groups(prompt.begins_answer)
            seen = oracle.reads(got[:-1], groups, {})
            rule = {
                "reward": AtOnce(world.reward_model, [ids + seen for ids in (*contexts, prompt.read)]),
                "reward_prompt_ids": contexts,
                "weights": asked.get("preference_weights"),
                "head": world.head(tuple(asked["weights"])) if "weights" in asked else None,
                "groups": groups,
                "neutral_prompt_ids": prompt.read,
            } | {key: asked[key] for key in ("beta", "top_k", "reference", "max_divergence") if key in asked}
        if allowed := controls.get("allowed_token_ids"):
            more = {"mask": _only(allowed)} | more
        oracle.generate(
            AtOnce(world.base_model, [prompt.ids + got[:-1]] if got else []),
            prompt.ids,
            len(got),
            logit_bias=controls.get("logit_bias", {}),
            penalties=tuple(penalties),
            behind=keep,
            force=lambda output: got[len(output)],
            **rule,
            **more,
        )
        return rows

    def _is_at_edge(
        self, request: Request, got: list[int], contexts: list[list[int]], drawn: bool, scale: float
    ) -> bool:
        """Whether the last candidate and the first that is none are a near tie, and by the other the token is right."""
        z = self._rows(request, got, None)[-1]
        groups = self._groups(request.prompt.begins_answer)
        if groups is not None:
            z = z.masked_fill(torch.tensor(groups.key) == -1, oracle.NEG_INF)
        k = self.asked(request).get("top_k", 10)
        values, order = z.sort(descending=True, stable=True)
        if k >= len(z) or not values[k].isfinite() or values[k - 1] - values[k] > TIE:
            return False
        allowed, last = request.controls.get("allowed_token_ids"), int(order[k - 1])
        before = _only(allowed) if allowed else lambda y, output: y

        def mask(y: torch.Tensor, output: list[int]) -> torch.Tensor:
            y = before(y, output).clone()
            if len(output) == len(got) - 1:
                y[last] = oracle.NEG_INF
            return y

        row = self._rows(request, got, contexts, mask=mask)[-1]
        if drawn:
            return bool(row[got[-1]].isfinite())
        return bool(row.max() - row[got[-1]] <= TIE * scale)


PENALTIES = ("presence", "frequency", "repetition")


def _only(allowed: list[int]) -> Callable[[torch.Tensor, list[int]], torch.Tensor]:
    index = torch.tensor(allowed)
    return lambda y, output: torch.full_like(y, oracle.NEG_INF).index_copy_(0, index, y[index])
