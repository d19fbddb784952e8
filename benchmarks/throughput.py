"""What guidance costs: guided over unguided throughput, in one engine, in one run.

    python -m benchmarks.throughput [--batch 1 16] [--repeats 5] [--output-len 64] [--json FILE]

Random models, because what is measured does not depend on what they say: by default a base of 134M parameters and a
reward model of 35M. Guided and unguided batches alternate, and each pair gives one ratio; absolute numbers of a shared
machine mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

BASE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
REWARD = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}


def make_model(path: Path, vocab_size: int, seed: int, **sizes: int) -> Path:
    """A random Llama in transformers' format."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=4096, **sizes))
    model.save_pretrained(path)
    print(f"{path.name}: {model.num_parameters() / 1e6:.0f}M parameters")
    return path


def measure(args: argparse.Namespace) -> list[dict]:
    """One row per batch size: medians of tokens per second, and of the ratios of interleaved pairs."""
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        base = make_model(Path(folder, "base"), args.vocab_size, 0, **BASE)
        reward = make_model(Path(folder, "reward"), args.vocab_size, 1, **REWARD)
        llm = LLM(
            str(base),
            dtype=args.dtype,
            max_model_len=2048,
            skip_tokenizer_init=True,
            enforce_eager=args.enforce_eager,
            kv_cache_memory_bytes=2 << 30,
            enable_prefix_caching=False,
            logits_processors=["pad_vllm:PADLogitsProcessor"],
            additional_config={"pad": {"reward_model": str(reward), "top_k": args.top_k}},
        )

        def tokens_per_second(batch: int, guided: bool) -> float:
            params = SamplingParams(
                temperature=0,
                max_tokens=args.output_len,
                ignore_eos=True,
                detokenize=False,
                extra_args={"pad_beta": 1.0} if guided else None,
            )
            prompts = [
                {"prompt_token_ids": [(7 * i + 13 * j) % 1000 + 5 for j in range(args.prompt_len)]}
                for i in range(batch)
            ]
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return batch * args.output_len / (time.perf_counter() - start)

        rows = []
        for batch in args.batch:
            pairs = [(tokens_per_second(batch, False), tokens_per_second(batch, True)) for _ in range(args.repeats + 1)]
            unguided, guided = zip(*pairs[1:], strict=True)  # the first warms up
            rows.append(
                {
                    "batch": batch,
                    "unguided_tokens_per_s": round(statistics.median(unguided), 1),
                    "guided_tokens_per_s": round(statistics.median(guided), 1),
                    "ratio": round(statistics.median(g / u for u, g in pairs[1:]), 3),
                }
            )
            print(rows[-1], flush=True)
        return rows


def hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    return f"{os.cpu_count()} cores of {model.partition(': ')[2] or platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-len", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--json", type=Path, help="write the result, with the hardware's name and the date")
    args = parser.parse_args()
    rows = measure(args)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "batch")}
        result = {"hardware": hardware(), "date": date.today().isoformat(), "settings": settings, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
