"""The Triton kernel of the packed runtime: in Triton's interpreter everywhere, on the device where there is one.

Whether Triton interprets is settled when it is imported, so the cases marked so run in a process of their own, which
`test_in_the_interpreter` starts.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mendlm.packing import pack_mask

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(
    n: int,
    d_in: int,
    d_out: int,
    rank: int,
    density: float,
    *,
    bias: bool,
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Compare the kernel with the product in float64."""
    from mendlm.kernels import _triton

    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(d_out, d_in, generator=g) < density
    mask[d_out // 2] = False
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(dim=1).cumsum(dim=0)])
    S, A, B, b, x = (
        torch.randn(shape, generator=g).to(dtype)
        for shape in ((d_out, d_in), (rank, d_in), (d_out, rank), (d_out,), (n, d_in))
    )
    arguments = (x, S[mask], pack_mask(mask), starts, A, B, b if bias else None)
    y = _triton.packed_linear(*(t if t is None else t.to(device) for t in arguments))
    L = B.double() @ A.double()
    expected = x.double() @ (S.double() * mask + L).T + (b.double() if bias else 0)
    # Sums in float32 of terms of this size, then one rounding of the result.
    size = x.double().abs() @ (S.double().abs() * mask + B.double().abs() @ A.double().abs()).T + 4
    bound = torch.finfo(dtype).eps * expected.abs() + (d_in + rank) * torch.finfo(torch.float32).eps * size
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert ((y.cpu().double() - expected).abs() <= bound + torch.finfo(dtype).tiny).all()


@interpreted
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 18),
    d_in=st.integers(1, 300),
    d_out=st.integers(1, 40),
    rank=st.integers(0, 20),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_equals_the_dense_product(
    n: int, d_in: int, d_out: int, rank: int, density: float, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    check(n, d_in, d_out, rank, density, bias=bias, dtype=dtype, seed=seed)


@interpreted
def test_leading_dimensions_and_no_tokens() -> None:
    from mendlm.kernels import _triton

    x = torch.ones(2, 3, 8)
    mask = torch.ones(4, 8, dtype=torch.bool)
    starts = 8 * torch.arange(5)
    packed = (torch.ones(32), pack_mask(mask), starts, torch.zeros(0, 8), torch.zeros(4, 0), None)
    assert torch.equal(_triton.packed_linear(x, *packed), torch.full((2, 3, 4), 8.0))
    assert torch.equal(_triton.packed_linear(x.mT.contiguous().mT, *packed), torch.full((2, 3, 4), 8.0))
    assert _triton.packed_linear(x[:0], *packed).shape == (0, 3, 4)
    with pytest.raises(TypeError, match="takes one dtype"):
        _triton.packed_linear(x.double(), *packed)


@pytest.mark.skipif(INTERPRETED, reason="this is it")
def test_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "dense_product or leading"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mendlm.kernels import _triton

pointers = "x values bitmask row_starts h lora_B bias y".split()
numbers = "n_tokens d_in d_out".split()
types = {name: "*bf16" for name in pointers} | {"bitmask": "*u8", "row_starts": "*i64", "h": "*fp32"}
types |= {name: "i32" for name in numbers}
for tokens, tuned in ((1, _triton._multiply_one), (16, _triton._multiply_some)):
    config = tuned.configs[0]
    constants = {"n_bytes": 512, "rank": 128, "HAS_BIAS": True, "TOKENS": tokens, "WIDEN": False, **config.kwargs}
    source = ASTSource(tuned.fn, types | {name: "constexpr" for name in constants}, constants)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    kernel = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    assert kernel.asm["cubin"]
    assert ("mma" in kernel.asm["ptx"]) == (tokens > 1)
    constants = {"d_in": 4096, "TOKENS": tokens, "COLUMNS": 256}
    types_of_A = {"x": "*bf16", "lora_A": "*bf16", "h": "*fp32", "n_tokens": "i32", "rank": "i32"}
    source = ASTSource(_triton._project, types_of_A | {name: "constexpr" for name in constants}, constants)
    assert compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options).asm["cubin"]
"""


@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_device(capability: int, tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_kernels_are_imported_when_needed() -> None:
    code = "import sys, mendlm, mendlm.hf, mendlm.runtime; print('mendlm.kernels._triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


def test_the_operator_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from mendlm.kernels import packed

    assert packed.unavailable("cuda") is None
    monkeypatch.setattr(packed, "HAS_TRITON", False)
    assert packed.unavailable("cuda") == "Triton is not installed"
    assert not packed.available("mps")


@compiled
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 4, 16, 17])
@pytest.mark.parametrize("shape", [(20, 12, 3), (1000, 301, 0), (4096, 1024, 128)], ids=str)
def test_on_the_device(dtype: torch.dtype, n: int, shape: tuple[int, int, int]) -> None:
    check(n, *shape, 0.5, bias=True, dtype=dtype, device="cuda")


@compiled
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_the_runtime_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from mendlm.kernels import _triton
    from test_runtime import make_layer

    layer, _ = make_layer(dtype=torch.bfloat16)
    merged, _ = make_layer(dtype=torch.bfloat16)
    merged.set_runtime("merged")
    called = []
    kernel = _triton.packed_linear
    monkeypatch.setattr(_triton, "packed_linear", lambda *arguments: called.append(1) or kernel(*arguments))
    x = torch.ones(3, 20, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(layer.cuda()(x), merged.cuda()(x), rtol=0.05, atol=0.1)
    assert called
