"""Training as its users run it: killed and resumed, refused, exported, converted, and weights fitted to a user."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pad_vllm.cli import main
from pad_vllm.reward.adapters import module_of
from pad_vllm.reward.heads import load_heads
from pad_vllm.reward.source import source_of
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.synthetic import models, world
from pad_vllm.synthetic.models import PROMPT_TEMPLATE, TINY
from pad_vllm.training import heads, trainer
from pad_vllm.training import train as train_module
from pad_vllm.training.data import DataError, encode, read_comparisons
from pad_vllm.training.export import convert
from pad_vllm.training.fit import fit_weights
from pad_vllm.training.train import Stage, TrainingConfig, train
from tests.support.command import run_command, run_python
from tests.support.engine import PLUGIN, Engine
from tests.support.models import make_model
from tests.support.tokenizers import CHATML, make


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return models.build_base("llama", tmp_path_factory.mktemp("cache"), 0, TINY)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    return models.write_records(path, [models.preference_record(rng) for _ in range(40)])


def config_of(base, pairs, output, **settings):
    stage = Stage(lr=1e-3, batch_size=8)
    settings = {"save_steps": 2, "backbone": stage, "heads": stage} | settings
    return TrainingConfig(str(pairs), str(base), str(output), prompt_template=PROMPT_TEMPLATE, **settings)


def weights_of(folder):
    return {name: Path(folder, name).read_bytes() for name in ("model.safetensors", "heads.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(base, pairs, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "reward"
    train(config_of(base, pairs, output), quiet=True)
    assert json.loads((output / "pad.json").read_text()) == {"prompt_template": PROMPT_TEMPLATE, "reference": "base"}
    return weights_of(output)


@pytest.mark.parametrize("step", [0, 3, 4, 5, 8])
def test_killed_at_any_step_and_resumed_ends_in_the_same_weights(step, base, pairs, undisturbed, tmp_path, monkeypatch):
    """Five steps of the backbone and four of the heads, a checkpoint after every second: before the first, between two,
    after one, between the stages, at the last step."""
    steps = 0
    compute_loss = trainer.PADTrainer.compute_loss

    def killed(self, *args, **kwargs):
        nonlocal steps
        steps += 1
        if steps > step:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    config = config_of(base, pairs, tmp_path / "reward")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.PADTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["reward.unfinished"]
    started = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer.PADTrainer, "compute_loss", lambda *a, **k: started.append(1) or compute_loss(*a, **k))
        train(config, quiet=True)
    assert len(started) <= 9 - step + 1  # goes on, and does not begin anew
    assert weights_of(tmp_path / "reward") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["reward"]


def test_killed_while_a_checkpoint_is_written(base, pairs, undisturbed, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    config = config_of(base, pairs, tmp_path / "reward")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.PADTrainer, "_save_optimizer_and_scheduler", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, quiet=True)
    assert (tmp_path / "reward.unfinished" / "backbone" / "checkpoint-2" / "model.safetensors").exists()
    train(config, quiet=True)
    assert weights_of(tmp_path / "reward") == undisturbed


def test_the_command_killed_by_the_system(base, pairs, undisturbed, tmp_path):
    command = [sys.executable, "-m", "pad_vllm.cli", "train", str(pairs), "--model", str(base)]
    command += ["--output", str(tmp_path / "reward"), "--save-steps", "2", "--batch-size", "8"]
    command += ["--backbone-lr", "1e-3", "--prompt-template", PROMPT_TEMPLATE]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "reward.unfinished" / "backbone"
    while process.poll() is None and not list(checkpoints.glob("checkpoint-*/complete")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "accuracy" in run_command(command[3:])
    assert weights_of(tmp_path / "reward") == undisturbed


def test_another_run_is_not_continued(base, pairs, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.PADTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config_of(base, pairs, tmp_path / "reward"), quiet=True)
    with pytest.raises(ValueError, match="unfinished run with other settings"):
        train(config_of(base, pairs, tmp_path / "reward", seed=1), quiet=True)


def test_a_lora_is_the_reward_model_and_resumes(base, pairs, tmp_path, monkeypatch):
    """An adapter's folder, complete, that names the model it was made for from wherever it is read."""
    settings = {"lora_rank": 4, "stages": ("backbone",)}
    monkeypatch.chdir(base.parent)
    named = Path(base.name)
    train(config_of(named, pairs, tmp_path / "whole", **settings), quiet=True)
    compute_loss, steps = trainer.PADTrainer.compute_loss, []

    def killed(*args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer.PADTrainer, "compute_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(named, pairs, tmp_path / "halves", **settings), quiet=True)
    train(config_of(named, pairs, tmp_path / "halves", **settings), quiet=True)
    monkeypatch.chdir(tmp_path)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    its_own = {"adapter_config.json", "adapter_model.safetensors", "pad.json", "training.json"}
    assert its_own <= names
    assert names - its_own <= {path.name for path in base.iterdir() if "token" in path.name or "chat" in path.name}
    source = source_of({"reward_model": str(tmp_path / "whole")}, None)
    assert (source.is_adapter, source.model) == (True, str(base))
    whole, halves = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name)
    merged, theirs = load_file(convert(tmp_path / "whole", tmp_path / "merged") / "model.safetensors"), weights_in(base)
    changed = {name for name in theirs if not torch.equal(merged[name], theirs[name])}
    assert changed == {f"{module_of(name)}.weight" for name in whole}
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in changed)
    assert json.loads((tmp_path / "merged" / "pad.json").read_text())["prompt_template"] == PROMPT_TEMPLATE


