"""Which tokens stand inside a base's answers, and how answers begin."""

from __future__ import annotations

from collections import defaultdict

import pytest

from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.first_space import first_space
from pad_vllm.reward.token_tables import NO_KEY, NO_OPINION, make_tables
from pad_vllm.worker.answers import answer_tokens
from tests.engine.test_answers import BARE, INST
from tests.support.tokenizers import CHATML, make

REASONS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}",
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}"
    "<|end|><|start|>assistant{% endif %}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{{ '</s>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def tokenizer_with(template: str, special: tuple[str, ...] = (), plain: tuple[str, ...] = ()):
    tokenizer = make("byte-level", 600, template)
    tokenizer.add_tokens(list(plain))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


@pytest.mark.parametrize(
    ("template", "special", "plain", "expected"),
    [
        (REASONS, (), ("<think>", "</think>", "<table>", "</table>", "<unused0>"), {"<think>", "</think>"}),
        (REASONS, ("<think>", "</think>", "<image>"), (), {"<think>", "</think>"}),
        # A template that drops reasoning, and role markers that are added and not special.
        (CHATML + "{# </think> #}", (), ("<think>", "</think>", "<|User|>"), {"<think>", "</think>"}),
        (CHATML, (), ("<think>", "</think>"), set()),
        (
            HARMONY,
            ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|reserved|>"),
            (),
            {"<|start|>", "<|channel|>", "<|message|>", "<|end|>"},
        ),
        ("{{ raise_exception('no') }}", (), ("<think>", "</think>"), set()),
    ],
)
def test_tokens_inside_answers(template, special, plain, expected):
    tokenizer = tokenizer_with(template, special, plain)
    assert set(answer_tokens(tokenizer, {1}).values()) == expected
    named = tokenizer.convert_tokens_to_ids([*special, *plain][:1])
    assert set(answer_tokens(tokenizer, {1}, [*named, 1, 300]).values()) == expected | {[*special, *plain][0]}


@pytest.mark.parametrize(
    ("base", "reward", "expected"),
    [
        (("metaspace", BARE), ("byte-level", CHATML), "drop"),
        (("byte-level", CHATML), ("byte-level", INST), "add"),
        (("byte-level", INST), ("metaspace", BARE), None),
        (("metaspace", CHATML), ("byte-level", CHATML), None),
        (("metaspace", BARE), ("byte-level", None), None),
    ],
)
def test_how_answers_begin(base, reward, expected):
    tokens = [ByteTokens(make(kind, 700, template), kind) for kind, template in (base, reward)]
    assert first_space(*tokens) == expected


@pytest.mark.parametrize(
    ("base", "reward", "how"),
    [("metaspace", "byte-level", "drop"), ("byte-level", "metaspace", "add")],
)
def test_tables_of_an_answers_first_token(base, reward, how):
    """By their definition, one token at a time."""
    b, r = ByteTokens(make(base, 700), base), ByteTokens(make(reward, 640), reward)
    answers = {3: "<think>", 4: 5}
    tables = make_tables(b, [1], r, [1], answers, how)
    first = tables.first

    def there(content):
        if how == "drop":
            return content[1:] if content[:1] == b" " and len(content) > 1 else content
        return content if content[:1] == b" " else b" " + content

    def back(content):
        if how == "drop":
            return content if content[:1] == b" " else b" " + content
        return content[1:] if content[:1] == b" " and len(content) > 1 else content

    for c in range(b.size):
        if c in answers or c == 1:
            assert first.pieces_of([c]) == tables.pieces_of([c])
            assert first.key[c] == tables.key[c]
        elif b.bytes[c] is not None and tables.key[c] != NO_KEY:
            pieces = r.encode_one(there(b.bytes[c]))
            assert (first.key[c], first.pieces_of([c])) == (pieces[0], pieces)
        else:
            assert first.key[c] == NO_KEY
    assert (tables.key[3], tables.pieces_of([3])) == (NO_OPINION, r.encode_one(b"<think>"))
    assert (tables.key[4], tables.pieces_of([4])) == (5, [5])
    members = defaultdict(set)
    for u in range(r.size):
        members[u].add(u)
        if r.bytes[u] is not None:
            home = first.key[b.encode_one(back(r.bytes[u]))[0]]
            if home >= 0:
                members[home].add(u)
    starts = first.member_starts
    assert [set(first.members[starts[g] : starts[g + 1]].tolist()) for g in range(r.size)] == [
        members[g] for g in range(r.size)
    ]
