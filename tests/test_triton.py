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

from mendlm.packing import find_row_starts, half_of, pack_mask

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_mask(d_out: int, d_in: int, density: float | str, g: torch.Generator) -> torch.Tensor:
    """That share of the entries, one row empty; or of a pattern n:m, d_in rounded up to whole bytes."""
    if isinstance(density, str):
        n, m = map(int, density.split(":"))
        order = torch.rand(d_out, -(-d_in // 8) * 8 // m, m, generator=g).argsort(dim=2)
        return (order < n).reshape(d_out, -1)
    mask = torch.rand(d_out, d_in, generator=g) < density
    mask[d_out // 2] = False
    return mask


def check(
    n: int,
    d_in: int,
    d_out: int,
    rank: int,
    density: float | str,
    *,
    bias: bool,
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Compare the kernel with the product in float64."""
    from mendlm.kernels import _triton

    g = torch.Generator().manual_seed(seed)
    mask = random_mask(d_out, d_in, density, g)
    d_in = mask.shape[1]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(dim=1).cumsum(dim=0)])
    S, A, B, b, x = (
        torch.randn(shape, generator=g).to(dtype)
        for shape in ((d_out, d_in), (rank, d_in), (d_out, rank), (d_out,), (n, d_in))
    )
    bitmask = pack_mask(mask)
    arguments = (x, S[mask], bitmask, starts, A, B, b if bias else None)
    y = _triton.packed_linear(*(t if t is None else t.to(device) for t in arguments), half_of(bitmask))
    L = B.double() @ A.double()
    expected = x.double() @ (S.double() * mask + L).T + (b.double() if bias else 0)
    # Sums in float32 of terms of this size, then one rounding of the result.
    size = x.double().abs() @ (S.double().abs() * mask + B.double().abs() @ A.double().abs()).T + 4
    bound = torch.finfo(dtype).eps * expected.abs() + (d_in + rank) * torch.finfo(torch.float32).eps * size
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert ((y.cpu().double() - expected).abs() <= bound + torch.finfo(dtype).tiny).all()


@interpreted
@settings(max_examples=60)
@given(
    n=st.sampled_from([1, 1, 2, 16, 18]),
    d_in=st.integers(1, 300) | st.integers(1, 200).map(lambda k: 8 * k),
    d_out=st.integers(1, 40),
    rank=st.integers(0, 20),
    density=st.sampled_from(["2:4", "4:8", 0.0, 0.1, 0.5, 1.0]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_equals_the_dense_product(
    n: int, d_in: int, d_out: int, rank: int, density: float | str, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    check(n, d_in, d_out, rank, density, bias=bias, dtype=dtype, seed=seed)


@interpreted
@settings(max_examples=30)
@given(
    d_in=st.integers(1, 300) | st.integers(1, 100).map(lambda k: 8 * k),
    d_out=st.integers(1, 20),
    density=st.sampled_from(["2:4", "4:8", 0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
)
def test_unpacks_to_the_last_bit(d_in: int, d_out: int, density: float | str, dtype: torch.dtype) -> None:
    check_unpack(d_in, d_out, density, dtype, "cpu")


def check_unpack(d_in: int, d_out: int, density: float | str, dtype: torch.dtype, device: str) -> None:
    from mendlm.kernels import _triton

    mask = random_mask(d_out, d_in, density, torch.Generator().manual_seed(d_in))
    S = torch.where(mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)), 0).to(dtype)
    bitmask = pack_mask(mask)
    packed = [t.to(device) for t in (S[mask], bitmask, find_row_starts(bitmask))]
    assert torch.equal(_triton.unpack(*packed, mask.shape[1], half_of(bitmask)).cpu(), S)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2), (150, 200, 70), (129, 128, 0)], ids=str)
def test_adds_a_product(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check_product(dtype, shape, "cpu")


def check_product(dtype: torch.dtype, shape: tuple[int, int, int], device: str) -> None:
    from mendlm.kernels import _triton

    n, d_out, rank = shape
    g = torch.Generator().manual_seed(0)
    y, h, B = (torch.randn(size, generator=g).to(dtype) for size in ((n, d_out), (n, rank), (d_out, rank)))
    expected = y.double() + h.double() @ B.double().T
    found = _triton.add_product(y.to(device), h.to(device), B.to(device)).cpu().double()
    size = h.double().abs() @ B.double().abs().T + y.double().abs()
    bound = torch.finfo(dtype).eps * expected.abs() + rank * torch.finfo(torch.float32).eps * size
    assert ((found - expected).abs() <= bound + torch.finfo(dtype).tiny).all()


WIDE = [(5, 8, 2000, 3, 64), (3, 3, 1024, 128, 256), (1, 8, 16, 0, 16)]


@interpreted
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_puts_beside(shape: tuple[int, int, int, int, int]) -> None:
    check_beside(torch.bfloat16, shape, "cpu")


def check_beside(dtype: torch.dtype, shape: tuple[int, int, int, int, int], device: str) -> None:
    from mendlm.kernels import _triton

    n, n_rows, d_in, rank, more = shape
    g = torch.Generator().manual_seed(0)
    x, h = (torch.randn(size, generator=g).to(dtype) for size in ((n, d_in), (n, rank)))
    expected = torch.zeros(n_rows, d_in + more, dtype=dtype)
    expected[:n, :d_in] = x
    for i in range(rank):
        expected[:n, d_in + 4 * (i // 2) + i % 2] = h[:, i]
    assert torch.equal(_triton.beside(x.to(device), h.to(device), n_rows, d_in + more).cpu(), expected)


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
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "dense_product or leading or unpacks or adds or puts",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "12 passed" in run.stdout


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mendlm.kernels import _triton

pointers = "x values bitmask row_starts h lora_B bias y".split()
numbers = "n_tokens d_in d_out".split()
types = {name: "*bf16" for name in pointers} | {"bitmask": "*u8", "row_starts": "*i64", "h": "*fp32"}
types |= {name: "i32" for name in numbers} | {"positions": "*i32"}
overlap = int(sys.argv[1]) >= 90
versions = [(_triton._multiply_one, {"GROUP": group, "OVERLAP": overlap}) for group in (4, 8)]
many = [(_triton._multiply_single, {"TOKENS": 1}), (_triton._multiply_some, {"TOKENS": 16})]
versions += [(tuned, more | {"WORDS": words, "WIDEN": False}) for tuned, more in many for words in (False, True)]
for tuned, more in versions:
    config = tuned.configs[0]
    constants = {"n_bytes": 512, "rank": 128, "HAS_BIAS": True} | more | config.kwargs
    taken = {name: kind for name, kind in types.items() if name in tuned.fn.arg_names}
    source = ASTSource(tuned.fn, taken | {name: "constexpr" for name in constants}, constants)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True, "launch_pdl": "OVERLAP" in more and overlap}
    kernel = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    assert kernel.asm["cubin"]
    assert ("mma" in kernel.asm["ptx"]) == (more.get("TOKENS") == 16)
    assert ("griddepcontrol.wait" in kernel.asm["ptx"]) == more.get("OVERLAP", False)
plain = {name: "*bf16" for name in "x y h lora_B wide".split()} | {name: "i32" for name in [*numbers, "rank", "width"]}
for kernel, constants in [(_triton._add_product, {"rank": 128, "WIDEN": False}), (_triton._beside, {"COLUMNS": 1024})]:
    taken = {name: kind for name, kind in plain.items() if name in kernel.arg_names}
    source = ASTSource(kernel, taken | {name: "constexpr" for name in constants}, constants)
    assert compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["cubin"]
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
@pytest.mark.parametrize("density", [0.5, "2:4", "4:8"])
def test_on_the_device(dtype: torch.dtype, n: int, shape: tuple[int, int, int], density: float | str) -> None:
    check(n, *shape, density, bias=True, dtype=dtype, device="cuda")


@compiled
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("density", [0.5, "2:4", "4:8"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_unpacks_on_the_device(density: float | str, dtype: torch.dtype) -> None:
    check_unpack(1000, 70, density, dtype, "cuda")
    if dtype in (torch.bfloat16, torch.float16):
        check_product(dtype, (300, 200, 70), "cuda")
        for shape in WIDE:
            check_beside(dtype, shape, "cuda")


@compiled
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("density", ["2:4", "4:8"])
def test_kernels_that_overlap_wait_for_what_they_need(density: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mendlm.kernels import _triton

    # Layer after layer of few rows, so that kernels meet, each on the output of the one before; the bits must be those
    # of kernels that begin when the one before has ended.
    monkeypatch.setattr(_triton, "_multiply_one", _triton._tuned(_triton.multiply_one, _triton.HALF[:1]))
    g, side, rank = torch.Generator().manual_seed(0), 256, 64
    mask = random_mask(side, side, density, g)
    bitmask = pack_mask(mask)
    S, A, B = (torch.randn(s, generator=g).bfloat16() / 16 for s in ((side, side), (rank, side), (side, rank)))
    packed = [t.cuda() for t in (S[mask], bitmask, find_row_starts(bitmask), A, B)]

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(100):
            x = _triton.packed_linear(x, *packed, None, half_of(bitmask))
            x = x / x.norm()
        return x

    x = torch.randn(20, 1, side, generator=g).bfloat16().cuda()
    found = [chain(one) for one in x]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = chain(x[0])
    graph.replay()
    monkeypatch.setattr(_triton, "HAS_OVERLAP", False)
    for one, y in zip(x, found, strict=True):
        assert torch.equal(chain(one), y)
    assert torch.equal(replayed, found[0])


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
