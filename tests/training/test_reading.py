"""The round of reading: what is to be learned is what guidance does, and it is learned."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pad_vllm.demo import questions, reading, recipe, smollm, wishes
from pad_vllm.demo.measures import DIRECTIONS
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import prompt_ids
from pad_vllm.training.distillation import Guidance, Lesson, ReadingTrainer, Taught, guidance_of, reading_loss
from pad_vllm.training.trainer import training_arguments
from tests.oracle import guided_logits, logits_after

BETA, TOP_K = 1.5, 8
TINY = reading.Reading(
    num_prompts=1,
    num_questions=1,
    prompts_per_part=2,
    combinations=1,
    strengths={"academic": 1.5},
    together=0.75,
    known=2,
    passes=(reading.Pass(2, 12, 8, 4e-4), reading.Pass(1, 6, 8, 4e-4)),
    max_tokens=12,
    save_steps=2,
)


def _llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, max_position_embeddings=128, **sizes)).eval()
    model.lm_head.weight.data *= 30  # or every token is as likely
    return model


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return _llama(0)


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return _llama(1)


def _lessons(num: int, contexts: list[list[int]], weights: list[float]) -> list[Lesson]:
    rng = random.Random(3)
    lessons = []
    for i in range(num):
        plain = [rng.randrange(20, 96) for _ in range(3 + i)]
        answer = [rng.randrange(20, 96) for _ in range(4 + (5 * i) % 7)]
        known = [([*context, *plain], weight) for context, weight in zip(contexts, weights, strict=True)]
        lessons.append(Lesson(plain, answer, known))
    return lessons


@pytest.mark.parametrize(("contexts", "weights"), [([[1, 2, 3]], [1.0]), ([[4, 5], [6, 7, 8], [9]], [0.8, 0.6, -0.4])])
def test_what_is_to_be_learned_is_what_guidance_does(base, teacher, contexts, weights):
    lessons = _lessons(19, contexts, weights)  # more than a batch
    for lesson, found in zip(lessons, guidance_of(base, teacher, lessons, beta=BETA, top_k=TOP_K), strict=True):
        assert found.candidates.shape == found.guided.shape == (len(lesson.answer), TOP_K)
        for t in range(len(lesson.answer)):
            said = lesson.answer[:t]
            z = logits_after(base, (*lesson.plain, *said))
            r = [logits_after(teacher, (*context, *said)) for context, _ in lesson.known]
            expected = guided_logits(z, r, TOP_K, BETA, weights=weights)
            candidates = found.candidates[t].long()
            assert set(candidates.tolist()) == set(expected.isfinite().nonzero().flatten().tolist())
            torch.testing.assert_close(found.base[t], z[candidates], rtol=0, atol=2e-4)
            torch.testing.assert_close(
                found.guided[t].log_softmax(0), expected[candidates].log_softmax(0), rtol=0, atol=1e-3
            )


def test_the_loss_is_the_divergence_of_two_guided_distributions():
    torch.manual_seed(0)
    scores, base, guided = torch.randn(3, 5, 7)
    expected = 0.0
    for t in range(5):
        q, p = (values.softmax(0) for values in (guided[t], base[t] + BETA * (scores[t] - base[t])))
        expected += sum(float(b * (b / a).log()) for a, b in zip(p, q, strict=True)) / 5
    assert float(reading_loss(scores, base, guided, BETA)) == pytest.approx(expected, rel=1e-5)
    exact = base + (guided - base) / BETA + 3.0  # what a token adds to all candidates changes nothing
    assert float(reading_loss(exact, base, guided, BETA)) == pytest.approx(0, abs=1e-6)


def test_other_words_are_learned(base, teacher, tmp_path):
    """A wish in a word that the teacher knows is learned for a word that it does not."""
    lessons = _lessons(32, [[1, 2, 3]], [1.0])
    guidance = guidance_of(base, teacher, lessons, beta=BETA, top_k=TOP_K)
    taught = [
        Taught([10, 11, *lesson.plain], lesson.answer, own) for lesson, own in zip(lessons, guidance, strict=True)
    ]
    student = _llama(1)

    def divergence() -> float:
        read = [Lesson(one.plain, one.answer, [(own.prompt, 1.0)]) for one, own in zip(lessons, taught, strict=True)]
        own = guidance_of(base, student, read, beta=BETA, top_k=TOP_K)
        told = torch.cat([one.guided.log_softmax(-1) for one in guidance])
        done = torch.cat([one.guided.log_softmax(-1) for one in own])
        return float((told.exp() * (told - done)).sum(-1).mean())

    before = divergence()
    args = training_arguments(tmp_path, steps=60, batch_size=8, lr=3e-3, seed=0, use_cpu=True, disable_tqdm=True)
    ReadingTrainer(student, taught, args, BETA).train()
    assert divergence() < 0.25 * before


def test_what_users_say_is_not_held_out():
    for value in DIRECTIONS:
        later = wishes.later_wordings(value)
        assert len(set(later)) == len(later) > 300
        assert not set(later) & {*wishes.wordings(value), *wishes.wordings(value, held_out=True)}


def test_a_round_of_reading(tmp_path, monkeypatch):
    for name, value in {
        "max_model_len": 256,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": 256 << 20,
    }.items():
        monkeypatch.setitem(recipe.ENGINE, name, value)
    models = smollm.build()
    learned = reading.learn_to_read(tmp_path, models.base, models.reward, TINY)
    before, after = (load_file(folder / smollm.ADAPTER_WEIGHTS) for folder in (models.reward, learned))
    assert before.keys() == after.keys()
    assert any(not after[name].equal(before[name].float()) for name in before)
    assert json.loads((learned / "pad.json").read_text()) == smollm.DEFAULTS
    answers = [json.loads(line) for line in next(tmp_path.glob("answers-*.jsonl")).read_text().splitlines()]
    assert len(answers) == 2 * (len(DIRECTIONS) + 1)
    assert {answer["prompt"] for answer in answers} == {wishes.prompts()[0], questions.questions(101)[100]}
    made = json.loads((learned / "training.json").read_text())
    assert made["num_answers"] == len(answers)
    first = load_file(tmp_path / "pass-1" / smollm.ADAPTER_WEIGHTS)
    assert any(not after[name].equal(first[name]) for name in first)
    assert reading.learn_to_read(tmp_path, models.base, models.reward, TINY) == learned


def test_what_an_answer_has_already_is_not_to_come_again():
    answer = [1, 2, 3, 4, 9, 1, 2, 3, 4, 1, 2, 3, 5]
    candidates = torch.tensor([[4, 5, 9]]).repeat(len(answer), 1)
    guided = torch.zeros(len(answer), 3)
    reading.discourage_circles(Guidance(candidates, torch.zeros_like(guided), guided), answer, 0.5)
    expected = torch.zeros(len(answer), 3)
    expected[8, 0] = -0.5  # 1 2 3 4 was said once
    expected[12, 0] = -1.0  # and twice
    expected[9, 2] = -0.5  # 2 3 4 9
    assert guided.equal(expected)


def test_a_teacher_reads_known_words_with_their_weights():
    tokenizer = AutoTokenizer.from_pretrained(smollm.build_base())
    answer = {"prompt": "Why is the sky blue?", "values": ["academic", "brief"], "text": "So.", "finished": True}
    (lesson,) = reading.lessons_of([answer], tokenizer, TINY)
    assert lesson.plain == prompt_ids(answer["prompt"], tokenizer)
    assert lesson.answer[-1] == tokenizer.eos_token_id
    template = PromptTemplate(tokenizer, smollm.PROMPT_TEMPLATE)
    academic, brief = 0.75 * 1.5 / 2, 0.75 / 2  # two wishes together, each in two wordings
    expected = [("academic", academic), ("simple", -academic / 2), ("brief", brief), ("detailed", -brief / 2)]
    assert [weight for _, weight in lesson.known] == [weight for _, weight in expected for _ in range(2)]
    for (context, _), (value, _) in zip(lesson.known, [one for one in expected for _ in range(2)], strict=True):
        known = [template.compose(lesson.plain, wish) for wish in wishes.wordings(value)]
        assert context in known
