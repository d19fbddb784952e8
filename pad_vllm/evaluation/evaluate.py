"""``pad-vllm eval``: ways to personalize answers, side by side, through the real engine.

Every method answers the same cells, a user and a prompt each:

- ``base``: the base model, which knows nothing of the user.
- ``prompting``: the preference in the base model's prompt.
- ``best_of_n``: n answers of the base model, of which the reward model picks one.
- ``pad``: guidance by the preference, at each beta; ``pad_weights``: guidance by weights over the reward model's heads.
- ``reward_model``: the reward model answers alone.
- ``dpo``: a model of the base's kind tuned for this very user.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pad_vllm.config import PADConfig
from pad_vllm.evaluation.engine import Answers, Request, generate
from pad_vllm.evaluation.judgement import Judgement
from pad_vllm.evaluation.metrics import bootstrap, distinct, win_shares
from pad_vllm.reward.byte_tokens import same_ordinary_tokens
from pad_vllm.reward.heads import HEAD_FILES
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import Example, answer_ids, prompt_ids
from pad_vllm.training.records import json_lines
from pad_vllm.training.train import another_tokenizer
from pad_vllm.training.trainer import score_answers

METHODS = ("base", "prompting", "best_of_n", "pad", "pad_weights", "reward_model", "dpo")


Checker = Callable[[str, Mapping[str, Any], Mapping[str, Any]], Judgement]
"""Judges an answer, given its prompt's record and its user's."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated.

    Attributes:
        base: path or hub id of the base model.
        pad: the ``pad`` section of an engine's ``additional_config``.
        users: name -> ``preference`` (text, or one for each prompt), ``weights`` (for ``pad_weights``: a list, or
            several by name), ``group`` (users of one group are reported together), ``prompts`` (instead of the common
            ones), ``dpo`` (path of a model tuned for this user), and whatever else the checker reads.
        prompts: records with a ``prompt`` (text or messages), and whatever else the checker reads.
        checker: ``"module:name"`` of a :data:`Checker`.
        methods: of :data:`METHODS`; those that need what a user does not have are left out for this user.
        betas: strengths of ``pad``. ``pad_weights`` has 1.
        best_of: answers that ``best_of_n`` chooses from.
        prompting: how a preference enters the base model's prompt, in its last turn.
        reference: model that says how likely an answer is by itself, in its own tokens. None: the base.
        engine: more arguments of ``vllm.LLM``.
    """

    base: str
    pad: dict[str, Any]
    users: dict[str, dict[str, Any]]
    checker: str
    prompts: list[dict[str, Any]] = field(default_factory=list)
    methods: tuple[str, ...] = METHODS
    betas: tuple[float, ...] = (0.5, 1.0, 1.5)
    best_of: int = 8
    prompting: str = "{prompt} {preference}"
    reference: str | None = None
    temperature: float = 0.8
    max_tokens: int = 256
    seed: int = 0
    engine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"methods: {', '.join(sorted(unknown))}: there are {', '.join(METHODS)}")
        if "base" not in self.methods:
            raise ValueError("methods: base is what the others are held against, and cannot be left out")
        if not self.users:
            raise ValueError("users: none")
        for name, user in self.users.items():
            prompts = user.get("prompts", self.prompts)
            if not prompts:
                raise ValueError(f"users.{name}: no prompts, of its own or for all")
            preference = user.get("preference")
            if isinstance(preference, Sequence) and not isinstance(preference, str) and len(preference) != len(prompts):
                raise ValueError(f"users.{name}: {len(preference)} preferences for {len(prompts)} prompts")


class Cell(NamedTuple):
    """A user and a prompt, with what the user says of it."""

    name: str
    user: Mapping[str, Any]
    record: Mapping[str, Any]
    preference: str | None


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Answer, judge, and summarize.

    Returns:
        JSON: ``rows``, one for a group of users and a method, and ``answers``, of every method for every cell.
    """
    checker = load_checker(config.checker)
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    cells = _cells(config)
    reward_tokenizer = AutoTokenizer.from_pretrained(config.pad["reward_model"])
    tokenizers = {"reward_model": reward_tokenizer}
    answers = _answer(config, tokenizer, reward_tokenizer, cells)
    model = config.reference or config.base
    reference, reads = _load(model), another_tokenizer(model, tokenizer) or tokenizer
    judged = {}
    for method, (indices, found) in answers.items():
        own = [cells[i] for i in indices]
        nll = _nll(reference, reads, own, in_tokens_of(reads, found, tokenizers.get(method, tokenizer)))
        judged[method] = [
            {
                "cell": i,
                "user": cell.name,
                "text": text,
                "nll": round(value, 4),
                "satisfied": dict(judgement.satisfied),
                "satisfaction": judgement.satisfaction,
                "well_formed": judgement.well_formed,
            }
            for i, cell, text, value, judgement in zip(
                indices,
                own,
                found.texts,
                nll,
                (checker(text, cell.record, cell.user) for cell, text in zip(own, found.texts, strict=True)),
                strict=True,
            )
        ]
    seconds = {method: found.seconds / len(indices) for method, (indices, found) in answers.items()}
    groups = list(dict.fromkeys(cell.user.get("group", "all") for cell in cells))
    rows = [
        row
        for group in groups
        for method, records in judged.items()
        if (row := _summarize(group, method, records, judged["base"], cells, seconds)) is not None
    ]
    return {"rows": rows, "answers": judged}


