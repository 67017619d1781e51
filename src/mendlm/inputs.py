"""What calibration tells about the inputs of one weight: moments, and the Gram matrix where one is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mendlm.errors import NonFiniteError, UsageError
from mendlm.linalg import all_finite

# Of ``|G_ij - G_ji|``, in units of the roots of G_ii G_jj: sums in half precision stay below, a missing half does not.
ASYMMETRY = 0.05
TILE = 512  # rows and columns compared at a time

DeadColumns = Literal["keep", "drop", "error"]
T = TypeVar("T")


@dataclass(frozen=True)
class InputStats:
    """Statistics of the inputs X (n_tokens, d_in) that a weight (d_out, d_in) saw in calibration.

    Attributes
    ----------
    n_tokens : rows of X; 0 for an expert that no token was routed to.
    second_moment : (d_in,) float64, the mean of ``x_j ** 2``.
    gram : (d_in, d_in) float64, ``X.T @ X / n_tokens``; None if nobody asked for it.
    mean, mean_abs : (d_in,) float64, the means of ``x_j`` and of ``|x_j|``; None if unknown. Calibration gathers them
        always.
    """

    n_tokens: int
    second_moment: Tensor
    gram: Tensor | None = None
    mean: Tensor | None = None
    mean_abs: Tensor | None = None
    _cache: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def d_in(self) -> int:
        """Number of inputs."""
        return self.second_moment.shape[0]

    @property
    def dead(self) -> Tensor:
        """(d_in,) bool: inputs that were zero for every token."""
        return self.second_moment == 0

    @property
    def scale(self) -> Tensor:
        """(d_in,) float64, the root mean square of every input."""
        return self.second_moment.sqrt()

    def cached(self, key: object, make: Callable[[], T]) -> T:
        """``make()``, computed once: weights that read the same inputs share what is derived from these statistics."""
        if key not in self._cache:
            self._cache[key] = make()
        value: T = self._cache[key]
        return value

    def revived(self) -> InputStats:
        """These statistics with every dead input given the smallest second moment of a live one (1 if all are dead).

        A dead input then counts as one that was not correlated with any other; matrices stay positive definite. Its
        mean stays 0, its mean size becomes the smallest of a live one too.
        """
        dead = self.dead
        if not bool(dead.any()):
            return self
        return self.cached("revived", lambda: self._revive(dead))

    def _revive(self, dead: Tensor) -> InputStats:
        second_moment = _lifted(self.second_moment, dead)
        gram = self.gram
        if gram is not None:
            gram = gram.clone()
            gram.diagonal()[dead] = second_moment[dead]
        mean_abs = None if self.mean_abs is None else _lifted(self.mean_abs, dead)
        return InputStats(self.n_tokens, second_moment, gram, self.mean, mean_abs)


def _lifted(values: Tensor, dead: Tensor) -> Tensor:
    """`values` (d_in,) with the smallest live one in the place of the dead; 1 if all are dead."""
    live = values[~dead]
    floor = live.min() if live.numel() else torch.ones((), dtype=values.dtype, device=dead.device)
    return torch.where(dead, floor, values)


def treat_dead_columns(W: Tensor, inputs: InputStats, policy: DeadColumns) -> tuple[Tensor, InputStats]:
    """W and statistics fit for criteria and metrics, whatever inputs were dead.

    Parameters
    ----------
    W : (d_out, d_in). Not modified.
    inputs : of `W`.
    policy : "keep" ranks and mends the weights of a dead input as if it were the weakest live one, "drop" zeroes them,
        so that they are pruned first, "error" refuses. Of a weight that no token reached nothing is known: "drop" keeps
        it.

    Raises
    ------
    UsageError : the policy is "error" and an input is dead.
    """
    dead = inputs.dead
    if not bool(dead.any()):
        return W, inputs
    if policy == "error":
        if inputs.n_tokens == 0:
            raise UsageError(
                "no calibration token reached this expert. Calibrate on more or other text, or pass --dead-columns "
                "keep or drop."
            )
        columns = dead.nonzero().flatten().tolist()
        shown = ", ".join(map(str, columns[:5])) + (", …" if len(columns) > 5 else "")
        raise UsageError(
            f"{len(columns)} of {inputs.d_in} inputs were zero for every calibration token (columns {shown}). "
            "Calibrate on more or other text, or pass --dead-columns keep or drop."
        )
    return (W.masked_fill(dead, 0) if policy == "drop" and inputs.n_tokens else W), inputs.revived()


def check_stats(W: Tensor, inputs: InputStats | None, needs: Literal["weights", "second_moment", "gram"]) -> None:
    """Raise `UsageError` unless `inputs` hold what is needed for `W` (d_out, d_in)."""
    if needs == "weights":
        return
    if inputs is None:
        raise _missing(needs)
    check_sizes(W, inputs)
    if needs == "gram" and inputs.gram is None:
        raise _missing(needs)


def check_sizes(W: Tensor, inputs: InputStats) -> None:
    """Raise `UsageError` unless all that `inputs` hold is of the inputs of `W` (d_out, d_in)."""
    d_in = W.shape[1]
    if inputs.second_moment.shape != (d_in,):
        raise UsageError(f"the statistics are of {inputs.d_in} inputs, W of shape {tuple(W.shape)} has {d_in}.")
    for name, shape in (("gram", (d_in, d_in)), ("mean", (d_in,)), ("mean_abs", (d_in,))):
        values = getattr(inputs, name)
        if values is not None and values.shape != shape:
            raise UsageError(
                f"the statistics are of other inputs: {name} has shape {tuple(values.shape)}, W of shape "
                f"{tuple(W.shape)} needs {shape}."
            )


def check_gram(gram: Tensor) -> None:
    """Refuse what is no Gram matrix; whether it is definite shows when it is factored.

    Parameters
    ----------
    gram : (d_in, d_in).

    Raises
    ------
    NonFiniteError : NaN or infinity.
    UsageError : it is not symmetric.
    """
    if not all_finite(gram):
        raise NonFiniteError("the Gram matrix of the inputs holds NaN or infinity. Calibrate on other text.")
    size = torch.split(gram.diagonal().abs().sqrt(), TILE)
    tiles = [torch.split(strip, TILE, dim=1) for strip in torch.split(gram, TILE)]
    for i, row in enumerate(tiles):
        for j in range(i, len(row)):
            excess = (row[j] - tiles[j][i].T).abs_().sub_(torch.outer(size[i], size[j]), alpha=ASYMMETRY)
            if bool((excess > 0).any()):
                a, b = divmod(int(excess.argmax()), excess.shape[1])
                raise _asymmetric(gram, i * TILE + a, j * TILE + b)


def _asymmetric(gram: Tensor, a: int, b: int) -> UsageError:
    i, j = sorted((a, b))
    return UsageError(
        f"the Gram matrix of the inputs is not symmetric: {float(gram[i, j]):g} in row {i}, column {j}, and "
        f"{float(gram[j, i]):g} in row {j}, column {i}. Pass X.T @ X / n with both of its triangles."
    )


def _missing(needs: str) -> UsageError:
    what = "the Gram matrix" if needs == "gram" else "the second moments"
    return UsageError(f"this needs {what} of the inputs. Calibrate, or pass inputs=InputStats(...).")
