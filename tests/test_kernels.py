"""Kernels on packed weights, against a product in float64 written from the definition."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mendlm import TLR, refine
from mendlm.errors import CheckpointError, UsageError
from mendlm.kernels import _cpu, completion, packed
from mendlm.packing import find_row_starts, pack_mask, unpack
from mendlm.runtime import SparseLowRankLinear
from test_runtime import make_layer

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
built = pytest.mark.skipif(not packed.available(), reason=f"no CPU kernel: {packed.unavailable()}")


@pytest.fixture(params=_cpu.ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in _cpu.isas():
        pytest.skip(f"this CPU has no {request.param}")
    return str(request.param)


def make_operands(
    d_out: int, d_in: int, rank: int, tokens: int, density: float, *, bias: bool, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    """x, mask, and the operands of `packed_linear` after x; the first row is empty, the last is full."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(d_out, d_in, generator=g) < density
    mask[:1], mask[1:][-1:] = False, True
    S, A, B, x, b = (
        torch.randn(*shape, generator=g).to(dtype)
        for shape in ((d_out, d_in), (rank, d_in), (d_out, rank), (tokens, d_in), (d_out,))
    )
    bits = pack_mask(mask)
    return x, mask, S[mask], bits, find_row_starts(bits), A, B, b if bias else None


def expected(x: Tensor, mask: Tensor, operands: tuple[Tensor, ...], size: bool = False) -> Tensor:
    """The product entry by entry; with `size`, the sum of the absolute terms instead."""
    values, _, _, A, B, bias = (None if t is None else t.double() for t in operands)
    S = torch.zeros(mask.shape, dtype=torch.float64)
    S[mask] = values
    x = x.double()
    if size:
        S, A, B, x, bias = (None if t is None else t.abs() for t in (S, A, B, x, bias))
    y = torch.einsum("ti,oi->to", x, S) + torch.einsum("ti,ri,or->to", x, A, B)
    return y if bias is None else y + bias


