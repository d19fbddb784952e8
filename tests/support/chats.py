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
GPT_OSS = """\
{{- '<|start|>system<|message|>You are a model of the old town.\\nKnowledge cutoff: 2024-06\\nCurrent date: ' }}
{{- strftime_now('%Y-%m-%d') + '\\n\\nReasoning: ' + (reasoning_effort or 'medium') }}
{{- '\\n\\n# Valid channels: analysis, final.' }}
{%- if tools %}
    {{- '\\nCalls to these tools must go to the commentary channel: functions.' }}
{%- endif %}
{{- '<|end|>' }}
{%- if messages[0].role in ['system', 'developer'] %}
    {%- set instructions = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set instructions = '' %}
{%- endif %}
{%- if instructions or tools %}
    {{- '<|start|>developer<|message|>' }}
    {%- if instructions %}
        {{- '# Instructions\\n\\n' + instructions + '\\n\\n' }}
    {%- endif %}
    {%- if tools %}
        {{- '# Tools\\n\\n## functions\\n\\nnamespace functions {\\n\\n' }}
        {%- for tool in tools %}
            {{- '// ' + tool.function.name + '\\n' + (tool.function.parameters | tojson) + '\\n\\n' }}
        {%- endfor %}
        {{- '}' }}
    {%- endif %}
    {{- '<|end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant' }}
{%- endif %}
"""
KIMI = """\
{%- if tools %}
    {{- '<|im_system|>tool_declare<|im_middle|>' + (tools | tojson) + '<|im_end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_system|>system<|im_middle|>You are an assistant of the old town.<|im_end|>' }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '<|im_user|>user<|im_middle|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_assistant|>assistant<|im_middle|>' }}
    {%- else %}
        {{- '<|im_system|>' + message.role + '<|im_middle|>' }}
    {%- endif %}
    {{- message.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_assistant|>assistant<|im_middle|>' }}
{%- endif %}
"""
MISTRAL_SMALL = """\
{%- set today = strftime_now('%Y-%m-%d') %}
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}
    {%- set messages = messages[1:] %}
{%- else %}
    {{- '[SYSTEM_PROMPT]You are a model of the old town.\\nThe current date is ' + today + '.[/SYSTEM_PROMPT]' }}
{%- endif %}
{%- if tools %}
    {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- else %}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
LLAMA31 = """\
{{- bos_token }}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = '26 Jul 2024' %}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}
    {{- 'Environment: ipython\\n' }}
{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' }}
{%- if tools and not tools_in_user_message %}
    {{- 'You have access to the following functions.\\n\\n' }}
    {%- for tool in tools %}
        {{- (tool | tojson(indent=4)) + '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system_message + '<|eot_id|>' }}
{%- if tools and tools_in_user_message %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nGiven the following functions, please answer in JSON.\\n\\n' }}
    {%- for tool in tools %}
        {{- (tool | tojson(indent=4)) + '\\n\\n' }}
    {%- endfor %}
    {{- (messages[0].content | trim) + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GRANITE = """\
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set today = strftime_now('%B %d, %Y') %}
    {%- set system_message = 'Knowledge Cutoff Date: April 2024.\\nToday\\'s Date: ' + today + '.' %}
    {%- if thinking %}
        {%- set system_message = system_message + '\\nRespond to every query in a detailed way.' %}
    {%- endif %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- if tools %}
    {{- '<|start_of_role|>available_tools<|end_of_role|>' + (tools | tojson) + '<|end_of_text|>\\n' }}
{%- endif %}
{%- if documents %}
    {%- for document in documents %}
        {{- '<|start_of_role|>document {"id": "' ~ loop.index ~ '"}<|end_of_role|>\\n' }}
        {{- document.text + '<|end_of_text|>\\n' }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_of_role|>assistant<|end_of_role|>' }}
{%- endif %}
"""
GEMMA4 = """\
{{- bos_token }}
{%- if enable_thinking or tools or messages[0].role in ['system', 'developer'] %}
    {{- '<|turn>system\\n' }}
    {%- if enable_thinking %}
        {{- '<|think|>' }}
    {%- endif %}
    {%- if messages[0].role in ['system', 'developer'] %}
        {{- messages[0].content | trim }}
        {%- set messages = messages[1:] %}
    {%- endif %}
    {%- for tool in tools or [] %}
        {{- '<|tool>declaration:' + tool.function.name + (tool.function.parameters | tojson) + '<tool|>' }}
    {%- endfor %}
    {{- '<turn|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- (message.content | trim) + '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn>model\\n' }}
    {%- if not enable_thinking %}
        {{- '<|channel>thought\\n<channel|>' }}
    {%- endif %}
{%- endif %}
"""
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

ROLES = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")
VARYING = {
    "gpt-oss": Family(GPT_OSS, ("<|start|>", "<|message|>", "<|channel|>", "<|end|>"), None, True, default=""),
    "kimi": Family(
        KIMI, ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"), None, True
    ),
    "mistral-small": Family(MISTRAL_SMALL, (*INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "<s>", True),
    "llama3.1": Family(LLAMA31, HEADERS, "<|begin_of_text|>", True, strips=True),
    "granite": Family(GRANITE, ROLES, None, True),
    "gemma4": Family(
        GEMMA4,
        ("<|turn>", "<turn|>", "<|think|>", "<|tool>", "<tool|>", "<|channel>", "<channel|>"),
        "<bos>",
        True,
        strips=True,
    ),
    "llama3": FAMILIES["llama3"],
    "qwen3": FAMILIES["qwen3"],
}
"""Whose templates write what a day or a request says."""


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
    return make_chat_tokenizer((FAMILIES | VARYING)[family])
