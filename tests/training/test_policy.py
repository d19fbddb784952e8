"""The round on policy: what is learned from is what was served, and what is wanted comes more often."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pad_vllm.demo import policy, questions, smollm, wishes
from pad_vllm.demo.measures import DIRECTIONS
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import prompt_ids
from pad_vllm.training.policy import GuidedPolicy, PolicyTrainer, Rollout, policy_steps, policy_terms
from pad_vllm.training.trainer import training_arguments
from tests.oracle import guided_logits, logits_after

GUIDED = GuidedPolicy(beta=1.5, top_k=8, temperature=0.7)
TINY = policy.PolicyRound(
    first_prompt=0,
    first_question=100,
    num_prompts=1,
    num_questions=1,
    plain=2,
    each=1,
    combinations=1,
    max_tokens=12,
    epochs=2.0,
    batch_size=8,
    save_steps=2,
)


def _llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, max_position_embeddings=128, **sizes)).eval()
    model.lm_head.weight.data *= 8  # or every token is as likely
    return model


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return _llama(0)


def _policy_after(base, reward, plain, prompt, said) -> torch.Tensor:
    """The oracle's, over the vocabulary."""
    z, r = logits_after(base, (*plain, *said)), logits_after(reward, (*prompt, *said))
    return (guided_logits(z, [r], GUIDED.top_k, GUIDED.beta) / GUIDED.temperature).log_softmax(0)


def _sampled(base, reward, num: int, length: int, seed: int = 0) -> list[Rollout]:
    """Answers to one prompt as they are served, without advantages."""
    torch.manual_seed(seed)
    plain = [20, 21, 22]
    rollouts = []
    for _ in range(num):
        said: list[int] = []
        for _ in range(length):
            said.append(int(torch.multinomial(_policy_after(base, reward, plain, [5, *plain], said).exp(), 1)))
        rollouts.append(Rollout(plain, [5, *plain], said, 0.0))
    return rollouts


def test_what_is_learned_from_is_what_was_served(base):
    reward, rng = _llama(1), random.Random(3)
    rollouts = []
    for i in range(19):  # more than a batch
        plain = [rng.randrange(20, 96) for _ in range(3 + i)]
        answer = _sampled(base, reward, 1, 4 + (5 * i) % 7, seed=i)[0].answer
        rollouts.append(Rollout(plain, [1, 2, *plain], answer, 0.0))
    for one, steps in zip(rollouts, policy_steps(base, reward, rollouts, GUIDED), strict=True):
        for t, token in enumerate(one.answer):
            expected = _policy_after(base, reward, one.plain, one.prompt, one.answer[:t])
            candidates = steps.candidates[t].tolist()
            assert set(candidates) == set(expected.isfinite().nonzero().flatten().tolist())
            z = logits_after(base, (*one.plain, *one.answer[:t]))
            torch.testing.assert_close(steps.base[t], z[candidates], rtol=0, atol=2e-4)
            if token in candidates:
                assert candidates[int(steps.chosen[t])] == token
                assert float(steps.before[t]) == pytest.approx(float(expected[token]), abs=1e-3)
            else:
                assert int(steps.chosen[t]) == -1


def test_a_tokens_gain_and_divergence():
    torch.manual_seed(0)
    scores, base = torch.randn(2, 6, 5)
    own = GUIDED.logprobs(scores, base)
    chosen = torch.tensor([0, 1, 2, 3, -1, 0])
    now = own.gather(1, chosen.clamp(min=0)[:, None])[:, 0]
    # as likely as before; much likelier; much less likely; as likely; no candidate; a little likelier
    before = now - torch.tensor([0.0, 1.0, -1.0, 0.0, 0.0, 0.1])
    advantage = torch.tensor([0.5, 0.5, 0.5, -0.5, 0.5, -0.5])
    tokens = {"base": base, "chosen": chosen, "before": before, "advantage": advantage}
    gain, divergence = policy_terms(scores, tokens, GUIDED, 0.2)
    less, little = float(torch.tensor(-1.0).exp()), float(torch.tensor(0.1).exp())
    torch.testing.assert_close(gain, torch.tensor([0.5, 0.5 * 1.2, 0.5 * less, -0.5, 0.0, -0.5 * little]))
    for t in range(6):
        p, q = own[t].exp(), (base[t] / GUIDED.temperature).softmax(0)
        assert float(divergence[t]) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


def _train(base, reward, rollouts, folder, divergence: float) -> None:
    steps = policy_steps(base, reward, rollouts, GUIDED)
    args = training_arguments(folder, steps=40, batch_size=16, lr=3e-3, seed=0, use_cpu=True, disable_tqdm=True)
    PolicyTrainer(reward, rollouts, steps, args, GUIDED, divergence=divergence).train()
    logits_after.cache_clear()


