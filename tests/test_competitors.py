"""Published competitors: HASSLE-free, EoRA, SLiM-LoRA and DSnoT, against float64 NumPy versions of their papers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mendlm
import oracle
from mendlm import NM, EoRA, HassleFree, PruneOnly, Recipe, SLiMLoRA, Unstructured, ZeroShotSVD, refine, select_mask
from mendlm.config import Calibration
from mendlm.criteria import DSnoT, SparseGPT
from mendlm.errors import UsageError
from mendlm.inputs import InputStats
from mendlm.linalg import inverse_factor
from mendlm.metrics import GramMetric, Metric, diagonal_metric, gram_metric, make_metric
from mendlm.patterns import Pattern, Tiles, n_kept_total
from mendlm.refiners import AbstractRefiner
from mendlm.refiners._alps import alps
from mendlm.selection import select
from strategies import inputs_for, stats_for
from test_refiners import planted

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
CPU = torch.device("cpu")
D_OUT, D_IN, RANK = 24, 40, 4
PATTERNS: list[Pattern] = [Unstructured(0.5), Unstructured(0.6, "row"), NM(2, 4), NM(1, 8), Tiles(0.5, 4, 4)]
STATS = stats_for(D_IN)


def gram_of(stats: InputStats) -> torch.Tensor:
    assert stats.gram is not None
    return stats.gram


def metric_of(dtype: torch.dtype = torch.float64, stats: InputStats = STATS) -> GramMetric:
    metric = make_metric("gram", stats, damping=0.01, dtype=dtype, device=CPU)
    assert isinstance(metric, GramMetric)
    return metric


DAMPED = oracle.damped(gram_of(STATS).numpy(), 0.01)


# What is derived from a Gram matrix.


def test_what_is_derived_from_a_metric_is_computed_once() -> None:
    metric = metric_of()
    assert metric.eigen[0] is metric.eigen[0]
    assert metric.inverse_factor is metric.inverse_factor
    assert metric_of(torch.float32).eigen[1].dtype == metric_of(torch.float32).inverse_factor.dtype == torch.float32


def test_eigenvectors_and_inverse_factor_are_those_of_the_correlation() -> None:
    metric = metric_of()
    R = metric.parts()[0]
    values, vectors = metric.eigen
    assert torch.all(values.diff() >= 0)
    bound = {"rtol": 0, "atol": 16 * D_IN * EPS64 * float(values[-1] / values[0])}
    torch.testing.assert_close((vectors * values) @ vectors.T, R, **bound)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(D_IN, dtype=torch.float64), **bound)
    U = metric.inverse_factor
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ R, torch.eye(D_IN, dtype=torch.float64), **bound)
    assert inverse_factor(-R) is None


def test_a_metric_rounded_to_float32_has_an_inverse_factor() -> None:
    """Ten tokens for 40 inputs: with the least damping that float64 accepts float32 may have rounded it away."""
    X = inputs_for(D_IN, n_tokens=10)
    metric = gram_metric(X.T @ X / 10, 0.0, torch.float32)
    assert torch.isfinite(metric.inverse_factor).all()


def test_a_metric_without_a_gram_matrix_is_refused() -> None:
    for name in ("eigen", "inverse_factor"):
        with pytest.raises(UsageError, match=r"made by mendlm\.metrics\.gram_metric"):
            getattr(GramMetric(), name)
    no_correlation = GramMetric(None, -torch.eye(3), torch.eye(3))
    with pytest.raises(UsageError, match="no positive definite correlation"):
        _ = no_correlation.inverse_factor


# EoRA


@pytest.mark.parametrize("rank", [0, 1, 5, 24])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_eora_is_that_of_the_paper(criterion: str, rank: int) -> None:
    W = planted(D_OUT, D_IN)
    chosen = select(W, criterion, NM(2, 4), inputs=STATS)
    S = W * chosen.mask if chosen.S is None else chosen.S
    out = refine(W, chosen.mask, EoRA(rank), metric=metric_of(), start=chosen.S)
    expected = oracle.eora((W - S).numpy(), DAMPED, rank)
    np.testing.assert_allclose((out.B @ out.A).numpy(), expected, rtol=0, atol=1e-10 * (np.abs(expected).max() + 1))
    torch.testing.assert_close(out.S, S, rtol=0, atol=4 * EPS64 * float(S.abs().max()))
    assert torch.all(out.S[~chosen.mask] == 0)
    error = oracle.gram_norm((W - S).numpy() - expected, DAMPED)
    assert out.objective == pytest.approx(error, rel=1e-9, abs=1e-9)
    assert out.trace[-1].objective == pytest.approx(error, rel=1e-9, abs=1e-9)
    total = oracle.gram_norm((W - S).numpy(), DAMPED)
    assert out.trace[-1].energy_frac == pytest.approx(1 - error**2 / total**2, abs=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_eora_is_zero_shot_svd_in_the_gram_metric(pattern: Pattern, dtype: torch.dtype) -> None:
    W = planted(D_OUT, D_IN, dtype=dtype)
    chosen = select(W, "sparsegpt", pattern, inputs=STATS)
    here, there = (
        refine(W, chosen.mask, refiner, metric=metric_of(dtype), start=chosen.S)
        for refiner in (EoRA(RANK), ZeroShotSVD(RANK, refit=False))
    )
    assert here.objective == pytest.approx(there.objective, rel=1e3 * torch.finfo(dtype).eps)
    gap = metric_of(dtype).norm(here.B @ here.A - there.B @ there.A)
    assert gap <= 1e4 * torch.finfo(dtype).eps * metric_of(dtype).norm(W)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_eora_with_fewer_tokens_than_inputs(dtype: torch.dtype) -> None:
    """With a compensation of rank 10 the outputs on 10 tokens can be matched exactly; and L is bounded."""
    X = inputs_for(D_IN, n_tokens=10)
    W = planted(D_OUT, D_IN, dtype=dtype)
    mask = select_mask(W, "magnitude", NM(2, 4))
    metric = gram_metric(X.T @ X / 10, 0.0, dtype)
    out = refine(W, mask, EoRA(10), metric=metric)
    assert out.rel_output_error is not None
    assert out.rel_output_error <= 1e-2  # what damping makes of nothing
    assert float((out.B @ out.A).norm()) <= 10 * float(W.norm())


def test_eora_of_an_exactly_singular_matrix() -> None:
    """The pseudo-inverse leaves directions without inputs alone."""
    X = inputs_for(D_IN, n_tokens=10)
    correlation = X.T @ X / X.square().sum(dim=0).sqrt().outer(X.square().sum(dim=0).sqrt())
    metric = GramMetric(None, correlation, torch.linalg.qr(X, mode="r").R.T @ torch.diag(1 / X.norm(dim=0))[:10, :10])
    values, vectors = metric.eigen
    assert int((values > 1e-12).sum()) == 10
    from mendlm.refiners.eora import _eigenspace

    project, back = _eigenspace(metric)
    on_inputs = vectors[:, -10:] @ vectors[:, -10:].T
    torch.testing.assert_close(project @ back, on_inputs, rtol=0, atol=1e-9)


# SLiM-LoRA


@pytest.mark.parametrize("kind", ["diagonal", "gram"])
@pytest.mark.parametrize("rank", [0, 1, 5, 24])
def test_slim_lora_is_that_of_the_paper(kind: str, rank: int) -> None:
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "wanda", Unstructured(0.5, "row"), inputs=STATS)
    metric = make_metric(kind, STATS, damping=0.01, dtype=torch.float64, device=CPU)
    out = refine(W, mask, SLiMLoRA(rank), metric=metric, inputs=STATS)
    assert STATS.mean_abs is not None
    lost = (W * ~mask).numpy()
    expected = oracle.slim_lora(lost, STATS.mean_abs.numpy(), rank)
    np.testing.assert_allclose((out.B @ out.A).numpy(), expected, rtol=0, atol=1e-11 * (np.abs(expected).max() + 1))
    torch.testing.assert_close(out.S, W * mask, rtol=0, atol=4 * EPS64 * float(W.abs().max()))
    gram = DAMPED if kind == "gram" else np.diag(STATS.second_moment.numpy())
    assert out.objective == pytest.approx(oracle.gram_norm(lost - expected, gram), rel=1e-9)


def test_slim_lora_can_fit_S_as_the_code_does() -> None:
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "wanda", NM(2, 4), inputs=STATS)
    how = {"metric": make_metric("diagonal", STATS, damping=0.01, dtype=torch.float64, device=CPU), "inputs": STATS}
    plain, fitted = (refine(W, mask, SLiMLoRA(RANK, refit), **how) for refit in (False, True))  # type: ignore[arg-type]
    assert torch.equal(plain.B @ plain.A, fitted.B @ fitted.A)
    torch.testing.assert_close(fitted.S, (W - fitted.B @ fitted.A) * mask, rtol=0, atol=1e-14)
    assert fitted.objective < plain.objective


def test_slim_lora_with_inputs_that_are_never_used() -> None:
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "magnitude", NM(2, 4))
    assert STATS.mean_abs is not None
    sizes = STATS.mean_abs.clone()
    sizes[3] = 0
    metric = diagonal_metric(STATS.scale)
    out = refine(W, mask, SLiMLoRA(RANK), metric=metric, inputs=replace(STATS, mean_abs=sizes))
    expected = oracle.slim_lora((W * ~mask).numpy(), sizes.numpy(), RANK)
    np.testing.assert_allclose((out.B @ out.A).numpy(), expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    out = refine(W, mask, SLiMLoRA(RANK), metric=metric, inputs=replace(STATS, mean_abs=torch.zeros_like(sizes)))
    expected = oracle.truncate((W * ~mask).numpy(), RANK)  # x is 1 everywhere
    np.testing.assert_allclose((out.B @ out.A).numpy(), expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def test_slim_lora_needs_the_sizes_of_its_own_inputs() -> None:
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "magnitude", NM(2, 4))
    for inputs in (None, replace(STATS, mean_abs=None)):
        with pytest.raises(UsageError, match=r"'slim-lora' needs the mean sizes of the inputs\. Calibrate, or pass"):
            refine(W, mask, SLiMLoRA(RANK), input_scale=STATS.scale, inputs=inputs)
    with pytest.raises(UsageError, match=r"the statistics are of 8 inputs, W of shape \(24, 40\) has 40"):
        refine(W, mask, SLiMLoRA(RANK), input_scale=STATS.scale, inputs=stats_for(8))


# HASSLE-free


def alternate(W: torch.Tensor, pattern: Pattern, rank: int, n_iter: int) -> tuple[list[float], np.ndarray, np.ndarray]:
    """The paper's alternation in the original columns: SparseGPT on W - L, L by an SVD with an explicit inverse.

    Objectives, and mask and S with the least one.
    """
    root = np.linalg.cholesky(DAMPED)
    L = np.zeros(W.shape)
    objectives: list[float] = []
    best = (np.zeros(W.shape, dtype=bool), L)
    for _ in range(n_iter):
        chosen = select(W - torch.from_numpy(L), SparseGPT(damping=0.01), pattern, inputs=STATS)
        assert chosen.S is not None
        S = chosen.S.numpy()
        L = oracle.truncate((W.numpy() - S) @ root, rank) @ np.linalg.inv(root)
        objectives.append(oracle.gram_norm(W.numpy() - S - L, DAMPED))
        if objectives[-1] == min(objectives):
            best = (chosen.mask.numpy(), S)
    return objectives, *best


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_hassle_free_is_the_papers_alternation(pattern: Pattern) -> None:
    W = planted(D_OUT, D_IN)
    objectives, mask, S = alternate(W, pattern, RANK, 6)
    given = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) < 0.5  # it does not look at it
    out = refine(W, given, HassleFree(RANK, n_iter=6, solver="exact"), metric=metric_of(), pattern=pattern)
    np.testing.assert_allclose([p.objective for p in out.trace], objectives, rtol=1e-8)
    np.testing.assert_array_equal(out.decomposition.mask.numpy(), mask)
    L = oracle.truncate((W.numpy() - S) @ np.linalg.cholesky(DAMPED), RANK) @ np.linalg.inv(np.linalg.cholesky(DAMPED))
    np.testing.assert_allclose((out.B @ out.A).numpy(), L, rtol=0, atol=1e-8 * np.abs(L).max())
    assert out.objective <= min(objectives) * (1 + 1e-12)  # S is fitted to the best L


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparse_step", ["sparsegpt", "alps"])
def test_hassle_free_is_no_worse_than_what_it_starts_from(
    sparse_step: str, dtype: torch.dtype, pattern: Pattern
) -> None:
    W = planted(D_OUT, D_IN, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    metric = metric_of(compute)
    chosen = select(W, "sparsegpt", pattern, inputs=STATS)
    start = refine(W, chosen.mask, ZeroShotSVD(RANK, refit=False), metric=metric, start=chosen.S)
    refiner = HassleFree(RANK, n_iter=8, sparse_step=sparse_step)  # type: ignore[arg-type]
    out = refine(W, chosen.mask, refiner, metric=metric, pattern=pattern)
    mask = out.decomposition.mask
    assert out.objective <= start.objective * (1 + 1e-6)
    assert out.rel_output_error is not None
    assert start.rel_output_error is not None
    assert out.rel_output_error <= start.rel_output_error + 2 * torch.finfo(dtype).eps
    assert int(mask.sum()) == n_kept_total(pattern, D_OUT, D_IN)
    assert torch.all(out.S[~mask] == 0)
    if isinstance(pattern, NM):
        assert torch.all(mask.reshape(-1, pattern.m).sum(dim=1) == pattern.n)
    if isinstance(pattern, Unstructured) and pattern.scope == "row":
        assert torch.all(mask.sum(dim=1) == pattern.n_kept(D_IN))
    again = refine(W, chosen.mask, refiner, metric=metric, pattern=pattern)
    assert torch.equal(out.S, again.S)


def test_the_first_iterate_is_sparsegpt_with_the_best_L_on_top() -> None:
    W = planted(D_OUT, D_IN)
    chosen = select(W, "sparsegpt", NM(2, 4), inputs=STATS)
    start = refine(W, chosen.mask, ZeroShotSVD(RANK, refit=False), metric=metric_of(), start=chosen.S)
    out = refine(W, chosen.mask, HassleFree(RANK, n_iter=1, solver="exact"), metric=metric_of(), pattern=NM(2, 4))
    assert torch.equal(out.decomposition.mask, chosen.mask)
    assert out.trace[0].objective == pytest.approx(start.objective, rel=1e-10)
    none = refine(W, chosen.mask, HassleFree(0), metric=metric_of(), pattern=NM(2, 4))
    assert torch.equal(none.decomposition.mask, chosen.mask)
    assert len(none.trace) == 1
    assert none.objective < oracle.gram_norm((W - chosen.S).numpy(), DAMPED)  # type: ignore[operator]


def test_the_best_iterate_is_returned() -> None:
    W = planted(D_OUT, D_IN)
    metric = metric_of()
    for n_iter in (1, 3, 20):
        out = refine(W, torch.ones_like(W) > 0, HassleFree(RANK, n_iter=n_iter), metric=metric, pattern=NM(2, 4))
        assert out.objective <= min(p.objective for p in out.trace) * (1 + 1e-9)


def test_the_subspace_reaches_the_exact_alternation() -> None:
    stats = stats_for(160)
    W = planted(96, 160, dtype=torch.float32)
    metric = metric_of(torch.float32, stats)
    exact, subspace = (
        refine(W, W != 0, HassleFree(8, n_iter=15, solver=s), metric=metric, pattern=NM(2, 4)).objective  # type: ignore[arg-type]
        for s in ("exact", "subspace")
    )
    assert subspace <= exact * 1.02


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alps_is_better_than_sparsegpt_alone(pattern: Pattern) -> None:
    W, metric = planted(D_OUT, D_IN), metric_of()
    mask, S = alps(metric.scaled(W), metric, pattern, rho=0.1)
    assert int(mask.sum()) == n_kept_total(pattern, D_OUT, D_IN)
    assert torch.all(S[~mask] == 0)
    chosen = select(W, "sparsegpt", pattern, inputs=STATS)
    assert chosen.S is not None
    assert metric.norm(W - metric.unscaled(S)) < metric.norm(W - chosen.S)


def test_alps_of_nothing_and_everything() -> None:
    W, metric = planted(D_OUT, D_IN), metric_of()
    target = metric.scaled(W)
    mask, S = alps(target, metric, Unstructured(0.0), rho=0.1)
    assert mask.all()
    torch.testing.assert_close(S, target, rtol=1e-6, atol=1e-6)
    mask, S = alps(target, metric, Unstructured(1.0), rho=0.1)
    assert not mask.any()
    assert not S.any()
    mask, S = alps(torch.zeros_like(target), metric, NM(2, 4), rho=0.1)
    assert not S.any()


def clear_cut(dtype: torch.dtype) -> list[tuple[torch.Tensor, Pattern]]:
    """Weights whose mask nothing moves, with the patterns that see it."""
    W = planted(D_OUT, D_IN, dtype=dtype)
    large = torch.where(torch.arange(D_IN) % 4 < 2, 100 * W.sign(), 0.01 * W)
    return [
        (torch.zeros_like(W), NM(2, 4)),
        (W, Unstructured(0.0)),
        (W, Unstructured(1.0)),
        (large, NM(2, 4)),
        (torch.where(torch.arange(D_IN) % 4 < 2, W, 0), NM(2, 4)),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [0, 2])
def test_alps_ends_on_a_mask_that_nothing_moves(rank: int, dtype: torch.dtype) -> None:
    for W, pattern in clear_cut(dtype):
        mask = select_mask(W, "magnitude", pattern)
        out = refine(W, mask, HassleFree(rank, 3, "alps"), metric=metric_of(dtype), pattern=pattern)
        assert torch.equal(out.decomposition.mask, mask)
        best = refine(W, mask, PruneOnly(), metric=metric_of(dtype))
        assert out.rel_output_error is not None
        assert best.rel_output_error is not None
        assert out.rel_output_error <= best.rel_output_error * 1.001 + 16 * torch.finfo(dtype).eps
    column = planted(D_OUT, 1, dtype=dtype)
    metric = gram_metric(torch.ones(1, 1), 0.01, dtype)
    mask = select_mask(column, "magnitude", Unstructured(0.5))
    out = refine(column, mask, HassleFree(0, 3, "alps"), metric=metric, pattern=Unstructured(0.5))
    assert torch.equal(out.decomposition.mask, mask)


def test_bad_fields_of_hassle_free_are_refused() -> None:
    for bad, message in (
        ({"n_iter": 0}, "n_iter must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"sparse_step": "wanda"}, "sparse_step must be one of sparsegpt, alps, got 'wanda'"),
        ({"solver": "svd"}, "solver must be one of"),
    ):
        with pytest.raises(UsageError, match=message):
            HassleFree(RANK, **bad)  # type: ignore[arg-type]
    W = planted(D_OUT, D_IN)
    with pytest.raises(UsageError, match="'hassle-free' moves the mask, so it needs the pattern"):
        refine(W, W != 0, HassleFree(RANK), metric=metric_of())


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.parametrize("refiner", [HassleFree(3, 5), HassleFree(3, 3, "alps"), EoRA(3), SLiMLoRA(3)], ids=repr)
def test_extreme_sparsities(refiner: AbstractRefiner, sparsity: float) -> None:
    W = planted(16, D_IN)
    mask = select_mask(W, "magnitude", Unstructured(sparsity))
    metric: Metric = metric_of() if "gram" in refiner.metrics[:1] else diagonal_metric(STATS.scale)
    out = refine(W, mask, refiner, metric=metric, pattern=Unstructured(sparsity), inputs=STATS)
    assert out.rel_output_error is not None
    if sparsity == 0:
        assert out.rel_output_error <= 1e-6
        return
    assert not out.S.any()
    if isinstance(refiner, SLiMLoRA):
        return
    best = refine(W, mask, ZeroShotSVD(3), metric=metric).rel_output_error
    assert out.rel_output_error == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("refiner", [HassleFree(3, 5), EoRA(3), SLiMLoRA(3)], ids=repr)
def test_a_zero_matrix_and_its_permuted_rows(refiner: AbstractRefiner) -> None:
    metric: Metric = metric_of() if "gram" in refiner.metrics[:1] else diagonal_metric(STATS.scale)
    W = torch.zeros(12, D_IN, dtype=torch.float64)
    mask = select_mask(W, "magnitude", NM(2, 4))
    out = refine(W, mask, refiner, metric=metric, pattern=NM(2, 4), inputs=STATS)
    assert not out.decomposition.to_dense().any()
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "magnitude", NM(2, 4))
    order = torch.randperm(D_OUT, generator=torch.Generator().manual_seed(3))
    here, there = (
        refine(W[rows], mask[rows], refiner, metric=metric, pattern=NM(2, 4), inputs=STATS)
        for rows in (torch.arange(D_OUT), order)
    )
    torch.testing.assert_close(there.S, here.S[order], rtol=0, atol=1e-8)
    torch.testing.assert_close(there.B @ there.A, (here.B @ here.A)[order], rtol=0, atol=1e-8)


# DSnoT

DSNOT_PATTERNS: list[Pattern] = [Unstructured(0.5, "row"), Unstructured(0.6), NM(2, 4), NM(1, 8), NM(3, 5)]
DSNOTS = [
    DSnoT(),
    DSnoT(initial="magnitude"),
    DSnoT(max_cycles=3),
    DSnoT(regrowing_power=0.0, same_sign=True),
    DSnoT(update_threshold=2048.0),
]


def shifted_stats(d_in: int, seed: int = 0) -> InputStats:
    """Inputs with means, half of their spread."""
    X = inputs_for(d_in, seed)
    X = X + 0.5 * X.std(dim=0) * torch.randn(d_in, generator=torch.Generator().manual_seed(seed), dtype=X.dtype)
    return InputStats(len(X), X.square().mean(dim=0), X.T @ X / len(X), X.mean(dim=0), X.abs().mean(dim=0))


@pytest.mark.parametrize("pattern", DSNOT_PATTERNS, ids=str)
@pytest.mark.parametrize("criterion", DSNOTS, ids=repr)
def test_dsnot_is_that_of_the_paper(criterion: DSnoT, pattern: Pattern) -> None:
    W, stats = planted(D_OUT, D_IN), shifted_stats(D_IN)
    assert stats.mean is not None
    initial = select_mask(W, criterion.initial, pattern, inputs=stats).numpy()
    got = select_mask(W, criterion, pattern, inputs=stats).numpy()
    mean, norms = stats.mean.numpy(), stats.scale.numpy()
    variance = stats.second_moment.numpy() - mean**2
    size = np.abs(W.numpy())
    scores = size * norms if criterion.initial == "wanda" else size
    expected = np.stack(
        [
            oracle.dsnot_row(
                W[i].numpy(),
                initial[i],
                mean,
                variance,
                size[i] * norms,
                scores[i],
                m=pattern.m if isinstance(pattern, NM) else None,
                cycles=criterion.max_cycles,
                threshold=criterion.update_threshold / 2048,
                power=criterion.regrowing_power,
                same_sign=criterion.same_sign,
            )
            for i in range(D_OUT)
        ]
    )
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got.sum(axis=1), initial.sum(axis=1))
    assert int(got.sum()) == n_kept_total(pattern, D_OUT, D_IN)
    if isinstance(pattern, NM):
        assert np.all(got.reshape(-1, pattern.m).sum(axis=1) == pattern.n)
    if criterion == DSnoT():
        assert not np.array_equal(got, initial)


@pytest.mark.parametrize("pattern", DSNOT_PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dsnot_lowers_the_expected_error(pattern: Pattern, dtype: torch.dtype) -> None:
    W, stats = planted(48, 80, dtype=dtype), shifted_stats(80)
    assert stats.mean is not None
    before, after = (
        (W.double() * ~select_mask(W, criterion, pattern, inputs=stats) @ stats.mean).abs()
        for criterion in ("wanda", DSnoT(same_sign=True))
    )
    assert float(after.mean()) < 0.9 * float(before.mean())
    rounding = 80 * EPS32 * (W.double().abs() @ stats.mean.abs())
    assert torch.all(after <= before + rounding)


def test_dsnot_leaves_what_has_no_expected_error() -> None:
    W = planted(D_OUT, D_IN)
    stats = replace(STATS, mean=torch.zeros_like(STATS.second_moment))
    for pattern in DSNOT_PATTERNS:
        for criterion, inputs in ((DSnoT(), stats), (DSnoT(max_cycles=0), shifted_stats(D_IN))):
            wanda = select_mask(W, "wanda", pattern, inputs=inputs)
            assert torch.equal(select_mask(W, criterion, pattern, inputs=inputs), wanda)


def test_dsnot_of_inputs_that_never_change() -> None:
    """Variance 0: such weights are grown first, and nothing is divided by zero."""
    W = planted(D_OUT, D_IN, dtype=torch.float32)
    mean = torch.ones(D_IN, dtype=torch.float64)
    for pattern in DSNOT_PATTERNS:
        mask = select_mask(W, "dsnot", pattern, inputs=InputStats(9, mean.clone(), None, mean))
        assert int(mask.sum()) == n_kept_total(pattern, D_OUT, D_IN)


def test_bad_input_of_dsnot_is_refused() -> None:
    W = planted(D_OUT, D_IN)
    with pytest.raises(UsageError, match=r"needs the means of the inputs\. Calibrate, or pass inputs"):
        select_mask(W, "dsnot", NM(2, 4), inputs=replace(STATS, mean=None))
    with pytest.raises(UsageError, match=r"'dsnot' swaps single weights, got pattern 0\.5 4x4"):
        select_mask(W, "dsnot", Tiles(0.5, 4, 4), inputs=STATS)
    for bad, message in (
        ({"initial": "sparsegpt"}, "initial must be one of wanda, magnitude, got 'sparsegpt'"),
        ({"max_cycles": -1}, "max_cycles must be at least 0, got -1"),
        ({"update_threshold": -0.1}, "update_threshold must be a number >= 0"),
        ({"regrowing_power": float("nan")}, "regrowing_power must be a number >= 0"),
    ):
        with pytest.raises(UsageError, match=message):
            DSnoT(**bad)  # type: ignore[arg-type]


# In recipes and in a whole run.


@pytest.mark.parametrize("name", ["hassle-free", "eora", "slim-lora"])
def test_refiners_that_weigh_the_inputs_need_a_text(name: str) -> None:
    with pytest.raises(UsageError, match=f"refiner '{name}' weighs the inputs, so it needs calibration data"):
        Recipe(refiner=name, rank=4)
    with pytest.raises(UsageError, match=f"refiner '{name}' has no metric 'plain'"):
        Recipe(refiner=name, rank=4, calibration="c4", metric="plain")
    recipe = Recipe(refiner=name, rank=4, calibration="c4")
    assert recipe.metric_kind == ("diagonal" if name == "slim-lora" else "gram")
    assert recipe.needs == ("second_moment" if name == "slim-lora" else "gram")


def test_whole_runs(tiny_llama: Path, tmp_path: Path) -> None:
    text = Calibration(source="random-tokens", n_sequences=8, seqlen=32)
    errors = {}
    for criterion, refiner in itertools.product(("sparsegpt", "dsnot"), ("zero-shot-svd", "slim-lora", "eora")):
        recipe = Recipe(criterion=criterion, refiner=refiner, rank=4, pattern="2:4", calibration=text, metric="gram")
        result = mendlm.compress(tiny_llama, tmp_path / f"{criterion}-{refiner}", recipe)
        assert all(r.sparsity == 0.5 and r.rank == 4 for r in result.records)
        errors[criterion, refiner] = [r.rel_output_error for r in result.records]
    recipe = Recipe(criterion="sparsegpt", refiner="oats", rank=0, pattern="2:4", calibration=text)
    result = mendlm.compress(tiny_llama, tmp_path / "oats", recipe)
    assert all(r.sparsity == 0.5 and r.rank == 0 for r in result.records)
    assert mendlm.verify(tmp_path / "oats", tiny_llama).findings == ()
    recipe = Recipe(criterion="sparsegpt", refiner=HassleFree(4, n_iter=10), pattern=NM(2, 4), calibration=text)
    result = mendlm.compress(tiny_llama, tmp_path / "hassle-free", recipe)
    assert all(r.sparsity == 0.5 and r.n_iter == 10 and r.metric == "gram" for r in result.records)
    # The first block saw the same inputs in every run.
    here = [r.rel_output_error for r in result.records if ".0." in r.name]
    there = [e for e, r in zip(errors["sparsegpt", "eora"], result.records, strict=True) if ".0." in r.name]
    assert all(a is not None and b is not None and a < b for a, b in zip(here, there, strict=True))
