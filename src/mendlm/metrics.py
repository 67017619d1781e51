"""Metrics: what the error of a weight is measured in. `refine` minimises the same objective in each of them.

An error E (d_out, d_in) is measured as

- plain: ``||E||_F``;
- diagonal: ``||E D||_F``, D the root mean squares of the inputs;
- gram: ``||E C||_F`` with ``C C^T = G + damping * mean(diag(G)) * I`` and G the Gram matrix ``X^T X / n`` of the inputs
  X (n, d_in): up to damping ``||X E^T||_F / sqrt(n)``, the error of the outputs.

Every metric scales columns first; in the scaled columns the Gram matrix has a unit diagonal, which preconditions the
least-squares problems of `mendlm.refiners` (Jacobi).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mendlm.errors import NonFiniteError, UsageError
from mendlm.inputs import InputStats, check_gram
from mendlm.linalg import all_finite, frobenius, inverse_factor, with_damping

MetricName = Literal["plain", "diagonal", "gram"]

SMALLEST_DAMPING = 1e-8  # the first share tried after 0


@dataclass(frozen=True)
class Metric:
    """The plain metric, and what the others add.

    Attributes
    ----------
    scale : (d_in,) > 0, columns are multiplied by it; None for ones.
    """

    name: ClassVar[MetricName] = "plain"
    scale: Tensor | None = None

    @property
    def damping(self) -> float | None:
        """Share of the mean of the Gram diagonal that was added to it; None without a Gram matrix."""
        return None

    def scaled(self, W: Tensor) -> Tensor:
        """`W` (…, d_in) in scaled columns; `W` itself where there is nothing to scale."""
        return W if self.scale is None else W * self.scale

    def unscaled(self, W: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return W if self.scale is None else W / self.scale

    def whiten(self, E: Tensor) -> Tensor:
        """What the metric takes the Frobenius norm of, for `E` (…, d_in) in scaled columns."""
        return E

    def norm(self, E: Tensor) -> float:
        """The norm of an error (…, d_in) in the original columns."""
        return frobenius(self.whiten(self.scaled(E)))

    def norm_of_scaled(self, E: Tensor) -> Tensor:
        """The norm of an error (…, d_in) in scaled columns, 0-dim."""
        norm: Tensor = torch.linalg.vector_norm(self.whiten(E))
        return norm


@dataclass(frozen=True)
class DiagonalMetric(Metric):
    """Every input weighed by its root mean square."""

    name: ClassVar[MetricName] = "diagonal"


@dataclass(frozen=True)
class GramMetric(Metric):
    """The Gram matrix of the inputs.

    Attributes
    ----------
    scale : (d_in,), the roots of the diagonal of the damped G.
    correlation : (d_in, d_in), the damped G in scaled columns: unit diagonal.
    factor : (d_in, d_in) lower triangular, ``factor @ factor.T == correlation``.
    damping_share : that was needed.
    """

    name: ClassVar[MetricName] = "gram"
    correlation: Tensor | None = None
    factor: Tensor | None = None
    damping_share: float = 0.0

    @property
    def damping(self) -> float | None:
        """As `Metric.damping`."""
        return self.damping_share

    def parts(self) -> tuple[Tensor, Tensor]:
        """Correlation and factor."""
        if self.correlation is None or self.factor is None:
            raise UsageError("a Gram metric is made by mendlm.metrics.gram_metric.")
        return self.correlation, self.factor

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (d_in,), non-decreasing, and eigenvectors (d_in, d_in) of `correlation`; float64 inside."""
        correlation = self.parts()[0]
        values, vectors = torch.linalg.eigh(correlation.to(torch.float64))
        return values.to(correlation.dtype), vectors.to(correlation.dtype)

    @cached_property
    def inverse_factor(self) -> Tensor:
        """(d_in, d_in) upper triangular U with ``inv(correlation) = U.T @ U``; float64 inside."""
        correlation = self.parts()[0]

        def attempt(share: float) -> Tensor | None:
            H = correlation.to(torch.float64, copy=True)
            H.diagonal().add_(share)
            return inverse_factor(H)

        # The correlation was rounded to the compute dtype, which may have cost it its smallest eigenvalue.
        U, _ = with_damping(attempt, 0.0, torch.finfo(correlation.dtype).eps)
        if U is None:
            raise UsageError("the metric has no positive definite correlation. Make it by mendlm.metrics.gram_metric.")
        return U.to(correlation.dtype)

    def whiten(self, E: Tensor) -> Tensor:
        """``E @ factor``."""
        return E @ self.parts()[1]


