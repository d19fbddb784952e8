"""Where a reward model's weights come from: itself, the served model, or the model that an adapter was made for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pad_vllm.checks import check_text
from pad_vllm.reward.folder import files_beside
from pad_vllm.reward.kind import ADAPTER_CONFIG, adapter_config, is_adapter

if TYPE_CHECKING:
    from vllm.config import ModelConfig

SERVED = "base"
"""``pad.reward_model``: the served model."""
OF_WEIGHTS = ("dtype", "quantization", "revision")
"""Keys of the configuration that say how the reward model's own weights are loaded."""


class Source(NamedTuple):
    """A reward model's weights."""

    reward_model: str
    """Path or hub id: what stands beside it, as ``pad.json``, stands here"""
    model: str
    """Path or hub id of the weights"""
    revision: str | None
    """Of ``reward_model``"""
    is_served: bool = False
    """They are the served model's, and are not loaded again"""
    is_adapter: bool = False
    """``reward_model`` is a PEFT folder over them"""

    @property
    def model_revision(self) -> str | None:
        return self.revision if self.model == self.reward_model else None

    @property
    def kind(self) -> str:
        """For clients: ``served``, the served model itself; ``served_adapter``, an adapter over it;
        ``merged_adapter``, one merged into another model; or ``model``."""
        if self.is_served:
            return "served_adapter" if self.is_adapter else "served"
        return "merged_adapter" if self.is_adapter else "model"

    @property
    def tokenizer(self) -> tuple[str, str | None]:
        """Path or hub id, and revision, of its tokenizer."""
        names = ("tokenizer.json", "tokenizer_config.json")
        if self.is_adapter and not files_beside(self.reward_model, self.revision, names):
            return self.model, self.model_revision
        return self.reward_model, self.revision


def source_of(given: dict[str, Any], base: ModelConfig | None) -> Source:
    """Find it.

    Args:
        given: the configuration's keys that are not null; ``reward_model`` is one.
        base: the served model's; None where there is none yet.

    Raises:
        ValueError: keys that say how to load weights which are the served model's; or an adapter's base is not named.
    """
    reward_model, revision = given["reward_model"], given.get("revision")
    if reward_model == SERVED:
        for key in OF_WEIGHTS:
            if key in given:
                raise ValueError(
                    f"pad.{key}={given[key]!r}: cannot be set where reward_model is {SERVED!r}, the served model "
                    f"itself; leave pad.{key} out (a folder of that name is './{SERVED}')"
                )
        if base is None:
            return Source(SERVED, SERVED, None, is_served=True)
        return Source(base.model, base.model, base.revision, is_served=True)
    if not is_adapter(reward_model, revision):
        same = base is not None and is_same(reward_model, base.model) and _as_served(given, base)
        return Source(reward_model, reward_model, revision, is_served=same)
    own = adapter_config(reward_model, revision) or {}
    model = given.get("adapter_base") or own.get("base_model_name_or_path")
    if not isinstance(model, str) or not model:
        raise ValueError(
            f"pad.reward_model={reward_model!r}: its {ADAPTER_CONFIG} does not say which model it was made for "
            "(base_model_name_or_path); name it in pad.adapter_base"
        )
    names_it = base is not None and (model == SERVED or is_same(model, base.model))
    others = {key: value for key, value in given.items() if key != "revision"}  # which is the adapter's
    if base is not None and names_it and _as_served(others, base):
        return Source(reward_model, base.model, revision, is_served=True, is_adapter=True)
    return Source(reward_model, model, revision, is_adapter=True)


def is_same(model: str, other: str) -> bool:
    """Whether two paths or hub ids are one."""
    return model == other or (os.path.isdir(model) and os.path.realpath(model) == os.path.realpath(other))


def _as_served(given: dict[str, Any], base: ModelConfig) -> bool:
    """Whether the configuration sets nothing that would need other weights than the served ones."""
    dtypes = str(base.dtype).removeprefix("torch."), "auto"
    as_served = {"dtype": dtypes, "quantization": (base.quantization,), "revision": (base.revision,)}
    return all(key not in given or given[key] in allowed for key, allowed in as_served.items())


def check_paths(key: str, paths: Any) -> dict[str, str]:
    """``paths`` if it is an object of name -> path or hub id; else ValueError naming ``key``."""
    if not isinstance(paths, dict):
        raise ValueError(f"{key}={paths!r}: must be an object of name -> path or hub id of a PEFT adapter")
    return {check_text(f"{key}: a name", name): check_text(f"{key}[{name!r}]", path) for name, path in paths.items()}


def beside(folder: Path, path: Any) -> Any:
    """A path that a file in ``folder`` names, if it is there; else as it stands, as :data:`SERVED` does."""
    is_there = isinstance(path, str) and path != SERVED and (folder / path).exists()
    return str(folder / path) if is_there else path