def weights_in(folder):
    return load_file(folder / "model.safetensors")


def test_a_lora_is_gone_on_with(base, pairs, tmp_path):
    """At a rate of nothing it is what it was; at another one it is not, and is the earlier run's no more."""
    once, still, on = (tmp_path / name for name in ("once", "still", "on"))
    train(config_of(base, pairs, once, lora_rank=4, stages=("backbone",)), quiet=True)
    again = {"adapter": str(once), "stages": ("backbone",)}
    train(config_of(base, pairs, still, **again, backbone=Stage(lr=0.0, batch_size=8)), quiet=True)
    train(config_of(base, pairs, on, **again), quiet=True)
    first, same, later = (load_file(path / "adapter_model.safetensors") for path in (once, still, on))
    assert first.keys() == same.keys() == later.keys()
    assert all(torch.equal(tensor, first[name]) for name, tensor in same.items())
    assert any(not torch.equal(tensor, first[name]) for name, tensor in later.items())
    kept = json.loads((on / "adapter_config.json").read_text())
    assert (kept["r"], kept["base_model_name_or_path"]) == (4, str(base))


def renamed_adapter(adapter: Path, folder: Path) -> Path:
    """As of a model whose layers have other names."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace(".layers.", ".h."): tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def test_an_adapter_of_another_model_is_not_left_out(base, pairs, tmp_path):
    """PEFT says nothing where none of its layers is there, and the result would be the base."""
    train(config_of(base, pairs, tmp_path / "once", lora_rank=4, stages=("backbone",)), quiet=True)
    other = renamed_adapter(tmp_path / "once", tmp_path / "other")
    words = "it does not have the same layers as the model, for example .*lora_"
    with pytest.raises(ValueError, match=words):
        convert(other, tmp_path / "reward")
    with pytest.raises(ValueError, match=f"--adapter='{other}' does not fit {base}: {words}"):
        train(config_of(base, pairs, tmp_path / "reward", adapter=str(other), stages=("backbone",)), quiet=True)
    wider = make_model(tmp_path / "wider", seed=0, hidden_size=96)
    again = {"adapter": str(tmp_path / "once"), "stages": ("backbone",)}
    with pytest.raises(ValueError, match=f"--adapter='{tmp_path / 'once'}' does not fit {wider}: "):
        train(config_of(wider, pairs, tmp_path / "reward", **again), quiet=True)
    assert not (tmp_path / "reward").exists()


def test_passes_over_the_data_are_what_was_asked_for_in_parts_too(base, pairs, tmp_path, monkeypatch):
    """With batches of 8 that are read in one part or two: 38 comparisons are two passes in 10 steps or 5."""
    found = []

    def made(*_, **how) -> None:
        found.append(how["max_steps"] if "max_steps" in how else how["steps"])
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "training_arguments", made)
    for parts in (1, 2):
        settings = {
            "trainer": {"gradient_accumulation_steps": parts},
            "backbone": Stage(lr=1e-3, batch_size=8, epochs=2.0),
        }
        with pytest.raises(KeyboardInterrupt):
            train(config_of(base, pairs, tmp_path / f"{parts}", **settings), quiet=True)
    assert found == [10, 5]


def test_data_without_opposites_is_named_before_training(base, pairs, tmp_path, monkeypatch):
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    both = tmp_path / "both.jsonl"
    others = [r | {"preference": "Otherwise.", "chosen": r["rejected"], "rejected": r["chosen"]} for r in records]
    models.write_records(both, records + others)
    monkeypatch.setattr(trainer.PADTrainer, "train", pytest.fail)
    settings = {"backbone": Stage(lr=1e-3, opposites=True), "stages": ("backbone",)}
    for data, eval_data in ((pairs, None), (both, str(pairs))):
        with pytest.raises(DataError, match=f"{pairs}: opposites: 40 of 40 comparisons have none"):
            train(config_of(base, data, tmp_path / "reward", eval_data=eval_data, **settings), quiet=True)
    assert list(tmp_path.iterdir()) == [both]


def served(base, reward, requests: list[dict]) -> list[list[int]]:
    """Greedy tokens of each request."""
    pad = {"reward_model": str(reward), "top_k": 20}
    engine = Engine("v1", base, max_model_len=128, logits_processors=PLUGIN, additional_config={"pad": pad})
    params = [{"temperature": 0, "max_tokens": 24, "ignore_eos": True, "extra_args": own} for own in requests]
    found = engine.generate([list(range(5, 15))] * len(requests), params)
    engine.close()
    return found


def test_heads_are_learned_over_a_lora_and_served_beside_it(base, pairs, tmp_path):
    """In one run, or over a LoRA that is there; over the served model both do what the merged model and they do."""
    fast = Stage(lr=2e-2, batch_size=8)
    both = {"backbone": fast, "heads": fast}
    train(config_of(base, pairs, tmp_path / "once", lora_rank=4, **both), quiet=True)
    train(config_of(base, pairs, tmp_path / "lora", lora_rank=4, stages=("backbone",), **both), quiet=True)
    over = {"adapter": str(tmp_path / "lora"), "stages": ("heads",)}
    train(config_of(base, pairs, tmp_path / "reward", **over, **both), quiet=True)
    for name in ("adapter_model.safetensors", "heads.safetensors"):
        once, again = (load_file(tmp_path / folder / name) for folder in ("once", "reward"))
        assert all(torch.equal(once[key], again[key]) for key in once)
    merged = convert(tmp_path / "reward", tmp_path / "merged")
    names = load_heads(tmp_path / "merged" / "heads.safetensors", TINY.hidden_size).names
    weights = [1.0 if name == "backbone" else 3.0 for name in names]
    requests = [{}, {"pad_preference": "Please be brief."}, {"pad_weights": weights}]
    requests = [own | ({"pad_beta": 2.0} if own else {}) for own in requests]
    ours = served(base, tmp_path / "reward", requests)
    assert ours == served(base, merged, requests)
    assert len({tuple(tokens) for tokens in ours}) == len(requests)


def test_a_model_in_half_precision_is_trained_in_full(base, pairs, tmp_path):
    """Updates of 1e-6 are lost to bfloat16; what is saved is of the model's own precision."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(base).save_pretrained(half)
    seen = []

    class Watching(trainer.PADTrainer):
        def compute_loss(self, model, *args, **kwargs):
            seen.append({p.dtype for p in model.parameters() if p.requires_grad})
            return super().compute_loss(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pad_vllm.training.train.PADTrainer", Watching)
        train(config_of(half, pairs, tmp_path / "reward", trainer={"gradient_accumulation_steps": 2}), quiet=True)
    assert seen == [{torch.float32}] * len(seen)
    assert {t.dtype for t in load_file(tmp_path / "reward" / "model.safetensors").values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(tmp_path / "reward" / "heads.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stages": ("head",)}, "stages: head: there are backbone, heads"),
        ({"prompt_template": "no hole"}, "exactly once"),
        ({"max_length": 3}, "all 38 comparisons are longer than 3 tokens|longer than 3 tokens"),
        ({"max_answer": 0}, "max_answer=0: must be at least 1"),
        ({"max_length": 0}, "max_length=0: must be at least 1"),
        ({"save_steps": 0}, "save_steps=0: must be at least 1"),
        ({"lora_rank": -1}, "lora_rank=-1: must be at least 0"),
        ({"backbone": Stage(lr=1e-3, batch_size=0)}, "backbone: batch_size=0: must be at least 1"),
        ({"heads": Stage(lr=1e-3, batch_size=-2, opposites=True)}, "heads: batch_size=-2: must be at least 1"),
        ({"backbone": Stage(lr=float("nan"))}, "backbone: lr=nan: must be between 0 and 1000"),
        ({"heads": Stage(lr=1e-3, epochs=float("inf"))}, "heads: epochs=inf: must be between"),
        ({"trainer": {"gradient_accumulation_steps": 0}}, "trainer: gradient_accumulation_steps=0: must be at least 1"),
        ({"trainer": {"optim": "none"}}, "trainer: none is not a valid OptimizerNames"),
        ({"adapter": "/nowhere"}, "adapter: /nowhere has no adapter_config.json"),
        ({"adapter": "/nowhere", "lora_rank": 4}, "adapter: it has its own rank"),
        ({"stages": ("heads",), "lora_rank": 4}, "lora_rank: only the stage 'backbone' trains a LoRA"),
        ({"data": "/nowhere"}, "/nowhere: no such file"),
        ({"trainer": {"gradient": 1}}, "trainer: gradient: set by another option, or unknown to"),
        ({"trainer": {"learning_rate": 1}}, "trainer: learning_rate: set by another option"),
    ],
)
def test_bad_settings_leave_nothing_behind(settings, says, base, pairs, tmp_path):
    fields = config_of(base, pairs, tmp_path / "reward").__dict__ | settings
    with pytest.raises(ValueError, match=says):
        train(TrainingConfig(**fields), quiet=True)
    assert not list(tmp_path.iterdir())