def load_checker(name: str) -> Checker:
    """The object that ``"module:name"`` names."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"checker: {name!r} is not the 'module:name' of a function ({error})") from None


def _cells(config: EvaluationConfig) -> list[Cell]:
    cells = []
    for name, user in config.users.items():
        prompts = user.get("prompts", config.prompts)
        said = user.get("preference")
        preferences = [said] * len(prompts) if said is None or isinstance(said, str) else said
        cells += [Cell(name, user, record, text) for record, text in zip(prompts, preferences, strict=True)]
    return cells


def _answer(
    config: EvaluationConfig, tokenizer: Any, reward_tokenizer: Any, cells: Sequence[Cell]
) -> dict[str, tuple[list[int], Answers]]:
    """For each method, the cells that it answered and its answers. One engine serves all that the base model can."""
    said = [i for i, cell in enumerate(cells) if cell.preference is not None]
    plain = [prompt_ids(cell.record["prompt"], tokenizer) for cell in cells]
    plans: dict[str, tuple[list[int], list[Request]]] = {"base": (list(range(len(cells))), list(map(Request, plain)))}

    def preferring(i: int) -> dict[str, Any]:
        return {"pad_preference": cells[i].preference} if cells[i].preference is not None else {}

    if "prompting" in config.methods:
        asked = [prompt_ids(_with_preference(config.prompting, cells[i]), tokenizer) for i in said]
        plans["prompting"] = (said, list(map(Request, asked)))
    if "best_of_n" in config.methods:
        plans["best_of_n"] = (said, [Request(plain[i]) for i in said for _ in range(config.best_of)])
    if "pad" in config.methods:
        for beta in config.betas:
            requests = [Request(plain[i], {**preferring(i), "pad_beta": beta}) for i in said]
            plans[f"pad, beta {beta:g}"] = (said, requests)
    if "pad_weights" in config.methods:
        weights = [_weights(cell.user) for cell in cells]
        for name in dict.fromkeys(name for own in weights for name in own):
            weighed = [i for i, own in enumerate(weights) if name in own]
            requests = [Request(plain[i], {"pad_weights": weights[i][name], "pad_beta": 1.0}) for i in weighed]
            plans[name] = (weighed, requests)

    settings = {"temperature": config.temperature, "max_tokens": config.max_tokens, "seed": config.seed}
    pad = PADConfig.from_additional_config({"pad": config.pad})
    read = plain
    same = same_ordinary_tokens(tokenizer, reward_tokenizer)
    if not same:  # it reads the same texts, in its own chat template
        read = [prompt_ids(cell.record["prompt"], reward_tokenizer) for cell in cells]
    chat_tokenizer = tokenizer if same else reward_tokenizer
    template = PromptTemplate(reward_tokenizer, pad.prompt_template, pad.insert_after, chat_tokenizer)
    found = generate(
        config.base,
        {method: requests for method, (_, requests) in plans.items() if requests},
        **settings,
        **config.engine,
        logits_processors=["pad_vllm:PADLogitsProcessor"],
        additional_config={"pad": config.pad},
    )
    if "best_of_n" in found:
        contexts = [(template.compose(read[i], cells[i].preference), plain[i]) for i in said]
        found["best_of_n"] = _pick_best(config, contexts, found["best_of_n"], tokenizer, reward_tokenizer)
    answers = {method: (plans[method][0], found[method]) for method in plans if method in found}
    if "reward_model" in config.methods and said:
        requests = [Request(template.compose(read[i], cells[i].preference)) for i in said]
        with _without_heads(config.pad["reward_model"]) as path:
            alone = generate(path, {"it": requests}, **settings, **config.engine)
        answers["reward_model"] = (said, alone["it"])
    if "dpo" in config.methods:
        tuned = defaultdict(list)
        for i, cell in enumerate(cells):
            if cell.user.get("dpo"):
                tuned[cell.user["dpo"]].append(i)
        parts = []
        for path, indices in tuned.items():
            parts.append(
                generate(path, {"it": [Request(plain[i]) for i in indices]}, **settings, **config.engine)["it"]
            )
        if parts:
            all_of = Answers(
                [t for p in parts for t in p.texts], [t for p in parts for t in p.tokens], sum(p.seconds for p in parts)
            )
            answers["dpo"] = ([i for indices in tuned.values() for i in indices], all_of)
    return answers


def _weights(user: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """A user's weights by the name of what is done with them."""
    weights = user.get("weights")
    if weights is None:
        return {}
    if isinstance(weights, Mapping):
        return {f"pad_weights, {name}": values for name, values in weights.items()}
    return {"pad_weights": weights}