def assert_right(y: Tensor, x: Tensor, mask: Tensor, operands: tuple[Tensor, ...]) -> None:
    """Sums in float32, one rounding to the dtype, which flushes below its least subnormal."""
    exact, size = expected(x, mask, operands), expected(x, mask, operands, size=True)
    n = x.shape[1] + operands[3].shape[0] + 1
    bound = torch.finfo(y.dtype).eps * exact.abs() + n * torch.finfo(torch.float32).eps * size
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound + torch.finfo(y.dtype).smallest_normal).all())


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40)
@given(
    d_out=st.integers(0, 40),
    d_in=st.integers(1, 200),
    rank=st.integers(0, 40),
    tokens=st.integers(0, 9),
    density=st.floats(0, 1),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_product_is_right_in_every_version(
    dtype: torch.dtype, d_out: int, d_in: int, rank: int, tokens: int, density: float, bias: bool, seed: int
) -> None:
    x, mask, *operands = make_operands(d_out, d_in, rank, tokens, density, bias=bias, dtype=dtype, seed=seed)
    for isa in _cpu.isas():
        assert_right(_cpu.packed_linear(x, *operands, isa=isa), x, mask, operands)
        S = _cpu.unpack(*operands[:3], d_in, isa=isa)
        assert torch.equal(S, unpack(operands[0], operands[1], d_in))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_large_product_does_not_depend_on_threads(isa: str, dtype: torch.dtype, tokens: int) -> None:
    x, mask, *operands = make_operands(300, 1003, 33, tokens, 0.5, bias=True, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(_cpu.packed_linear(x, *operands, isa=isa))
    finally:
        torch.set_num_threads(before)
    assert_right(results[0], x, mask, operands)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@built
def test_every_half_is_read_and_written_exactly(isa: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        column = torch.ones(every.numel(), 1, dtype=torch.bool)
        bits = pack_mask(column)
        nothing = torch.zeros(0, 1, dtype=dtype), torch.zeros(every.numel(), 0, dtype=dtype)
        for factor in (1.0, 0.75):
            x = torch.full((1, 1), factor, dtype=dtype)
            y = _cpu.packed_linear(x, every, bits, find_row_starts(bits), *nothing, None, isa=isa)[0]
            exact = (every.float() * factor).to(dtype)
            same = (y == exact) | (y.isnan() & exact.isnan())
            assert bool(same.all())


@pytest.fixture
def before_a_wall() -> Iterator[object]:
    """A function that copies a tensor to the end of a mapping; reading further ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    mappings = []

    def copy(tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        mapping = mmap.mmap(-1, (-(-size // page) + 1) * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        wall = len(mapping) - page
        assert libc.mprotect(ctypes.c_void_p(base + wall), ctypes.c_size_t(page), 0) == 0
        mappings.append((mapping, base + wall))
        there = torch.frombuffer(mapping, dtype=tensor.dtype, count=tensor.numel(), offset=wall - size)
        return there.view(tensor.shape).copy_(tensor)

    yield copy
    for _, wall in mappings:
        libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


@built
@pytest.mark.skipif(sys.platform == "win32", reason="no mprotect")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "rank", "density"), [(256, 32, 0.5), (251, 33, 0.5), (64, 1, 0.02), (37, 5, 1.0)])
def test_nothing_is_read_beyond_a_buffer(
    before_a_wall, isa: str, dtype: torch.dtype, d_in: int, rank: int, density: float
) -> None:
    x, mask, *operands = make_operands(19, d_in, rank, 5, density, bias=True, dtype=dtype)
    guarded = [before_a_wall(t) for t in operands]
    assert_right(_cpu.packed_linear(before_a_wall(x), *guarded, isa=isa), x, mask, operands)
    assert torch.equal(_cpu.unpack(*guarded[:3], d_in, isa=isa), unpack(operands[0], operands[1], d_in))


@built
def test_a_changed_bitmask_is_found_before_it_does_harm(isa: str) -> None:
    x, _, *operands = make_operands(8, 64, 2, 1, 0.5, bias=True, dtype=torch.float32)
    operands[1][-1] = 0
    with pytest.raises(CheckpointError, match="row starts"):
        _cpu.packed_linear(x, *operands, isa=isa)
    with pytest.raises(CheckpointError, match="row starts"):
        _cpu.unpack(*operands[:3], 64, isa=isa)


def make_completion(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    L, W, chance = (torch.randn(rows, columns, generator=g) for _ in range(3))
    return L, W, chance < 0


def assert_completed(sums: Sequence[float], out: Tensor, L: Tensor, W: Tensor, mask: Tensor) -> None:
    """Every entry to the bit; the sum of squares of float32 differences, added in float32 along a row."""
    assert torch.equal(out, torch.where(mask, L, W))
    for found, terms in zip(sums, ((W.double() - L.double()) * ~mask, torch.where(mask, L, W).double()), strict=True):
        exact = float(terms.square().sum())
        assert abs(found - exact) <= (L.numel() + 4) * torch.finfo(torch.float32).eps * exact


@built
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 63), (40, 64), (7, 65), (33, 1027)], ids=str)
def test_completion_is_right_in_every_version(isa: str, shape: tuple[int, int]) -> None:
    before, found = torch.get_num_threads(), []
    L, W, mask = make_completion(*shape)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = torch.full_like(W, torch.nan)
            found.append(_cpu.complete(L, W, mask, out, isa=isa))
            assert_completed(found[-1], out, L, W, mask)
    finally:
        torch.set_num_threads(before)
    assert found == [_cpu.complete(L, W, mask, None, isa=isa)] * 3


@built
def test_completion_of_a_part_leaves_the_rest_alone(isa: str) -> None:
    L, W, mask = make_completion(20, 90)
    out, part = torch.full_like(W, torch.nan), (slice(3, 11), slice(5, 80))
    views = [t[part] for t in (L, W, mask, out)]
    assert_completed(_cpu.complete(views[0].contiguous(), *views[1:], isa=isa), views[3], *views[:3])
    assert int(out.isnan().sum()) == out.numel() - views[3].numel()


@built
@pytest.mark.skipif(sys.platform == "win32", reason="no mprotect")
@pytest.mark.parametrize("n", [64, 129])
def test_completion_reads_nothing_beyond(before_a_wall, isa: str, n: int) -> None:
    L, W, mask = make_completion(3, n)
    guarded = [before_a_wall(t) for t in (L, W, mask, torch.zeros(3, n))]
    assert_completed(_cpu.complete(*guarded, isa=isa), guarded[3], L, W, mask)


@pytest.mark.parametrize("kernel", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_completion_with_and_without_the_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype, contiguous: bool
) -> None:
    monkeypatch.setenv("MENDLM_KERNEL", kernel)
    L, W, mask = (t.to(dtype if t.is_floating_point() else t.dtype) for t in make_completion(30, 20))
    if not contiguous:
        L, W, mask = L.T, W.T, mask.T
    assert not (completion.serves(L, W, mask) and (kernel == "0" or dtype == torch.float64 or not contiguous))
    before, out = L.clone(), torch.full_like(W, torch.nan)
    assert_completed(completion.complete(L, W, mask, out).tolist(), out, L, W, mask)
    assert torch.equal(completion.complete(L, W, mask), completion.complete(L, W, mask, out))
    assert torch.equal(L, before)


def test_refinement_does_not_depend_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(900, 1100, generator=g)  # four tiles
    found = []
    for kernel in ("0", "1"):
        monkeypatch.setenv("MENDLM_KERNEL", kernel)
        found.append(refine(W, W.abs() > 0.7, TLR(20, n_iter=10)))
    for name in ("S", "A", "B"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))
    assert found[0].objective == pytest.approx(found[1].objective, rel=1e-6)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (0, torch.zeros(1, 9)),
        (0, torch.zeros(1, 64, dtype=torch.float16)),
        (2, torch.zeros(8, 7, dtype=torch.uint8)),
        (3, torch.zeros(8, dtype=torch.int64)),
        (4, torch.zeros(2, 63)),
        (5, torch.zeros(8, 3)),
        (6, torch.zeros(7)),
    ],
)
def test_operator_refuses_what_does_not_fit(place: int, wrong: Tensor) -> None:
    x, _, *operands = make_operands(8, 64, 2, 1, 0.5, bias=True, dtype=torch.float32)
    arguments = [x, *operands]
    arguments[place] = wrong
    with pytest.raises(UsageError):
        packed.packed_linear(*arguments)


@pytest.mark.parametrize(("half_of", "density"), [(4, 0.4), (8, 0.4), (3, 0.5)])
def test_a_half_that_is_none_is_refused(half_of: int, density: float) -> None:
    x, _, *operands = make_operands(8, 64, 2, 1, density, bias=True, dtype=torch.float32)
    with pytest.raises(UsageError, match="are not the half"):
        packed.packed_linear(x, *operands, half_of)
    with pytest.raises(UsageError, match="are not the half"):
        packed.unpack(*operands[:3], 64, half_of)


@pytest.mark.parametrize("kernel", ["0", "1"])
def test_operators_are_registered_properly(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setenv("MENDLM_KERNEL", kernel)
    x, _, *operands = make_operands(8, 61, 2, 3, 0.5, bias=True, dtype=torch.float32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mendlm.packed_linear.default, (x, *operands), test_utils=checks)
    torch.library.opcheck(torch.ops.mendlm.unpack.default, (*operands[:3], 61), test_utils=checks)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@torch.no_grad()
def test_layer_without_kernel_computes_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    layer, dense = make_layer(24, 70, dtype=dtype)
    x = torch.randn(2, 1, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    with_kernel = layer(x)
    monkeypatch.setenv("MENDLM_KERNEL", "0")
    assert packed.unavailable() == "MENDLM_KERNEL=0 turns it off"
    assert not packed.serves(x, layer.weight_values)
    size = float(x.abs().double().sum(dim=-1).max() * dense.abs().max()) + 4
    torch.testing.assert_close(layer(x), with_kernel, rtol=0, atol=4 * torch.finfo(dtype).eps * size)
    operator = packed.packed_linear(
        x, layer.weight_values, layer.weight_bitmask, layer.row_starts, layer.lora_A, layer.lora_B, layer.bias
    )
    assert torch.equal(operator, layer(x))


@torch.no_grad()
def test_layer_uses_the_kernel_for_few_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = make_layer()
    used = []
    monkeypatch.setattr(packed, "packed_linear", lambda x, *_: used.append(len(x)) or x.new_zeros(len(x), 12))
    monkeypatch.setattr(packed, "available", lambda device: True)
    limit = packed.MAX_TOKENS["cpu"]
    for tokens in (1, limit, limit + 1):
        layer(torch.zeros(tokens, 20))
    layer.double()(torch.zeros(1, 20, dtype=torch.float64))
    layer.float().set_runtime("factored")
    layer(torch.zeros(1, 20))
    assert used == [1, limit]


def test_gradients_flow_and_steps_are_seen() -> None:
    layer, _ = make_layer()
    x = torch.ones(1, 20, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert all(t.grad is not None for t in (x, layer.lora_A, layer.lora_B, layer.bias))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
        layer.lora_B += 1
        assert not torch.allclose(layer(x), y)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x.detach()), layer(x))


@torch.no_grad()
def test_row_starts_follow_the_bitmask() -> None:
    layer, _ = make_layer()
    other = SparseLowRankLinear(20, 12, n_kept=layer.n_kept, rank=3, bias=True, dtype=torch.float32)
    other.load_state_dict(layer.state_dict())
    x = torch.ones(1, 20)
    assert torch.equal(other(x), layer(x))
    flipped = layer.state_dict()
    flipped["weight_bitmask"] = flipped["weight_bitmask"].flip(0)
    other.load_state_dict(flipped)
    layer.load_state_dict(flipped)
    assert torch.equal(other(x), layer(x))
    other.set_runtime("factored")
    assert "row_starts" not in dict(other.named_buffers())
    torch.testing.assert_close(other(x), layer(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("ready", [True, False])
@torch.no_grad()
def test_compiled_layer_is_one_graph(ready: bool) -> None:
    layer, _ = make_layer(dtype=torch.bfloat16)
    x = torch.randn(1, 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = layer(x)
    if not ready:
        layer.row_starts = None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)


def test_import_does_not_load_the_library() -> None:
    code = "import mendlm.runtime; from mendlm.kernels import _cpu; assert not _cpu._library.cache_info().currsize"
    subprocess.run([sys.executable, "-c", code], check=True)