def test_what_is_wanted_comes_more_often(base, tmp_path):
    reward = _llama(1)
    rollouts = _sampled(base, reward, 96, 6)
    wanted = [sum(token % 2 for token in one.answer) / 6 for one in rollouts]
    mean = sum(wanted) / len(wanted)
    rollouts = [one._replace(advantage=score - mean) for one, score in zip(rollouts, wanted, strict=True)]
    _train(base, reward, rollouts, tmp_path, divergence=0.0)
    again = _sampled(base, reward, 96, 6, seed=1)
    assert sum(token % 2 for one in again for token in one.answer) / (96 * 6) > mean + 0.1


def test_what_nobody_needs_is_given_back(base, tmp_path):
    reward = _llama(1)
    rollouts = _sampled(base, reward, 32, 6)

    def divergence() -> float:
        tokens = [
            (
                GUIDED.logprobs(
                    torch.stack(
                        [logits_after(reward, (*one.prompt, *one.answer[:t]))[s.candidates[t].long()] for t in range(6)]
                    ),
                    s.base,
                ),
                s.base,
            )
            for one, s in zip(rollouts, policy_steps(base, reward, rollouts, GUIDED), strict=True)
        ]
        own, plain = (torch.cat(parts) for parts in zip(*tokens, strict=True))
        return float((own.exp() * (own - (plain / GUIDED.temperature).log_softmax(-1))).sum(-1).mean())

    before = divergence()
    _train(base, reward, rollouts, tmp_path, divergence=1.0)
    assert divergence() < 0.5 * before


def test_scores():
    plain = [{"prompt": "Q", "values": [], "preference": "", "tokens": [1], "text": "One two three."}] * 2

    def asked(value: str, text: str, wish: str = "w", prompt: str = "Q") -> dict:
        values = value.split()
        return {"prompt": prompt, "values": values, "preference": wish, "tokens": [1], "text": text}

    long, same, circles = " ".join(["word"] * 3 + ["other"] * 75), "Four five six.", "go on " * 20
    answers = [*plain, asked("detailed", long), asked("detailed", same), asked("brief", long), asked("brief", circles)]
    answers.append(asked("brief plain", same))
    scored = policy.scored_answers(answers, TINY)
    assert [one["text"] for one in scored] == [long, same, long, circles, same]
    scores = [one["score"] for one in scored]
    assert scores[0] == pytest.approx(0.995 - TINY.circles, abs=0.01)  # 75 words more, and the same four, too
    assert scores[1] == 0 == scores[4]
    assert scores[2] < -0.9
    assert scores[3] < -TINY.circles
    two, shared = scores[:2], sum(scores[:2]) / 2
    expected = two[0] - (two[1] + TINY.shared * shared) / (1 + TINY.shared)
    assert scored[0]["advantage"] == pytest.approx(expected)
    assert scored[4]["advantage"] == 0  # the only one of its kind


def test_what_users_say_is_not_held_out():
    for value in DIRECTIONS:
        later = wishes.later_wordings(value)
        assert len(set(later)) == len(later) > 300
        assert not set(later) & {*wishes.wordings(value), *wishes.wordings(value, held_out=True)}


def test_a_round_on_policy(tmp_path, short_contexts):
    models = smollm.build()
    learned = policy.learn_on_policy(tmp_path, models.base, models.reward, TINY)
    before, after = (load_file(folder / smollm.ADAPTER_WEIGHTS) for folder in (models.reward, learned))
    assert before.keys() == after.keys()
    assert any(not after[name].equal(before[name].float()) for name in before)
    assert json.loads((learned / "pad.json").read_text()) == smollm.DEFAULTS
    answers = [json.loads(line) for line in next(tmp_path.glob("answers-*.jsonl")).read_text().splitlines()]
    assert len(answers) == 2 * (TINY.plain + len(DIRECTIONS) + 1)
    assert {answer["prompt"] for answer in answers} == {wishes.prompts()[0], questions.questions(101)[100]}
    made = json.loads((learned / "training.json").read_text())
    assert made["num_answers"] == 2 * (len(DIRECTIONS) + 1)
    assert set(made["before"]) == {*DIRECTIONS, policy.TWO_WISHES}
    tokenizer = AutoTokenizer.from_pretrained(models.base)
    scored = policy.scored_answers(answers, TINY)
    template = PromptTemplate(tokenizer, smollm.PROMPT_TEMPLATE)
    for answer, one in zip(scored, policy.rollouts_of(scored, tokenizer, TINY), strict=True):
        assert one.plain == prompt_ids(answer["prompt"], tokenizer)
        assert one.prompt == template.compose(one.plain, answer["preference"])
        assert one.answer == answer["tokens"]
    assert policy.learn_on_policy(tmp_path, models.base, models.reward, TINY) == learned
