"""``pad-vllm eval``: compare ways to personalize answers, through the real engine.

Every method answers the same cells. A cell is a user and a prompt.

- ``base``: the base model, which knows nothing of the user.
- ``prompting``: the preference in the base model's prompt.
- ``best_of_n``: the base model gives n answers, and the reward model picks one.
- ``pad``: guidance by the preference, at each beta; ``pad_weights``: guidance by weights over the reward model's heads.
- ``reward_model``: the reward model answers alone.
- ``dpo``: a model of the base's kind tuned for this very user.
"""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pad_vllm.checks import check_int, check_number, shown
from pad_vllm.evaluation.engine import Answers
from pad_vllm.evaluation.harness import Asked, Method, Models, Prompt, answers, in_tokens_of
from pad_vllm.evaluation.judgement import Judgement
from pad_vllm.evaluation.methods import (
    BASE,
    BestOf,
    Guided,
    Prompting,
    RewardModel,
    Tuned,
    Weighted,
    in_last_turn,
    load_scorer,
)
from pad_vllm.evaluation.metrics import bootstrap, distinct, win_shares
from pad_vllm.params import MAX_BETA
from pad_vllm.reward.source import Source
from pad_vllm.training.data import Example, prompt_ids
from pad_vllm.training.records import json_lines
from pad_vllm.training.train import another_tokenizer
from pad_vllm.training.trainer import score_answers

METHODS = ("base", "prompting", "best_of_n", "pad", "pad_weights", "reward_model", "dpo")
"""The names allowed in ``methods``."""


Checker = Callable[[str, Mapping[str, Any], Mapping[str, Any]], Judgement]
"""Judges an answer, given its prompt's record and its user's."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The settings of an evaluation.

    Attributes:
        base: path or hub id of the base model.
        pad: the ``pad`` section of an engine's ``additional_config``.
        users: name -> ``preference`` (text, or one for each prompt), ``weights`` (for ``pad_weights``: a list, or
            several by name), ``group`` (users of one group are reported together), ``prompts`` (instead of the common
            ones), ``dpo`` (path of a model tuned for this user), and whatever else the checker reads.
        prompts: records with a ``prompt`` (text or messages), and whatever else the checker reads.
        checker: ``"module:name"`` of a :data:`Checker`.
        methods: of :data:`METHODS`. A method is left out for a user who lacks what it needs.
        betas: strengths of ``pad``; ``pad_weights`` always has strength 1.
        best_of: how many answers ``best_of_n`` chooses from.
        prompting: text that puts a preference into the last turn of the base model's prompt.
        reference: model that measures how likely an answer is without the preference. None: the base.
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
        self._check_types()
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"methods: {', '.join(sorted(unknown))}: unknown; must be of {', '.join(METHODS)}")
        if "base" not in self.methods:
            raise ValueError("methods: must include base, with which the others are compared")
        if not self.users:
            raise ValueError("users: must name at least one user")
        for name, user in self.users.items():
            prompts = user.get("prompts", self.prompts)
            if not prompts:
                raise ValueError(f"users.{name}: has no prompts; give prompts for this user, or for all users")
            preference = user.get("preference")
            if isinstance(preference, Sequence) and not isinstance(preference, str) and len(preference) != len(prompts):
                raise ValueError(f"users.{name}: {len(preference)} preferences for {len(prompts)} prompts")

    def _check_types(self) -> None:
        check_int("best_of", self.best_of, 1)
        check_int("max_tokens", self.max_tokens, 1)
        check_number("temperature", self.temperature, 0, math.inf)
        for beta in self.betas:
            check_number("betas", beta, 0, MAX_BETA)
        for name, value in (("pad", self.pad), ("engine", self.engine), ("users", self.users)):
            if not isinstance(value, Mapping):
                raise ValueError(f"{name}={shown(value)}: must be an object")
        _check_prompts("prompts", self.prompts)
        for name, user in self.users.items():
            if not isinstance(user, Mapping):
                raise ValueError(f"users.{name}={shown(user)}: must be an object")
            _check_prompts(f"users.{name}.prompts", user.get("prompts", ()))
            preference = user.get("preference") or ""
            texts = [preference] if isinstance(preference, str) else preference
            if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str | None) for text in texts):
                raise ValueError(f"users.{name}.preference={shown(preference)}: must be a text, or a list of texts")


def _check_prompts(key: str, prompts: Any) -> None:
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"{key}={shown(prompts)}: must be a list of records with a prompt")
    for i, record in enumerate(prompts):
        if not isinstance(record, Mapping) or not isinstance(record.get("prompt"), (str, list)):
            raise ValueError(f"{key}[{i}]={shown(record)}: must be an object with a prompt, which is text or messages")


class Cell(NamedTuple):
    """A user and a prompt, with what the user says of it."""

    name: str
    user: Mapping[str, Any]
    record: Mapping[str, Any]
    preference: str | None

    @property
    def prompt(self) -> Prompt:
        return self.record["prompt"]

    @property
    def group(self) -> str:
        return self.user.get("group", "all")


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Answer, judge, and summarize.

    Returns:
        JSON: ``rows``, one for a group of users and a method, and ``answers``, of every method for every cell.
    """
    checker = load_checker(config.checker)
    models = Models.load(config.base, config.pad)
    cells = cells_of(config)
    found = _answer(config, models, cells)
    model = config.reference or config.base
    reference = load_scorer("reference", Source(model, model, None))
    reads = another_tokenizer(model, models.tokenizer) or models.tokenizer
    judged: dict[Method, list[dict[str, Any]]] = {}
    for asked, own_answers in found:
        own = [cells[i] for i in asked.indices]
        tokens = in_tokens_of(reads, own_answers, asked.method.tokenizer(models))
        nll = _nll(reference, reads, own, tokens)
        judged[asked.method] = [
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
                asked.indices,
                own,
                own_answers.texts,
                nll,
                (checker(text, cell.record, cell.user) for cell, text in zip(own, own_answers.texts, strict=True)),
                strict=True,
            )
        ]
    seconds = {asked.method: own_answers.seconds / len(asked.indices) for asked, own_answers in found}
    rows = [
        row
        for group in dict.fromkeys(cell.group for cell in cells)
        for method, records in judged.items()
        if (row := _summarize(group, method, records, judged[BASE], cells, seconds[method] / seconds[BASE])) is not None
    ]
    return {"rows": rows, "answers": {method.name: records for method, records in judged.items()}}


