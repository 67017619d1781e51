"""`select` and `select_mask`: the entries of a weight that stay, by a criterion and a pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from mendlm.criteria import CRITERIA, AbstractCriterion, Selection
from mendlm.errors import NonFiniteError, UsageError
from mendlm.inputs import InputStats, check_stats
from mendlm.linalg import all_finite
from mendlm.names import lookup
from mendlm.patterns import Pattern


def select_mask(
    W: Tensor,
    criterion: str | AbstractCriterion,
    pattern: Pattern,
    *,
    inputs: InputStats | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the entries of `W` that stay.

    Parameters
    ----------
    W : (d_out, d_in) floating tensor. Not modified.
    criterion : a name in `mendlm.criteria.CRITERIA`, or an instance of one of its classes.
    pattern : where the zeros of S may be, e.g. `Unstructured`, `NM` or `Tiles`.
    inputs : calibration statistics, for criteria that need them.
    generator : source of randomness for criteria that need one; seed 0 if not given.

    Returns
    -------
    (d_out, d_in) bool tensor on the device of `W`, True = kept. Every group keeps exactly `pattern.n_kept` of its
    entries (or tiles), also under ties (the one that comes first in memory is kept), all-zero input, sparsity 0 and 1.

    Raises
    ------
    UsageError : `W` is not 2-D and floating, an unknown criterion, statistics that are missing or do not fit, or a
        pattern that does not fit the shape.
    NonFiniteError : `W` or the scores hold NaN or infinity.

    Notes
    -----
    Cost: one selection per group, O(numel) expected; about three copies of `W` in memory. SparseGPT costs more, see
    there.
    """
    return select(W, criterion, pattern, inputs=inputs, generator=generator).mask


@torch.no_grad()
def select(
    W: Tensor,
    criterion: str | AbstractCriterion,
    pattern: Pattern,
    *,
    inputs: InputStats | None = None,
    generator: torch.Generator | None = None,
) -> Selection:
    """As `select_mask`, with the updated weights of a criterion that has any, and the damping it used."""
    if W.ndim != 2 or not W.is_floating_point():
        raise UsageError(f"W must be a 2-D floating tensor, got shape {tuple(W.shape)} and dtype {W.dtype}.")
    W = W.detach()  # a parameter counts as its values
    chosen = lookup(CRITERIA, criterion, "criterion")() if isinstance(criterion, str) else criterion
    if generator is None:
        generator = torch.Generator(device=W.device).manual_seed(0)
    if not all_finite(W):
        raise NonFiniteError(
            f"W of shape {tuple(W.shape)} holds NaN or infinity. Repair or re-download the checkpoint."
        )
    check_stats(W, inputs, chosen.needs)
    return chosen.select(W, pattern, inputs, generator)
