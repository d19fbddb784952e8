"""Tokens as bytes, and the tables of two tokenizers."""

from __future__ import annotations

import random
import resource
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pad_vllm.cache import cached
from pad_vllm.reward import token_tables
from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.token_tables import NO_KEY, load_tables, make_tables
from tests.support.tokenizers import make

KINDS = {"byte-level": 600, "metaspace": 700, "replace": 900, "unigram": 620}
PAIRS = [("byte-level", "metaspace"), ("unigram", "byte-level"), ("replace", "replace"), ("metaspace", "unigram")]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("ab ▁\n\t.é東😀Ġ<0x4>", max_size=30)


@pytest.fixture(scope="module")
def tokens() -> dict[str, ByteTokens]:
    return {kind: ByteTokens(make(kind, size), kind) for kind, size in KINDS.items()}


def every_pair(tokens, base: str, reward: str):
    return make_tables(tokens[base], [1], tokens[reward], [1, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_texts_tokens_are_the_texts(kind, tokens):
    """Whatever the text, and by the tokenizer itself where it has nothing of its own to add."""
    by_bytes = tokens[kind]

    @settings(max_examples=150, deadline=None, database=None)
    @given(text=TEXTS)
    def same(text):
        content = text.encode()
        assert by_bytes.decode(by_bytes.encode_one(content)) == content
        broken = content[1:-1]
        assert by_bytes.decode(by_bytes.encode_one(broken)) == broken
        if "▁" not in text:
            ids = by_bytes.tokenizer.encode("\n" + text, add_special_tokens=False)
            assume(not by_bytes.special_ids & set(ids))  # it spells one
            assert by_bytes.decode(ids).removeprefix(b" ") == b"\n" + content

    same()


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_no_bytes_and_are_not_read_out_of_a_text(kind, tokens):
    by_bytes = tokens[kind]
    assert [by_bytes.bytes[i] for i in range(3)] == [None] * 3
    assert not set(by_bytes.encode_one(b"<s>hello</s>")) & by_bytes.special_ids


@pytest.mark.parametrize("kind", KINDS)
def test_running_text_has_no_space_added(kind, tokens):
    by_bytes = tokens[kind]
    assert by_bytes.decode(by_bytes.encode_one(b"the")) == b"the"
    starts, ids = by_bytes.encode([b"the", b"", b" the"])
    assert starts.tolist() == [0, len(by_bytes.encode_one(b"the")), starts[1], len(ids)]


@pytest.mark.parametrize("is_large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize(("base", "reward"), PAIRS)
def test_tables_by_their_definition(base, reward, is_large, tokens, monkeypatch):
    """Each table, one token at a time; also with what is left out of a large vocabulary."""
    b, r = tokens[base], tokens[reward]
    if is_large:
        monkeypatch.setattr(token_tables, "LARGE_VOCABULARY", 0)
        monkeypatch.setattr(token_tables, "MAX_PIECES", 4)
    tables = every_pair(tokens, base, reward)
    members = defaultdict(set)
    for u in range(r.size):
        members[u].add(u)
        if r.bytes[u] is not None:
            first = b.encode_one(r.bytes[u])[0]
            members[r.encode_one(b.bytes[first])[0]].add(u)
    members[1] |= {1, 2}
    whole: dict[int, int] = {}
    for c in range(b.size):
        pieces = [1] if b.bytes[c] is None else r.encode_one(b.bytes[c])
        if (is_large and len(pieces) > 4) or (b.bytes[c] is None and c != 1):
            assert tables.key[c] == NO_KEY
            continue
        assert tables.key[c] == pieces[0]
        assert tables.pieces_of([c]) == pieces
        if len(pieces) == 1:
            whole.setdefault(pieces[0], c)
    assert tables.whole_tokens().tolist() == [whole.get(u, NO_KEY) for u in range(r.size)]
    for g in range(r.size):
        begin, end = tables.member_starts[g : g + 2]
        assert sorted(members[g]) == tables.members[begin:end].tolist(), g
    assert tables.num_pieces.min() == 1


def test_with_equal_tokenizers_a_group_is_a_token(tokens):
    tables = every_pair(tokens, "byte-level", "byte-level")
    ordinary = [i for i, content in enumerate(tokens["byte-level"].bytes) if content]
    assert tables.key[ordinary].tolist() == ordinary
    assert set(np.diff(tables.member_starts)[3:].tolist()) == {1}


def test_tables_are_kept(tokens, tmp_path):
    pair = tokens["byte-level"], [1], tokens["metaspace"], [1, 2]
    first = load_tables(*pair, cache_dir=tmp_path)
    (kept,) = tmp_path.glob("*/tables.npz")
    changed = first.arrays() | {"key": first.key + 1}
    np.savez(kept, **changed, checksum=token_tables._checksum(changed))
    assert load_tables(*pair, cache_dir=tmp_path).key.tolist() == (first.key + 1).tolist()
    assert load_tables(*pair[:3], [1], cache_dir=tmp_path).members.tolist() != first.members.tolist()


def test_damaged_tables_are_made_again(tokens, tmp_path):
    """Cut short anywhere, or with a byte that another one stands for: never an error, and never other tables."""
    pair = tokens["byte-level"], [1], tokens["metaspace"], [1, 2]
    first = load_tables(*pair, cache_dir=tmp_path)
    (kept,) = tmp_path.glob("*/tables.npz")
    whole = kept.read_bytes()
    rng = random.Random(0)
    damaged = [whole[:length] for length in (0, 1, 30, len(whole) // 2, len(whole) - 1)]
    for at in (*range(0, 200, 7), *rng.sample(range(len(whole)), 60), *range(len(whole) - 300, len(whole), 7)):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    for content in damaged:
        kept.write_bytes(content)
        found = load_tables(*pair, cache_dir=tmp_path)
        assert all(np.array_equal(vars(found)[name], table) for name, table in vars(first).items())
        assert [path.name for path in kept.parent.iterdir()] == ["tables.npz"]
    kept.write_bytes(b"")
    load_tables(*pair, cache_dir=tmp_path)
    assert len(kept.read_bytes()) == len(whole)


def test_a_cache_that_cannot_be_written_is_done_without(tokens, tmp_path):
    (tmp_path / "file").write_text("")
    tables = load_tables(tokens["byte-level"], [1], tokens["metaspace"], [1], cache_dir=tmp_path / "file")
    assert len(tables.key) == tokens["byte-level"].size


def test_a_full_disk_is_done_without(tokens, tmp_path):
    """A limit on the size of files stands for the disk, where nothing is left of what did not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        tables = load_tables(tokens["byte-level"], [1], tokens["metaspace"], [1], cache_dir=tmp_path)
        with pytest.raises(OSError, match=r"/model cannot be written: .*\. Nothing is left of it$") as error:
            cached(tmp_path, "model", lambda folder: folder.mkdir() or save_file({"a": torch.zeros(999)}, folder / "a"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(tables.key) == tokens["byte-level"].size
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def refused(model, pre_tokenizer=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (refused(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "no tokens for single bytes"),
        (refused(models.Unigram([("a", 0.0)], 0)), "Unigram.* has no tokens for single bytes"),
        (refused(models.BPE({"a": 0}, []), pre_tokenizers.ByteLevel()), "no token for 2.. of the bytes"),
        (object(), "is object, a slow tokenizer"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(tokenizer, reason):
    with pytest.raises(ValueError, match=reason):
        ByteTokens(tokenizer, "model")
