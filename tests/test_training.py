"""The PAD objective, the training loops, and the build of the demo's models."""

import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pad_vllm.demo import models, world
from pad_vllm.demo.models import TINY
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training import trainer
from pad_vllm.training.objective import pad_loss, sequence_sums, token_logprobs
from pad_vllm.training.trainer import Example, PairExample


@pytest.fixture(scope="module")
def tokenizer():
    return models.train_tokenizer(TINY.vocab_size, seed=0)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return models.build(tmp_path_factory.mktemp("cache"), seed=0, recipe=TINY)


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def test_token_logprobs_and_their_sums():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)], [math.log(3.0), 0.0]])
    logprobs = token_logprobs(logits, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(logprobs, torch.tensor([0.5, 0.75, 0.25]).log())
    sums = sequence_sums(logprobs, torch.tensor([1, 0, 1]), 3)
    torch.testing.assert_close(sums, torch.tensor([math.log(0.75), math.log(0.125), 0.0]))


def test_pad_loss_is_the_hand_computed_value():
    chosen, rejected = torch.tensor([-10.0, -4.0]), torch.tensor([-12.0, -3.0])
    ref_chosen, ref_rejected = torch.tensor([-11.0, -4.0]), torch.tensor([-11.5, -6.0])
    loss, margins = pad_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
    # Rewards 1 and -0.5, then 0 and 3: margins 0.5 * 1.5 and 0.5 * -3.
    torch.testing.assert_close(margins, torch.tensor([0.75, -1.5]))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-0.75)) + math.log1p(math.exp(1.5))) / 2)


def test_pad_loss_pulls_the_answers_apart():
    logprobs = [torch.tensor([value], requires_grad=True) for value in (-5.0, -5.0, -6.0, -4.0)]
    pad_loss(*logprobs, beta=0.3)[0].backward()
    chosen, rejected, ref_chosen, ref_rejected = (value.grad.item() for value in logprobs)
    assert chosen < 0 < rejected
    assert chosen == -rejected == -ref_chosen == ref_rejected
    # The wider the margin, the weaker the pull.
    far = torch.tensor([5.0], requires_grad=True)
    pad_loss(far, *(value.detach() for value in logprobs[1:]), beta=0.3)[0].backward()
    assert abs(far.grad.item()) < abs(chosen)


def test_answer_logprobs_of_a_padded_batch_are_those_of_each_row(small_model):
    examples = [Example([1, 2, 3], [4, 5]), Example([6], [7, 8, 9, 10]), Example([1, 2, 3, 4, 5], [6])]
    sums = trainer.answer_logprob_sums(small_model, examples)
    for example, total in zip(examples, sums, strict=True):
        ids = torch.tensor([example.prompt + example.answer])
        logprobs = small_model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        tokens = range(len(example.prompt), ids.shape[1])
        torch.testing.assert_close(total, torch.stack([logprobs[t - 1, ids[0, t]] for t in tokens]).sum())


def test_pad_training_learns_what_a_preference_token_asks_for(small_model):
    """Token 1 asks for answer 10, token 2 for answer 11; the reference sees neither."""
    reference = LlamaForCausalLM(small_model.config).requires_grad_(False)
    pairs = [PairExample([p, 3], [3], [9 + p, 31], [12 - p, 31]) for p in (1, 2)] * 100
    before = [weight.clone() for weight in reference.parameters()]
    trainer.train_pad(
        small_model, reference, pairs, batch_size=8, lr=1e-2, beta=0.5, nll_weight=0.0, seed=0, desc="test"
    )
    assert (trainer.reward_margins(small_model, reference, pairs) > 0).all()
    swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    assert (trainer.reward_margins(small_model, reference, swapped) < 0).all()
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True))