@contextlib.contextmanager
def _without_heads(reward_model: str) -> Iterator[str]:
    """A folder of the reward model that vLLM loads as a base: its loader takes heads for the model's own weights."""
    if not Path(reward_model).is_dir():
        yield reward_model
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in Path(reward_model).iterdir():
            if path.name not in HEAD_FILES:
                Path(folder, path.name).symlink_to(path.resolve())
        yield folder


def _with_preference(template: str, cell: Cell) -> Any:
    prompt = cell.record["prompt"]
    if isinstance(prompt, str):
        return template.format(prompt=prompt, preference=cell.preference)
    *head, last = prompt
    return [*head, last | {"content": template.format(prompt=last["content"], preference=cell.preference)}]


def _pick_best(
    config: EvaluationConfig,
    contexts: Sequence[tuple[list[int], list[int]]],
    samples: Answers,
    tokenizer: Any,
    reward_tokenizer: Any,
) -> Answers:
    """Of each cell's samples the one of the highest reward, log pi_theta(y | x, p) - log pi_ref(y | x)."""
    start = time.perf_counter()
    n = config.best_of
    rewards = torch.zeros(len(samples.texts))
    for path, side, sign in ((config.pad["reward_model"], 0, 1), (config.base, 1, -1)):
        answers = in_tokens_of(reward_tokenizer if sign == 1 else tokenizer, samples, tokenizer)
        examples = [Example(contexts[i // n][side], tokens) for i, tokens in enumerate(answers)]
        rewards += sign * score_answers(_load(path), examples)
    best = [i * n + int(own.argmax()) for i, own in enumerate(rewards.view(-1, n))]
    seconds = samples.seconds + time.perf_counter() - start
    return Answers([samples.texts[i] for i in best], [samples.tokens[i] for i in best], seconds)


def in_tokens_of(reads: Any, answers: Answers, tokenizer: Any) -> list[list[int]]:
    """Answers in ``tokenizer``'s tokens, in those of a tokenizer that is to read them; an end token stays one."""
    if reads is tokenizer or same_ordinary_tokens(reads, tokenizer):
        return answers.tokens
    ended = [tokens[-1:] == [tokenizer.eos_token_id] for tokens in answers.tokens]
    return [answer_ids(text, reads)[: None if end else -1] for text, end in zip(answers.texts, ended, strict=True)]


def _load(path: str) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(path).eval().to(device)


def _nll(reference: Any, tokenizer: Any, cells: Sequence[Cell], tokens: Sequence[list[int]]) -> list[float]:
    """Negative log-likelihood per token of each answer after its plain prompt, in nats; in the reference's tokens."""
    examples = [
        Example(prompt_ids(cell.record["prompt"], tokenizer), answer)
        for cell, answer in zip(cells, tokens, strict=True)
    ]
    sums = score_answers(reference, examples).tolist()
    return [-total / max(len(answer), 1) for total, answer in zip(sums, tokens, strict=True)]


def _summarize(
    group: str,
    method: str,
    records: Sequence[dict[str, Any]],
    base: Sequence[dict[str, Any]],
    cells: Sequence[Cell],
    seconds: Mapping[str, float],
) -> dict[str, Any] | None:
    own = [record for record in records if cells[record["cell"]].user.get("group", "all") == group]
    if not own:
        return None
    users = [record["user"] for record in own]
    satisfaction = [record["satisfaction"] for record in own]
    theirs = [base[record["cell"]]["satisfaction"] for record in own]
    by_dimension, by_user = defaultdict(list), defaultdict(list)
    for record in own:
        by_user[record["user"]].append(record["text"])
        for dimension, value in record["satisfied"].items():
            by_dimension[dimension].append(value)
    return {
        "group": group,
        "method": method,
        "num_users": len(by_user),
        "num_answers": len(own),
        "satisfaction": bootstrap(satisfaction, users),
        "win_rate": bootstrap(win_shares(satisfaction, theirs), users),
        "well_formed": bootstrap([float(record["well_formed"]) for record in own], users),
        "nll": bootstrap([record["nll"] for record in own], users),
        "distinct_2": sum(distinct(texts, 2) for texts in by_user.values()) / len(by_user),
        "seconds_over_base": seconds[method] / seconds["base"],
        "dimensions": {name: sum(values) / len(values) for name, values in sorted(by_dimension.items())},
    }


def read_config(path: str | Path) -> EvaluationConfig:
    """A configuration from a JSON or YAML file; ``prompts`` and ``users`` may be paths of files beside it.

    Raises:
        ValueError: naming the file and the key.
    """
    from pad_vllm.config import read_file

    path = Path(path)
    settings = read_file("config", str(path))
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path}: expected the settings of an evaluation, by name")
    settings = dict(settings)
    known = EvaluationConfig.__dataclass_fields__
    if unknown := set(settings) - set(known):
        raise ValueError(
            f"{path}: unknown settings {', '.join(sorted(map(str, unknown)))}; there are {', '.join(known)}"
        )
    if isinstance(settings.get("prompts"), str):
        file = path.parent / settings["prompts"]
        try:
            settings["prompts"] = [record for _, record in json_lines(file)]
        except OSError as error:
            raise ValueError(f"prompts: {file}: {error}") from None
    if isinstance(settings.get("users"), str):
        settings["users"] = read_file("users", str(path.parent / settings["users"]))
    for name in ("methods", "betas"):
        if name in settings:
            settings[name] = tuple(settings[name])
    try:
        return EvaluationConfig(**settings)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None
