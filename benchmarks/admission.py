"""What a request costs the API server's process before it goes to an engine: texts made to take long, refused or not.

    python -m benchmarks.admission [--output FILE]

Each text is checked as a request's preference is, under a tokenizer of 6,000 added tokens that is made here (as many as
Gemma 3 has); and composed with a chat, as the engine's worker does. Prompts are read as ``pad.chat: strict`` has it.
Every time is the best of several first sights: what was seen before is kept. A body is read beside ``json.loads`` of
it, which vLLM does too. The exit status is 1 where a request takes more than 5 ms of CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pad_vllm.frontend.http import _read
from pad_vllm.params import MAX_PREFERENCE_CHARS, MAX_PREFERENCE_TOKENS, PAD, check_num_chars
from pad_vllm.reward.chat import HEAD
from pad_vllm.reward.template import PromptTemplate

NUM_ADDED = 6000
MAX_MS = 5.0
CHAT = (
    "{% for m in messages %}<|open|>{{ m.role }}\\n{{ m.content }}<|close|>\\n{% endfor %}"
    "{% if add_generation_prompt %}<|open|>assistant\\n{% endif %}"
)


def make_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few thousand merges, with added tokens of which most are not marked special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8))) for _ in range(3000)]
    corpus = [" ".join(rng.choices(words, k=20)) for _ in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=8000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<|close|>")
    tags = [f"<{a}{b}>" for a in ("", "/") for b in ("a", "b", "i", "h1", "h2", "table", "td", "tr", "ul", "li")]
    made.add_tokens(["<|open|>", *tags, *(f"<unused{i}>" for i in range(NUM_ADDED - len(tags) - 3))])
    made.chat_template = CHAT
    return made


def preferences_to_check(rng: random.Random) -> Iterator[tuple[str, str]]:
    n = MAX_PREFERENCE_CHARS
    many = "".join(f"<unused{rng.randrange(5000)}>" for _ in range(n))
    yield "a preference", "Answer briefly and formally, with an example."
    yield "words", ("be concise and formal please " * n)[:n]
    yield "one letter", "a" * n
    yield "random letters", "".join(rng.choices(string.ascii_lowercase, k=n))
    yield "random ASCII", "".join(rng.choices(string.printable, k=n))
    yield "digits", "1" * n
    yield "spaces", f"a{' ' * (n - 2)}a"
    yield "Chinese", "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(n))
    yield "emoji", "\U0001f600" * n
    yield "opening brackets", "<" * n
    yield "nearly added tokens", ("<unused" * n)[:n]
    yield "16 added tokens", "".join(f"<b>{'briefly, ' * 14}" for _ in range(16))[:n]
    yield "16 added tokens at once", ("<b>" * 16 + "a" * n)[:n]
    yield "added tokens", many[:n]
    yield "short added tokens", ("<b>" * n)[:n]
    yield "32,000 characters", many[:32_000]


def bodies(rng: random.Random) -> Iterator[tuple[str, str]]:
    yield "a chat", json.dumps({"messages": [{"role": "user", "content": "a notepad " * 1000}]})
    yield "many names", json.dumps({f"pad{i}": i for i in range(10_000)})
    yield "many objects", json.dumps({"a": [{"p": {}} for _ in range(10_000)], "pad": 1})
    deep: dict = {"pad_": 1}
    for i in range(800):
        deep = {"x" * 50 + str(i): deep}
    yield "deep", json.dumps(deep)
    yield "names given twice", '{"pad": 1, ' + ", ".join(['"a": 1'] * 10_000) + "}"


def prompts_to_read(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, list[int]]]:
    """Of as many tokens as are read as a whole, and of many more."""
    critic, user, system = (tokenizer.encode(f"<|open|>{role}\n") for role in ("critic", "user", "system"))
    spaces = tokenizer.encode(" " * 64)
    for n in (HEAD, 100 * HEAD):
        yield "any tokens", [rng.randrange(len(tokenizer)) for _ in range(n)]
        yield "no message", [*critic, *(rng.randrange(8000) for _ in range(n))][:n]
        yield "one message", [*user, *(rng.randrange(8000) for _ in range(n))][:n]
        yield "system messages", (system * n)[:n]
        yield "spaces", [*system, *(spaces * n)][:n]


def milliseconds(run: Callable[[], object], repeats: int = 7) -> tuple[float, str]:
    """Of CPU, the least; and what became of it."""
    best, said = float("inf"), "accepted"
    for _ in range(repeats):
        start = time.thread_time()
        try:
            run()
        except ValueError as error:
            said = f"refused: {error}"
        best = min(best, time.thread_time() - start)
    return 1000 * best, said


def admit(template: PromptTemplate, text: str) -> None:
    asked = PAD.from_extra_args({"pad_preference": text})
    assert asked is not None
    check_num_chars(asked.preferences)
    template._encode_preference(text)


def first_reading(template: PromptTemplate, ids: list[int]) -> float:
    """Milliseconds of CPU, the least of some, with every token unknown."""
    assert template.chat is not None
    best, marked = float("inf"), template.chat.marked
    for _ in range(7):
        marked._pieces = dict(marked.atoms)
        start = time.thread_time()
        template.is_misread(ids)
        best = min(best, time.thread_time() - start)
    return 1000 * best


def compose(template: PromptTemplate, text: str) -> float:
    """Milliseconds, with a preference that is new."""
    template.encode_preference.clear()
    template._join.clear()
    prompt = template.tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], return_dict=False)
    start = time.thread_time()
    template.compose_shared(prompt, text)
    return 1000 * (time.thread_time() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rng = random.Random(0)
    tokenizer = make_tokenizer(rng)
    rows, worst = [], 0.0
    template = PromptTemplate(tokenizer)
    template.max_preference_tokens = MAX_PREFERENCE_TOKENS
    for name, text in preferences_to_check(rng):
        took, said = milliseconds(partial(admit, template, text))
        worker = None
        if said == "accepted":
            other = PromptTemplate(tokenizer)
            other.max_preference_tokens = MAX_PREFERENCE_TOKENS
            worker = min(compose(other, text) for _ in range(5))
        worst = max(worst, took)
        rows.append({"preference": name, "characters": len(text), "ms": took, "worker_ms": worker, "said": said[:100]})
        print(
            f"{name:24s} {len(text):6d} characters {took:7.2f} ms  {said[:70]}",
            f"worker {worker:.2f} ms" if worker else "",
        )
    for name, ids in prompts_to_read(rng, tokenizer):
        took = first_reading(template, ids)
        worst = max(worst, took)
        rows.append({"prompt": name, "tokens": len(ids), "ms": took})
        print(f"prompt: {name:16s} {len(ids):8d} tokens {took:7.2f} ms")
    for name, text in bodies(rng):
        body = text.encode()
        ours, _ = milliseconds(partial(_read, body, "/v1/chat/completions"))
        theirs, _ = milliseconds(partial(json.loads, body))
        rows.append({"body": name, "bytes": len(body), "ms": ours, "json_ms": theirs})
        print(f"body: {name:18s} {len(body):8d} bytes {ours:7.2f} ms, json.loads {theirs:.2f} ms")
    if args.output:
        args.output.write_text(json.dumps({"max_ms": MAX_MS, "rows": rows}, indent=2) + "\n")
    print(f"the longest check: {worst:.2f} ms of at most {MAX_MS:g}")
    return int(worst > MAX_MS)


if __name__ == "__main__":
    sys.exit(main())
