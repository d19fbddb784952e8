"""``vllm bench serve`` with arguments of a request's own: the client of ``benchmarks/served.py``.

    python -m benchmarks.served_client --dataset-name custom --dataset-path requests.jsonl --num-prompts 100 ...

All other options are those of ``vllm bench serve``, which sends, times and counts. Its requests can have fields of
their own (``SampleRequest.request_overrides``), but it has no data set that reads them from a file: ``--extra-body`` is
the same for all requests, and ``custom`` takes prompts and lengths alone. So here ``custom`` is a data set that takes
the fields too:

    {"prompt": [token id, ...], "output_tokens": 64, "request_overrides": {"vllm_xargs": {"pad_persona": "ada"}}}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm.benchmarks import serve as serve  # heavy imports, for those that fork from a process that has this module
from vllm.benchmarks.datasets import datasets
from vllm.entrypoints.cli import main as cli


class Requests(datasets.BenchmarkDataset):
    """Lines of ``prompt`` (token ids), ``output_tokens`` and, of some, ``request_overrides``, in their order."""

    def sample(
        self, tokenizer: Any, num_requests: int, request_id_prefix: str = "", **kwargs: Any
    ) -> list[datasets.SampleRequest]:
        lines = Path(str(self.dataset_path)).read_text().splitlines()
        if len(lines) < num_requests:
            raise ValueError(f"--num-prompts {num_requests}: {self.dataset_path} has {len(lines)} requests")
        return [
            datasets.SampleRequest(
                prompt=line["prompt"],
                prompt_len=len(line["prompt"]),
                expected_output_len=line["output_tokens"],
                request_id=f"{request_id_prefix}{i}",
                request_overrides=line.get("request_overrides"),
            )
            for i, line in enumerate(map(json.loads, lines[:num_requests]))
        ]


def main() -> None:
    datasets.CustomDataset = Requests
    sys.argv[:] = ["vllm", "bench", "serve", *sys.argv[1:]]
    cli.main()


if __name__ == "__main__":
    main()
