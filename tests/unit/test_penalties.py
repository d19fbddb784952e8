"""What the V1 adapter hands vLLM's operators: on a GPU they refuse memory with gaps, on a CPU they read any."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams

from pad_vllm.worker.adapters import v1
from pad_vllm.worker.slots import SamplingControls

VOCAB_SIZE = 40


@pytest.mark.parametrize("num_requests", [1, 3])
def test_every_argument_of_a_vllm_operator_is_contiguous(monkeypatch, num_requests):
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.3)
    rows = {
        2 * row: v1.V1RequestState(
            None, SamplingControls.of(params), 0, slot=row, prompt_ids=[1, 2, 3 + row], output_ids=[5] * (row + 1)
        )
        for row in range(num_requests)
    }
    seen = []
    for name in ("apply_penalties", "get_token_bin_counts_and_mask"):
        function = getattr(v1, name)

        def watched(*args, function=function):
            seen.append([arg for arg in args if isinstance(arg, torch.Tensor)])
            return function(*args)

        monkeypatch.setattr(v1, name, watched)
    penalties = v1.Penalties(rows, VOCAB_SIZE, torch.device("cpu"))
    before = torch.randn(2 * num_requests, VOCAB_SIZE)
    logits = before.clone()
    penalties.apply_(logits)
    assert not torch.allclose(logits, before)
    penalties.invert_(logits)
    torch.testing.assert_close(logits, before)
    assert [len(tensors) for tensors in seen] == [6, 1, 1]
    assert all(tensor.is_contiguous() for tensors in seen for tensor in tensors)
