"""Reward model directories: a plain transformers model, or a LoRA adapter in PEFT's format; its tokenizer, and
``heads.safetensors`` beside it."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pad_vllm.errors import one_line, writing
from pad_vllm.reward.folder import DEFAULTS_FILE, read_defaults, write_defaults
from pad_vllm.reward.heads import RELEASED_HEAD
from pad_vllm.reward.kind import ADAPTER_CONFIG, adapter_config
from pad_vllm.training.loading import has_tokenizer, load_merged

HEADS_FILE = "heads.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors")
BASE_NAME = "base_model_name_or_path"
"""Key of an adapter's configuration: the model that it was made for."""
_HEAD_PREFIX = "v_head."
_BACKBONE_PREFIX = "pretrained_model."


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into. When all is written it becomes ``target`` in one rename; if writing fails, it is removed.

    Raises:
        FileExistsError: ``target`` exists.
        OSError: the disk is full.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with writing(target, "Nothing is left of it"):
            yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's own is 0o700
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def export(
    target: str | Path,
    model: PreTrainedModel | Path,
    tokenizer: PreTrainedTokenizerBase,
    heads: Mapping[str, torch.Tensor] | None = None,
    record: Mapping | None = None,
    defaults: Mapping | None = None,
) -> Path:
    """Write a reward model that the plugin loads.

    Args:
        model: the model, or the folder of a LoRA, which is copied as it is.
        heads: ``<name>.weight`` and ``<name>.bias``, in the order in which users give their weights.
        record: how the model was made, for ``training.json``.
        defaults: how the model is to be used, for ``pad.json``.
    """
    with whole_folder(Path(target)) as folder:
        if isinstance(model, Path):
            for name in ADAPTER_FILES:
                shutil.copy(model / name, folder / name)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if heads is not None:
            save_heads(folder / HEADS_FILE, heads)
        if record is not None:
            (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        if defaults is not None:
            write_defaults(folder, defaults)
    return Path(target)


def save_heads(path: Path, heads: Mapping[str, torch.Tensor]) -> None:
    # Read back in the order of the data, which safetensors lays out by dtype and name.
    save_file(dict(heads), path, metadata={"format": "pt"})


def convert(source: str | Path, target: str | Path) -> Path:
    """Make a reward model from a checkpoint in another layout.

    A model tuned by DPO, another causal language model and a LoRA adapter work as they are: name one as
    ``reward_model``. This function merges an adapter into its base model. It also splits a checkpoint with a value head
    into backbone and heads: the layout of the authors' release, and that of TRL's value head models
    (``v_head.summary.*`` beside or among the backbone's weights).

    Raises:
        ValueError: the source is neither.
    """
    source = Path(source)
    if Path(target).exists():
        raise FileExistsError(f"{target} exists")
    tensors = _read_tensors(source)
    heads = {name: tensor.float() for name, tensor in tensors.items() if name.startswith(_HEAD_PREFIX)}
    if unknown := set(heads) - {f"{RELEASED_HEAD}.weight", f"{RELEASED_HEAD}.bias"}:
        raise ValueError(f"{source}: unknown head tensors {', '.join(sorted(unknown))}")
    if (source / ADAPTER_CONFIG).exists():
        base = (adapter_config(str(source)) or {}).get(BASE_NAME)
        if not isinstance(base, str):
            raise ValueError(f"{source}: its {ADAPTER_CONFIG} does not say which model it was made for ({BASE_NAME})")
        model = load_merged("source", str(source), base)
        tokenizer = AutoTokenizer.from_pretrained(source if has_tokenizer(str(source)) else base)
        if (source / HEADS_FILE).exists():
            heads = load_file(source / HEADS_FILE)
    elif not (source / "config.json").exists():
        raise ValueError(f"{source}: neither config.json nor adapter_config.json")
    else:
        model = _backbone(
            source,
            {
                name.removeprefix(_BACKBONE_PREFIX): tensor
                for name, tensor in tensors.items()
                if not name.startswith(_HEAD_PREFIX)
            },
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    defaults = read_defaults(source / DEFAULTS_FILE) if (source / DEFAULTS_FILE).exists() else None
    return export(target, model, tokenizer, heads or None, defaults=defaults)


def _backbone(source: Path, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source)
    dtype = next(iter(tensors.values())).dtype if tensors else None
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # of other sizes
        raise ValueError(f"{source}: the weights do not fit config.json: {one_line(error)}") from None
    model.tie_weights()
    # A tied lm_head is not in the file.
    loaded = {p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False) if name in tensors}
    missing = [
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if name in missing and p.data_ptr() not in loaded
    ]
    if missing or unexpected:
        raise ValueError(
            f"{source}: the weights do not fit config.json: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return model


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Raises ValueError for a file that cannot be read."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin")), key=lambda path: path.suffix == ".bin"):
        if path.name == "training_args.bin":
            continue
        try:
            is_torch = path.suffix == ".bin"
            tensors |= torch.load(path, map_location="cpu", weights_only=True) if is_torch else load_file(path)
        except Exception as error:  # of a damaged file: libraries raise what they like
            raise ValueError(f"{path}: cannot be read ({one_line(error)[:200]})") from None
    return tensors
