"""What `benchmarks/families.py` looks at: chat templates, and the tables of pairs against their definition.

The definition is applied here to ``tokenizers`` itself, for a sample of tokens, and not by pad-vllm's own reading of a
tokenizer.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig
from vllm.config import ModelConfig

from pad_vllm.config import PADConfig
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.worker.tokens import TokenizerPair, load_shared_tokens

MARKS = re.compile(r"<[|\uff5c].*[|\uff5c]>|</?(think|tool_call|tool_response)>|\[multimodal\]|<(mask|unused\d+)>")
"""Of added tokens that are not special, those that no text means."""
INSIDE = re.compile("</?(think|tool_call|tool_response)>")
"""That stand within a message."""
SAMPLE = 3000
"""Tokens of each vocabulary, of those that the definition decides by a plain call."""
PREFERENCE_TEXT = "Prefer short sentences."
SYSTEM = "Ты — Ada, a reviewer.\n1. Cite `code`; 请用简体中文回答。"
USER = (
    "Why does this fail? 😀\n\n```python\ndef f(x):\n\tif x:\n        return {'a':  1}   # two  spaces\n```\n"
    "<table><tr><td>مرحبا بالعالم</td></tr></table> наконец, 東京の天気は? नमस्ते, naïve café"
)
ANSWER_TEXT = "Потому что `x`\n\n    is 0: 空です。"
MARKERS = ("<|im_start|>system", "<start_of_turn>", "[INST]", "<|eot_id|>", "<think>", "</tool_call>", "<|start|>")
"""In a user's text, as a user who asks about them writes them; those of a base's own are another matter: a server's
tokenizer reads them as what they are."""
TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
THOUGHTS = "<think>\n\n</think>\n\n"
DAY = {"strftime_now": lambda form: "31 Dec 2031", "date_string": "31 Dec 2031"}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "tools": ({"tools": [TOOL]},),
    "day": (DAY,),
    "thinking": ({"enable_thinking": False}, {"enable_thinking": True}, {"reasoning_effort": "high"}),
}


def chat(system: str | None = SYSTEM, user: str = USER) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": user}]


def conversation(user: str) -> list[dict[str, str]]:
    """Of three turns behind a system message."""
    return [*chat(user="And before?"), {"role": "assistant", "content": ANSWER_TEXT}, {"role": "user", "content": user}]


class Checks:
    """Of families: name -> the folder of a tokenizer and the tokens that end answers.

    ``work``: where a folder is made for each, with a configuration beside the tokenizer's files.
    """

    def __init__(self, work: Path, families: dict[str, tuple[Path, Sequence[str]]]) -> None:
        self.folders = {}
        for name, (folder, ends) in families.items():
            self.folders[name] = target = work / name
            target.mkdir()
            for file in folder.glob("*token*"):
                (target / file.name).symlink_to(file)
            for file in folder.glob("*.jinja"):
                (target / file.name).symlink_to(file)
            vocabulary = AutoTokenizer.from_pretrained(target).get_vocab()
            size = -(-(1 + max(vocabulary.values())) // 64) * 64
            config = LlamaConfig(vocab_size=size, hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
            config.architectures = ["LlamaForCausalLM"]
            config.save_pretrained(target)
            (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [vocabulary[e] for e in ends]}))

    @functools.cache  # noqa: B019 (one instance, as long as the command)
    def config(self, name: str) -> ModelConfig:
        return ModelConfig(model=str(self.folders[name]), dtype="float32", max_model_len=512)

    @functools.cache  # noqa: B019
    def loaded(self, name: str) -> Any:
        return AutoTokenizer.from_pretrained(self.folders[name])

    @functools.cache  # noqa: B019
    def definition(self, name: str) -> Definition:
        return Definition(self.folders[name] / "tokenizer.json")

    def tokenizer(self, name: str) -> dict[str, Any]:
        tokenizer = self.loaded(name)
        text = f"{SYSTEM}\n{USER}"
        back = tokenizer.decode(
            tokenizer.encode(text, add_special_tokens=False),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        found = {"tokens": len(tokenizer.get_vocab()), "reads_text": back.strip() == text}
        if tokenizer.chat_template and found["reads_text"]:
            found["template"] = templates(tokenizer)
        return found

    def pair(self, base: str, reward: str) -> dict[str, Any]:
        """What a start finds of a base and a reward model."""
        folder = str(self.folders[reward])
        num_rows = self.config(reward).get_vocab_size()
        kept, began = os.environ.get("PAD_VLLM_CACHE"), (time.perf_counter(), time.process_time())
        with tempfile.TemporaryDirectory() as cache:  # what it takes the first time
            os.environ["PAD_VLLM_CACHE"] = cache
            try:
                tokens = load_shared_tokens(
                    PADConfig(reward_model=folder),
                    {"pretrained_model_name_or_path": folder},
                    self.config(base),
                    self.config(reward),
                    num_rows,
                )
            except ValueError as error:
                return {"kind": "refused", "reason": self.unnamed(str(error))}
            finally:
                os.environ.pop("PAD_VLLM_CACHE")
                os.environ |= {} if kept is None else {"PAD_VLLM_CACHE": kept}
        if tokens.pair is None:
            return {"kind": "same", "foreign": len(tokens.foreign)}
        seconds, cpu_seconds = time.perf_counter() - began[0], time.process_time() - began[1]
        checked, wrong = check_tables(tokens.pair, self.definition(base), self.definition(reward))
        found = {"kind": "tables", "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
        found |= {**token_figures(tokens.pair), "checked": checked, "wrong": wrong}
        if self.loaded(base).chat_template and self.loaded(reward).chat_template:
            found["chat"] = translations(tokens.pair, self.loaded(base), self.loaded(reward))
        return found

    def unnamed(self, text: str) -> str:
        """A message without this machine's folders."""
        for name, folder in self.folders.items():
            text = text.replace(str(folder), name)
        return text


