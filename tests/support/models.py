"""Small random models, real transformers files: what the tests load into vLLM and into the oracle."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "You are asked to be concise, formal, playful or detailed, and to say why.",
    "The quick brown fox jumps over the lazy dog while the rain keeps falling on the old town.",
    "Preferences are given as text, and every answer should follow them as well as it can.",
    "[Guidelines] Your task is to generate response by considering the following principle. [Principles] [Instruction]",
]
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def make_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL.values(), "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL,
        additional_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def make_model(path: Path, seed: int, *, vocab_size: int = 512, max_position_embeddings: int = 1024, **config) -> Path:
    """A random Llama (or ``model_type``) with logits spread enough that greedy choices are not near-ties."""
    settings = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | config
    model_config = AutoConfig.for_model(
        settings.pop("model_type"),
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        dtype="float32",
        **settings,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.12 if "embed" not in name and "lm_head" not in name else 0.4)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_near(path: Path, model: AutoModelForCausalLM) -> AutoModelForCausalLM:
    """A model with some noise: as a drafter of the one that it is made of, it is right and wrong by turns."""
    near = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    near.save_pretrained(path)
    return near


def make_adapter(path: Path, base: Path, seed: int, rank: int, targets: list[str], **config) -> AutoModelForCausalLM:
    """A random PEFT LoRA folder for a model; returns the model with it merged, in float32."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.25 / rank**0.5
                parameter.copy_(noise if "lora_" in name else parameter + noise)
    model.save_pretrained(path)
    return model.merge_and_unload().eval()


def make_heads(path: Path, names: list[str], hidden_size: int = 64, seed: int = 0) -> Path:
    """A value-head file: each head the identity plus noise, as trained heads are."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        noise = torch.randn(hidden_size, hidden_size, generator=generator)
        tensors[f"{name}.weight"] = torch.eye(hidden_size) + 0.15 * noise
        tensors[f"{name}.bias"] = 0.3 * torch.randn(hidden_size, generator=generator)
    save_file(tensors, path)
    return path
