"""Metrics, and the refiners in them: dense float64 oracles, monotone objectives, baselines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mendlm import NM, OATS, PCP, TLR, AcceleratedTLR, PruneOnly, Unstructured, ZeroShotSVD, refine, select_mask
from mendlm.errors import NonFiniteError, UsageError
from mendlm.inputs import InputStats, check_gram
from mendlm.linalg import FullSVD, SubspaceIteration, make_solver
from mendlm.metrics import gram_metric, make_metric
from mendlm.patterns import Pattern, Tiles
from mendlm.refiners import REFINERS, AbstractRefiner
from mendlm.refiners._base import Problem
from mendlm.refiners._least_squares import masked_least_squares
from mendlm.selection import select
from strategies import inputs_for, stats_for
from test_refiners import planted

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
CPU = torch.device("cpu")
D_OUT, D_IN = 24, 40
PATTERNS: list[Pattern] = [Unstructured(0.5), NM(2, 4)]


def gram_of(stats: InputStats) -> torch.Tensor:
    assert stats.gram is not None
    return stats.gram


def root_of(gram: torch.Tensor, damping: float) -> np.ndarray:
    """Symmetric root of the damped Gram matrix, by its eigenvectors."""
    G = gram.numpy() + damping * np.mean(np.diag(gram.numpy())) * np.eye(gram.shape[0])
    values, vectors = np.linalg.eigh(G)
    return (vectors * np.sqrt(values)) @ vectors.T


def best_S(target: np.ndarray, mask: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Row by row: numpy's least squares over the kept columns."""
    S = np.zeros_like(target)
    for i, kept in enumerate(mask):
        S[i, kept] = np.linalg.lstsq(root[kept].T, (target[i] @ root).T, rcond=None)[0]
    return S


def best_L(target: np.ndarray, rank: int, root: np.ndarray) -> np.ndarray:
    U, sigma, Vh = np.linalg.svd(target @ root, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank] @ np.linalg.inv(root)


