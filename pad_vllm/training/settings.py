"""The settings of ``pad-vllm train``, and the checks that need nothing loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from pad_vllm.checks import check_int, check_number
from pad_vllm.errors import one_line
from pad_vllm.reward.template import DEFAULT_PROMPT_TEMPLATE
from pad_vllm.training.trainer import training_arguments

STAGES = ("backbone", "heads")
SAVING = {"save_strategy": "steps", "save_total_limit": 2, "eval_strategy": "steps"}


@dataclass(frozen=True)
class Stage:
    """How long and how fast a stage learns, and the weights in its objective.

    ``opposites``: the data has each comparison twice, once from a user who chose the other answer, and the loss judges
    the two together (:func:`~pad_vllm.training.objective.pad_loss`).
    """

    lr: float
    epochs: float = 1.0
    batch_size: int = 16
    beta: float = 0.1
    nll_weight: float = 1.0
    opposites: bool = False


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of ``pad-vllm train``.

    Attributes:
        data: preference set; see :mod:`pad_vllm.training.data`.
        model: path or hub id of the causal language model to start from.
        output: folder to write the reward model to; must not exist.
        reference: path or hub id of pi_ref; best is the base model that will be served. None: ``model``.
        stages: of :data:`STAGES`; None: the backbone, and the heads if any comparison has labels.
        eval_data: comparisons to measure accuracy on. None: a twentieth of ``data``, which training leaves out.
        columns, split: as :func:`~pad_vllm.training.data.read_comparisons` takes them.
        prompt_template, insert_after: where a preference goes in a prompt. Both are written to the reward model's
            ``pad.json``, from which the server reads them.
        max_length: most tokens of prompt and answer; longer comparisons are left out. None: the models' positions.
        max_answer: learn from only so many first tokens of an answer. The style of an answer shows early, and with
            shorter answers training sees more comparisons in the same time. Needs a reference with the model's
            tokenizer.
        trainer: more settings of transformers' ``TrainingArguments``, such as ``{"gradient_checkpointing": True}``.
        lora_rank: train a LoRA of this rank (needs peft) instead of all weights. The LoRA is then the reward model, and
            ``model`` its base. 0: train all weights.
        adapter: continue to train the LoRA in this folder, which was made for ``model`` (peft's format, such as the
            ``output`` of an earlier run). It keeps its rank. Without the stage ``backbone``, heads are trained over it.
        save_steps: steps between checkpoints. A run that was killed continues from its last checkpoint.
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
    if foreign := [
        name
        for name in config.trainer
        if name in (*taken, *SAVING) or name not in TrainingArguments.__dataclass_fields__
    ]:
        raise ValueError(f"trainer: {', '.join(foreign)}: set by another option, or unknown to TrainingArguments")
    check_training_numbers(config)
    if config.lora_rank and "backbone" not in (config.stages or STAGES):
        raise ValueError(
            "lora_rank: only the stage 'backbone' trains a LoRA; add it to the stages, or leave lora_rank out"
        )
    if any(stage.opposites and stage.batch_size % 2 for stage in (config.backbone, config.heads)):
        raise ValueError("opposites: comparisons are judged in pairs, so batch_size must be even")
    if config.adapter is not None:
        if config.lora_rank:
            raise ValueError("adapter: it has its own rank; leave lora_rank out")
        if not (Path(config.adapter) / "adapter_config.json").is_file():
            raise ValueError(f"adapter: {config.adapter} has no adapter_config.json")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("training runs in one process on one device; for large models, set lora_rank")


def check_training_numbers(config: TrainingConfig) -> None:
    """Raise ValueError, with the setting and what is allowed, for a number with which nothing could be learned."""
    for name in ("save_steps", "max_length", "max_answer"):
        if (value := getattr(config, name)) is not None:
            check_int(name, value, 1)
    check_int("lora_rank", config.lora_rank, 0)
    check_int("seed", config.seed, 0, 2**32 - 1)
    for name in STAGES:
        stage: Stage = getattr(config, name)
        check_int(f"{name}: batch_size", stage.batch_size, 1)
        check_number(f"{name}: lr", stage.lr, 0, 1e3)
        check_number(f"{name}: epochs", stage.epochs, 0, 1e6)
        check_number(f"{name}: beta", stage.beta, 0, 1e3)
        check_number(f"{name}: nll_weight", stage.nll_weight, 0, 1e6)
    if "gradient_accumulation_steps" in config.trainer:
        check_int("trainer: gradient_accumulation_steps", config.trainer["gradient_accumulation_steps"], 1)
    try:
        training_arguments(config.output, steps=1, batch_size=1, lr=0.0, seed=0, **config.trainer)
    except Exception as error:  # transformers raises what it likes
        raise ValueError(f"trainer: {one_line(error)}") from None
