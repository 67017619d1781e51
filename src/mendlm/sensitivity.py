"""How much the error of a weight changes the output of its block: what makes errors of different weights comparable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mendlm.curves import TensorCurves
from mendlm.errors import NonFiniteError
from mendlm.patterns import Pattern

Change = Callable[[Mapping[str, Tensor]], float]
"""Mean squared relative change of a block's outputs, for parameters of it by name that are put in place of its own."""


class Pruned(NamedTuple):
    """S (d_out, d_in) of rank 0, and its squared error in the metric."""

    S: Tensor
    error: float

    def for_module(self, dtype: torch.dtype, *, transposed: bool) -> Pruned:
        """With S in the dtype of a block, and (d_in, d_out) if it has its weights so."""
        return Pruned((self.S.T if transposed else self.S).to(dtype), self.error)


@dataclass(frozen=True)
class PrunedWeight:
    """One weight as every pattern of its curves leaves it at rank 0.

    Attributes
    ----------
    curves : of the weight.
    parameter : its name in the block.
    pruned : by pattern, as the block has it.
    frac : share of the tokens that reach it, > 0; below 1 for experts.
    """

    curves: TensorCurves
    parameter: str
    pruned: Mapping[Pattern, Pruned]
    frac: float


def with_sensitivities(group: Sequence[PrunedWeight], change: Change) -> list[TensorCurves]:
    """The curves of the weights of one projection, with the sensitivities of their patterns.

    With the block f, its inputs X, its outputs Y = f(X), and S in place of W, the sensitivity of W is

        s = mean over tokens of ||f(X; S) - Y||^2 / ||Y||^2,   divided by ||(W - S) C||^2,

    so that s times a squared error in the metric is the squared relative change of the block's output that the error
    makes, as far as that grows with it in proportion and the directions of errors do not matter.

    Parameters
    ----------
    group : one weight, or those of all experts of a projection, which are put in together: the change is shared out by
        their squared errors and the shares of the tokens that reach them.
    change : measures the change of the block's outputs.

    Raises
    ------
    NonFiniteError : the outputs of the block overflow with a pruned weight.

    Notes
    -----
    Cost: one call of `change` for each pattern, a forward pass of the block.
    """
    changes: dict[Pattern, float] = {}
    for pattern in dict.fromkeys(curve.pattern for weight in group for curve in weight.curves.curves):
        having = [(weight, weight.pruned[pattern]) for weight in group if pattern in weight.pruned]
        total = sum(weight.frac * pruned.error for weight, pruned in having)
        changed = change({weight.parameter: pruned.S for weight, pruned in having})
        if not math.isfinite(changed):
            raise NonFiniteError(
                f"with {group[0].curves.name} at {pattern} the outputs of its block hold NaN or infinity. Calibrate in "
                "float32 (--calibration-dtype float32)."
            )
        changes[pattern] = changed / total if total > 0 else 0.0
    return [
        replace(
            weight.curves,
            curves=tuple(
                replace(curve, sensitivity=weight.frac * changes[curve.pattern]) for curve in weight.curves.curves
            ),
        )
        for weight in group
    ]