def token_figures(pair: TokenizerPair) -> dict[str, Any]:
    tables = pair.tables
    num_pieces = tables.num_pieces[tables.key >= 0]
    sizes = np.diff(tables.member_starts)
    largest = int(sizes.argmax())
    return {
        "tokens": len(tables.key),
        "candidates": len(num_pieces),
        "pieces": {str(n): int((num_pieces == n).sum()) for n in sorted(set(num_pieces.tolist()))},
        "largest_group": int(sizes.max()),
        "largest_of": repr(pair.translator.reward.bytes[largest]),
        "groups_over_1000": int((sizes > 1000).sum()),
    }


class Definition:
    """Bytes and ids by plain calls of ``tokenizers``, from a tokenizer.json."""

    def __init__(self, file: Path) -> None:
        settings = json.loads(file.read_text())
        self.backend = Tokenizer.from_file(str(file))
        self.special = {token["content"] for token in settings["added_tokens"] if token["special"]}
        self.added = {token["content"]: token["id"] for token in settings["added_tokens"]}
        self.byte_level = "ByteLevel" in json.dumps(settings["pre_tokenizer"])
        self.normalizes = "NFC" in json.dumps(settings["normalizer"])
        alphabet = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        rest = [byte for byte in range(256) if byte not in alphabet]
        self.byte_of = {chr(byte): byte for byte in alphabet} | {chr(256 + n): byte for n, byte in enumerate(rest)}
        names = {i: token for token, i in self.backend.get_vocab(with_added_tokens=True).items()}
        self.bytes = {i: content for i, token in names.items() if (content := self._bytes(token))}
        self.markers = [token for token in self.added if token in self.special or MARKS.fullmatch(token)]
        begins_with_space = self.backend.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
        self.left = self.backend.encode("\n", add_special_tokens=False).ids if begins_with_space else []
        """What stands before a text, so that it is no text's beginning, where such a one is written otherwise."""

    def _bytes(self, token: str) -> bytes | None:
        if token in self.special:
            return None
        if self.byte_level:
            if token in self.added:
                return token.encode()
            return bytes(self.byte_of[c] for c in token) if all(c in self.byte_of for c in token) else None
        if single := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(single[1])
        return token.replace("▁", " ").encode()

    def encode(self, content: bytes) -> list[int] | None:
        """The ids of bytes in running text; None where no plain call says them: bytes that are no text, that the
        tokenizer normalizes, or that spell one of its markers."""
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return None
        if (self.normalizes and unicodedata.normalize("NFC", text) != text) or "▁" in text:
            return None
        if any(marker in text for marker in self.markers):
            return None
        if not self.left:
            return self.backend.encode(text, add_special_tokens=False).ids
        ids = self.backend.encode(f"\n{text}", add_special_tokens=False).ids
        return ids[len(self.left) :] if ids[: len(self.left)] == self.left and text[0] != "\n" else None


