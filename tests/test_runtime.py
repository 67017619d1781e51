"""SparseLowRankLinear: every runtime computes x (S + B A)ᵀ + bias."""

from __future__ import annotations

import pytest
import torch

from mendlm.errors import CheckpointError, UsageError
from mendlm.packing import pack_mask, unpack_mask
from mendlm.runtime import SparseLowRankLinear
from tiny import CPU_RUNTIMES

EPS32 = torch.finfo(torch.float32).eps


def make_layer(
    d_out: int = 12,
    d_in: int = 20,
    rank: int = 3,
    density: float = 0.5,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[SparseLowRankLinear, torch.Tensor]:
    """A filled packed layer and its dense weight in float64."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(d_out, d_in, generator=g) < density
    S = torch.randn(d_out, d_in, generator=g).to(dtype) * mask
    layer = SparseLowRankLinear(d_in, d_out, n_kept=int(mask.sum()), rank=rank, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight_values.copy_(S[mask])
        layer.weight_bitmask.copy_(pack_mask(mask))
        for parameter in (layer.lora_A, layer.lora_B, layer.bias):
            if parameter is not None:
                parameter.copy_(torch.randn(parameter.shape, generator=g))
    layer.check()
    return layer, S.double() + (layer.lora_B.double() @ layer.lora_A.double()).detach()


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("d_in", "rank", "density", "bias"),
    [(20, 3, 0.5, True), (16, 0, 0.5, False), (9, 2, 0.0, True), (9, 2, 1.1, False)],
)
@torch.no_grad()
def test_forward(runtime: str, dtype: torch.dtype, d_in: int, rank: int, density: float, bias: bool) -> None:
    layer, dense = make_layer(12, d_in, rank, density, bias=bias, dtype=dtype)
    layer.set_runtime(runtime)
    x = torch.randn(2, 5, d_in, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ dense.T + (layer.bias.double() if layer.bias is not None else 0)
    # Every product rounds its result once: three of them, plus the sum, on terms of this size.
    size = float(x.abs().double().sum(dim=-1).max() * dense.abs().max()) + 4
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * size)
    assert layer(x).dtype == dtype
    assert layer(x[:0]).shape == (0, 5, 12)


def test_packed_and_factored_convert_without_loss() -> None:
    layer, _ = make_layer()
    with torch.no_grad():
        layer.weight_values[4] = 0.0  # a kept entry may be zero
    before = {name: t.clone() for name, t in layer.packed_tensors().items()}
    layer.set_runtime("factored")
    assert {"S", "weight_bitmask", "lora_A", "lora_B", "bias"} == {
        *dict(layer.named_parameters()),
        *dict(layer.named_buffers()),
    }
    for name, tensor in layer.packed_tensors().items():
        assert torch.equal(tensor, before[name])
    layer.set_runtime("packed")
    for name, tensor in layer.packed_tensors().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("runtime", ["factored", "packed"])
def test_state_dict_is_packed_in_both_forms(runtime: str) -> None:
    layer, _ = make_layer()
    layer.set_runtime(runtime)
    state = layer.state_dict()
    assert sorted(state) == ["bias", "lora_A", "lora_B", "weight_bitmask", "weight_values"]
    other, _ = make_layer(density=0.5)
    other.set_runtime(runtime)
    with torch.no_grad():
        other.lora_A.zero_()
    other.load_state_dict(state)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("runtime", ["factored", "packed"])
def test_only_the_factors_are_trained(runtime: str) -> None:
    layer, _ = make_layer()
    layer.set_runtime(runtime)
    layer(torch.ones(2, 20)).sum().backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == {"lora_A", "lora_B", "bias"}


@pytest.mark.parametrize("runtime", ["factored", "packed"])
@pytest.mark.parametrize("alone", [False, True], ids=["all", "S alone"])
def test_S_keeps_its_zeros_where_it_is_trained_too(runtime: str, alone: bool) -> None:
    layer, _ = make_layer()
    layer.set_runtime(runtime)
    layer.requires_grad_(not alone)
    S = (layer.S if runtime == "factored" else layer.weight_values).requires_grad_()
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    mask = unpack_mask(layer.weight_bitmask, 20)
    with torch.no_grad():
        before, error = S.clone(), layer(x)
    expected = (2 * error.T @ x).where(mask, 0)  # of the sum of squares
    layer(x).square().sum().backward()
    found = S.grad if runtime == "factored" else torch.zeros(12, 20).masked_scatter(mask, S.grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * EPS32 * float(expected.abs().max()))
    torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1).step()
    assert not torch.equal(S, before)
    again, _ = make_layer()
    again.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(x), layer(x), rtol=0, atol=64 * EPS32 * float(error.abs().max()))
    other = "packed" if runtime == "factored" else "factored"
    layer.set_runtime(other)
    assert (layer.S if other == "factored" else layer.weight_values).requires_grad


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_weight_is_that_of_the_whole_layer(runtime: str, dtype: torch.dtype) -> None:
    """Some models multiply with it themselves (Mamba): S alone would be another function."""
    layer, dense = make_layer(dtype=dtype)
    layer.set_runtime(runtime)
    size = float(dense.abs().max()) + 4
    torch.testing.assert_close(layer.weight.double(), dense, rtol=0, atol=2 * torch.finfo(dtype).eps * size)
    assert layer.weight.dtype == dtype
    if runtime == "merged":
        assert layer.weight is dict(layer.named_parameters())["weight"]
        return
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    factors = layer.lora_A, layer.lora_B
    found, expected = (
        torch.autograd.grad(y.square().sum(), factors) for y in (x @ layer.weight.T + layer.bias, layer(x))
    )
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=64 * torch.finfo(dtype).eps * float(e.abs().max()))
    assert "weight" not in dict(layer.named_parameters())
    with pytest.raises(KeyError, match="already exists"):
        layer.weight = torch.nn.Parameter(layer.weight.detach())


def test_merged_is_final() -> None:
    layer, _ = make_layer()
    layer.set_runtime("merged")
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    layer.set_runtime("merged")
    with pytest.raises(UsageError, match="a merged layer cannot become packed"):
        layer.set_runtime("packed")
    with pytest.raises(UsageError, match="no packed form"):
        layer.packed_tensors()


def test_packed_takes_less_memory() -> None:
    layer, dense = make_layer(256, 256, 8, dtype=torch.bfloat16)
    packed = sum(t.numel() * t.element_size() for t in layer.packed_tensors().values())
    assert packed < 0.65 * dense.numel() * 2


def test_unknown_runtime_names_the_nearest() -> None:
    layer, _ = make_layer()
    with pytest.raises(UsageError, match=r"unknown runtime 'factord'\. Did you mean 'factored'"):
        layer.set_runtime("factord")


def test_damage_is_found() -> None:
    layer, _ = make_layer()
    layer.weight_bitmask[0, 0] ^= 1
    with pytest.raises(CheckpointError, match="entries as kept"):
        layer.check()