def test_bad_data_is_one_line_and_leaves_nothing(base, pairs, tmp_path, capsys):
    data = tmp_path / "bad.jsonl"
    data.write_text(pairs.read_text() + '{"prompt": "p", "chosen": "a"}\n')
    with pytest.raises(SystemExit) as ended:
        main(["train", str(data), "--model", str(base), "--output", str(tmp_path / "reward")])
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {data}, line 41, field 'rejected': missing\n"
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_one_comparison_is_too_few(base, pairs, tmp_path, capsys):
    """One is kept to measure on."""
    data = tmp_path / "one.jsonl"
    data.write_text(pairs.read_text().splitlines()[0])
    command = ["train", str(data), "--model", str(base), "--output", str(tmp_path / "reward")]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    words = (
        "only one comparison of at most 512 tokens, but one is needed to train on and another to measure accuracy on"
    )
    assert capsys.readouterr().err == f"error: {data}: {words}; give more, or give --eval-data\n"
    assert [path.name for path in tmp_path.iterdir()] == ["one.jsonl"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--trainer", "optim=adamw"])
    assert ended.value.code == 1
    assert "error: --trainer: optim='adamw' is not JSON: Expecting value" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["a checkpoint", "the reward model"])
def test_a_full_disk_is_a_line_and_loses_nothing(when, base, pairs, undisturbed, tmp_path):
    """A limit on the size of files stands for the disk: writing beyond it fails as it does there, in the middle."""
    command = ["train", str(pairs), "--model", str(base), "--output", str(tmp_path / "reward"), "--save-steps", "2"]
    command += ["--batch-size", "8", "--backbone-lr", "1e-3", "--prompt-template", PROMPT_TEMPLATE]
    size = (base / "model.safetensors").stat().st_size
    code = (
        "import resource, sys\n"
        "from pad_vllm import cli\n"
        "from pad_vllm.training import train\n"
        f"def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, ({3 * size // 4}, -1))\n"
        "export = train.export\n"
        "def full(*args): limit(); export(*args)\n"
        f"if {when!r} == 'the reward model': train.export = full\n"
        "else: limit()\n"
        "cli.main(sys.argv[1:])\n"
    )
    script = tmp_path.with_suffix(".py")
    script.write_text(code)
    printed = run_python([script, *command], status=1)
    last = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(last) == 1, printed[-3000:]
    assert "Traceback" not in printed
    work = tmp_path / "reward.unfinished"
    assert " cannot be written: " in last[0]
    assert f"{work} keeps what was trained" in last[0]
    assert [path.name for path in tmp_path.iterdir()] == ["reward.unfinished"]
    assert "accuracy" in run_command(command)
    assert weights_of(tmp_path / "reward") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["reward"]


