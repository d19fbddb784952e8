"""``pad-vllm train``: from a causal language model and a preference set to a reward model that the plugin loads.

Two stages (PAD, arXiv 2410.04070, section 3.3). The backbone learns to read preferences, by the PAD objective with unit
weights; then, frozen, it gets one head per labelled dimension.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from pad_vllm.reward.byte_tokens import same_ordinary_tokens
from pad_vllm.reward.template import DEFAULT_PROMPT_TEMPLATE, PromptTemplate
from pad_vllm.training.data import DataError, PairExample, encode, read_comparisons
from pad_vllm.training.export import export
from pad_vllm.training.heads import HeadedModel, users_of
from pad_vllm.training.trainer import PADTrainer, last_checkpoint, opposites_of, reward_margins, training_arguments

logger = logging.getLogger(__name__)

STAGES = ("backbone", "heads")
ADAPTER = "adapter"
"""A LoRA by itself, a folder in the reward model's own."""
_SAVING = {"save_strategy": "steps", "save_total_limit": 2, "eval_strategy": "steps"}


@dataclass(frozen=True)
class Stage:
    """How long and how fast a stage learns, and what of PAD's objective.

    ``opposites``: every comparison has its opposite, and the two are judged together
    (:func:`~pad_vllm.training.objective.pad_loss`).
    """

    lr: float
    epochs: float = 1.0
    batch_size: int = 16
    beta: float = 0.1
    nll_weight: float = 1.0
    opposites: bool = False


@dataclass(frozen=True)
class TrainingConfig:
    """What ``pad-vllm train`` is asked for.

    Attributes:
        data: preference set; see :mod:`pad_vllm.training.data`.
        model: path or hub id of the causal language model to start from.
        output: the reward model's folder; must not exist.
        reference: pi_ref, path or hub id, best the model that will be served as the base. None: ``model``.
        stages: of :data:`STAGES`; None: the backbone, and the heads if any comparison has labels.
        eval_data: comparisons to measure accuracy on. None: a twentieth of ``data``, which is then not trained on.
        columns, split: as :func:`~pad_vllm.training.data.read_comparisons` takes them.
        prompt_template, insert_after: how a preference enters; written to the reward model's ``pad.json``, from where
            the server reads it.
        max_length: tokens of prompt and answer; longer comparisons are left out. None: the models' positions.
        max_answer: tokens of an answer to learn from, the first ones. How an answer is written shows early, and shorter
            answers are more comparisons in the same time. Takes a reference with the model's tokenizer.
        trainer: more settings of transformers' ``TrainingArguments``, such as ``{"gradient_checkpointing": True}``.
        lora_rank: train a LoRA of this rank (takes peft) instead of all weights; merged at the end, and kept beside the
            model in ``adapter/``. 0: all weights.
        adapter: go on with the LoRA in this folder (peft's format, as ``adapter/`` of an earlier run is), made for
            ``model``; it has a rank of its own.
        save_steps: a checkpoint every so many steps, from which a killed run goes on when started again.
    """

    data: str
    model: str
    output: str
    reference: str | None = None
    stages: tuple[str, ...] | None = None
    eval_data: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    prompt_template: str = DEFAULT_PROMPT_TEMPLATE
    insert_after: str | None = None
    max_length: int | None = None
    max_answer: int | None = None
    lora_rank: int = 0
    adapter: str | None = None
    save_steps: int = 200
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)
    backbone: Stage = field(default_factory=lambda: Stage(lr=5e-6))
    heads: Stage = field(default_factory=lambda: Stage(lr=1e-3))

    @property
    def has_lora(self) -> bool:
        return bool(self.lora_rank) or self.adapter is not None


def check_settings(config: TrainingConfig) -> None:
    """Raise ValueError, or FileExistsError, for what can be seen before anything is loaded."""
    if Path(config.output).exists():
        raise FileExistsError(f"{config.output} exists")
    if strange := set(config.stages or ()) - set(STAGES):
        raise ValueError(f"stages: {', '.join(sorted(strange))}: there are {', '.join(STAGES)}")
    taken = (
        "output_dir",
        "max_steps",
        "per_device_train_batch_size",
        "learning_rate",
        "seed",
        "save_steps",
        "eval_steps",
    )
    if strange := [
        name
        for name in config.trainer
        if name in (*taken, *_SAVING) or name not in TrainingArguments.__dataclass_fields__
    ]:
        raise ValueError(f"trainer: {', '.join(strange)}: set by another option, or not of TrainingArguments")
    if any(stage.opposites and stage.batch_size % 2 for stage in (config.backbone, config.heads)):
        raise ValueError("opposites: comparisons come by two, so batch_size has to be even")
    if config.adapter is not None:
        if config.lora_rank:
            raise ValueError("adapter: it has a rank already, so lora_rank cannot be asked for")
        if not (Path(config.adapter) / "adapter_config.json").is_file():
            raise ValueError(f"adapter: {config.adapter} has no adapter_config.json")
    if config.max_answer is not None and config.max_answer < 1:
        raise ValueError(f"max_answer: {config.max_answer}: at least one token of an answer is learned from")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("training runs in one process, on one device; see lora_rank for large models")


