"""The PAD objective, the training loops, and the build of the synthetic models."""

import copy
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from pad_vllm.reward.byte_tokens import same_ordinary_tokens
from pad_vllm.reward.heads import ValueHeads, load_heads
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.synthetic import models, world
from pad_vllm.synthetic.models import TINY
from pad_vllm.synthetic.tokenizer import USER_TOKEN
from pad_vllm.training import trainer
from pad_vllm.training.data import Comparison, DataError, Example, PairExample, answer_ids, encode, prompt_ids
from pad_vllm.training.heads import HeadedModel, users_of
from pad_vllm.training.objective import pad_loss, sequence_sums, token_logprobs
from pad_vllm.training.train import measure_ranking
from tests.support.tokenizers import like_gemma


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


def test_pad_loss_of_opposites_is_of_what_a_preference_changes():
    """Two users of the same two answers: neither the reference nor what is likely under both preferences matters."""
    first, second = torch.tensor([-10.0, -14.0]), torch.tensor([-12.0, -13.0])  # the two answers, by user
    generic, ref = torch.tensor([3.0, -4.0]), torch.tensor([-11.0, -15.0])
    chosen, rejected = torch.stack([first[0], second[1]]), torch.stack([second[0], first[1]])
    found, _ = pad_loss(chosen, rejected, ref, ref.flip(0), beta=0.5, opposites=True)
    # ((-10 + 12) + (-13 + 14)) / 2
    assert found.item() == pytest.approx(math.log1p(math.exp(-1.5)))
    same, _ = pad_loss(chosen + generic, rejected + generic.flip(0), 2 * ref, 2 * ref.flip(0), 0.5, opposites=True)
    assert same.item() == pytest.approx(found.item())


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
    sums = trainer.score_answers(small_model, examples, batch_size=3)
    for example, total in zip(examples, sums, strict=True):
        ids = torch.tensor([example.prompt + example.answer])
        logprobs = small_model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        tokens = range(len(example.prompt), ids.shape[1])
        torch.testing.assert_close(total, torch.stack([logprobs[t - 1, ids[0, t]] for t in tokens]).sum())


PAIRS = [PairExample([p, 3], [3], [9 + p, 31], [12 - p, 31], {}) for p in (1, 2)]
"""Token 1 asks for answer 10, token 2 for answer 11; the reference sees neither."""


def pad_trainer(model, reference, folder, steps=25, opposites=False, **settings):
    args = trainer.training_arguments(folder, steps=steps, batch_size=8, lr=1e-2, seed=0, disable_tqdm=True, **settings)
    return trainer.PADTrainer(model, reference, PAIRS * 100, args, beta=0.5, nll_weight=0.0, opposites=opposites)


@pytest.mark.parametrize("opposites", [False, True])
def test_pad_training_learns_what_a_preference_token_asks_for(small_model, tmp_path, opposites):
    reference = LlamaForCausalLM(small_model.config).requires_grad_(False)
    before = [weight.clone() for weight in reference.parameters()]
    pad_trainer(small_model, reference, tmp_path, opposites=opposites).train()
    assert (trainer.reward_margins(small_model, reference, PAIRS) > 0).all()
    swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in PAIRS]
    assert (trainer.reward_margins(small_model, reference, swapped) < 0).all()
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True))


def test_the_order_of_training_takes_every_example_once_a_pass_and_similar_lengths_together():
    rng = random.Random(0)
    sizes = [rng.randint(1, 50) for _ in range(1004)]
    order = list(trainer._order(sizes, 8, 251, rng))
    assert len(order) == 8 * 251 == 2 * len(sizes)
    assert sorted(order) == sorted([*range(1004), *range(1004)])
    batches = [order[i : i + 8] for i in range(0, len(order), 8)]
    padding = sum(max(sizes[i] for i in batch) - sizes[i] for batch in batches for i in batch)
    assert padding < 0.1 * 2 * sum(sizes)
    assert len(list(trainer._order(sizes[:3], 8, 5, rng))) == 40  # fewer examples than a batch