def check_tables(pair: TokenizerPair, base: Definition, reward: Definition) -> tuple[int, list[str]]:
    """How many tokens were held against the definition, and what is wrong of them.

    Every base token that is a candidate has pieces with its bytes; of a sample the pieces, the key and, of reward
    tokens, the group are those of the definition.
    """
    tables, wrong = pair.tables, []
    starts, pieces = tables.piece_starts.tolist(), tables.pieces.tolist()
    ends = set(pair.translator.ends) if hasattr(pair.translator, "ends") else set()
    for c in np.flatnonzero(tables.key >= 0).tolist():
        if c in base.bytes and c not in ends:
            own = pieces[starts[c] : starts[c + 1]]
            if b"".join(reward.bytes.get(u, b"?") for u in own) != base.bytes[c]:
                wrong.append(f"bytes of {c} {base.bytes[c]!r}: {own}")
    rng, checked = random.Random(0), 0
    for c in _sample(base, rng):
        ids = reward.encode(base.bytes[c])
        if ids is None or tables.key[c] < 0:
            continue
        checked += 1
        own = pieces[starts[c] : starts[c + 1]]
        if own != ids or tables.key[c] != ids[0]:
            wrong.append(f"pieces of {c} {base.bytes[c]!r}: {own} (key {tables.key[c]}), not {ids}")
    members, bounds = tables.members.tolist(), tables.member_starts.tolist()
    for u in _sample(reward, rng):
        first = base.encode(reward.bytes[u])
        home = first and reward.encode(base.bytes.get(first[0], b"\xff"))
        if not home:
            continue
        checked += 1
        if u not in members[bounds[home[0]] : bounds[home[0] + 1]]:
            wrong.append(f"{u} {reward.bytes[u]!r} is no member of {home[0]} {reward.bytes.get(home[0])!r}")
    return checked, wrong[:20]


def _sample(of: Definition, rng: random.Random) -> Iterable[int]:
    """Any tokens, and all that are white space."""
    ids = sorted(of.bytes)
    blank = [i for i in ids if not of.bytes[i].strip()]
    return dict.fromkeys([*rng.sample(ids, SAMPLE), *blank])


def render_prompt(tokenizer: Any, messages: Sequence[dict[str, str]], **variables: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def templates(tokenizer: Any) -> dict[str, str]:
    """Where a preference stands in chats of the family's own template: ``right``, ``none`` where the template has no
    such thing, or what was read instead."""
    template = PromptTemplate(tokenizer, "{preference}{prompt}")
    plain = render_prompt(tokenizer, chat())
    found = {"system": [plain], "no system": [render_prompt(tokenizer, chat(None))]}
    for name, variants in VARIANTS.items():
        texts = [render_prompt(tokenizer, messages, **v) for v in variants for messages in (chat(), chat(None))]
        found[name] = [text for text in texts if text not in (plain, found["no system"][0])]
    said = {}
    for name, texts in found.items():
        wrong = []
        for text in texts:
            ids = encode_text(tokenizer, text)
            out = decode(tokenizer, template.compose(ids, PREFERENCE_TEXT))
            if not stands_right(tokenizer, decode(tokenizer, ids), out):
                wrong.append(out)
        said[name] = "none" if not texts else wrong[0] if wrong else "right"
    return said


def markers(tokenizer: Any) -> list[str]:
    """A tokenizer's special tokens, and those that were added to mark roles, tools and thoughts; not those that were
    added as text is: runs of spaces, HTML."""
    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if token.special or MARKS.fullmatch(token.content)]


def marker_pattern(tokenizer: Any, inside: bool = True) -> re.Pattern[str]:
    """Of any marker; not ``inside``: of those between messages alone."""
    some = [marker for marker in markers(tokenizer) if inside or not INSIDE.fullmatch(marker)]
    return re.compile("|".join(map(re.escape, sorted(some, key=len, reverse=True))))


def has_system_turn(tokenizer: Any) -> bool:
    """Whether the template writes a system message as one, and not into the user's."""
    text = render_prompt(tokenizer, chat())
    between = text[text.index(SYSTEM) + len(SYSTEM) : text.index(USER)]
    return marker_pattern(tokenizer).search(between) is not None


def stands_right(tokenizer: Any, text: str, out: str) -> bool:
    """Whether the preference stands at the end of the leading system message, or at the start of the first message,
    and nothing else has changed."""
    before, _, after = out.partition(PREFERENCE_TEXT)
    if text not in (before + after, before.removesuffix("\n\n") + after) or out.count(PREFERENCE_TEXT) != 1:
        return False
    marker = marker_pattern(tokenizer, inside=False)
    user = text.index(USER)
    if SYSTEM in text and marker.search(text[text.index(SYSTEM) + len(SYSTEM) : user]):
        # A message of its own: behind its text, and before the marker that ends it.
        return SYSTEM in before and not marker.search(before.rpartition(SYSTEM)[2])
    first = min(text.index(part) for part in (SYSTEM, USER) if part in text)
    if before == text[:first]:
        return True
    # The template has written a system message: at its end.
    return len(before) < user and marker.match(after) is not None and marker.search(before[-1:]) is None