def test_the_factor_is_one_of_the_damped_gram_matrix() -> None:
    gram = gram_of(stats_for(D_IN))
    metric = gram_metric(gram, 0.05, torch.float64)
    _, factor = metric.parts()
    assert metric.scale is not None
    C = metric.scale[:, None] * factor
    expected = gram + 0.05 * gram.diagonal().mean() * torch.eye(D_IN, dtype=torch.float64)
    torch.testing.assert_close(C @ C.T, expected, rtol=0, atol=D_IN * 8 * EPS64 * float(gram.abs().max()))
    E = torch.randn(5, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert metric.norm(E) == pytest.approx(float(torch.einsum("ij,jk,ik->", E, expected, E).sqrt()), rel=1e-12)


def test_the_undamped_metric_is_the_error_of_the_outputs() -> None:
    X = inputs_for(D_IN)
    metric = gram_metric(X.T @ X / X.shape[0], 0.0, torch.float64)
    E = torch.randn(5, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert metric.damping == 0.0
    assert metric.norm(E) == pytest.approx(float((X @ E.T).norm()) / X.shape[0] ** 0.5, rel=1e-9)


def test_a_singular_gram_matrix_is_damped_and_says_how_much() -> None:
    X = torch.randn(10, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = X.T @ X / 10
    assert gram_metric(gram, 0.01, torch.float64).damping == 0.01
    damping = gram_metric(gram, 0.0, torch.float32).damping
    assert damping is not None
    assert EPS32 / D_IN < damping <= 1e-4
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "magnitude", NM(2, 4))
    out = refine(W, mask, TLR(rank=4), metric=gram_metric(gram, 0.0, torch.float64))
    assert out.metric == "gram"
    assert out.damping is not None
    assert out.damping > 0
    assert out.rel_output_error is not None
    assert out.rel_output_error < 0.2  # 10 tokens leave nearly everything free


def test_what_is_no_gram_matrix_is_refused() -> None:
    gram = gram_of(stats_for(D_IN)).clone()
    with pytest.raises(UsageError, match="not positive definite after damping"):
        gram_metric(-gram, 0.01, torch.float64)
    with pytest.raises(UsageError, match="must be a square matrix"):
        gram_metric(gram[:3], 0.01, torch.float64)
    with pytest.raises(UsageError, match="damping must be at least 0"):
        gram_metric(gram, -1.0, torch.float64)
    gram[5, 2] = 2 * gram[2, 2] + gram[2, 5]
    with pytest.raises(UsageError, match=r"is not symmetric: \S+ in row 2, column 5, and \S+ in row 5, column 2\."):
        gram_metric(gram, 0.01, torch.float64)
    gram[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        gram_metric(gram, 0.01, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gram_matrix_needs_both_triangles_in_any_dtype(dtype: torch.dtype) -> None:
    X = (inputs_for(1100) * torch.logspace(-1, 1, 1100)).to(dtype)
    gram = X.T @ X / X.shape[0]
    check_gram(gram)
    check_gram(torch.zeros_like(gram))
    for half in (gram.float().triu(), gram.float().tril()):
        with pytest.raises(UsageError, match=r"not symmetric.*Pass X\.T @ X / n with both of its triangles"):
            check_gram(half)


def test_metrics_are_shared_by_weights_with_the_same_inputs() -> None:
    stats = stats_for(D_IN)
    how = {"damping": 0.01, "dtype": torch.float32, "device": CPU}
    for kind in ("diagonal", "gram"):
        assert make_metric(kind, stats, **how) is make_metric(kind, stats, **how)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=rf"metric '{kind}' needs"):
            make_metric(kind, None, **how)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs the Gram matrix"):
        make_metric("gram", InputStats(3, torch.ones(D_IN)), **how)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="got 'other'"):
        make_metric("other", stats, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masked_least_squares_is_that_of_numpy(pattern: Pattern) -> None:
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "magnitude", pattern)
    stats = stats_for(D_IN)
    metric = make_metric("gram", stats, damping=0.01, dtype=torch.float64, device=CPU)
    out = refine(W, mask, PruneOnly(), metric=metric)
    root = root_of(gram_of(stats), 0.01)
    expected = best_S(W.numpy(), mask.numpy(), root)
    best = np.linalg.norm((W.numpy() - expected) @ root)
    got = np.linalg.norm((W.numpy() - out.S.numpy()) @ root)
    assert best * (1 - 1e-12) <= got <= best * (1 + 1e-3)  # the last step gains less than 1e-4 of its square
    assert out.objective == pytest.approx(got, rel=1e-9)
    assert out.rel_output_error == pytest.approx(got / np.linalg.norm(W.numpy() @ root), rel=1e-9)


def test_least_squares_converge_to_rounding() -> None:
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "magnitude", NM(2, 4))
    metric = gram_metric(gram_of(stats_for(D_IN)), 0.01, torch.float64)
    assert metric.scale is not None
    kept = mask.double()
    target = W * metric.scale
    solved = masked_least_squares(target, target * kept, kept, metric.parts()[0], max_steps=400)
    expected = best_S(W.numpy(), mask.numpy(), root_of(gram_of(stats_for(D_IN)), 0.01))
    np.testing.assert_allclose((solved.S / metric.scale).numpy(), expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    assert torch.all(solved.S[~mask] == 0)
    assert float(solved.energy) == pytest.approx(metric.norm(W - solved.S / metric.scale) ** 2, rel=1e-8)


def test_every_step_of_least_squares_lowers_the_objective() -> None:
    W = planted(D_OUT, D_IN, dtype=torch.float32)
    mask = select_mask(W, "magnitude", NM(2, 4))
    metric = gram_metric(gram_of(stats_for(D_IN)), 0.01, torch.float32)
    assert metric.scale is not None
    kept, target = mask.float(), W * metric.scale
    norms = [
        metric.norm(
            W - masked_least_squares(target, target * kept, kept, metric.parts()[0], max_steps=n).S / metric.scale
        )
        for n in range(12)
    ]
    assert all(b <= a * (1 + 16 * EPS32) for a, b in itertools.pairwise(norms))
    assert norms[-1] < 0.95 * norms[0]


@pytest.mark.parametrize("share", [0.0, 1e-8, 1e-7, 1e-6])
@pytest.mark.parametrize("n_factors", [3, 6])
def test_least_squares_with_a_nearly_singular_matrix_stay_small(n_factors: int, share: float) -> None:
    """Of few factors; the damping is too small for float32, so that curvatures are rounding, and some negative."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        X = torch.randn(80, n_factors, generator=g, dtype=torch.float64)
        X = X @ torch.randn(n_factors, D_IN, generator=g, dtype=torch.float64)
        gram = X.T @ X / 80
        gram.diagonal().add_(share * float(gram.diagonal().mean()))
        scale = gram.diagonal().sqrt()
        correlation = (gram / torch.outer(scale, scale)).float()
        W = torch.randn(D_OUT, D_IN, generator=g)
        kept = select_mask(W, "magnitude", NM(2, 4)).float()
        solved = masked_least_squares(W, W * kept, kept, correlation, max_steps=200, rtol=1e-4)
        before, after = (torch.einsum("ij,jk,ik->", E, correlation, E) for E in (W - W * kept, W - solved.S))
        assert after <= 0.01 * before  # half of the columns span all that there is
        out = refine(W, kept > 0, PruneOnly(), metric=gram_metric(X.T @ X / 80, share, torch.float32))
        assert out.rel_output_error is not None
        assert out.rel_output_error < 0.01


def test_little_damping_stays_where_no_pivot_is_lost() -> None:
    """Also with one input far larger than the others, whose pivot is the smallest."""
    X = inputs_for(D_IN, n_tokens=10)
    X[:, 7] *= 1e4
    X[:, 8] = X[:, 7]
    assert gram_metric(X.T @ X / 10, 0.01, torch.float32).damping == 0.01
    assert gram_metric(gram_of(stats_for(D_IN)), 0.0, torch.float32).damping == 0.0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", [TLR, AcceleratedTLR])
def test_gram_refiners_reach_alternating_exact_minimisation(kind: type[AbstractRefiner], pattern: Pattern) -> None:
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "magnitude", pattern)
    stats = stats_for(D_IN)
    root = root_of(gram_of(stats), 0.01)
    S = best_S(W.numpy(), mask.numpy(), root)
    for t in range(51):
        L = best_L(W.numpy() - S, 4 if kind is AcceleratedTLR else min(1 + 3 * t // 49, 4), root)
        S = best_S(W.numpy() - L, mask.numpy(), root)
    exact = np.linalg.norm((W.numpy() - S - L) @ root)
    metric = make_metric("gram", stats, damping=0.01, dtype=torch.float64, device=CPU)
    out = refine(W, mask, kind(rank=4, n_iter=50, solver="exact"), metric=metric)  # type: ignore[call-arg]
    dense = out.decomposition.to_dense().numpy()
    assert np.linalg.norm((W.numpy() - dense) @ root) == pytest.approx(out.objective, rel=1e-9)
    assert out.objective < 0.97 * refine(W, mask, PruneOnly(), metric=metric).objective
    # One step of S per iteration instead of an exact fit, but the momentum of all: as good or better.
    assert out.objective <= exact * 1.001


@pytest.mark.parametrize(
    ("refiner", "kind"),
    [  # not accelerated TLR in the diagonal metric: extrapolation may raise it
        (TLR(1, 40, "exact"), "diagonal"),
        (TLR(1, 40, "exact"), "gram"),
        (AcceleratedTLR(4, 40, 0.0, "exact"), "gram"),
    ],
    ids=repr,
)
def test_the_objective_never_rises_at_constant_rank(refiner: AbstractRefiner, kind: str) -> None:
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "magnitude", NM(2, 4))
    metric = make_metric(kind, stats_for(D_IN), damping=0.01, dtype=torch.float64, device=CPU)
    out = refine(W, mask, refiner, metric=metric)
    objectives = [p.objective for p in out.trace]
    assert len(objectives) == 40
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(objectives))
    assert objectives[-1] < 0.9 * objectives[0]
    assert out.objective <= objectives[-1] * (1 + 1e-12)


def test_the_reported_objective_is_that_of_S_and_L() -> None:
    """The trace is predicted from a quadratic; the last L and S, not fitted any further, must give what it says."""
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "magnitude", NM(2, 4))
    metric = gram_metric(gram_of(stats_for(D_IN)), 0.01, torch.float64)
    refiner = AcceleratedTLR(4, 12, 0.0, "exact")
    assert metric.scale is not None
    problem = Problem(W * metric.scale, mask, torch.Generator().manual_seed(0), metric)
    state = refiner.init(problem)
    for t in range(12):
        state, progress = refiner.step(problem, state, t)
    left, right = refiner.finish(problem, state)
    S = refiner.final_S(problem, state)
    assert S is not None
    error = metric.norm(W - (S + left @ right) / metric.scale)
    assert torch.all(S[~mask] == 0)
    # The left factor was fitted anew, to the S of the last step.
    assert 0.99 * progress.objective <= error <= progress.objective * (1 + 1e-12)
    _, again = refiner.step(problem, state, 12)
    assert again.energy_frac == pytest.approx(1 - error**2 / metric.norm(W - S / metric.scale) ** 2, rel=1e-10)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(
    "refiner", [PruneOnly(), ZeroShotSVD(4), ZeroShotSVD(4, False), TLR(4), AcceleratedTLR(4)], ids=repr
)
def test_a_diagonal_gram_matrix_is_the_diagonal_metric(refiner: AbstractRefiner, identity: bool) -> None:
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "magnitude", NM(2, 4))
    scale = torch.linspace(0.2, 3, D_IN, dtype=torch.float64)
    scale = torch.ones_like(scale) if identity else scale
    diagonal = refine(W, mask, refiner, input_scale=None if identity else scale)
    gram = refine(W, mask, refiner, metric=gram_metric(torch.diag(scale**2), 0.0, torch.float64))
    assert diagonal.metric == ("plain" if identity else "diagonal")
    assert gram.metric == "gram"
    assert gram.rel_output_error == pytest.approx(
        float(((W - gram.decomposition.to_dense()) * scale).norm() / (W * scale).norm()), rel=1e-12
    )
    if isinstance(refiner, TLR | AcceleratedTLR):  # other steps, to the same place or a better one
        assert gram.objective <= diagonal.objective * 1.01
        return
    torch.testing.assert_close(gram.B @ gram.A, diagonal.B @ diagonal.A, rtol=0, atol=1e-10)
    torch.testing.assert_close(gram.S, diagonal.S, rtol=0, atol=1e-10)
    assert gram.objective == pytest.approx(diagonal.objective, rel=1e-9)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_weighted_triplets_are_those_of_the_whitened_matrix(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    M = planted(*shape)
    stats = stats_for(shape[1])
    metric = gram_metric(gram_of(stats), 0.01, torch.float64)
    G, root = metric.parts()
    U, sigma, _ = np.linalg.svd((M @ root).numpy(), full_matrices=False)
    expected = U[:, :5] @ U[:, :5].T @ M.numpy()
    solvers = [make_solver(name, M.shape, 5, root=root, like=M, generator=g) for name in ("exact", "subspace")]  # type: ignore[arg-type]
    for solver, rtol in zip(solvers, (1e-12, 1e-6), strict=True):
        for _ in range(20):
            found = solver.leading(M, 5, M @ G)
        found = solver.final(M, 5, M @ G)
        np.testing.assert_allclose(
            (found.left @ found.right).numpy(), expected, rtol=0, atol=rtol * np.abs(expected).max()
        )
        np.testing.assert_allclose((found.left.T @ found.left).numpy(), np.eye(5), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.weighted, found.right @ G, rtol=1e-9, atol=1e-9)
        assert float(found.energy_frac) == pytest.approx((sigma[:5] ** 2).sum() / (sigma**2).sum(), rel=1e-9)


def test_auto_leaves_the_subspace_sooner_with_a_gram_matrix() -> None:
    M, g = torch.zeros(96, 160), torch.Generator()
    root = torch.eye(160)
    for rank, plain, gram in ((32, SubspaceIteration, SubspaceIteration), (33, SubspaceIteration, FullSVD)):
        assert isinstance(make_solver("auto", M.shape, rank, like=M, generator=g), plain)
        assert isinstance(make_solver("auto", M.shape, rank, root=root, like=M, generator=g), gram)


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_the_subspace_solver_is_as_good_in_the_gram_metric(shape: tuple[int, int]) -> None:
    W = planted(*shape, dtype=torch.float32)
    stats = stats_for(shape[1])
    mask = select_mask(W, "wanda", NM(2, 4), inputs=stats)
    metric = make_metric("gram", stats, damping=0.01, dtype=torch.float32, device=CPU)
    for k in (4, 24):
        exact, subspace = (refine(W, mask, TLR(k, solver=s), metric=metric).objective for s in ("exact", "subspace"))
        assert subspace <= exact * 1.01


def test_whitened_zero_shot_svd_is_that_of_numpy() -> None:
    W = planted(D_OUT, D_IN)
    stats = stats_for(D_IN)
    chosen = select(W, "sparsegpt", NM(2, 4), inputs=stats)
    assert chosen.S is not None
    metric = make_metric("gram", stats, damping=0.01, dtype=torch.float64, device=CPU)
    out = refine(W, chosen.mask, ZeroShotSVD(4, refit=False), metric=metric, start=chosen.S)
    expected = best_L(W.numpy() - chosen.S.numpy(), 4, root_of(gram_of(stats), 0.01))
    np.testing.assert_allclose((out.B @ out.A).numpy(), expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    torch.testing.assert_close(out.S, chosen.S, rtol=0, atol=1e-14)
    refitted = refine(W, chosen.mask, ZeroShotSVD(4), metric=metric, start=chosen.S)
    assert refitted.objective < out.objective


def test_the_updated_weights_of_a_criterion_stay_where_nothing_is_mended() -> None:
    W = planted(D_OUT, D_IN)
    stats = stats_for(D_IN)
    chosen = select(W, "sparsegpt", NM(2, 4), inputs=stats)
    assert chosen.S is not None
    for refiner in (PruneOnly(), TLR(rank=0), ZeroShotSVD(rank=0, refit=False)):
        out = refine(W, chosen.mask, refiner, start=chosen.S)
        torch.testing.assert_close(out.S, chosen.S, rtol=0, atol=0)
    residual = refine(W, chosen.mask, ZeroShotSVD(rank=4, refit=False), start=chosen.S)
    U, sigma, Vh = np.linalg.svd((W - chosen.S).numpy(), full_matrices=False)
    expected = (U[:, :4] * sigma[:4]) @ Vh[:4]
    np.testing.assert_allclose((residual.B @ residual.A).numpy(), expected, atol=1e-11 * np.abs(expected).max())
    with pytest.raises(UsageError, match="zero off the mask"):
        refine(W, chosen.mask, PruneOnly(), start=W)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", [name for name, cls in REFINERS.items() if cls.moves_mask])
def test_refiners_that_move_the_mask_leave_nothing_off_it(name: str, rank: int, pattern: Pattern) -> None:
    """Whatever S the criterion left, whose zeros are those of another mask."""
    W = planted(D_OUT, D_IN)
    stats = stats_for(D_IN)
    chosen = select(W, "sparsegpt", pattern, inputs=stats)
    refiner: AbstractRefiner = REFINERS[name](rank=rank)  # type: ignore[call-arg]
    for kind in refiner.metrics:
        metric = make_metric(kind, stats, damping=0.01, dtype=torch.float64, device=CPU)
        out = refine(W, chosen.mask, refiner, metric=metric, pattern=pattern, start=chosen.S)
        mask = out.decomposition.mask
        assert int(mask.sum()) == int(chosen.mask.sum())
        assert torch.all(out.S[~mask] == 0)
        assert torch.all(out.S[mask] != 0)
        assert out.rel_error < 1


@pytest.mark.parametrize(("refiner", "kind"), [(PruneOnly(), kind) for kind in ("plain", "diagonal", "gram")], ids=str)
def test_the_start_is_not_modified_and_not_returned(refiner: AbstractRefiner, kind: str) -> None:
    W = planted(D_OUT, D_IN)
    stats = stats_for(D_IN)
    mask = select_mask(W, "magnitude", NM(2, 4))
    start = torch.where(mask, W, -0.0)
    metric = make_metric(kind, stats, damping=0.01, dtype=torch.float64, device=CPU)
    before = start.clone()
    out = refine(W, mask, refiner, metric=metric, start=start)
    assert not torch.signbit(out.S[~mask]).any()
    out.S.zero_()
    assert torch.equal(start, before)
    assert torch.signbit(start[~mask]).all()


def test_an_S_off_its_mask_is_refused() -> None:
    class Disagreeing(OATS):
        def final_S(self, problem: Problem, state: object) -> torch.Tensor | None:
            return problem.start

    W = planted(D_OUT, D_IN)
    chosen = select(W, "sparsegpt", NM(2, 4), inputs=stats_for(D_IN))
    with pytest.raises(UsageError, match=r"refiner 'oats' gave an S that is not zero off the mask it found"):
        refine(W, chosen.mask, Disagreeing(0), pattern=NM(2, 4), start=chosen.S)


def every_case() -> list[tuple[AbstractRefiner, str]]:
    made = [cls() if cls is PruneOnly else cls(rank=3) for cls in REFINERS.values()]  # type: ignore[call-arg]
    return [(refiner, metric) for refiner in made for metric in refiner.metrics]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("refiner", "kind"), every_case(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_contract(refiner: AbstractRefiner, kind: str, dtype: torch.dtype, pattern: Pattern) -> None:
    W = planted(D_OUT, D_IN, dtype=dtype)
    stats = stats_for(D_IN)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    metric = make_metric(kind, stats, damping=0.01, dtype=compute, device=CPU)
    mask = select_mask(W, "wanda", pattern, inputs=stats)
    out = refine(W, mask, refiner, metric=metric, pattern=pattern, inputs=stats)
    assert out.metric == kind
    kept = out.decomposition.mask
    assert int(kept.sum()) == int(mask.sum())
    assert refiner.moves_mask or torch.equal(kept, mask)
    assert torch.all(out.S[~kept] == 0)
    assert (out.damping is None) == (kind != "gram")
    error = metric.norm((W - out.decomposition.to_dense()).to(compute)) / metric.norm(W.to(compute))
    if kind != "plain":
        assert out.rel_output_error == pytest.approx(error, rel=1e-3)
    if refiner.name == "pcp":
        return  # its cut to rank k can lose more than the low-rank part gains: that is the method
    plain = metric.norm((W * ~mask).to(compute)) / metric.norm(W.to(compute))
    rounding = 4 * float(torch.finfo(dtype).eps)
    assert error <= plain * (1 + 1e-6) + rounding * float(metric.norm(W.abs().to(compute)) / metric.norm(W.to(compute)))


@pytest.mark.parametrize(("refiner", "kind"), every_case(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_tensors_with_gradients_count_as_their_values(refiner: AbstractRefiner, kind: str) -> None:
    def grown(x: torch.Tensor | None) -> torch.Tensor:
        assert x is not None
        return x.clone().requires_grad_()

    W, stats = planted(D_OUT, D_IN, dtype=torch.float32), stats_for(D_IN)
    leaves = InputStats(stats.n_tokens, *map(grown, (stats.second_moment, stats.gram, stats.mean, stats.mean_abs)))
    plain, mine = (select(x, "sparsegpt", NM(2, 4), inputs=s) for x, s in ((W, stats), (grown(W), leaves)))
    assert plain.S is not None
    how = [
        {"plain": {}, "diagonal": {"input_scale": s.scale.float()}, "gram": {"gram": s.gram}}[kind]
        for s in (stats, leaves)
    ]
    expected = refine(W, plain.mask, refiner, start=plain.S, pattern=NM(2, 4), inputs=stats, **how[0])  # type: ignore[arg-type]
    out = refine(
        grown(W),
        mine.mask,
        refiner,
        start=grown(mine.S),
        pattern=NM(2, 4),
        inputs=leaves,
        **how[1],  # type: ignore[arg-type]
    )
    for got, want in ((out.S, expected.S), (out.A, expected.A), (out.B, expected.B)):
        assert torch.equal(got, want)
        assert not got.requires_grad
    assert not make_metric("gram", leaves, damping=0.01, dtype=torch.float32, device=CPU).parts()[0].requires_grad  # type: ignore[attr-defined]


def test_a_metric_that_a_refiner_does_not_have_is_refused() -> None:
    W = planted(D_OUT, D_IN)
    mask = select_mask(W, "magnitude", NM(2, 4))
    with pytest.raises(UsageError, match=r"refiner 'oats' has no metric 'gram'\. It has: plain, diagonal"):
        refine(W, mask, OATS(rank=3), gram=gram_of(stats_for(D_IN)), pattern=NM(2, 4))
    with pytest.raises(UsageError, match="pass one of"):
        refine(W, mask, TLR(rank=3), gram=gram_of(stats_for(D_IN)), input_scale=torch.ones(D_IN))
    narrow = gram_metric(gram_of(stats_for(D_IN)), 0.01, torch.float32)
    with pytest.raises(
        UsageError, match=r"is in torch\.float32, narrower than the torch\.float64 .* pass dtype=torch\.float32"
    ):
        refine(W, mask, TLR(rank=3), metric=narrow)
    assert refine(W, mask, TLR(rank=3), metric=narrow, dtype=torch.float32).S.dtype == torch.float64
    with pytest.raises(UsageError, match="the metric is of 40 inputs"):
        refine(W[:, :20], mask[:, :20], TLR(rank=3), gram=gram_of(stats_for(D_IN)))
    with pytest.raises(UsageError, match="'oats' moves the mask, so it needs the pattern"):
        refine(W, mask, OATS(rank=3))


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "row"), NM(2, 4)], ids=str)
def test_oats_is_algorithm_1_of_its_paper(pattern: Pattern) -> None:
    W = planted(D_OUT, D_IN)
    scale = stats_for(D_IN).scale
    target = (W * scale).numpy()
    S = np.zeros_like(target)
    group = pattern.group_size(D_OUT, D_IN)
    for _ in range(80):
        U, sigma, Vh = np.linalg.svd(target - S, full_matrices=False)
        L = (U[:, :3] * sigma[:3]) @ Vh[:3]
        error = (target - L).reshape(-1, group)
        order = np.argsort(-np.abs(error), axis=1, kind="stable")
        mask = np.zeros(error.shape, dtype=bool)
        np.put_along_axis(mask, order[:, : pattern.n_kept(group)], True, axis=1)
        S = (error * mask).reshape(target.shape)
    mask = mask.reshape(target.shape)
    given = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) < 0.5  # OATS does not look at it
    out = refine(W, given, OATS(rank=3, solver="exact"), input_scale=scale, pattern=pattern)
    np.testing.assert_array_equal(out.decomposition.mask.numpy(), mask)
    np.testing.assert_allclose((out.B @ out.A * scale).numpy(), L, rtol=0, atol=1e-9 * np.abs(L).max())
    np.testing.assert_allclose((out.S * scale).numpy(), S, rtol=0, atol=1e-9 * np.abs(S).max())
    assert len(out.trace) == 80
    assert out.objective < refine(W, given, OATS(rank=0), input_scale=scale, pattern=pattern).objective


def test_oats_keeps_the_tiles_that_leave_the_least_error() -> None:
    W = planted(D_OUT, D_IN)
    W *= torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) ** 4
    scale, pattern = stats_for(D_IN).scale, Tiles(0.5, 4, 4)
    energies = (W * scale).square().reshape(D_OUT // 4, 4, D_IN // 4, 4).sum(dim=(1, 3)).flatten().sort().values
    out = refine(W, W != 0, OATS(rank=0), input_scale=scale, pattern=pattern)
    assert out.objective**2 == pytest.approx(float(energies[: energies.numel() // 2].sum()), rel=1e-12)


def test_pcp_is_the_augmented_lagrangian_method() -> None:
    """An independent ADMM with a constant penalty, run to convergence, finds the same minimum."""
    W = planted(16, 20)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    weight, mu = 20**-0.5, 0.05
    A, P = W.numpy(), mask.numpy()
    L, Y = np.zeros_like(A), np.zeros_like(A)
    for _ in range(20000):
        T = A - L + Y / mu
        S = np.sign(T) * np.maximum(np.abs(T) - weight / mu, 0) * P
        U, sigma, Vh = np.linalg.svd(A - S + Y / mu, full_matrices=False)
        L = (U * np.maximum(sigma - 1 / mu, 0)) @ Vh
        Y = Y + mu * (A - S - L)
    assert np.linalg.norm(A - S - L) < 1e-9 * np.linalg.norm(A)
    expected = np.linalg.svd(L, compute_uv=False).sum() + weight * np.abs(S).sum()
    out = refine(W, mask, PCP(rank=16, n_iter=2000, weight=1.0, growth=1.01, tol=1e-10))
    found = (out.B @ out.A).numpy()
    rest = (A - found) * P
    np.testing.assert_allclose(found[~P], A[~P], rtol=0, atol=1e-6 * np.abs(A).max())
    value = np.linalg.svd(found, compute_uv=False).sum() + weight * np.abs(rest).sum()
    assert value == pytest.approx(expected, rel=1e-4)
    assert out.status == "converged"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pcp_without_a_tolerance_ends(dtype: torch.dtype) -> None:
    W = planted(16, 20, dtype=dtype)
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    out = refine(W, mask, PCP(rank=3, n_iter=1000, growth=10.0, tol=0.0))
    assert len(out.trace) == 1000
    assert out.rel_error == pytest.approx(refine(W, mask, PCP(rank=3, n_iter=30, growth=10.0)).rel_error, rel=1e-2)


def test_bad_fields_of_pcp_and_oats_are_refused() -> None:
    for bad in ({"n_iter": 0}, {"growth": 0.5}, {"tol": -1.0}, {"weight": -1.0}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            PCP(rank=3, **bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="n_iter"):
        OATS(rank=3, n_iter=0)