def opposite(pair):
    return pair._replace(prompt=[*pair.prompt, 9], chosen=pair.rejected, rejected=pair.chosen)


def test_a_comparison_and_its_opposite_come_into_one_batch(small_model, tmp_path):
    rng = random.Random(0)
    some = [
        PairExample([1], [i], [rng.randint(2, 30) for _ in range(rng.randint(1, 9))], [i, 31], {}) for i in range(20)
    ]
    pairs = some + [opposite(pair) for pair in reversed(some)]
    assert sorted(trainer.opposites_of(pairs)) == [(i, 39 - i) for i in range(20)]
    for without in (pairs[:-1], [some[0], some[0]], [some[0], opposite(some[0])._replace(ref_prompt=[30])]):
        with pytest.raises(DataError, match=r"opposites: . of .* have none, such as number 0"):
            trainer.opposites_of(without)
    args = trainer.training_arguments(tmp_path, steps=20, batch_size=4, lr=1e-2, seed=0)
    made = trainer.PADTrainer(small_model, small_model, pairs, args, beta=0.5, nll_weight=0.0, opposites=True)
    order = [pair for pair, *_ in made.train_dataset]
    assert len(order) == 80
    for one, other in zip(order[::2], order[1::2], strict=True):
        assert (one.ref_prompt, one.chosen, one.rejected) == (other.ref_prompt, other.rejected, other.chosen)
    singles = [pair for pair in order if pair in some]
    assert all(singles.count(pair) == 2 for pair in some)


def test_an_answer_that_is_compared_often_is_scored_once(small_model, monkeypatch):
    examples = [Example([1], [i % 3 + 4, 31]) for i in range(12)]
    rows = []
    compute = trainer.answer_logprob_sums
    monkeypatch.setattr(
        trainer, "answer_logprob_sums", lambda m, ids, is_answer: rows.append(len(ids)) or compute(m, ids, is_answer)
    )
    scores = trainer.score_answers(small_model, examples)
    assert rows == [3]
    torch.testing.assert_close(scores, scores[:3].repeat(4))
    assert len(set(scores.tolist())) == 3


def test_heads_learn_directions_and_leave_the_backbone_alone(small_model, tmp_path):
    """Dimension "ten": answers 10 over 11; dimension "five": answers 5 over 6. Neither preference is in the prompt."""
    reference = LlamaForCausalLM(small_model.config).requires_grad_(False)
    reference.load_state_dict(small_model.state_dict())
    pairs = [
        PairExample([3], [3], [10, 31], [11, 31], {"ten": 2}),
        PairExample([4], [4], [6, 31], [5, 31], {"five": -1}),
    ]
    model = HeadedModel(small_model, ["five", "ten"])
    seen, users = users_of(pairs * 100, model.names, seed=0)
    assert users.abs().sum(1).eq(1).all()
    assert {tuple(u) for u in users.tolist()} == {(1, 0), (-1, 0), (0, 1), (0, -1)}
    args = trainer.training_arguments(tmp_path, steps=40, batch_size=8, lr=1e-2, seed=0, disable_tqdm=True)
    trainer.PADTrainer(model, reference, seen, args, beta=0.5, nll_weight=0.0, weights=users).train()
    for weights, chosen in (((1.0, 1.0), (10, 5)), ((-1.0, 1.0), (10, 6)), ((1.0, -1.0), (11, 5)), ((0.0, 0.0), None)):
        margins = trainer.reward_margins(model, reference, pairs, torch.tensor([weights, weights])).tolist()
        if chosen is None:
            assert margins == pytest.approx([0, 0], abs=1e-5)
        else:
            assert [margins[0] > 0, margins[1] < 0] == [chosen[0] == 10, chosen[1] == 5]
    for name, weight in small_model.state_dict().items():
        assert torch.equal(weight, reference.state_dict()[name])


