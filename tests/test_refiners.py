"""Refiners: the contract of all, the oracle of TLR, the properties the paper proves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from mendlm import NM, TLR, AcceleratedTLR, PruneOnly, Unstructured, ZeroShotSVD, refine, select_mask
from mendlm.criteria import CRITERIA
from mendlm.errors import NonFiniteError, UsageError
from mendlm.inputs import InputStats
from mendlm.metrics import Metric, diagonal_metric
from mendlm.patterns import Pattern
from mendlm.refiners import REFINERS, AbstractRefiner, SLiMLoRA, refine_stack
from strategies import matrices, patterns_for, stats_for

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def planted(d_out: int, d_in: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A matrix like a real layer: noise, a decaying spectrum, a few large columns."""
    g = torch.Generator().manual_seed(seed)
    rank = min(d_out, d_in) // 2
    decay = torch.arange(1, rank + 1, dtype=torch.float64) ** -0.7
    left = torch.randn(d_out, rank, generator=g, dtype=torch.float64)
    right = torch.randn(rank, d_in, generator=g, dtype=torch.float64)
    W = (left * decay) @ right + 0.5 * torch.randn(d_out, d_in, generator=g, dtype=torch.float64)
    W[:, :: max(d_in // 4, 1)] *= 4
    return W.to(dtype)


def every_refiner(rank: int) -> list[AbstractRefiner]:
    """One instance of each refiner that works without data; `none` has rank 0 by definition."""
    without_data = [cls for cls in REFINERS.values() if "plain" in cls.metrics]
    return [cls() if cls is PruneOnly else cls(rank=rank) for cls in without_data]  # type: ignore[call-arg]


PATTERNS: list[Pattern] = [Unstructured(0.5), Unstructured(0.6, "row"), NM(2, 4), NM(1, 8)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("refiner", every_refiner(4), ids=lambda r: r.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_contract(refiner: AbstractRefiner, criterion: str, pattern: Pattern, dtype: torch.dtype) -> None:
    W = planted(24, 40, dtype=dtype)
    before = W.clone()
    mask = select_mask(W, criterion, pattern, inputs=stats_for(40))
    out = refine(W, mask, refiner, pattern=pattern)
    if refiner.moves_mask:
        assert int(out.decomposition.mask.sum()) == int(mask.sum())
        mask = out.decomposition.mask

    assert torch.equal(W, before)
    assert out.S.dtype == out.A.dtype == out.B.dtype == dtype
    assert out.S.shape == W.shape
    assert out.A.shape == (refiner.rank, 40)
    assert out.B.shape == (24, refiner.rank)
    assert torch.all(out.S[~mask] == 0)  # Theorem 4.1
    # On the mask only the rounding of S is left: half an ulp of the largest entry, plus that of computing B A.
    wide = out.S.double() + out.B.double() @ out.A.double()
    on_mask = (W.double() - wide)[mask].abs().max()
    largest = (W.double().abs().max() + (out.B.double().abs() @ out.A.double().abs()).max()).item()
    eps = max(torch.finfo(dtype).eps, EPS32 if dtype != torch.float64 else EPS64)
    assert on_mask <= 4 * eps * largest
    plain = refine(W, mask, PruneOnly()).rel_error
    assert out.rel_error <= plain * (1 + 8 * eps)
    assert [p.rank for p in out.trace] == sorted(p.rank for p in out.trace)
    assert all(0 <= p.energy_frac <= 1 + 100 * EPS32 for p in out.trace)
    again = refine(W, mask, refiner, pattern=pattern)
    assert torch.equal(out.S, again.S)
    assert torch.equal(out.A, again.A)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("refiner", every_refiner(4), ids=lambda r: r.name)
def test_the_parameter_of_a_module_counts_as_its_values(
    refiner: AbstractRefiner, criterion: str, pattern: Pattern
) -> None:
    W = planted(24, 40, dtype=torch.float32)
    expected = refine(W, select_mask(W, criterion, pattern, inputs=stats_for(40)), refiner, pattern=pattern)
    parameter = torch.nn.Parameter(W.clone())
    out = refine(parameter, select_mask(parameter, criterion, pattern, inputs=stats_for(40)), refiner, pattern=pattern)
    assert torch.equal(parameter.detach(), W)
    for mine, theirs in zip((out.S, out.A, out.B), (expected.S, expected.A, expected.B), strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad


@pytest.mark.parametrize("shape", [(20, 32), (32, 20), (24, 24)])
@pytest.mark.parametrize(("k", "T"), [(1, 1), (4, 1), (1, 5), (6, 10), (20, 7)])
def test_exact_tlr_is_algorithm_1(shape: tuple[int, int], k: int, T: int) -> None:
    W = planted(*shape)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    _, L, objectives = oracle.tlr(W.numpy(), mask.numpy(), k, T)
    out = refine(W, mask, TLR(rank=k, n_iter=T, solver="exact"))

    np.testing.assert_allclose(
        [p.objective for p in out.trace], objectives, rtol=1e-10, atol=64 * EPS64 * float(W.norm())
    )
    low_rank = oracle.truncate(L, k)
    np.testing.assert_allclose((out.B @ out.A).numpy(), low_rank, rtol=0, atol=1e-10 * np.abs(low_rank).max())
    expected_S = np.where(mask.numpy(), W.numpy() - low_rank, 0)
    np.testing.assert_allclose(out.S.numpy(), expected_S, rtol=0, atol=1e-10 * np.abs(expected_S).max())
    expected_error = np.linalg.norm((W.numpy() - low_rank)[~mask.numpy()])
    assert out.objective == pytest.approx(expected_error, rel=1e-10, abs=64 * EPS64 * float(W.norm()))


def test_refitting_S_differs_from_the_papers_S_only_by_the_truncation() -> None:
    W = planted(20, 32)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    S, L, _ = oracle.tlr(W.numpy(), mask.numpy(), 6, 30)
    out = refine(W, mask, TLR(rank=6, n_iter=30, solver="exact"))
    tail = np.linalg.norm(L - oracle.truncate(L, 6))
    assert np.linalg.norm(out.S.numpy() - S) <= tail * (1 + 1e-10)


def test_rank_grows_from_one_to_k() -> None:
    assert [TLR(rank=4, n_iter=7).rank_at(t) for t in range(7)] == [1, 1, 2, 2, 3, 3, 4]
    assert TLR(rank=9, n_iter=1).rank_at(0) == 1


@given(data=st.data(), W=matrices())
def test_properties_of_the_exact_solver(data: st.DataObject, W: torch.Tensor) -> None:
    mask = select_mask(W, "magnitude", data.draw(patterns_for(W.shape[1])))
    k = data.draw(st.integers(0, min(W.shape)))
    out = refine(W, mask, TLR(rank=k, n_iter=data.draw(st.integers(1, 8)), solver="exact"))
    largest = float(W.abs().max())
    assert torch.all(out.S[~mask] == 0)
    assert torch.linalg.matrix_rank(out.B @ out.A, atol=1e3 * EPS64 * max(largest, 1e-300) * max(W.shape)) <= k
    dense = out.S + out.B @ out.A
    assert float((W - dense)[mask].abs().max() if mask.any() else 0.0) <= 64 * EPS64 * max(W.shape) * largest


@pytest.mark.parametrize("solver", ["exact", "subspace"])
def test_objective_falls_once_the_rank_stops_growing(solver: str) -> None:
    """Theorem 4.3: with constant rank (k = 1) alternating projection never raises the objective."""
    W = planted(40, 56)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    trace = refine(W, mask, TLR(rank=1, n_iter=60, solver=solver)).trace  # type: ignore[arg-type]
    objectives = [p.objective for p in trace]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(objectives))
    assert objectives[-1] < objectives[0]


@pytest.mark.parametrize("refiner", every_refiner(5), ids=lambda r: r.name)
def test_rows_may_be_permuted(refiner: AbstractRefiner) -> None:
    W = planted(30, 30)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    pattern = Unstructured(0.5)
    here, there = refine(W, mask, refiner, pattern=pattern), refine(W[order], mask[order], refiner, pattern=pattern)
    torch.testing.assert_close(there.S, here.S[order], rtol=0, atol=1e-9)
    torch.testing.assert_close(there.B @ there.A, (here.B @ here.A)[order], rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [8, 40])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_subspace_solver_reaches_the_exact_objective(shape: tuple[int, int], k: int) -> None:
    W = planted(*shape, dtype=torch.float32)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    exact = refine(W, mask, TLR(rank=k, solver="exact")).objective
    subspace = refine(W, mask, TLR(rank=k, solver="subspace")).objective
    assert subspace <= exact * 1.015


def test_acceleration_is_better_in_half_the_steps() -> None:
    W = planted(96, 96, dtype=torch.float32)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    exact = refine(W, mask, TLR(rank=24, n_iter=50, solver="exact")).objective
    out = refine(W, mask, AcceleratedTLR(rank=24, n_iter=25, rtol=0))
    assert len(out.trace) == 25
    assert out.objective < exact
    assert out.objective <= min(p.objective for p in out.trace) * (1 + 1e-4)  # the best iterate is returned


def test_acceleration_stops_when_nothing_changes() -> None:
    W = planted(24, 24)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    out = refine(W, mask, AcceleratedTLR(rank=2, n_iter=500, rtol=1e-4))
    assert out.status == "converged"
    assert len(out.trace) < 500
    assert refine(W, mask, AcceleratedTLR(rank=2, n_iter=5, rtol=0)).status == "max_steps"


def test_zero_shot_svd_is_the_truncated_svd_of_what_was_pruned() -> None:
    W = planted(20, 28)
    mask = select_mask(W, "magnitude", NM(2, 4))
    out = refine(W, mask, ZeroShotSVD(rank=5))
    expected = oracle.truncate(np.where(mask.numpy(), 0, W.numpy()), 5)
    np.testing.assert_allclose((out.B @ out.A).numpy(), expected, atol=1e-12 * np.abs(expected).max() * 20)


def test_the_published_zero_shot_baseline_leaves_the_kept_entries() -> None:
    W = planted(20, 28)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    out, refitted = (refine(W, mask, ZeroShotSVD(rank=5, refit=refit)) for refit in (False, True))
    assert torch.equal(out.S, W * mask)
    assert torch.equal(out.B @ out.A, refitted.B @ refitted.A)
    assert refitted.rel_error < out.rel_error


@pytest.mark.parametrize("refiner", [TLR(6, 20, "exact"), TLR(6, 20, "subspace"), AcceleratedTLR(6, 20)], ids=repr)
def test_input_scale_is_the_metric(refiner: AbstractRefiner) -> None:
    W = planted(48, 48)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    d = torch.linspace(0.1, 10, 48, dtype=torch.float64)
    scaled = refine(W, mask, refiner, input_scale=d)
    plain = refine(W, mask, refiner)
    by_hand = refine(W * d, mask, refiner)
    torch.testing.assert_close(scaled.B @ scaled.A * d, by_hand.B @ by_hand.A, rtol=1e-9, atol=1e-9)
    error = {name: float(((W - o.decomposition.to_dense()) * d).norm()) for name, o in [("s", scaled), ("p", plain)]}
    assert error["s"] < error["p"]
    assert scaled.objective == pytest.approx(error["s"], rel=1e-9)


def test_planted_rank_is_recovered_in_the_easy_regime_only() -> None:
    # TLR itself reaches rank k in its last step only, so it comes close but cannot converge to machine precision.
    g = torch.Generator().manual_seed(0)
    L = torch.randn(60, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 60, generator=g, dtype=torch.float64)
    spikes = 50 * torch.randn(60, 60, generator=g, dtype=torch.float64)
    easy = torch.rand(60, 60, generator=g) < 0.1
    out = refine(torch.where(easy, L + spikes, L), easy, AcceleratedTLR(rank=3, n_iter=400, rtol=0))
    assert float((out.B @ out.A - L).norm() / L.norm()) < 1e-6
    # With 97 % of the entries free there are fewer equations than unknowns: nothing can recover L.
    hard = torch.rand(60, 60, generator=g) < 0.97
    out = refine(torch.where(hard, L + spikes, L), hard, AcceleratedTLR(rank=3, n_iter=400, rtol=0))
    assert float((out.B @ out.A - L).norm() / L.norm()) > 1e-2


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.parametrize("refiner", every_refiner(3), ids=lambda r: r.name)
def test_extreme_sparsities(refiner: AbstractRefiner, sparsity: float) -> None:
    W = planted(16, 24)
    mask = select_mask(W, "magnitude", Unstructured(sparsity))
    out = refine(W, mask, refiner, pattern=Unstructured(sparsity))
    if sparsity == 0:
        assert out.rel_error <= 32 * EPS64
    else:
        best = np.linalg.norm(W.numpy() - oracle.truncate(W.numpy(), refiner.rank)) / np.linalg.norm(W.numpy())
        assert out.rel_error >= best * (1 - 1e-9)
        assert out.rel_error <= best * (1 + 1e-3)


@pytest.mark.parametrize("refiner", every_refiner(3), ids=lambda r: r.name)
def test_an_all_zero_matrix_stays_zero(refiner: AbstractRefiner) -> None:
    W = torch.zeros(12, 40)
    out = refine(W, select_mask(W, "magnitude", NM(2, 4)), refiner, pattern=NM(2, 4))
    assert out.rel_error == 0.0
    assert not out.decomposition.to_dense().any()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
@pytest.mark.parametrize("refiner", every_refiner(0), ids=lambda r: r.name)
def test_empty_matrices(refiner: AbstractRefiner, shape: tuple[int, int]) -> None:
    W = torch.zeros(shape)
    out = refine(W, W != 0, refiner, pattern=Unstructured(0.5))
    assert out.S.shape == shape
    assert out.rel_error == 0.0


def test_a_low_rank_matrix_does_not_break_the_subspace() -> None:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(64, 2, generator=g) @ torch.randn(2, 80, generator=g)
    W[:, 10:] = 0
    mask = torch.zeros_like(W, dtype=torch.bool)
    out = refine(W, mask, TLR(rank=8, n_iter=10, solver="subspace"))
    assert out.rel_error <= 200 * EPS32


def test_factors_are_rounded_before_S_is_fitted() -> None:
    """S absorbs the rounding of B and A: with S kept wide, the error on the mask vanishes."""
    W = planted(32, 32, dtype=torch.float32)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    out = refine(W, mask, TLR(rank=8), storage_dtype=torch.bfloat16)
    L = out.B.float() @ out.A.float()
    expected = torch.where(mask, W - L, 0).to(torch.bfloat16)
    assert torch.equal(out.S, expected)


@pytest.mark.parametrize("rank", [-1, 17])
def test_ranks_out_of_range_are_refused(rank: int) -> None:
    W = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(W, dtype=torch.bool)
    for refiner in (TLR(rank=rank), AcceleratedTLR(rank=rank), ZeroShotSVD(rank=rank)):
        with pytest.raises(UsageError, match=rf"rank must be in \[0, 16\] for W of shape \(16, 24\), got {rank}"):
            refine(W, mask, refiner)


def test_a_rank_is_a_whole_number_of_any_library() -> None:
    W = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(W, dtype=torch.bool)
    assert refine(W, mask, TLR(rank=np.int64(3))).A.shape == (3, 24)  # type: ignore[arg-type]
    for rank in (2.0, "5%", None, True):
        with pytest.raises(UsageError, match=r"rank must be a whole number, got .* A percentage is for a Recipe"):
            refine(W, mask, TLR(rank=rank))  # type: ignore[arg-type]


def test_bad_hyperparameters_are_refused() -> None:
    with pytest.raises(UsageError, match="n_iter must be at least 1, got 0"):
        TLR(rank=4, n_iter=0)
    with pytest.raises(UsageError, match=r"solver must be one of auto, subspace, exact, got 'svd'"):
        TLR(rank=4, solver="svd")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="rtol must be at least 0"):
        AcceleratedTLR(rank=4, rtol=-1.0)


def test_bad_input_is_refused() -> None:
    W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(W, dtype=torch.bool)
    with pytest.raises(UsageError, match=r"mask must be a bool tensor of shape \(8, 8\)"):
        refine(W, mask.float(), TLR(2))
    with pytest.raises(UsageError, match=r"input_scale must have shape \(8,\), got \(7,\)"):
        refine(W, mask, TLR(2), input_scale=torch.ones(7))
    scale = torch.ones(8)
    scale[5] = 0
    with pytest.raises(UsageError, match=r"input_scale must be positive, got 0\.0 in column 5"):
        refine(W, mask, TLR(2), input_scale=scale)
    scale[5] = math.nan
    with pytest.raises(NonFiniteError, match="input_scale holds NaN"):
        refine(W, mask, TLR(2), input_scale=scale)
    with pytest.raises(NonFiniteError, match=r"start of shape \(8, 8\) holds NaN"):
        refine(W, mask, TLR(2), start=W * math.nan)
    W[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        refine(W, mask, TLR(2))


def test_dtypes_that_are_not_computed_in_are_refused() -> None:
    W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(W, dtype=torch.bool)
    with pytest.raises(UsageError, match=r"W must be .* or torch\.bfloat16, got torch\.float8_e4m3fn"):
        refine(W.to(torch.float8_e4m3fn), mask, TLR(2))
    for dtype in (torch.float16, torch.bfloat16, torch.int32):
        with pytest.raises(UsageError, match=r"compute in, must be torch\.float32 or torch\.float64, got torch\."):
            refine(W, mask, TLR(2), dtype=dtype)
    with pytest.raises(UsageError, match=r"storage_dtype must be .*, got torch\.int8"):
        refine(W, mask, TLR(2), storage_dtype=torch.int8)


@pytest.mark.parametrize(
    "change", [{"gram": torch.eye(7)}, {"mean": torch.ones(7)}, {"mean_abs": torch.ones(9)}], ids=str
)
def test_statistics_of_other_inputs_are_refused(change: dict[str, torch.Tensor]) -> None:
    W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    stats = InputStats(4, torch.ones(8), **change)
    (name,) = change
    with pytest.raises(UsageError, match=rf"the statistics are of other inputs: {name} has shape \([79]"):
        select_mask(W, "sparsegpt" if name == "gram" else "wanda", NM(2, 4), inputs=stats)
    with pytest.raises(UsageError, match=rf"the statistics are of other inputs: {name} has shape \([79]"):
        refine(W, W != 0, SLiMLoRA(2), input_scale=torch.ones(8), inputs=stats)


def test_overflow_is_reported_with_the_iteration() -> None:
    W = torch.full((8, 8), 1e38) * torch.eye(8)
    W[0] = 1e38
    mask = torch.eye(8, dtype=torch.bool)
    with pytest.raises(NonFiniteError, match="iteration 0"):
        refine(W, mask, TLR(2, n_iter=3, solver="subspace"))


def test_overflow_of_the_storage_dtype_is_reported() -> None:
    W = torch.eye(8) * 1e6
    with pytest.raises(NonFiniteError, match=r"rounding to torch\.float16 overflowed after iteration 49\. Store in"):
        refine(W, W != 0, TLR(2), storage_dtype=torch.float16)
    with pytest.raises(NonFiniteError, match=r"rounding to torch\.float16 overflowed\. Store in"):
        refine(W, W != 0, PruneOnly(), storage_dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("power", [-83, -66, 61, 83])
def test_errors_are_right_where_squares_leave_float32(power: int, dtype: torch.dtype) -> None:
    W = planted(16, 24, dtype=dtype)
    mask = select_mask(W, "magnitude", NM(2, 4))
    for metric in (Metric(), diagonal_metric(torch.linspace(1, 2, 24))):
        expected = refine(W, mask, PruneOnly(), metric=metric)
        out = refine(W * 2.0**power, mask, PruneOnly(), metric=metric)
        assert out.rel_error == pytest.approx(expected.rel_error, rel=16 * EPS32)
        assert (out.rel_output_error or 0.0) == pytest.approx(expected.rel_output_error or 0.0, rel=16 * EPS32)
        assert out.objective == pytest.approx(expected.objective * 2.0**power, rel=16 * EPS32)
    for refiner in every_refiner(4):
        try:
            out = refine(W * 2.0**power, mask, refiner, pattern=NM(2, 4))
        except NonFiniteError:
            assert power > 0
            continue
        error = (W * 2.0**power).double() - out.decomposition.to_dense().double()
        assert out.rel_error == pytest.approx(float(error.norm() / (W * 2.0**power).double().norm()), rel=1e-3)


def test_an_error_that_is_not_finite_is_reported() -> None:
    W = torch.full((8, 8), 1e200, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"the error of W of shape \(8, 8\) is not finite"):
        refine(W, torch.eye(8, dtype=torch.bool), PruneOnly())
    W = torch.full((8, 8), 1e30)
    with pytest.raises(NonFiniteError, match=r"none gave a non-finite S for W of shape \(8, 8\)"):
        refine(W, torch.eye(8, dtype=torch.bool), PruneOnly(), gram=torch.eye(8) + 1)


def stack_of(n: int, dtype: torch.dtype, device: str = "cpu") -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Some matrices of one shape, all zero and of rank 1 among them, and masks."""
    weights = [planted(24, 40, seed=seed, dtype=dtype) for seed in range(n)]
    weights[1] = torch.zeros(24, 40, dtype=dtype)
    weights[2] = torch.ones(24, 40, dtype=dtype)
    masks = [select_mask(W, "magnitude", Unstructured(0.5)) for W in weights]
    return [W.to(device) for W in weights], [mask.to(device) for mask in masks]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("refiner", [TLR(4), TLR(12, n_iter=9, solver="subspace"), TLR(1, n_iter=1), TLR(0)], ids=str)
def test_a_stack_gives_what_its_matrices_give_alone(refiner: TLR, dtype: torch.dtype) -> None:
    weights, masks = stack_of(5, dtype)
    assert refiner.stacks(24, 40)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(5)]
    found = refine_stack(weights, masks, refiner, generators=seeds)
    for seed, (W, mask, one) in enumerate(zip(weights, masks, found, strict=True)):
        alone = refine(W, mask, refiner, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(one.decomposition.mask, mask)
        assert [p.rank for p in one.trace] == [p.rank for p in alone.trace]
        # Rounding is carried from step to step, and then S, A and B are rounded to their dtype.
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        size = float(torch.linalg.vector_norm(W.double()))
        for mine, other in zip(one.trace, alone.trace, strict=True):
            assert mine.objective == pytest.approx(other.objective, rel=1e4 * eps, abs=1e3 * eps * size)
            assert mine.energy_frac == pytest.approx(other.energy_frac, rel=1e4 * eps)
        stored = torch.finfo(dtype).eps
        assert one.rel_error == pytest.approx(alone.rel_error, rel=1e4 * eps, abs=4 * stored)
        gap = one.decomposition.to_dense().double() - alone.decomposition.to_dense().double()
        assert float(torch.linalg.vector_norm(gap)) <= (8 * stored + 1e5 * eps) * size


def test_a_stack_of_parameters_counts_as_their_values() -> None:
    weights, masks = stack_of(3, torch.float32)
    found, mine = (
        refine_stack(given, masks, TLR(4), generators=[torch.Generator().manual_seed(0) for _ in given])
        for given in (weights, [torch.nn.Parameter(W) for W in weights])
    )
    for one, other in zip(found, mine, strict=True):
        assert torch.equal(one.S, other.S)
        assert not other.S.requires_grad


def test_a_stack_is_checked() -> None:
    weights, masks = stack_of(3, torch.float32)
    seeds = [torch.Generator().manual_seed(0)] * 3
    weights[2][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        refine_stack(weights, masks, TLR(4), generators=seeds)
    large = torch.full((8, 8), 1e38) * torch.eye(8)
    large[0] = 1e38
    masks = [torch.eye(8, dtype=torch.bool)] * 3
    with pytest.raises(NonFiniteError, match=r"tlr gave a non-finite objective in iteration 0 .*\(8, 8\)"):
        refine_stack([torch.eye(8), large, torch.eye(8)], masks, TLR(2, solver="subspace"), generators=seeds)
    assert not TLR(4, solver="exact").stacks(24, 40)
    assert not TLR(24).stacks(24, 40)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [4, 12])
def test_a_stack_on_cuda_gives_what_its_matrices_give_alone(rank: int) -> None:
    def source(seed: int) -> torch.Generator:
        return torch.Generator(device="cuda").manual_seed(seed)

    weights, masks = stack_of(40, torch.float32, "cuda")
    refiner = TLR(rank, solver="subspace")
    found = refine_stack(weights, masks, refiner, generators=[source(seed) for seed in range(40)])
    for seed, (W, mask, one) in enumerate(zip(weights, masks, found, strict=True)):
        alone = refine(W, mask, refiner, generator=source(seed))
        assert one.rel_error == pytest.approx(alone.rel_error, rel=1e-3, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("refiner", every_refiner(16), ids=lambda r: r.name)
def test_cuda_agrees_with_cpu(refiner: AbstractRefiner) -> None:
    W = planted(128, 160, dtype=torch.float32)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    gpu = W.cuda()
    assert torch.equal(select_mask(gpu, "magnitude", Unstructured(0.5)).cpu(), mask)
    here, there = (refine(x, kept, refiner, pattern=Unstructured(0.5)) for x, kept in ((W, mask), (gpu, mask.cuda())))
    assert there.S.is_cuda
    assert there.rel_error == pytest.approx(here.rel_error, rel=1e-2)
