"""Sparsities by block: outlier-weighed layer sparsity (OWL), Yin et al. (2024), arXiv:2310.05175, Section 3."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mendlm.errors import UsageError
from mendlm.linalg import compute_dtype


def outlier_frac(W: Tensor, second_moment: Tensor, threshold: float) -> float:
    """Share of outliers among the entries of a weight: ``|W_ij| ||X_j||_2`` above `threshold` times its mean.

    Parameters
    ----------
    W : (d_out, d_in) floating. Not modified.
    second_moment : (d_in,) mean squares of the inputs; a common factor changes nothing.
    threshold : M > 0. The paper's settings use 5 for LLaMA.

    Returns
    -------
    float in [0, 1]; 0 if all scores are 0. The layerwise outlier distribution D of the paper.

    Raises
    ------
    UsageError : `second_moment` is not of the inputs of `W`.

    Notes
    -----
    Computed in float32 (float64 for float64 `W`), the mean in float64; two copies of W. Deviation: the authors' code
    (lib/prune_all.py, ``check_outlier_mean``) takes one mean over the scores of all weights of a block. There a weight
    with large inputs raises the bar for one with small inputs, although their scores share no unit; here every weight
    is measured by its own mean.
    """
    if second_moment.shape != (W.shape[1],):
        raise UsageError(
            f"second_moment must have the length of an input of W, {W.shape[1]}, got shape "
            f"{tuple(second_moment.shape)}."
        )
    if not W.numel():
        return 0.0
    dtype = compute_dtype(W.dtype)
    scores = W.abs().to(dtype) * second_moment.sqrt().to(W.device, dtype)
    bar = threshold * float(scores.mean(dtype=torch.float64))
    return int((scores > bar).sum()) / W.numel()


def owl_sparsities(
    outlier_fracs: Mapping[int, float], weights: Mapping[int, int], sparsity: float, spread: float
) -> dict[int, float]:
    """Sparsities of blocks: the more outliers, the fewer zeros.

        s_b = sparsity - c (D_b - mean(D))

    The mean is weighted by parameters, so that the mean of s, weighted alike, is `sparsity`; c >= 0 is as large as
    |s_b - sparsity| <= spread and 0 <= s_b <= 1 allow.

    Parameters
    ----------
    outlier_fracs : D by block, as `outlier_frac` gives it.
    weights : parameters by block, of the same blocks; > 0.
    sparsity : of all blocks together, in [0, 1].
    spread : lambda in [0, 1); the paper takes 0.08. The block furthest from the mean of D lies this far from
        `sparsity`, unless 0 or 1 is nearer: then all blocks move together.

    Returns
    -------
    Sparsity by block, in the order of `outlier_fracs`. All equal `sparsity` if the blocks have equally many outliers,
    if there is one block, or if the spread is 0.

    Raises
    ------
    UsageError : no block, other blocks in `weights`, or a value out of range.

    Notes
    -----
    Paper: s_b proportional to 1 - D_b within sparsity ± lambda. Deviations: it takes a plain mean over blocks, which is
    the same where all have equally many parameters; and its code stretches the D to a range of 2 lambda before it
    shifts them to the mean, so that a block far out moves by up to 2 lambda, and sets sparsities below 0 to 0.01, which
    changes the mean.
    """
    _check_blocks(outlier_fracs, weights)
    if not 0 <= sparsity <= 1:
        raise UsageError(f"sparsity must be in [0, 1], got {sparsity!r}.")
    if not 0 <= spread < 1:
        raise UsageError(f"spread must be in [0, 1), got {spread!r}. The paper takes 0.08.")
    total = sum(weights.values())
    mean = math.fsum(weights[block] / total * frac for block, frac in outlier_fracs.items())
    excess = {block: frac - mean for block, frac in outlier_fracs.items()}
    most, least = max(excess.values()), min(excess.values())
    # Equal shares of outliers differ from their mean by rounding, and that must not be blown up to the spread. Real
    # differences are at least one in the number of parameters.
    if most - least <= 1e-12:
        return dict.fromkeys(outlier_fracs, sparsity)
    slope = min(_steepest(min(spread, sparsity), most), _steepest(min(spread, 1 - sparsity), -least))
    return {block: min(max(sparsity - slope * value, 0.0), 1.0) for block, value in excess.items()}


def _steepest(room: float, excess: float) -> float:
    """The slope at which `excess` fills `room`."""
    return room / excess if excess > 0 else math.inf


def _check_blocks(outlier_fracs: Mapping[int, float], weights: Mapping[int, int]) -> None:
    if not outlier_fracs:
        raise UsageError("OWL shares sparsity out among blocks, but there is none to compress.")
    if set(outlier_fracs) != set(weights):
        odd = min(set(outlier_fracs) ^ set(weights))
        raise UsageError(f"block {odd} is in only one of outlier_fracs and weights.")
    for block, frac in outlier_fracs.items():
        if not 0 <= frac <= 1:
            raise UsageError(f"the share of outliers of block {block} must be in [0, 1], got {frac!r}.")
        if weights[block] <= 0:
            raise UsageError(f"block {block} must have parameters, got {weights[block]!r}.")
