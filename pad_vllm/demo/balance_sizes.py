"""The rounds of :mod:`pad_vllm.demo.balance`: how much is answered, compared and learned in each."""

from __future__ import annotations

from dataclasses import dataclass, field

from pad_vllm.training.train import Stage


@dataclass(frozen=True)
class Balance:
    """The sizes of a round.

    Attributes:
        num_prompts, num_questions: of ours and real ones, which are answered; of each ``num_test`` are for measuring.
        prompts_per_part: answered by one engine, whose answers are then kept.
        plain: answers to a prompt as it is.
        always, others: measures that every prompt is answered for, both ways, and how many more.
        combinations: of two wishes, that every prompt is answered for, with their opposites.
        max_answer: tokens of an answer that are measured and learned from, the first ones.
        margin: by how many standard deviations of the answers' measure two of a comparison differ.
        num_each: comparisons of each measure, at most, a user's and the opposite user's counted.
        num_combined: comparisons by users of two wishes, at most.
        num_comparisons, num_test_comparisons: at most.
        num_looping: in which one answer goes in circles.
        first_prompt, first_question: of ours and of the real ones, the first one.
    """

    num_prompts: int = 13
    num_questions: int = 13
    num_test: int = 2
    prompts_per_part: int = 26
    plain: int = 3
    always: tuple[str, ...] = ("grade",)
    others: int = 2
    combinations: int = 0
    max_tokens: int = 96
    temperature: float = 0.7
    max_answer: int = 64
    margin: float = 0.7
    num_each: int = 72
    num_combined: int = 0
    num_comparisons: int = 384
    num_test_comparisons: int = 36
    num_looping: int = 24
    save_steps: int = 15
    first_prompt: int = 288
    first_question: int = 0
    seed: int = 0
    stage: Stage = field(default_factory=lambda: Stage(lr=5e-4, batch_size=8, beta=0.1, nll_weight=1.0))


ROUNDS = (
    Balance(),
    Balance(
        *(20, 20, 3, 40),
        always=("grade", "length"),
        combinations=1,
        max_tokens=144,
        max_answer=112,
        num_each=72,
        num_combined=64,
        num_comparisons=480,
        first_prompt=301,
        first_question=13,
        seed=1,
        stage=Stage(lr=3e-4, batch_size=8, beta=0.1, nll_weight=1.0),
    ),
)
"""The second one has longer answers, so that it can learn what is said after the first sentences, and two wishes."""

TINY_BALANCE = Balance(
    *(2, 2, 1, 4, 2),
    combinations=1,
    num_combined=2,
    max_tokens=20,
    max_answer=16,
    margin=0.2,
    num_each=2,
    num_comparisons=4,
    num_test_comparisons=4,
    num_looping=1,
    stage=Stage(lr=5e-4, batch_size=2),
)
"""A minute, for tests."""