def load_checker(name: str) -> Checker:
    """The object that ``"module:name"`` names."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"checker: {name!r} is not the 'module:name' of a function ({error})") from None


def cells_of(config: EvaluationConfig) -> list[Cell]:
    cells = []
    for name, user in config.users.items():
        prompts = user.get("prompts", config.prompts)
        said = user.get("preference")
        preferences = [said] * len(prompts) if said is None or isinstance(said, str) else said
        cells += [Cell(name, user, record, text) for record, text in zip(prompts, preferences, strict=True)]
    return cells


def guided(beta: float) -> Guided:
    """``pad`` at one beta."""
    return Guided(f"pad, beta {beta:g}", beta)


def prompting(template: str) -> Prompting:
    return Prompting("prompting", in_last_turn(template))


def asked_of(config: EvaluationConfig, cells: Sequence[Cell]) -> list[Asked]:
    """The table's methods, and which cells have what each needs."""
    said = [i for i, cell in enumerate(cells) if cell.preference is not None]
    weights = [_weights(cell.user) for cell in cells]
    table = {
        "base": [Asked(BASE, range(len(cells)))],
        "prompting": [Asked(prompting(config.prompting), said)],
        "best_of_n": [Asked(BestOf("best_of_n", config.best_of), said)],
        "pad": [Asked(guided(beta), said) for beta in config.betas],
        "pad_weights": [
            Asked(Weighted(name, _weights_named(name)), [i for i, own in enumerate(weights) if name in own])
            for name in dict.fromkeys(name for own in weights for name in own)
        ],
        "reward_model": [Asked(RewardModel("reward_model"), said)],
        "dpo": [Asked(Tuned("dpo", _tuned), [i for i, cell in enumerate(cells) if cell.user.get("dpo")])],
    }
    return [asked for kind in METHODS if kind in config.methods for asked in table[kind] if asked.indices]


def _weights(user: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """A user's weights by the name of what is done with them."""
    weights = user.get("weights")
    if weights is None:
        return {}
    if isinstance(weights, Mapping):
        return {f"pad_weights, {name}": values for name, values in weights.items()}
    return {"pad_weights": weights}


def _weights_named(name: str) -> Callable[[Cell], dict[str, Any]]:
    return lambda cell: {"pad_weights": _weights(cell.user)[name], "pad_beta": 1.0}


def _tuned(cell: Cell) -> str:
    return cell.user["dpo"]


def _answer(config: EvaluationConfig, models: Models, cells: Sequence[Cell]) -> list[tuple[Asked, Answers]]:
    """Each method's answers, in the order of the table."""
    asked = asked_of(config, cells)
    found = answers(
        models,
        cells,
        asked,
        seed=config.seed,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        **config.engine,
    )
    return sorted(found, key=lambda one: asked.index(one[0]))


def _nll(reference: Any, tokenizer: Any, cells: Sequence[Cell], tokens: Sequence[list[int]]) -> list[float]:
    """Negative log-likelihood per token of each answer after its plain prompt, in nats; in the reference's tokens."""
    examples = [Example(prompt_ids(cell.prompt, tokenizer), answer) for cell, answer in zip(cells, tokens, strict=True)]
    sums = score_answers(reference, examples).tolist()
    return [-total / max(len(answer), 1) for total, answer in zip(sums, tokens, strict=True)]


def _summarize(
    group: str,
    method: Method,
    records: Sequence[dict[str, Any]],
    base: Sequence[dict[str, Any]],
    cells: Sequence[Cell],
    seconds_over_base: float,
) -> dict[str, Any] | None:
    """What is measured of a method's answers for one group of users; None where it answered none of them."""
    own = [record for record in records if cells[record["cell"]].group == group]
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
        "method": method.name,
        "num_users": len(by_user),
        "num_answers": len(own),
        "satisfaction": bootstrap(satisfaction, users),
        "win_rate": bootstrap(win_shares(satisfaction, theirs), users),
        "well_formed": bootstrap([float(record["well_formed"]) for record in own], users),
        "nll": bootstrap([record["nll"] for record in own], users),
        "distinct_2": sum(distinct(texts, 2) for texts in by_user.values()) / len(by_user),
        "seconds_over_base": seconds_over_base,
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
            if not isinstance(settings[name], list):
                raise ValueError(f"{path}: {name}={shown(settings[name])}: must be a list")
            settings[name] = tuple(settings[name])
    try:
        return EvaluationConfig(**settings)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None
