"""A base model and a reward model with another tokenizer."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.reward.token_tables import FirstSpace, TokenTables, make_tables
from tests import oracle
from tests.support.models import make_heads, make_model
from tests.support.tokenizers import like_gemma, like_qwen, make

HEADS = ("concise", "formal", "playful")
CLOSERS = ("<|im_end|>", "<end_of_turn>")


class Kind(NamedTuple):
    """Of a tokenizer."""

    name: str
    vocab_size: int

    def make(self, template: str | None = None) -> PreTrainedTokenizerFast:
        special = {"like Qwen's": like_qwen, "like Gemma's": like_gemma}.get(self.name)
        return make(self.name, self.vocab_size, template) if special is None else special()


def plain(tables: TokenTables) -> oracle.Groups:
    """Tables as the oracle reads them."""
    return oracle.Groups(
        tables.key.tolist(),
        [tables.members[i:j].tolist() for i, j in itertools.pairwise(tables.member_starts.tolist())],
        [tables.pieces_of([c]) for c in range(len(tables.key))],
        tables.first and plain(tables.first),
    )


def closers(tokenizer) -> list[int]:
    """What a chat template writes behind an answer is an end, too."""
    return [tokenizer.convert_tokens_to_ids(name) for name in CLOSERS if name in (tokenizer.chat_template or "")]


class TokenPair:
    """Random models on disk, and as the oracle reads them. What the reward model reads is written here without our
    translator, as text by its own tokenizer.

    Args:
        positions: of the reward model.
        templates: chat templates of the two.
        tags: added tokens of the base that are not special, and that its template names.
        first_space: as the two templates have it.
        more_ends: what the two templates write behind an answer, where that is no EOS and none of CLOSERS.
    """

    def __init__(
        self,
        root: Path,
        base: Kind,
        reward: Kind,
        positions: int = 512,
        templates: tuple[str | None, str | None] = (None, None),
        tags: tuple[str, ...] = (),
        first_space: FirstSpace = None,
        more_ends: tuple[list[int], list[int]] = ([], []),
    ) -> None:
        tokenizers = [kind.make(template) for kind, template in zip((base, reward), templates, strict=True)]
        tokenizers[0].add_tokens(list(tags))
        ends = [tokenizer.eos_token_id for tokenizer in tokenizers]
        self.base = make_model(root / "base", seed=0, vocab_size=base.vocab_size + len(tags), eos_token_id=ends[0])
        self.reward = make_model(
            root / "reward",
            seed=1,
            vocab_size=reward.vocab_size,
            max_position_embeddings=positions,
            eos_token_id=ends[1],
        )
        make_heads(self.reward / "heads.safetensors", list(HEADS))
        for path, tokenizer in zip((self.base, self.reward), tokenizers, strict=True):
            tokenizer.save_pretrained(path)
        self.base_tokenizer, self.reward_tokenizer = map(AutoTokenizer.from_pretrained, (self.base, self.reward))
        self.base_model = AutoModelForCausalLM.from_pretrained(self.base)
        self.reward_model = AutoModelForCausalLM.from_pretrained(self.reward)
        self.tags = {tag: self.base_tokenizer.convert_tokens_to_ids(tag) for tag in tags}
        base_tokens, reward_tokens = ByteTokens(self.base_tokenizer, "base"), ByteTokens(self.reward_tokenizer, "r")
        answers = {i: tag for tag, i in self.tags.items()}
        tokenizers = self.base_tokenizer, self.reward_tokenizer
        base_ends, reward_ends = (
            list(dict.fromkeys([end, *closers(tokenizer), *more]))
            for end, tokenizer, more in zip(ends, tokenizers, more_ends, strict=True)
        )
        tables = make_tables(base_tokens, base_ends, reward_tokens, reward_ends, answers, first_space)
        self.groups = plain(tables)
        self._compose = PromptTemplate(self.reward_tokenizer).compose

    def prompt(self, text: str) -> list[int]:
        return self.base_tokenizer.encode((self.base_tokenizer.bos_token or "") + text)

    def read(self, text: str) -> list[int]:
        bos = self.reward_tokenizer.bos_token if self.base_tokenizer.bos_token else None
        return self.reward_tokenizer.encode((bos or "") + text)

    def chat(self, question: str, answer: str = "", own: bool = False) -> list[int]:
        """A question and the beginning of an answer, as the base's prompt, or, ``own``, as the reward model's."""
        tokenizer = self.reward_tokenizer if own else self.base_tokenizer
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(text + answer, add_special_tokens=False)

    @functools.cache  # noqa: B019 (few instances, as long as the tests)
    def expect(
        self,
        text: str,
        max_tokens: int,
        preference=(),
        preference_weights=None,
        weights=None,
        eos_token_id=None,
        **asked,
    ) -> list[int]:
        """The oracle's answer; ``asked`` as a request's arguments."""
        return self.answer(
            self.prompt(text),
            self.read(text),
            max_tokens,
            preference,
            preference_weights,
            weights,
            eos_token_id,
            **asked,
        )

    def answer(
        self,
        prompt: list[int],
        read: list[int],
        max_tokens: int,
        preference=(),
        preference_weights=None,
        weights=None,
        eos_token_id=None,
        begins_answer: bool = False,
        **asked,
    ) -> list[int]:
        """As :meth:`expect`, of the base's prompt and what the reward model reads of it."""
        preferences = [preference] if isinstance(preference, str) else preference
        head = None
        if weights is not None:
            tensors = load_file(self.reward / "heads.safetensors")
            head = oracle.mixed_head(tensors, dict(zip(HEADS, weights, strict=True)))
        return oracle.generate(
            self.base_model,
            prompt,
            max_tokens,
            reward=self.reward_model,
            reward_prompt_ids=[self._compose(read, part) for part in preferences] or read,
            weights=preference_weights,
            head=head,
            groups=self.groups if begins_answer else self.groups._replace(first=None),
            neutral_prompt_ids=read,
            eos_token_id=eos_token_id,
            **asked,
        )