def test_batches_hold_every_example_once_and_similar_lengths():
    rng = random.Random(0)
    examples = [Example([0] * rng.randint(1, 50), [i]) for i in range(1000)]
    batches = list(trainer._batches(examples, 8, rng))
    assert sorted(example.answer[0] for batch in batches for example in batch) == list(range(1000))
    padding = sum(max(len(e.prompt) for e in batch) - len(e.prompt) for batch in batches for e in batch)
    assert padding < 0.1 * sum(len(e.prompt) for e in examples)


def test_tokenizer_round_trip(tokenizer):
    rng = random.Random(1)
    texts = ["", "  two  spaces \n\t and don't , stop .", "naïve 日本語 🙂 \x00\x7f", "a" * 300]
    texts += [world.answer(topic, rng.choice(world.STYLES), rng) for topic in world.TOPICS]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_chat_template(tokenizer):
    ids = models.chat_ids(tokenizer, "How do I bake bread?")
    assert tokenizer.decode(ids) == "<|bos|><|user|>How do I bake bread?<|assistant|>"
    assert ids[:2] == tokenizer.convert_tokens_to_ids(["<|bos|>", "<|user|>"])
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|bos|><|user|>Hi<|assistant|>Yes?<|eos|><|user|>Go<|assistant|>"


def test_training_pairs_are_composed_as_in_serving(tokenizer):
    pair = world.sample_pair(random.Random(2))
    template = PromptTemplate(tokenizer, **models.PAD_CONFIG)
    encoded = models.encode_pair(pair, tokenizer, template)
    assert encoded.ref_prompt == models.chat_ids(tokenizer, pair.question)
    assert encoded.prompt == template.compose(encoded.ref_prompt, pair.preference)
    assert tokenizer.decode(encoded.prompt) == (
        "<|bos|><|user|>[Guidelines] Your task is to generate response by considering the following principle. "
        f"[Principles] {pair.preference} [Instruction] {pair.question}<|assistant|>"
    )
    for ids, text in ((encoded.chosen, pair.chosen), (encoded.rejected, pair.rejected)):
        assert tokenizer.decode(ids) == text + "<|eos|>"


def test_built_models_load_as_transformers_models(built):
    for folder in (built.base, built.reward):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.dtype == torch.float32
        assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.config.vocab_size == len(tokenizer)
        assert tokenizer.chat_template
    assert set(built.metrics) == {"accuracy_after_sft", "margin_after_sft", "accuracy_after_pad", "margin_after_pad"}


def test_build_is_cached_and_deterministic(built, tmp_path, monkeypatch):
    again = models.build(tmp_path, seed=0, recipe=TINY)
    for name in ("base", "reward"):
        file = f"{name}/model.safetensors"
        assert (again.base.parent / file).read_bytes() == (built.base.parent / file).read_bytes()
    other = models.build(tmp_path, seed=1, recipe=TINY)
    assert other.base.parent != again.base.parent
    weights = "model.safetensors"
    assert (other.base / weights).read_bytes() != (again.base / weights).read_bytes()
    assert (again.base / weights).read_bytes() != (again.reward / weights).read_bytes()

    monkeypatch.setattr(models, "_train", lambda *_: pytest.fail("trained again"))
    assert models.build(tmp_path, seed=0, recipe=TINY) == again
    monkeypatch.setenv("PAD_VLLM_CACHE", str(tmp_path))
    assert models.build(seed=0, recipe=TINY) == again


def test_a_killed_build_leaves_nothing_usable(tmp_path, monkeypatch):
    train_pad = trainer.train_pad

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train_pad", killed)
    # SIGKILL runs no cleanup either.
    monkeypatch.setattr(models.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        models.build(tmp_path, recipe=TINY)
    assert [path.name[:11] for path in tmp_path.iterdir()] == [".unfinished"]

    monkeypatch.setattr(trainer, "train_pad", train_pad)
    assert models.build(tmp_path, recipe=TINY).reward.is_dir()


def test_building_draws_nothing_from_the_global_generator(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    models.build(tmp_path, recipe=TINY)
    assert torch.equal(torch.rand(1), expected)