def test_an_output_that_exists_is_kept(base, pairs, tmp_path):
    (tmp_path / "reward").mkdir()
    with pytest.raises(FileExistsError):
        train(config_of(base, pairs, tmp_path / "reward"), quiet=True)
    assert not list((tmp_path / "reward").iterdir())


def test_heads_need_labels(base, tmp_path):
    rng = random.Random(0)
    records = [{k: v for k, v in models.preference_record(rng).items() if k != "labels"} for _ in range(20)]
    data = models.write_records(tmp_path / "plain.jsonl", records)
    with pytest.raises(ValueError, match="no comparison has labels"):
        train(config_of(base, data, tmp_path / "reward", stages=("heads",)), quiet=True)
    assert set(train(config_of(base, data, tmp_path / "reward"), quiet=True)) == {"backbone"}
    assert not (tmp_path / "reward" / "heads.safetensors").exists()


def test_heads_alone_leave_the_backbone_as_it_was(base, pairs, tmp_path):
    train(config_of(base, pairs, tmp_path / "reward", stages=("heads",)), quiet=True)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "reward", base))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    heads = load_heads(tmp_path / "reward" / "heads.safetensors", TINY.hidden_size)
    backbone = heads.names.index("backbone")
    assert torch.equal(heads.weight[backbone], torch.eye(TINY.hidden_size))
    assert all(heads.weight[i].abs().max() > 0 for i in range(len(heads.names)))


