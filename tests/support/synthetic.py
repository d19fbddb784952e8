"""The synthetic models, trained beforehand, for tests of what trained models do.

They are what :func:`pad_vllm.synthetic.models.build` makes, in half precision. ``python -m tests.support.synthetic``
trains them anew, in some minutes; that training itself works is for the tests of small recipes to say.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pad_vllm.synthetic import models

FOLDER = Path(__file__).parents[1] / "data" / "synthetic"


def put_into(cache: Path) -> None:
    """Make a cache of models that has them, as :func:`~pad_vllm.synthetic.models.build` looks for them."""
    fingerprint = models.fingerprint(0, models.FULL)
    for kept in FOLDER.iterdir():
        _copy(kept, cache / f"{kept.name}-{fingerprint}", torch.float32)


def keep() -> None:
    built = models.build()
    for name, model in (("llama", built.base), ("reward", built.reward)):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        _copy(model, FOLDER / name, torch.float16)
    record = FOLDER / "reward" / "training.json"
    training = json.loads(record.read_text())
    for key in ("data", "eval_data", "model", "output"):  # folders of this machine
        del training["settings"][key]
    record.write_text(json.dumps(training, indent=1) + "\n")


def _copy(source: Path, target: Path, dtype: torch.dtype) -> None:
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    keep()
