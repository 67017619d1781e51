"""ALPS: a sparse step in the Gram metric by the alternating direction method of multipliers; the mask is free."""

from __future__ import annotations

import torch
from torch import Tensor

from mendlm.masks import mask_of_largest
from mendlm.metrics import GramMetric
from mendlm.patterns import Pattern
from mendlm.refiners._least_squares import masked_least_squares

# Steps between two looks at the mask, the most of them, the steps after which a nearly settled mask is good enough, and
# the steps of least squares at the end: the values of [1]'s code.
UPDATE_EVERY, MAX_STEPS, SWITCH_AFTER, BACK_SOLVE = 3, 200, 30, 10
MAX_RHO = 1e6
MIN_RHO = 1e-6  # not in [1]'s code: a mask that no penalty moves is as good as settled


def alps(target: Tensor, metric: GramMetric, pattern: Pattern, rho: float) -> tuple[Tensor, Tensor]:
    """Mask and S of the pattern with a small ``||(target - S) C||_F``.

    The problem is split into B without a pattern and S with one, and a multiplier V for ``B = S``:

        B = (target R - V + rho S) (R + rho I)^-1;   S = threshold(B + V / rho);   V = V + rho (B - S)

    R is the correlation. The penalty rho grows by 1.3, 1.2 or 1.1 while more than 10 %, 0.5 % or any of the mask
    changes; while nothing has changed yet, it falls to a fifth, down to 1e-6. At the end S is fitted on the mask of B.

    Parameters
    ----------
    target : (d_out, d_in) in the scaled columns of `metric`.
    metric : in whose eigenvectors ``R + rho I`` is inverted.
    pattern : where zeros may be.
    rho : the first penalty, > 0.

    Returns
    -------
    mask, S : bool and the dtype of `target`, S zero off the mask.

    Notes
    -----
    Two products with (d_in, d_in) matrices a step, 4 d_out d_in^2 flops, and a selection of entries.

    References
    ----------
    .. [1] Meng, Behdin, Wang, Mazumder (2024), ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
       Language Models, NeurIPS 2024, arXiv:2406.07831, eq. 4 (the steps) and Algorithm 1 (penalty and fit).
       Deviations: exact counts under ties; the least penalty; conjugate gradients with a step size per row, which
       never raise the error.
    """
    correlation = metric.parts()[0]
    values, vectors = metric.eigen
    image = target @ correlation
    V = torch.zeros_like(target)
    before = mask_of_largest(target, pattern)
    S = target * before
    n_kept = max(int(before.sum()), 1)
    moved = False
    B = target
    for step in range(1, MAX_STEPS + 1):
        B = (torch.add(image, S, alpha=rho).sub_(V) @ vectors).div_(values + rho) @ vectors.T
        raised = torch.add(B, V, alpha=1 / rho)
        mask = mask_of_largest(raised, pattern)
        S = raised * mask
        V.add_(B, alpha=rho).sub_(S, alpha=rho)
        if step % UPDATE_EVERY:
            continue
        n_changed = int((mask != before).sum())
        before = mask
        if n_changed == 0 and moved:
            break
        if n_changed == 0:
            if rho < MIN_RHO:
                break
            rho /= 5
            continue
        moved = True
        changed = n_changed / n_kept
        if step > SWITCH_AFTER and changed < 3e-4:
            break
        rho = min(rho * (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1), MAX_RHO)
    mask = mask_of_largest(B, pattern)
    solved = masked_least_squares(target, B * mask, mask.to(B.dtype), correlation, max_steps=BACK_SOLVE)
    return mask, solved.S
