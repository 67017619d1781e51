"""JointADMM against a float64 oracle, exhaustive search, and what it builds on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import oracle
from mendlm import NM, AcceleratedTLR, JointADMM, Tiles, Unstructured, refine
from mendlm.errors import UsageError
from mendlm.metrics import GramMetric, gram_metric
from mendlm.patterns import Pattern
from mendlm.selection import select
from strategies import stats_for
from test_metrics import best_L, best_S, root_of
from test_refiners import planted

EPS64 = torch.finfo(torch.float64).eps
D_OUT, D_IN = 24, 40


def metric_of(d_in: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> GramMetric:
    gram = stats_for(d_in, seed).gram
    assert gram is not None
    return gram_metric(gram, 0.01, dtype)


def nothing(W: torch.Tensor) -> torch.Tensor:
    """A mask that no answer could come from: the given one is not looked at."""
    return torch.zeros(W.shape, dtype=torch.bool)


@pytest.mark.parametrize(("d_out", "hold"), [(24, 5), (24, 1), (3, 2)])  # the last one without an explicit inverse
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6, "row"), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("rank", [0, 2])
def test_the_iteration_is_three_block_admm(d_out: int, hold: int, pattern: Pattern, rank: int) -> None:
    W = planted(d_out, D_IN)
    metric = metric_of(D_IN)
    assert metric.scale is not None
    refiner = JointADMM(rank, n_iter=13, hold=hold, polish=0, solver="exact")
    penalties = [refiner.penalties()[t // hold] for t in range(13)]
    scaled, H = W * metric.scale, metric.parts()[0]
    mask, D, L = oracle.joint_admm(
        scaled.numpy(), H.numpy(), pattern.group_size(*W.shape), pattern.n_kept(pattern.group_size(*W.shape)),
        rank, penalties,
    )  # fmt: skip
    out = refine(W, nothing(W), refiner, metric=metric, pattern=pattern)
    np.testing.assert_array_equal(out.decomposition.mask.numpy(), mask)
    root = root_of(stats_for(D_IN).gram, 0.01)  # type: ignore[arg-type]
    # What follows the last iteration: the best L for D, then S by least squares for that L.
    final_L = best_L(W.numpy() - D / metric.scale.numpy(), rank, root)
    np.testing.assert_allclose((out.B @ out.A).numpy(), final_L, rtol=0, atol=1e-8 * np.abs(W.numpy()).max())
    exact = np.linalg.norm((W.numpy() - final_L - best_S(W.numpy() - final_L, mask, root)) @ root)
    assert exact * (1 - 1e-10) <= out.objective <= exact * (1 + 1e-3)
    assert L.shape == W.shape


def test_it_comes_close_to_the_best_of_all_masks() -> None:
    """Every 2:4 mask of every row is tried; without a low-rank part rows are problems of their own."""
    ratios = []
    for seed in range(8):
        W, metric = planted(4, 12, seed=seed), metric_of(12, seed=seed)
        root = root_of(stats_for(12, seed).gram, 0.01)  # type: ignore[arg-type]
        groups = list(itertools.combinations(range(4), 2))
        best = 0.0
        for row in W.numpy():
            errors = []
            for choice in itertools.product(groups, repeat=3):
                kept = np.zeros((1, 12), dtype=bool)
                for g, pair in enumerate(choice):
                    kept[0, [4 * g + i for i in pair]] = True
                errors.append(np.linalg.norm((row[None] - best_S(row[None], kept, root)) @ root) ** 2)
            best += min(errors)
        out = refine(W, nothing(W), JointADMM(0), metric=metric, pattern=NM(2, 4))
        ratios.append(out.objective / best**0.5)
        assert ratios[-1] >= 1 - 1e-9
    assert np.mean(ratios) < 1.1  # the objective is the root of a sum of squares


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5), Unstructured(0.7, "row"), Tiles(0.5, 2, 4)], ids=str)
def test_it_beats_acceleration_on_the_mask_of_sparsegpt(pattern: Pattern) -> None:
    gains = []
    for seed in range(4):
        W = planted(48, 80, seed=seed)
        stats, metric = stats_for(80, seed), metric_of(80, seed=seed)
        chosen = select(W, "sparsegpt", pattern, inputs=stats)
        known = refine(W, chosen.mask, AcceleratedTLR(4, n_iter=100), metric=metric, start=chosen.S)
        out = refine(W, nothing(W), JointADMM(4), metric=metric, pattern=pattern)
        assert int(out.decomposition.mask.sum()) == int(chosen.mask.sum())
        gains.append(out.objective / known.objective)
    assert np.mean(gains) < 0.97


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_the_objective_never_rises_in_the_polish(pattern: Pattern) -> None:
    W, metric = planted(D_OUT, D_IN), metric_of(D_IN)
    refiner = JointADMM(4, n_iter=20, polish=40, rtol=0.0, solver="exact")
    out = refine(W, nothing(W), refiner, metric=metric, pattern=pattern)
    assert len(out.trace) == 60
    polish = [p.objective for p in out.trace[20:]]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(polish))
    assert out.objective <= polish[-1] * (1 + 1e-12)
    assert polish[-1] < polish[0]


def test_the_polish_ends_where_alternating_exact_minimisation_does() -> None:
    W, metric = planted(D_OUT, D_IN), metric_of(D_IN)
    out = refine(W, nothing(W), JointADMM(4, polish=400, solver="exact"), metric=metric, pattern=NM(2, 4))
    root = root_of(stats_for(D_IN).gram, 0.01)  # type: ignore[arg-type]
    mask, S = out.decomposition.mask.numpy(), out.S.numpy()
    for _ in range(200):
        L = best_L(W.numpy() - S, 4, root)
        S = best_S(W.numpy() - L, mask, root)
    exact = np.linalg.norm((W.numpy() - S - L) @ root)
    assert out.status == "converged"
    assert exact * (1 - 1e-9) <= out.objective <= exact * 1.002


def test_weights_with_the_same_inputs_share_one_eigendecomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    eigh = torch.linalg.eigh

    def counted(A: torch.Tensor) -> object:
        calls.append(A.shape)
        return eigh(A)

    metric = metric_of(D_IN, torch.float32)
    monkeypatch.setattr(torch.linalg, "eigh", counted)
    for seed in range(3):
        W = planted(D_OUT, D_IN, seed=seed, dtype=torch.float32)
        refine(W, nothing(W), JointADMM(2, n_iter=4), metric=metric, pattern=NM(2, 4))
    assert sum(shape == (D_IN, D_IN) for shape in calls) == 1


def test_bad_fields_are_refused() -> None:
    for bad in (
        {"n_iter": 0},
        {"first_penalty": 0.0},
        {"first_penalty": 3.0},
        {"last_penalty": float("inf")},
        {"hold": 0},
        {"polish": -1},
        {"rtol": -1.0},
        {"solver": "other"},
    ):
        with pytest.raises(UsageError, match=next(iter(bad)).split("_")[-1]):
            JointADMM(4, **bad)  # type: ignore[arg-type]
    W = planted(D_OUT, D_IN)
    with pytest.raises(UsageError, match="'joint-admm' has no metric 'plain'"):
        refine(W, nothing(W), JointADMM(4), pattern=NM(2, 4))
    with pytest.raises(UsageError, match="'joint-admm' moves the mask, so it needs the pattern"):
        refine(W, nothing(W), JointADMM(4), metric=metric_of(D_IN))