def test_headed_scores_are_those_of_the_mixed_hidden_state(small_model):
    """sum_i a_i (W_i h + b_i), written out."""
    torch.manual_seed(1)
    names = ("backbone", "x", "y")
    heads = ValueHeads(names, torch.randn(3, 32, 32), torch.randn(3, 32))
    heads.weight[0], heads.bias[0] = torch.eye(32), 0
    model = HeadedModel.of(small_model, heads)
    example = Example([1, 2, 3], [4, 5])
    weights = torch.tensor([1.0, 0.3, -2.0])
    hidden = small_model.model(torch.tensor([[1, 2, 3, 4]])).last_hidden_state[0]
    mixed = sum(a * (hidden @ w.T + b) for a, w, b in zip(weights, heads.weight, heads.bias, strict=True))
    logprobs = small_model.lm_head(mixed).log_softmax(-1)
    found = trainer.score_answers(model, [example], weights[None])
    torch.testing.assert_close(found[0], logprobs[2, 4] + logprobs[3, 5])
    # Heads that are maps of their own: weight 1 on one of them is this one alone.
    own = HeadedModel.of(small_model, ValueHeads(names[1:], heads.weight[1:], heads.bias[1:]))
    logprobs = small_model.lm_head(hidden @ heads.weight[2].T + heads.bias[2]).log_softmax(-1)
    found = trainer.score_answers(own, [example], torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(found[0], logprobs[2, 4] + logprobs[3, 5], rtol=1e-4, atol=1e-4)


def test_tokenizer_round_trip(tokenizer):
    rng = random.Random(1)
    texts = ["", "  two  spaces \n\t and don't , stop .", "naïve 日本語 🙂 \x00\x7f", "a" * 300]
    texts += [world.answer(topic, rng.choice(world.STYLES), rng) for topic in world.TOPICS]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_chat_template(tokenizer):
    ids = prompt_ids("How do I bake bread?", tokenizer)
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
    record = models.preference_record(random.Random(2))
    template = PromptTemplate(tokenizer, "Heed: {preference} {prompt}", insert_after=USER_TOKEN)
    (encoded,) = encode([Comparison(**record)], tokenizer, template, 512)
    assert tokenizer.decode(encoded.ref_prompt) == f"<|bos|><|user|>{record['prompt']}<|assistant|>"
    assert encoded.prompt == template.compose(encoded.ref_prompt, record["preference"])
    assert tokenizer.decode(encoded.prompt) == (
        f"<|bos|><|user|>Heed: {record['preference']} {record['prompt']}<|assistant|>"
    )
    for ids, text in ((encoded.chosen, record["chosen"]), (encoded.rejected, record["rejected"])):
        assert tokenizer.decode(ids) == text + "<|eos|>"


@pytest.mark.parametrize("ends", [None, [1], "both"])
def test_an_answer_ends_as_chats_of_its_model_do(ends, tmp_path):
    """Gemma's chats end with <end_of_turn>, which its generation configuration says, and its EOS is another token."""
    tokenizer = like_gemma()
    turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert turn != tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    if ends is not None:
        ends = [tokenizer.eos_token_id, turn] if ends == "both" else [tokenizer.eos_token_id]
        GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert answer_ids("why", read)[-1] == (turn if ends and turn in ends else tokenizer.eos_token_id)
    read = AutoTokenizer.from_pretrained(tmp_path)
    read.eos_token = read.chat_template = None
    with pytest.raises(DataError, match="has no end token"):
        answer_ids("why", read)


def test_an_answer_that_was_cut_has_no_end(tokenizer):
    record = models.preference_record(random.Random(2))
    template = PromptTemplate(tokenizer, "Heed: {preference} {prompt}", insert_after=USER_TOKEN)
    (whole,) = encode([Comparison(**record)], tokenizer, template, 512)
    longer = max(len(whole.chosen), len(whole.rejected))
    shorter = min(len(whole.chosen), len(whole.rejected))
    (same,) = encode([Comparison(**record)], tokenizer, template, 512, max_answer=longer)
    assert same == whole
    (cut,) = encode([Comparison(**record)], tokenizer, template, 512, max_answer=shorter - 1)
    assert cut.chosen == whole.chosen[: shorter - 1]
    assert cut.rejected == whole.rejected[: shorter - 1]
    assert tokenizer.eos_token_id not in cut.chosen + cut.rejected
    assert cut.prompt == whole.prompt


def test_opposites_are_measured_without_a_reference(small_model):
    """What a reference says is in both margins, and cancels."""
    pairs = [pair for one in PAIRS for pair in (one, opposite(one))]
    reference = copy.deepcopy(small_model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    margins = trainer.reward_margins(small_model, reference, pairs).view(-1, 2).sum(1)
    alone = trainer.reward_margins(small_model, None, pairs).view(-1, 2).sum(1)
    torch.testing.assert_close(margins, alone, atol=1e-4, rtol=0)
    assert measure_ranking(small_model, None, pairs)["accuracy"] == (alone > 0).float().mean().item()


def test_built_models_load_as_transformers_models(built, tmp_path_factory):
    folders = [built.base, built.reward]
    folders += [models.build_base(name, built.base.parent, 0, TINY) for name in models.ARCHITECTURES]
    for folder in folders:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.dtype == torch.float32
        assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.config.vocab_size == len(tokenizer)
        assert tokenizer.chat_template
    assert folders[2] == built.base
    assert len({type(AutoModelForCausalLM.from_pretrained(folder)) for folder in folders}) == len(models.ARCHITECTURES)
    assert {"accuracy"} <= set(built.metrics["backbone"])
    dimensions = {first for first, _ in world.DIMENSIONS.values()}
    names = load_heads(built.reward / "heads.safetensors", TINY.hidden_size).names
    assert set(names) == dimensions | {"backbone"}


def test_the_fourth_base_has_a_tokenizer_of_its_own(built, tokenizer):
    other = AutoTokenizer.from_pretrained(models.build_base("mistral", built.base.parent, 0, TINY))
    assert not same_ordinary_tokens(tokenizer, other)
    assert other.chat_template != tokenizer.chat_template
    for text in (world.answer(world.TOPICS[0], world.STYLES[0], random.Random(0)), "naïve café, 東京"):
        ids = other.encode(text, add_special_tokens=False)
        assert other.decode(ids) == text
        assert other.unk_token_id not in ids


def test_build_is_cached_and_deterministic(built, tmp_path, monkeypatch):
    again = models.build(tmp_path, seed=0, recipe=TINY)
    weights = "model.safetensors"
    for ours, theirs in zip(again[:2], built[:2], strict=True):
        assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
    assert (again.reward / "heads.safetensors").read_bytes() == (built.reward / "heads.safetensors").read_bytes()
    other = models.build_base("llama", tmp_path, seed=1, recipe=TINY)
    assert other != again.base
    assert (other / weights).read_bytes() != (again.base / weights).read_bytes()
    assert (again.base / weights).read_bytes() != (again.reward / weights).read_bytes()

    for name in ("_train_base", "_train_reward"):
        monkeypatch.setattr(models, name, lambda *_: pytest.fail("trained again"))
    assert models.build(tmp_path, seed=0, recipe=TINY) == again
    monkeypatch.setenv("PAD_VLLM_CACHE", str(tmp_path))
    assert models.build(seed=0, recipe=TINY) == again


def test_a_killed_build_leaves_nothing_usable(tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models.train, "train", killed)
        # SIGKILL runs no cleanup either.
        patch.setattr(models.tempfile.TemporaryDirectory, "cleanup", lambda self: self._finalizer.detach())
        with pytest.raises(KeyboardInterrupt):
            models.build(tmp_path, recipe=TINY)
    assert not list(tmp_path.glob("reward-*"))
    assert models.build(tmp_path, recipe=TINY).reward.is_dir()


def test_building_draws_nothing_from_the_global_generator(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    models.build(tmp_path, recipe=TINY)
    assert torch.equal(torch.rand(1), expected)
