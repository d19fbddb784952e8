"""Chat templates in the style of families in use, and tokenizers for them."""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.support.models import CORPUS

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT_SYSTEM = "You are a helpful assistant of the old town."
CHATML_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}{% endif %}"
) + CHATML
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nwithin <tool_call></tool_call> tags.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA3_PLAIN = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- if tools %}
    {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate, and the first is user') }}
    {%- endif %}
    {%- if message['role'] == 'user' and loop.first and system_message is defined %}
        {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate, and the first is user') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
GEMMA3 = """\
{{- bos_token }}
{%- set first = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}{{ '<|Assistant|>' + m.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}"
    "{% else %}{{ 'A chat between a user and an assistant.' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '\\n\\nUSER: ' + m.content }}"
    "{% else %}{{ '\\nASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nASSISTANT:' }}{% endif %}"
)
PARTS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""Contents are lists, as of a model for more than text."""

HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
IM = ("<|im_start|>", "<|im_end|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
INST = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")


class Family(NamedTuple):
    """A chat template, and what of a tokenizer it hangs on. ``has_system``: it writes system messages of their own."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    has_system: bool
    sentencepiece: bool = False
    default: str | None = None
    """What the template writes as a system message where there is none."""
    strips: bool = False


FAMILIES = {
    "llama3": Family(LLAMA3, HEADERS, "<|begin_of_text|>", True, default="", strips=True),
    "llama3-plain": Family(LLAMA3_PLAIN, HEADERS, "<|begin_of_text|>", True, strips=True),
    "smollm2": Family(CHATML_DEFAULT, IM, "<|im_start|>", True, default=DEFAULT_SYSTEM),
    "qwen2.5": Family(CHATML_DEFAULT, IM, None, True, default=DEFAULT_SYSTEM),
    "chatml": Family(CHATML, IM, "<s>", True),
    "qwen3": Family(QWEN3, (*IM, "<tool_call>", "</tool_call>", "<think>", "</think>"), None, True),
    "mistral": Family(MISTRAL, INST, "<s>", False, sentencepiece=True),
    "mistral-tekken": Family(MISTRAL.replace("'[INST] '", "'[INST]'"), INST, "<s>", False),
    "gemma2": Family(GEMMA, TURNS, "<bos>", False, strips=True),
    "gemma3": Family(GEMMA3, TURNS, "<bos>", False, strips=True),
    "llama2": Family(LLAMA2, (), "<s>", True, sentencepiece=True),
    "deepseek": Family(DEEPSEEK, ("<|User|>", "<|Assistant|>"), "<s>", True),
    "vicuna": Family(VICUNA, (), None, True, default="A chat between a user and an assistant."),
    "parts": Family(PARTS, HEADERS, "<|begin_of_text|>", True),
}


def make_chat_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Byte-level as of llama-3 and Qwen (runs of newlines are one token, and join the punctuation before them), or in
    the way of SentencePiece, with a space before every text."""
    special = list(dict.fromkeys([family.bos or "<pad>", "</s>", *family.special]))
    corpus = [*CORPUS * 4, *(f"{line}\n\n{line[:20]}.\n\n\n  {line[20:]}\n" for line in CORPUS), "system\nuser\n" * 9]
    if family.sentencepiece:
        tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        corpus = [line.replace("\n", " ") for line in corpus]
        alphabet = []
    else:
        tokenizer = Tokenizer(BPE())
        words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if family.sentencepiece:  # bytes are no added tokens, but entries of the vocabulary
        tokenizer = without_added(tokenizer, [token for token in special if token.startswith("<0x")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token="</s>",
        additional_special_tokens=list(family.special),
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )


def without_added(tokenizer: Tokenizer, tokens: list[str]) -> Tokenizer:
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [entry for entry in saved["added_tokens"] if entry["content"] not in tokens]
    return Tokenizer.from_str(json.dumps(saved))


@functools.cache
def tokenizer_of(family: str):
    return make_chat_tokenizer(FAMILIES[family])