def gram_metric(gram: Tensor, damping: float, dtype: torch.dtype) -> GramMetric:
    """The metric of a Gram matrix.

    Parameters
    ----------
    gram : (d_in, d_in), symmetric, positive semidefinite, with a positive diagonal.
    damping : share of the mean of its diagonal that is added to the diagonal; raised tenfold up to 1 while the
        factorization fails.
    dtype : of the result; the factorization is in float64.

    Raises
    ------
    UsageError : a matrix that is not square, not symmetric, or not positive definite with damping 1; a damping below 0.
    NonFiniteError : NaN or infinity.

    Notes
    -----
    ``d_in^3 / 3`` multiply-adds in float64.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise UsageError(f"gram must be a square matrix, got shape {tuple(gram.shape)}.")
    if not damping >= 0:
        raise UsageError(f"damping must be at least 0, got {damping!r}.")
    G = gram.detach().to(torch.float64)
    check_gram(G)
    mean = float(G.diagonal().mean())

    def attempt(share: float) -> GramMetric | None:
        damped = G.clone()
        damped.diagonal().add_(share * mean)
        scale = damped.diagonal().clamp_min(0).sqrt()
        correlation = damped / torch.outer(scale, scale)
        factor, info = torch.linalg.cholesky_ex(correlation)
        # A pivot of the size of its rounding error is none: in the compute dtype the matrix would not be definite. The
        # pivots, squares of this diagonal, are at least about share / d_in: a share of 0.01 does up to 80,000 inputs.
        smallest = float(factor.diagonal().min()) ** 2 if not bool(info) and factor.numel() else 0.0
        if factor.numel() == 0 or smallest > torch.finfo(dtype).eps:
            return GramMetric(scale.to(dtype), correlation.to(dtype), factor.to(dtype), share)
        return None

    metric, share = with_damping(attempt, damping, SMALLEST_DAMPING)
    if metric is None:
        raise UsageError(
            f"the Gram matrix of the inputs is not positive definite after damping: not even with {share:g} times "
            "its mean diagonal added to the diagonal, so it is no Gram matrix. Gather it again."
        )
    return metric


def make_metric(
    kind: str, inputs: InputStats | None, *, damping: float, dtype: torch.dtype, device: torch.device
) -> Metric:
    """The metric `kind` for a weight with these inputs; weights with the same inputs share it.

    Parameters
    ----------
    kind : "plain", "diagonal" or "gram".
    inputs : calibration statistics without dead inputs (`InputStats.revived`); not needed for "plain".
    damping : of a Gram matrix, as a share of the mean of its diagonal.
    dtype : to compute in.
    device : where the weight is.

    Raises
    ------
    UsageError : unknown kind, or statistics that are missing.
    NonFiniteError, UsageError : as `gram_metric`.
    """
    if kind == "plain":
        return Metric()
    if kind not in ("diagonal", "gram"):
        raise UsageError(f"metric must be plain, diagonal or gram, got {kind!r}.")
    if inputs is None or (kind == "gram" and inputs.gram is None):
        what = "the Gram matrix" if kind == "gram" else "the second moments"
        raise UsageError(f"metric {kind!r} needs {what} of the inputs. Calibrate, or take metric 'plain'.")
    stats = inputs

    def make() -> Metric:
        if kind == "gram" and stats.gram is not None:
            return gram_metric(stats.gram.to(device), damping, dtype)
        return diagonal_metric(stats.scale.to(device, dtype))

    return stats.cached(("metric", kind, damping, dtype, str(device)), make)


def diagonal_metric(scale: Tensor) -> DiagonalMetric:
    """The metric of input scales (d_in,).

    Raises
    ------
    UsageError : a scale is not positive.
    NonFiniteError : NaN or infinity.
    """
    if not all_finite(scale):
        raise NonFiniteError("input_scale holds NaN or infinity.")
    if not bool((scale > 0).all()):
        column = int((scale <= 0).nonzero()[0])
        raise UsageError(
            f"input_scale must be positive, got {float(scale[column])!r} in column {column}. "
            "Replace the scale of a dead input by a small positive number."
        )
    return DiagonalMetric(scale.detach())


def ratio(part: float, whole: float) -> float:
    """A norm relative to another one; 0 where there is nothing."""
    return 0.0 if whole == 0 else part / whole