def train(config: TrainingConfig, quiet: bool = False) -> dict[str, Any]:
    """Train, and write the reward model. Started again after it was killed, it goes on where its checkpoints end.

    Returns:
        What was measured: for each stage the accuracy on comparisons not trained on, over all and by dimension.

    Raises:
        ValueError: the data (:class:`~pad_vllm.training.data.DataError`), the settings, or a run of other settings left
            unfinished at the same place.
        FileExistsError: the output exists.
    """
    output = Path(config.output)
    check_settings(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = AutoModelForCausalLM.from_pretrained(config.model)
    reference = AutoModelForCausalLM.from_pretrained(config.reference or config.model).requires_grad_(False)
    other_tokenizer = another_tokenizer(config.reference, tokenizer) if config.reference else None
    if other_tokenizer is not None and config.max_answer is not None:
        raise ValueError("max_answer: another tokenizer of the reference would cut its answers elsewhere")
    dtype = model.dtype
    template = PromptTemplate(tokenizer, config.prompt_template, config.insert_after)
    positions = [m.config.get_text_config().max_position_embeddings for m in (model, reference)]
    max_length = min(config.max_length or math.inf, *positions)

    def read(path: str) -> list[PairExample]:
        comparisons = read_comparisons(path, config.columns, config.split)
        examples = encode(comparisons, tokenizer, template, max_length, other_tokenizer, config.max_answer)
        if left_out := len(comparisons) - len(examples):
            logger.warning(
                "%s: %d of %d comparisons are longer than %d tokens", path, left_out, len(comparisons), max_length
            )
        return examples

    pairs = read(config.data)
    if config.eval_data is not None:
        eval_pairs = read(config.eval_data)
    else:
        groups = opposites_of(pairs) if config.backbone.opposites else [(i,) for i in range(len(pairs))]
        random.Random(config.seed).shuffle(groups)
        cut = max(1, len(groups) // 20)
        eval_pairs, pairs = ([pairs[i] for group in part for i in group] for part in (groups[:cut], groups[cut:]))
    names = sorted({name for pair in pairs for name in pair.labels})
    stages = config.stages or (STAGES if names else STAGES[:1])
    if "heads" in stages and not names:
        raise DataError(f"{config.data}: no comparison has labels, from which heads would be learned")

    work = _work_folder(output, config)
    run = _Run(config, work, quiet)
    metrics: dict[str, Any] = {}
    if "backbone" in stages:
        if not config.has_lora:
            model.float()  # small updates are lost in half precision; a LoRA has weights of its own
        model = run.backbone(model, reference, pairs, eval_pairs)
        metrics["backbone"] = measure(model, None if config.backbone.opposites else reference, eval_pairs)
    heads = None
    if "heads" in stages:
        headed = run.heads(HeadedModel(model, names), reference, pairs, eval_pairs)
        metrics["heads"] = measure_heads(headed, reference, eval_pairs)
        heads = headed.tensors()
    record = {"settings": dataclasses.asdict(config), "metrics": metrics, "num_comparisons": len(pairs)}
    defaults = {"prompt_template": config.prompt_template, "insert_after": config.insert_after, "reference": "base"}
    defaults = {key: value for key, value in defaults.items() if value is not None}
    adapter = work / ADAPTER
    export(output, model.to(dtype), tokenizer, heads, record, defaults, adapter if adapter.exists() else None)
    shutil.rmtree(work)
    return metrics


def another_tokenizer(reference: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """A reference's, where it is not the reward model's; one without a tokenizer reads the reward model's tokens."""
    try:
        theirs = AutoTokenizer.from_pretrained(reference)
    except (OSError, ValueError):
        return None
    return None if same_ordinary_tokens(theirs, tokenizer) else theirs


def measure(model: nn.Module, reference: nn.Module | None, pairs: Sequence[PairExample]) -> dict[str, float]:
    """How often the chosen answer has the higher reward: over all comparisons, and where a dimension alone decides.

    Without a reference: how often two opposites are told apart, of which each has the sum of their margins.
    """
    margins = reward_margins(model, reference, pairs)
    if reference is None:
        for i, j in opposites_of(pairs):
            margins[[i, j]] = margins[i] + margins[j]
    correct = defaultdict(list)
    for pair, margin in zip(pairs, margins.tolist(), strict=True):
        correct["accuracy"].append(margin > 0)
        if len(pair.labels) == 1:
            correct[f"accuracy_{next(iter(pair.labels))}"].append(margin > 0)
    return {name: sum(values) / len(values) for name, values in sorted(correct.items())}


def measure_heads(model: HeadedModel, reference: nn.Module, pairs: Sequence[PairExample]) -> dict[str, float]:
    """How often each head alone, at weight 1 or -1, rewards the answer that has more, or less, of its dimension."""
    accuracy = {}
    for i, name in enumerate(model.names):
        seen, users = users_of(
            [p._replace(labels={name: p.labels[name]}) for p in pairs if name in p.labels], [name], 0
        )
        if seen:
            weights = torch.zeros(len(seen), len(model.names))
            weights[:, i] = users[:, 0]
            accuracy[f"accuracy_{name}"] = (reward_margins(model, reference, seen, weights) > 0).float().mean().item()
    return accuracy


class _Run:
    """One run's stages, each with checkpoints of its own under ``work``."""

    def __init__(self, config: TrainingConfig, work: Path, quiet: bool) -> None:
        self._config, self._work, self._quiet = config, work, quiet

    def backbone(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel,
        pairs: list[PairExample],
        eval_pairs: list[PairExample],
    ) -> PreTrainedModel:
        config = self._config
        trained = _with_lora(model, config) if config.has_lora else model
        self._train(
            "backbone",
            trained,
            reference,
            pairs,
            lambda m: measure(m, None if config.backbone.opposites else reference, eval_pairs),
        )
        if not config.has_lora:
            return trained.eval()
        trained.save_pretrained(self._work / ADAPTER)
        return trained.merge_and_unload().eval()

    def heads(
        self, model: HeadedModel, reference: PreTrainedModel, pairs: list[PairExample], eval_pairs: list[PairExample]
    ) -> HeadedModel:
        seen, users = users_of(pairs, model.names, self._config.seed)
        self._train("heads", model, reference, seen, lambda m: measure_heads(m, reference, eval_pairs), users)
        return model

    def _train(
        self,
        name: str,
        model: nn.Module,
        reference: PreTrainedModel,
        pairs: list[PairExample],
        measure: Callable[[nn.Module], dict[str, float]],
        weights: torch.Tensor | None = None,
    ) -> None:
        stage: Stage = getattr(self._config, name)
        folder = self._work / name
        args = training_arguments(
            folder,
            steps=max(1, round(stage.epochs * len(pairs) / stage.batch_size)),
            batch_size=stage.batch_size,
            lr=stage.lr,
            seed=self._config.seed,
            save_steps=self._config.save_steps,
            eval_steps=self._config.save_steps,
            **_SAVING,
            **({"disable_tqdm": self._quiet} | self._config.trainer),
        )
        trainer = PADTrainer(
            model,
            reference,
            pairs,
            args,
            beta=stage.beta,
            nll_weight=stage.nll_weight,
            opposites=stage.opposites,
            weights=weights,
            measure=measure,
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))


def _with_lora(model: PreTrainedModel, config: TrainingConfig) -> nn.Module:
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError:
        raise ValueError("a LoRA takes `pip install 'pad-vllm[train]'`") from None
    if config.adapter is not None:
        return PeftModel.from_pretrained(model, config.adapter, is_trainable=True)
    torch.manual_seed(config.seed)
    rank = config.lora_rank
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def _work_folder(output: Path, config: TrainingConfig) -> Path:
    """Where this run's checkpoints are; ValueError if those of another run are."""
    settings = dataclasses.asdict(config)
    for name in ("data", "eval_data"):
        path = Path(settings[name] or "")
        if path.is_file():
            settings[name] = [settings[name], hashlib.sha256(path.read_bytes()).hexdigest()]
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    work = output.with_name(f"{output.name}.unfinished")
    work.mkdir(parents=True, exist_ok=True)
    file = work / "settings.json"
    if file.exists() and file.read_text() != text:
        raise ValueError(f"{work} holds an unfinished run of other settings or data: remove it, or name another output")
    if not file.exists():
        part = file.with_suffix(".part")
        part.write_text(text)
        part.rename(file)
    return work
