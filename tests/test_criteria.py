"""Criteria that look at the inputs, against float64 NumPy versions written from their papers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import oracle
from mendlm import NM, Recipe, Unstructured, select_mask
from mendlm.criteria import CRITERIA, RIA, Magnitude, SparseGPT, Wanda
from mendlm.errors import NonFiniteError, UsageError
from mendlm.inputs import InputStats, treat_dead_columns
from mendlm.patterns import Pattern, Tiles, n_kept_total
from mendlm.selection import select
from strategies import inputs_for, stats_for

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
GENERATOR = torch.Generator()


def weights(d_out: int, d_in: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Wanda and RIA


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_wanda_is_weight_times_norm(dtype: torch.dtype) -> None:
    W, X = weights(12, 30, dtype=dtype), inputs_for(30)
    scores = Wanda().scores(W, stats_for(30), GENERATOR)
    expected = np.abs(W.double().numpy()) * np.linalg.norm(X.numpy(), axis=0) / np.sqrt(X.shape[0])
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=8 * torch.finfo(scores.dtype).eps)


def test_wanda_keeps_the_largest_scores_of_every_row() -> None:
    W, inputs = weights(12, 30), stats_for(30)
    mask = select_mask(W, "wanda", Unstructured(0.4, "row"), inputs=inputs)
    norms = np.sqrt(np.diag(inputs.gram.numpy()))  # type: ignore[union-attr]
    for row in range(12):
        np.testing.assert_array_equal(mask[row], oracle.mask_by_sorting(np.abs(W[row].numpy()) * norms, 18))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ria_is_relative_importance_times_powered_norm(dtype: torch.dtype, power: float) -> None:
    W, inputs = weights(12, 30, dtype=dtype), stats_for(30)
    size = np.abs(W.double().numpy())
    norms = np.sqrt(np.diag(inputs.gram.numpy()))  # type: ignore[union-attr]
    expected = np.empty_like(size)
    for i in range(12):
        for j in range(30):
            expected[i, j] = (size[i, j] / size[i].sum() + size[i, j] / size[:, j].sum()) * norms[j] ** power
    scores = RIA(activation_power=power).scores(W, inputs, GENERATOR)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=64 * torch.finfo(scores.dtype).eps)


def test_ria_of_zero_rows_and_columns_and_of_huge_weights() -> None:
    W, inputs = weights(12, 30, dtype=torch.float32), stats_for(30)
    W[3], W[:, 7] = 0, 0
    scores = RIA().scores(W, inputs, GENERATOR)
    assert torch.isfinite(scores).all()
    assert torch.equal(scores == 0, W == 0)
    huge = RIA().scores(W * 1e37, inputs, GENERATOR)
    torch.testing.assert_close(huge, scores)
    assert int(RIA().scores(torch.zeros(3, 30), inputs, GENERATOR).count_nonzero()) == 0


@pytest.mark.parametrize("power", [-0.5, float("nan"), float("inf")])
def test_ria_refuses_a_bad_power(power: float) -> None:
    with pytest.raises(UsageError, match="activation_power must be a number >= 0"):
        RIA(activation_power=power)


def test_weights_compete_as_in_the_papers() -> None:
    scopes = {name: kind.default_scope for name, kind in CRITERIA.items()}
    by_tensor = dict.fromkeys(("magnitude", "random", "ria", "sparsegpt"), "tensor")
    assert scopes == by_tensor | {"wanda": "row", "dsnot": "row"}
    recipe = Recipe(criterion="wanda", calibration="c4", pattern={"sparsity": 0.5})
    assert recipe.pattern == Unstructured(0.5, "row")


def test_inputs_that_no_token_reached_leave_magnitude() -> None:
    W = weights(8, 10)
    W, inputs = treat_dead_columns(W, InputStats(0, torch.zeros(10, dtype=torch.float64)), "keep")
    pattern = Unstructured(0.5, "row")
    assert torch.equal(select_mask(W, "wanda", pattern, inputs=inputs), select_mask(W, "magnitude", pattern))


# SparseGPT


def damped(inputs: InputStats, damping: float) -> Array:
    gram = inputs.gram.numpy()  # type: ignore[union-attr]
    return gram + damping * np.diag(gram).mean() * np.eye(len(gram))


def proportional(total: int, start: int, stop: int, width: int) -> int:
    """What of `total` falls on the columns from start to stop of `width`, rounded cumulatively (halves up)."""
    return int(np.floor(total * stop / width + 0.5)) - int(np.floor(total * start / width + 0.5))


def choose(scores: Array, pattern: Pattern, start: int, stop: int, d_in: int) -> Mask:
    """The mask of columns start to stop, by sorting their scores (d_out, stop - start)."""
    d_out = len(scores)
    if isinstance(pattern, NM):
        return np.stack([oracle.mask_by_sorting(row, pattern.n) for row in scores])
    if isinstance(pattern, Tiles):
        r, c = pattern.rows, pattern.cols
        n_tiles = (d_out // r) * (d_in // c)
        n_keep = proportional(n_tiles - round(pattern.sparsity * n_tiles), start, stop, d_in)
        sums = scores.reshape(d_out // r, r, -1, c).sum(axis=(1, 3))
        return np.kron(oracle.mask_by_sorting(sums, n_keep), np.ones((r, c), bool))
    if pattern.scope == "row":
        n_keep = proportional(d_in - round(pattern.sparsity * d_in), start, stop, d_in)
        return np.stack([oracle.mask_by_sorting(row, n_keep) for row in scores])
    n_entries = d_out * d_in
    n_keep = proportional(n_entries - round(pattern.sparsity * n_entries), start, stop, d_in)
    return oracle.mask_by_sorting(scores, n_keep)


def obs(W: Array, H: Array, pattern: Pattern, width: int) -> tuple[Mask, Array]:
    """Optimal brain surgery column by column, with the inverse of the Hessian of the columns that remain (Frantar and
    Alistarh 2023, eq. 3); the mask of `width` columns is chosen when the first of them is reached.
    """
    W, d_in = W.copy(), W.shape[1]
    mask = np.ones(W.shape, dtype=bool)
    for j in range(d_in):
        if j % width == 0:
            stop = min(j + width, d_in)
            pivots = np.array([np.linalg.inv(H[k:, k:])[0, 0] for k in range(j, stop)])
            mask[:, j:stop] = choose(W[:, j:stop] ** 2 / pivots, pattern, j, stop, d_in)
        inverse = np.linalg.inv(H[j:, j:])
        for row in range(len(W)):
            if not mask[row, j]:
                W[row, j:] -= W[row, j] / inverse[0, 0] * inverse[0]
                W[row, j] = 0
    return mask, W


CASES: list[tuple[Pattern, int, int]] = [  # pattern, block_size, columns whose mask is chosen at one time
    (Unstructured(0.5), 128, 60),
    (Unstructured(0.37), 16, 16),
    (Unstructured(0.5, "row"), 128, 60),
    (Unstructured(0.37, "row"), 16, 16),
    (Unstructured(0.7, "row"), 1, 1),
    (NM(2, 4), 128, 4),
    (NM(2, 4), 10, 4),
    (NM(3, 5), 128, 5),
    (NM(1, 15), 20, 15),
    (NM(7, 20), 8, 20),
    (NM(33, 60), 16, 60),
    (Tiles(0.5, 4, 4), 16, 16),
    (Tiles(0.4, 2, 5), 16, 15),
    (Tiles(0.5, 6, 20), 16, 20),
    (Tiles(0.5, 24, 3), 128, 60),
]


@pytest.mark.parametrize(("pattern", "block_size", "width"), CASES, ids=lambda value: str(value))
def test_sparsegpt_is_optimal_brain_surgery(pattern: Pattern, block_size: int, width: int) -> None:
    W, inputs = weights(24, 60), stats_for(60)
    mask, S = obs(W.numpy(), damped(inputs, 0.01), pattern, width)
    got = select(W, SparseGPT(block_size=block_size), pattern, inputs=inputs)
    assert got.S is not None
    assert got.S.dtype == torch.float64
    assert got.damping == 0.01
    np.testing.assert_array_equal(got.mask.numpy(), mask)
    np.testing.assert_allclose(got.S.numpy(), S, rtol=0, atol=1e-11 * np.abs(S).max())
    assert np.all(got.S.numpy()[~mask] == 0)
    assert mask.sum() == n_kept_total(pattern, 24, 60)


def test_sparsegpt_scores_are_those_before_any_update() -> None:
    W, inputs = weights(5, 20), stats_for(20)
    H = damped(inputs, 0.01)
    pivots = np.array([np.linalg.inv(H[k:, k:])[0, 0] for k in range(20)])
    scores = SparseGPT().scores(W, inputs, GENERATOR)
    np.testing.assert_allclose(scores.numpy(), W.numpy() ** 2 / pivots, rtol=1e-11)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 5), NM(4, 60)], ids=str)
def test_blocks_of_columns_change_only_the_rounding_of_n_of_m(pattern: NM) -> None:
    W, inputs = weights(24, 60), stats_for(60)
    whole = select(W, SparseGPT(block_size=60), pattern, inputs=inputs)
    for block_size in (1, 7, 20, 128):
        blocked = select(W, SparseGPT(block_size=block_size), pattern, inputs=inputs)
        assert torch.equal(blocked.mask, whole.mask)
        torch.testing.assert_close(blocked.S, whole.S, rtol=0, atol=1e-12)


def output_error(X: torch.Tensor, W: torch.Tensor, S: torch.Tensor) -> float:
    return float(torch.linalg.norm(X @ (W.double() - S.double()).T))


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4), NM(1, 8), Tiles(0.5, 8, 8)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sparsegpt_has_less_output_error_than_wanda(dtype: torch.dtype, pattern: Pattern) -> None:
    W, X, inputs = weights(48, 96, dtype=dtype), inputs_for(96), stats_for(96)
    before = W.clone()
    got = select(W, SparseGPT(block_size=32), pattern, inputs=inputs)
    wanda = select_mask(W, "wanda", pattern, inputs=inputs)
    assert got.S is not None
    assert got.S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.S.is_contiguous()
    assert torch.equal(W, before)
    error = output_error(X, W, got.S)
    assert error < 0.95 * output_error(X, W, torch.where(wanda, W, 0))
    assert error < 0.95 * output_error(X, W, torch.where(got.mask, W, 0))  # the update helps, not only the mask


def test_float32_loses_nothing_that_counts() -> None:
    W, X = weights(48, 96), inputs_for(96)
    S64 = select(W, SparseGPT(), Unstructured(0.5), inputs=stats_for(96)).S
    S32 = select(W.float(), SparseGPT(), Unstructured(0.5), inputs=stats_for(96)).S
    assert S64 is not None
    assert S32 is not None
    assert output_error(X, W, S32) == pytest.approx(output_error(X, W, S64), rel=1e-3)


@pytest.mark.parametrize("kind", ["ties", "zeros"])
def test_counts_are_exact_under_ties_in_every_block(kind: str) -> None:
    W = weights(10, 60).sign() if kind == "ties" else torch.zeros(10, 60, dtype=torch.float64)
    second_moment = torch.ones(60, dtype=torch.float64)
    inputs = InputStats(100, second_moment, torch.diag(second_moment))  # nothing is updated, so all scores stay tied
    by_tensor = select_mask(W, SparseGPT(block_size=16), Unstructured(0.37), inputs=inputs)
    by_row = select_mask(W, SparseGPT(block_size=16), Unstructured(0.37, "row"), inputs=inputs)
    assert int(by_tensor.sum()) == 378
    assert by_row.sum(dim=1).tolist() == [38] * 10
    for start, stop in ((0, 16), (16, 32), (32, 48), (48, 60)):
        assert int(by_tensor[:, start:stop].sum()) == proportional(378, start, stop, 60)
        assert by_row[:, start:stop].sum(dim=1).tolist() == [proportional(38, start, stop, 60)] * 10
    assert abs(int(by_tensor[:, :16].sum()) - 0.63 * 160) <= 0.5


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_nothing_and_everything_pruned(scope: str) -> None:
    W, inputs = weights(10, 60), stats_for(60)
    kept = select(W, SparseGPT(block_size=16), Unstructured(0.0, scope), inputs=inputs)  # type: ignore[arg-type]
    assert torch.equal(kept.S, W)  # type: ignore[arg-type]
    gone = select(W, SparseGPT(block_size=16), Unstructured(1.0, scope), inputs=inputs)  # type: ignore[arg-type]
    assert torch.equal(gone.S, torch.zeros_like(W))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 12), (1, 1), (1, 12), (12, 1)])
def test_small_shapes(shape: tuple[int, int]) -> None:
    for pattern in (Unstructured(0.5), Unstructured(0.5, "row")):
        got = select(weights(*shape), SparseGPT(block_size=4), pattern, inputs=stats_for(shape[1]))
        assert got.S is not None
        assert got.mask.shape == got.S.shape == shape
        assert int(got.mask.sum()) == n_kept_total(pattern, *shape)


def test_weights_with_the_same_inputs_share_one_factor() -> None:
    inputs = stats_for(20)
    first = SparseGPT().factor(weights(5, 20), inputs)
    assert SparseGPT(block_size=7).factor(weights(9, 20), inputs).U is first.U
    assert SparseGPT(damping=0.1).factor(weights(5, 20), inputs).U is not first.U
    assert SparseGPT().factor(weights(5, 20, dtype=torch.bfloat16), inputs).U.dtype == torch.float32


def singular() -> Iterator[tuple[str, InputStats]]:
    ones = torch.ones(12, dtype=torch.float64)
    yield "equal inputs", InputStats(9, ones, torch.ones(12, 12, dtype=torch.float64))
    yield "few tokens", stats_for(12, n_tokens=3)
    dead = stats_for(12)
    dead.second_moment[4] = 0
    dead.gram[4], dead.gram[:, 4] = 0, 0  # type: ignore[index]
    yield "a dead input", dead
    yield "all dead", InputStats(0, 0 * ones, torch.zeros(12, 12, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "inputs"), list(singular()), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_gram_matrix_is_damped(name: str, inputs: InputStats, damping: float) -> None:
    W = weights(6, 12)
    got = select(W, SparseGPT(damping=damping), NM(2, 4), inputs=inputs)
    assert got.S is not None
    assert torch.isfinite(got.S).all()
    assert got.damping is not None
    if damping:
        assert got.damping == damping
    elif name != "few tokens":  # there rounding may leave the matrix positive definite
        assert got.damping == 1e-6


def test_damping_is_raised_tenfold_until_the_matrix_is_definite() -> None:
    gram = torch.eye(12, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 1.05  # smallest eigenvalue -0.05
    inputs = InputStats(100, gram.diagonal().clone(), gram)
    assert select(weights(6, 12), SparseGPT(damping=0.001), NM(2, 4), inputs=inputs).damping == pytest.approx(0.1)
    assert select(weights(6, 12), SparseGPT(damping=0.06), NM(2, 4), inputs=inputs).damping == 0.06
    assert select(weights(6, 12), "wanda", NM(2, 4), inputs=inputs).damping is None


def test_what_is_no_gram_matrix_is_refused() -> None:
    gram = torch.eye(12, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 5.0
    inputs = InputStats(100, gram.diagonal().clone(), gram)
    with pytest.raises(UsageError, match="not positive definite with 1 times its mean diagonal"):
        select(weights(6, 12), "sparsegpt", NM(2, 4), inputs=inputs)
    with pytest.raises(UsageError, match="not symmetric: 5 in row 0, column 1, and 0 in row 1, column 0"):
        select(weights(6, 12), "sparsegpt", NM(2, 4), inputs=InputStats(100, gram.diagonal().clone(), gram.triu()))
    gram[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="the Gram matrix of the inputs holds NaN or infinity"):
        select(weights(6, 12), "sparsegpt", NM(2, 4), inputs=inputs)
    with pytest.raises(UsageError, match="this needs the Gram matrix of the inputs"):
        select(weights(6, 12), "sparsegpt", NM(2, 4), inputs=InputStats(100, torch.ones(12)))


def test_weights_too_large_to_rank_or_to_update_are_refused() -> None:
    W = weights(6, 12, dtype=torch.float32)
    with pytest.raises(NonFiniteError, match="ranked weights by NaN or infinity"):
        select(W * 1e38, "sparsegpt", Unstructured(0.5), inputs=stats_for(12))
    plain = stats_for(12)
    tiny = InputStats(9, plain.second_moment * 1e-44, plain.gram * 1e-44)  # type: ignore[operator]
    with pytest.raises(NonFiniteError, match="updated weights to NaN or infinity"):
        select(W.sign() * 3e38, "sparsegpt", Unstructured(0.5), inputs=tiny)


def test_bad_fields_are_refused() -> None:
    with pytest.raises(UsageError, match="block_size must be at least 1, got 0"):
        SparseGPT(block_size=0)
    for damping in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="damping must be a number >= 0"):
            SparseGPT(damping=damping)


@pytest.mark.gpu
@pytest.mark.parametrize("criterion", ["wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4), Tiles(0.5, 8, 8)], ids=str)
def test_gpu_chooses_as_the_cpu(criterion: str, pattern: Pattern) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    W, inputs = weights(48, 96), stats_for(96)
    here, there = (select(W.to(device), criterion, pattern, inputs=inputs) for device in ("cpu", "cuda"))
    assert torch.equal(there.mask.cpu(), here.mask)
    assert there.mask.device.type == "cuda"
    if here.S is not None and there.S is not None:
        torch.testing.assert_close(there.S.cpu(), here.S, rtol=0, atol=1e-10)


def test_magnitude_settles_ties_by_column_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        W = torch.randn(40, 24, generator=generator).to(dtype)
        W[:, ::3] = W[:, ::3].sign() * 0.5  # many ties, columns of equal norm
        W[:, 1::3] = torch.where(W[:, 1::3] > 0, 0.5, W[:, 1::3] * 2)
        mask = select_mask(W, "magnitude", NM(2, 4))
        wide = W.abs().double().numpy()
        norms = np.linalg.norm(wide, axis=0)
        order = np.lexsort(  # stable: by magnitude, then by the smaller column, then by position
            (np.broadcast_to(norms, wide.shape).reshape(-1, 4), -wide.reshape(-1, 4)), axis=1
        )
        expected = np.zeros((wide.size // 4, 4), dtype=bool)
        np.put_along_axis(expected, order[:, :2], True, axis=1)
        np.testing.assert_array_equal(mask.numpy(), expected.reshape(wide.shape))
        by_position = select_mask(W, Magnitude(ties="position"), NM(2, 4))
        assert not torch.equal(by_position, mask)
        earlier = np.zeros_like(expected)
        np.put_along_axis(earlier, np.argsort(-wide.reshape(-1, 4), axis=1, kind="stable")[:, :2], True, axis=1)
        np.testing.assert_array_equal(by_position.numpy(), earlier.reshape(wide.shape))


def test_neighbouring_float32_values_are_no_ties() -> None:
    W = torch.tensor([[1.0, float(np.nextafter(np.float32(1), np.float32(2)))], [5.0, 0.0], [0.0, 100.0]])
    assert select_mask(W, "magnitude", NM(1, 2))[0].tolist() == [False, True]  # the larger one, in the larger column