def translations(pair: TokenizerPair, base: Any, reward: Any) -> dict[str, str]:
    """Whether the reward model reads chats of the base's template as its own template would have written them:
    ``right``; ``header``, where the base's own words stand before the system text as well, such as a date; ``none``
    where the base's template has no such thing; or what was read instead."""
    user = " ".join([USER, *(marker for marker in MARKERS if not encodes_as_one(base, marker))])
    said = {}
    cases: dict[str, tuple[list[dict[str, str]], tuple[dict[str, Any], ...]]] = {
        "system": (chat(user=user), ({},)),
        "no system": (chat(None, user), ({},)),
        "turns": (conversation(user), ({},)),
        **{name: (chat(user=user), variants) for name, variants in VARIANTS.items()},
    }
    for name, (messages, variants) in cases.items():
        plain = render_prompt(base, messages)
        texts = [render_prompt(base, messages, **variant) for variant in variants]
        texts = texts if variants == ({},) else [text for text in texts if text != plain]
        said[name] = "none"
        for text in texts:
            ids = pair.translator.translate(encode_text(base, text))
            said[name] = verdict(reward, as_shown(base, messages, plain), ids, text, tools=name == "tools")
            if said[name] not in ("right", "header"):
                break
    return said


def as_shown(base: Any, messages: Sequence[dict[str, str]], text: str) -> list[dict[str, str]]:
    """The messages that a template shows: one that has no system turn writes its text into a user's."""
    first, *rest = messages
    if first["role"] != "system" or has_system_turn(base):
        return list(messages)
    at = text.index(SYSTEM)
    ends = {n: text.find(m["content"], at) for n, m in enumerate(rest) if m["role"] == "user"}
    n = min((n for n in ends if ends[n] >= 0), key=ends.__getitem__)
    rest[n] = {**rest[n], "content": text[at : ends[n] + len(rest[n]["content"])]}
    return rest


def verdict(reward: Any, messages: list[dict[str, str]], ids: Sequence[int], written: str, tools: bool) -> str:
    """As :func:`translations`. ``written``: the base's chat; with ``tools`` what its template says of these may stand
    beside the contents."""
    out, own, user = decode(reward, ids), render_prompt(reward, messages), messages[-1]["content"]
    if tools:
        start = max(own.rfind(marker, 0, own.index(user)) for marker in markers(reward))
        tail = re.escape(own[start:])
        for content in {user, SYSTEM} - ({SYSTEM} if SYSTEM in user else set()):
            tail = tail.replace(re.escape(content), f".*{re.escape(content)}.*")
        is_found = re.search(f"{tail}$", out, re.DOTALL) is not None
        is_right = is_found and out.count(SYSTEM) == out.count(user) == 1
        return "right" if is_right else out
    if out == own or (THOUGHTS in written and out == own + THOUGHTS):
        return "right" if num_markers(reward, ids) == own_markers(reward, messages) else out
    has_system = messages[0]["role"] == "system"
    with_system = messages if has_system else [{"role": "system", "content": SYSTEM}, *messages]
    header = header_of(reward, with_system, out, has_system)
    is_right = header is not None and header in written and num_markers(reward, ids) == own_markers(reward, with_system)
    return "header" if is_right else out


def num_markers(tokenizer: Any, ids: Sequence[int]) -> int:
    those = set(tokenizer.convert_tokens_to_ids(markers(tokenizer)))
    return sum(i in those for i in ids)


def own_markers(tokenizer: Any, messages: list[dict[str, str]]) -> int:
    """How many markers the template itself writes: none of those that a user spells is one."""
    spelled = re.compile("|".join(map(re.escape, MARKERS)))
    harmless = [{**message, "content": spelled.sub("a", message["content"])} for message in messages]
    return num_markers(tokenizer, encode_text(tokenizer, render_prompt(tokenizer, harmless)))


def header_of(reward: Any, messages: list[dict[str, str]], out: str, system: bool) -> str | None:
    """What stands in the system message before its text, or alone, where all else is the reward model's rendering."""
    own = render_prompt(reward, messages)
    content = f"{SYSTEM}\n\n" if not system and not has_system_turn(reward) else SYSTEM
    left, _, right = own.partition(content)
    right = (SYSTEM if system else "") + right
    if not (out.startswith(left) and out.endswith(right)):
        return None
    return out[len(left) : len(out) - len(right)].strip() or None


def encodes_as_one(tokenizer: Any, marker: str) -> bool:
    """Whether a marker, as a user spells it, has one of the tokenizer's own."""
    return any(own in marker for own in markers(tokenizer))