@pytest.mark.parametrize("among", [False, True], ids=["beside", "among"])
def test_conversion_of_the_released_layout(among, base, tmp_path, capsys):
    """A value head's tensors beside the backbone's, or among them under TRL's names."""
    source = tmp_path / "released"
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    head = {"v_head.summary.weight": torch.randn(64, 64), "v_head.summary.bias": torch.randn(64)}
    if among:
        tensors = load_file(source / "model.safetensors")
        both = {f"pretrained_model.{name}": tensor for name, tensor in tensors.items()} | head
        save_file(both, source / "model.safetensors", {"format": "pt"})
    else:
        save_file(head, source / "value_head.safetensors")
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source), str(tmp_path / "reward")])
    assert ended.value.code == 0
    assert "The reward model is in" in capsys.readouterr().out
    heads = load_heads(tmp_path / "reward" / "heads.safetensors", 64)
    assert heads.names == ("summary",)
    assert torch.equal(heads.weight[0], head["v_head.summary.weight"])
    assert torch.equal(heads.bias[0], head["v_head.summary.bias"])
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "reward", base))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert AutoTokenizer.from_pretrained(tmp_path / "reward").get_vocab() == tokenizer.get_vocab()


def test_conversion_of_an_adapter(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    converted = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "adapter", tmp_path / "reward"))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(converted(ids).logits, adapted(ids).logits)


def test_what_cannot_be_converted(base, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither config.json nor adapter_config.json"):
        convert(tmp_path / "empty", tmp_path / "reward")
    with pytest.raises(FileExistsError):
        convert(base, tmp_path / "empty")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "odd")
    save_file({"v_head.extra.weight": torch.zeros(2)}, tmp_path / "odd" / "value_head.safetensors")
    with pytest.raises(ValueError, match=r"unknown head tensors v_head.extra.weight"):
        convert(tmp_path / "odd", tmp_path / "reward")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "wider")
    config = tmp_path / "wider" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 7}))
    summary = {"v_head.summary.weight": torch.zeros(1, TINY.hidden_size)}
    save_file(summary, tmp_path / "wider" / "value_head.safetensors")
    with pytest.raises(ValueError, match=r"the weights do not fit config.json: .*size mismatch"):
        convert(tmp_path / "wider", tmp_path / "reward")
    assert not (tmp_path / "reward").exists()


