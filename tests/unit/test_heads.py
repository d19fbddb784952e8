"""Value-head files: the released layout, named heads, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from pad_vllm.reward.heads import load_heads, locate_heads, tensor_names_beside


def write(path, **tensors):
    save_file({key.replace("__", "."): value for key, value in tensors.items()}, path)
    return path


def test_released_layout(tmp_path):
    weight, bias = torch.randn(4, 4), torch.randn(4)
    path = write(tmp_path / "value_head.safetensors", v_head__summary__weight=weight, v_head__summary__bias=bias)
    heads = load_heads(path, 4)
    assert heads.names == ("summary",)
    assert heads.default_weights == (1.0,)
    assert torch.equal(heads.weight[0], weight)
    assert torch.equal(heads.bias[0], bias)


def test_named_heads_in_the_files_order(tmp_path):
    tensors = {f"{name}__weight": torch.full((2, 2), float(i)) for i, name in enumerate("abc")}
    heads = load_heads(write(tmp_path / "heads.safetensors", **tensors), 2)
    assert heads.names == ("a", "b", "c")
    assert heads.default_weights is None
    assert heads.weight[:, 0, 0].tolist() == [0, 1, 2]
    assert not heads.bias.any()


def test_a_vector_is_the_papers_elementwise_weight(tmp_path):
    """R = w_p . phi with phi = h * e_a: w_p alone is a diagonal map, kept as a vector unless another is a matrix."""
    vector = torch.tensor([1.0, 2.0])
    alone = load_heads(write(tmp_path / "h.safetensors", w__weight=vector.bfloat16()), 2)
    assert torch.equal(alone.weight, vector[None])
    mixed = load_heads(write(tmp_path / "m.safetensors", w__weight=vector, x__weight=torch.ones(2, 2)), 2)
    assert torch.equal(mixed.weight[mixed.names.index("w")], torch.diag(vector))


def test_found_beside_the_model(tmp_path):
    assert locate_heads(None, str(tmp_path), None) is None
    path = write(tmp_path / "heads.safetensors", a__weight=torch.eye(2))
    assert locate_heads(None, str(tmp_path), None) == path
    released = write(tmp_path / "value_head.safetensors", v_head__summary__weight=torch.eye(2))
    assert locate_heads(None, str(tmp_path), None) == released
    assert locate_heads(str(path), str(tmp_path), None) == path
    assert tensor_names_beside(str(tmp_path), None) == {"a.weight", "v_head.summary.weight"}


def test_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pad.heads='/no/such/file': no such file"):
        locate_heads("/no/such/file", str(tmp_path), None)
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"broken.safetensors'.*not a readable safetensors file"):
        load_heads(tmp_path / "broken.safetensors", 2)
    with pytest.raises(ValueError, match=r"head 'a' has weight \[3, 3\].*hidden size is 2"):
        load_heads(write(tmp_path / "h.safetensors", a__weight=torch.eye(3)), 2)
    with pytest.raises(ValueError, match=r"head 'a' has weight \[3\]"):
        load_heads(write(tmp_path / "v.safetensors", a__weight=torch.ones(3)), 2)
    with pytest.raises(ValueError, match="finite"):
        load_heads(write(tmp_path / "n.safetensors", a__weight=torch.full((2, 2), float("nan"))), 2)
    with pytest.raises(ValueError, match=r"expected pairs .* found \['stray'\]"):
        load_heads(write(tmp_path / "s.safetensors", a__weight=torch.eye(2), stray=torch.eye(2)), 2)
    with pytest.raises(ValueError, match="expected pairs"):
        load_heads(write(tmp_path / "b.safetensors", a__bias=torch.zeros(2)), 2)
    for name in ("heads.a", "v_head.summary"):
        other = "a" if name == "heads.a" else "summary"
        twice = write(tmp_path / "t.safetensors", **{f"{n}.weight": torch.eye(2) for n in (name, other)})
        with pytest.raises(ValueError, match=f"both mean the head '{other}' in a request; rename one"):
            load_heads(twice, 2)
