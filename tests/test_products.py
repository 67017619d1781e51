"""Products of half precision on a CPU without instructions for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mendlm.calibration import products
from mendlm.calibration.blocks import BlockModel
from mendlm.calibration.products import FloatProducts, quick_products
from mendlm.checkpoints.reader import open_checkpoint
from mendlm.evaluation._logits import eval_mode
from mendlm.loading import load

CPU = torch.device("cpu")
HALF = [torch.bfloat16, torch.float16]


def operands(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((7, 24), (24, 40), (40,)))
    return x, W, bias


PRODUCTS = {
    "linear": lambda x, W, bias: nn.functional.linear(x, W.T, bias),
    "linear by name": lambda x, W, bias: nn.functional.linear(x, weight=W.T, bias=bias),
    "linear without bias": lambda x, W, bias: nn.functional.linear(x, W.T),
    "addmm": lambda x, W, bias: torch.addmm(bias, x, W),
    "@": lambda x, W, bias: x @ W,
    "matmul": lambda x, W, bias: torch.matmul(x, W),
    "mm": lambda x, W, bias: x.mm(W),
    "bmm": lambda x, W, bias: torch.bmm(x[None], W[None]),
    "baddbmm": lambda x, W, bias: torch.baddbmm(bias[None, None], x[None], W[None]),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PRODUCTS)
def test_only_the_result_is_rounded(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    parts = operands(dtype, generator)
    with FloatProducts():
        out = PRODUCTS[name](*parts)
    assert out.dtype == dtype
    exact = PRODUCTS[name](*(part.double() for part in parts))
    # One rounding to the dtype, and those of a float32 sum of 25 terms.
    x, W, bias = (part.double().abs() for part in parts)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 26 * torch.finfo(torch.float32).eps * (x @ W + bias)
    assert bool(((out.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_attention_is_rounded_once(mask: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 3, 20, 16, generator=generator).to(dtype) for _ in range(3))
    seen = torch.ones(20, 20, dtype=torch.bool).tril()
    added = torch.zeros(20, 20, dtype=dtype).masked_fill(~seen, -torch.inf)
    attn_mask = {"none": None, "bool": seen, "added": added}[mask]
    leaves = q, k, v = [part.requires_grad_() for part in (q, k, v)]
    with FloatProducts():
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    wide = [part.detach().double().requires_grad_() for part in leaves]
    scores = wide[0] @ wide[1].mT / 4
    exact = torch.softmax(scores if mask == "none" else scores.masked_fill(~seen, -torch.inf), -1) @ wide[2]
    assert out.dtype == dtype
    # A score is a float32 sum of 16 products, `size` at most; an error in it is a relative one of a weight.
    with torch.no_grad():
        size = float((q.double().abs() @ k.double().abs().mT).max()) / 4
        loss = 2 * (17 * size + 40) * torch.finfo(torch.float32).eps * float(v.abs().max())
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + loss
    assert bool(((out.double() - exact).abs() <= bound).all())
    g = torch.randn(out.shape, generator=generator).to(dtype)
    for grad, right in zip(
        torch.autograd.grad(out, leaves, g), torch.autograd.grad(exact, wide, g.double()), strict=True
    ):
        assert grad.dtype == dtype
        assert float((grad.double() - right).norm() / right.norm()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_left_alone(dtype: torch.dtype, generator: torch.Generator) -> None:
    x, W, _ = operands(dtype, generator)
    with FloatProducts():
        assert torch.equal(x @ W, torch.matmul(x, W))
        with pytest.raises(RuntimeError, match="dtype"):
            x @ W.to(torch.bfloat16)


def test_gradients_pass_through(generator: torch.Generator) -> None:
    x, W, bias = operands(torch.bfloat16, generator)
    leaves = [part.clone().requires_grad_() for part in (x, W, bias)]
    with FloatProducts():
        out = nn.functional.linear(leaves[0], leaves[1].T, leaves[2])
    g = torch.randn(out.shape, generator=generator).bfloat16()
    grads = torch.autograd.grad(out, leaves, g)
    for grad, exact in zip(
        grads, (g.double() @ W.double().T, x.double().T @ g.double(), g.double().sum(0)), strict=True
    ):
        assert grad.dtype == torch.bfloat16
        assert float((grad.double() - exact).norm() / exact.norm()) < torch.finfo(torch.bfloat16).eps


def test_only_where_they_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(device: torch.device, dtype: torch.dtype) -> bool:
        return isinstance(quick_products(device, dtype), FloatProducts)

    monkeypatch.setattr(products, "_has_instructions", lambda dtype: dtype == torch.float16)
    assert wide(CPU, torch.bfloat16)
    assert not wide(CPU, torch.float16)
    assert not wide(CPU, torch.float32)
    assert not wide(torch.device("cuda"), torch.bfloat16)


def test_what_the_machine_says_is_believed() -> None:
    assert products._has_instructions(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert products._has_instructions(torch.float16) == torch.ops.mkldnn._is_mkldnn_fp16_supported()


def test_a_block_multiplies_that_way(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widened: list[Any] = []
    widen = products._widened
    monkeypatch.setattr(products, "_has_instructions", lambda dtype: False)

    def noting(value: Any) -> Any:
        widened.append(value)
        return widen(value)

    monkeypatch.setattr(products, "_widened", noting)
    ids = torch.arange(40).view(2, 20)
    model = BlockModel(open_checkpoint(tiny_llama), CPU, torch.bfloat16)
    hidden = model.embed(ids)
    for index in range(model.n_blocks):
        with model.loaded(index) as block, torch.no_grad():
            hidden = model.forward(index, block, hidden)
    n_dims = [value.ndim for value in widened if isinstance(value, Tensor) and value.dtype == torch.bfloat16]
    assert n_dims.count(2) == n_dims.count(3) == 2 * 7  # two blocks of seven projections: W and x
    assert n_dims.count(4) >= 2 * 3  # and of one attention: queries, keys and values
    whole = load(tiny_llama, dtype=torch.bfloat16)
    with torch.no_grad(), eval_mode(whole):
        last = whole(ids, output_hidden_states=True).hidden_states[-1].float()
        normed = whole.model.norm(hidden)
    assert normed.dtype == torch.bfloat16
    assert float((normed.float() - last).norm() / last.norm()) < 4 * torch.finfo(torch.bfloat16).eps