def test_fitted_weights_are_those_of_the_comparisons():
    """Comparisons by a user of known weights, with as many mistakes as sigmoid makes."""
    torch.manual_seed(0)
    true = torch.tensor([0.0, 2.0, -1.0, 0.0])
    rewards = torch.randn(2000, 4)
    rewards[:, 0] = 5  # the backbone's head, whatever it says
    chosen = torch.rand(2000) < torch.sigmoid(rewards @ true)
    rewards = torch.where(chosen[:, None], rewards, -rewards)
    found = fit_weights(rewards, ("backbone", "more", "less", "none"))
    assert found.weights[0] == 1
    assert found.weights[1] == 1
    assert found.weights[2] == pytest.approx(-0.5, abs=0.1)
    assert abs(found.weights[3]) < 0.1
    assert found.held_out_accuracy == pytest.approx((rewards @ true > 0).float().mean().item(), abs=0.01)
    assert found.num_comparisons == 2000
    # A head that speaks louder weighs less, so that served rewards are the user's.
    loud = fit_weights(rewards * torch.tensor([1.0, 4.0, 1.0, 1.0]), ("backbone", "more", "less", "none"))
    assert loud.weights[2] / loud.weights[1] == pytest.approx(-2, abs=0.4)
    # Nothing to learn from: held out, it is a coin; and no weight is infinite where the comparisons are separable.
    coin = fit_weights(torch.randn(200, 3), ("a", "b", "c"))
    assert abs(coin.held_out_accuracy - 0.5) < 0.12
    assert all(abs(weight) <= 1 for weight in fit_weights(torch.rand(20, 2) + 1, ("a", "b")).weights)


def test_the_fit_command_prints_a_persona(base, pairs, undisturbed, tmp_path, capsys):
    train(config_of(base, pairs, tmp_path / "reward", stages=("heads",)), quiet=True)
    rng = random.Random(0)
    records = []
    while len(records) < 20:
        pair = world.sample_pair(rng)
        records.append({"prompt": pair.question, "chosen": pair.chosen, "rejected": pair.rejected})
    own = models.write_records(tmp_path / "own.jsonl", records)
    with pytest.raises(SystemExit) as ended:
        main(["fit", str(own), "--reward-model", str(tmp_path / "reward"), "--name", "ada"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    persona = json.loads(out.splitlines()[-1])["ada"]
    names = load_heads(tmp_path / "reward" / "heads.safetensors", 64).names
    assert len(persona["pad_weights"]) == len(names)
    assert "20 comparisons" in out
    for bad, says in ((str(base), "no value heads beside it"), (str(tmp_path / "reward"), "a fit takes at least 5")):
        few = models.write_records(tmp_path / "few.jsonl", records[:3])
        with pytest.raises(SystemExit) as ended:
            main(["fit", str(few), "--reward-model", bad])
        assert ended.value.code == 1
        assert says in capsys.readouterr().err


def log_likelihood(model, prompt: list[int], answer: list[int]) -> float:
    log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


@torch.no_grad()
def test_a_reference_with_another_tokenizer_reads_the_same_texts(base, pairs, undisturbed, tmp_path):
    """In its own chat template and tokens; also where a user wants the answer that was rejected."""
    reference = make_model(tmp_path / "reference", seed=3, vocab_size=600)
    make("byte-level", 600, CHATML).save_pretrained(reference)
    tokenizer, theirs = (AutoTokenizer.from_pretrained(path) for path in (base, reference))
    comparisons = read_comparisons(pairs)[:6]
    encoded = encode(comparisons, tokenizer, PromptTemplate(tokenizer, PROMPT_TEMPLATE), 512, theirs)
    seen, _ = heads.users_of(encoded, sorted({name for pair in encoded for name in pair.labels}), 0)
    assert len(seen) == len(encoded) == 6
    swapped = {tuple(pair.chosen) == tuple(was.rejected) for pair, was in zip(seen, encoded, strict=True)}
    assert swapped == {True, False}
    own, other = (AutoModelForCausalLM.from_pretrained(path).double() for path in (base, reference))
    margins = trainer.reward_margins(own, other, seen)
    for pair, comparison, margin in zip(seen, comparisons, margins.tolist(), strict=True):
        assert tokenizer.decode(pair.chosen).startswith(theirs.decode(pair.reference[1]).removesuffix("</s>"))
        assert (
            theirs.decode(pair.reference[0])
            == f"<|im_start|>user\n{comparison.prompt}<|im_end|>\n<|im_start|>assistant\n"
        )
        expected = log_likelihood(own, pair.prompt, pair.chosen) - log_likelihood(own, pair.prompt, pair.rejected)
        prompt, chosen, rejected = pair.reference
        expected -= log_likelihood(other, prompt, chosen) - log_likelihood(other, prompt, rejected)
        assert margin == pytest.approx(expected, abs=1e-3)
    with torch.enable_grad():
        train(config_of(base, pairs, tmp_path / "reward", reference=str(reference)), quiet=True)
    assert weights_of(tmp_path / "reward") != undisturbed
