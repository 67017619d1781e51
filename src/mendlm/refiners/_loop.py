"""`refine`: the one loop that runs every refiner, and the last step that every refiner shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mendlm.budgets import as_whole
from mendlm.decomposition import SparseLowRank
from mendlm.errors import NonFiniteError, UsageError
from mendlm.inputs import InputStats, check_sizes
from mendlm.linalg import WEIGHT_DTYPES, all_finite, compute_dtype, frobenius
from mendlm.masks import row_blocks, zero_
from mendlm.metrics import GramMetric, Metric, MetricName, diagonal_metric, gram_metric, ratio
from mendlm.patterns import Pattern
from mendlm.refiners._base import AbstractRefiner, Problem, Progress, StackRefiner
from mendlm.refiners._completion import Completion
from mendlm.refiners._least_squares import masked_least_squares

DEFAULT_DAMPING = 0.01
# The last fit of S in the Gram metric: until a step gains less than this share of the squared error, or this many.
FINAL_RTOL, FINAL_STEPS = 1e-4, 200
STRIP_BYTES = 2**20  # of one of a few matrices that the cache holds at once


@dataclass(frozen=True)
class Refinement:
    """What `refine` returns.

    Attributes
    ----------
    decomposition : S, B, A and the mask, in the storage dtype.
    trace : one `Progress` per step.
    status : "converged" if the refiner's stop rule ended it, "max_steps" if its step budget did.
    rel_error : ``||W - S - B @ A||_F / ||W||_F`` of the stored (rounded) factors; 0 for W = 0.
    objective : ``||W - S - L||`` in the metric, before rounding; in the plain and the diagonal metric that is the error
        off the mask, in the Gram metric L is rounded already and S is not.
    metric : that was minimised in: "plain", "diagonal" or "gram".
    damping : of the Gram matrix, as a share of the mean of its diagonal; None without one.
    rel_output_error : error of what is stored relative to W, in the metric; None for the plain one.
    """

    decomposition: SparseLowRank
    trace: tuple[Progress, ...]
    status: Literal["converged", "max_steps"]
    rel_error: float
    objective: float
    metric: MetricName = "plain"
    damping: float | None = None
    rel_output_error: float | None = None

    @property
    def S(self) -> Tensor:
        """(d_out, d_in), zero off the mask."""
        return self.decomposition.S

    @property
    def A(self) -> Tensor:
        """(rank, d_in)."""
        return self.decomposition.A

    @property
    def B(self) -> Tensor:
        """(d_out, rank)."""
        return self.decomposition.B


@torch.no_grad()
def refine(
    W: Tensor,
    mask: Tensor,
    refiner: AbstractRefiner,
    *,
    input_scale: Tensor | None = None,
    gram: Tensor | None = None,
    metric: Metric | None = None,
    start: Tensor | None = None,
    pattern: Pattern | None = None,
    inputs: InputStats | None = None,
    dtype: torch.dtype | None = None,
    storage_dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Refinement:
    """Find S, B, A with ``W ≈ S + B @ A``, S zero off the mask.

    Parameters
    ----------
    W : (d_out, d_in) floating tensor, on the device to compute on. Not modified.
    mask : (d_out, d_in) bool, True = kept.
    refiner : the algorithm, e.g. ``TLR(rank=128)``.
    input_scale : (d_in,), > 0: the diagonal metric, the objective is measured on ``W * input_scale``.
    gram : (d_in, d_in): the Gram metric of these inputs, with a damping of 0.01.
    metric : any metric, e.g. of `mendlm.metrics.make_metric`. At most one of these three; plain if none is given.
    start : (d_out, d_in), zero off the mask: S as a criterion that updates weights left it; default ``mask * W``. Not
        modified.
    pattern : where zeros may be; for refiners that move the mask.
    inputs : statistics without dead inputs (`InputStats.revived`), for refiners that look at more of them than the
        metric does; they do not choose the metric.
    dtype : compute dtype; float32 for bf16, fp16 and float32 input, float64 for float64 input.
    storage_dtype : dtype of S, B and A; that of `W` if not given.
    generator : source of randomness on the device of `W`; seed 0 if not given. Same seed, same result.

    Returns
    -------
    Refinement. B and A are rounded to the storage dtype first and S is fitted to them (unless `refiner.refits_S` is
    False): in the plain and the diagonal metric the error on the mask is that of rounding S alone, in the Gram metric S
    is the least-squares solution for the rounded B and A. Without a low-rank part S stays `start` outside the Gram
    metric.

    Raises
    ------
    UsageError : shapes or dtypes that do not fit, a rank outside [0, min(d_out, d_in)], a scale that is not positive, a
        metric that the refiner does not have, a `gram` that is no Gram matrix, no `pattern` for one that moves the
        mask, no `inputs` for "slim-lora".
    NonFiniteError : NaN or infinity in `W`, in the statistics, or in a result; the message names the iteration.

    References
    ----------
    .. [1] Shen et al. (2025), Targeted Low-rank Refinement, ICML 2025, PMLR 267, Algorithm 1. Deviation: S is refitted
       on the mask after B and A are rounded; before rounding it equals the paper's S when the last residual has rank k.
    """
    _validate(W, mask, refiner.rank)
    W = W.detach()  # a parameter counts as its values
    compute = compute_dtype(W.dtype, dtype)
    storage = W.dtype if storage_dtype is None else storage_dtype
    _check_dtypes(W.dtype, compute, storage)
    if generator is None:
        generator = torch.Generator(device=W.device).manual_seed(0)
    measure = _metric(W, refiner, input_scale, gram, metric, compute)
    dense = W.to(compute)
    first = None if start is None else _checked_start(start, W, mask).to(compute)
    if inputs is not None:
        check_sizes(W, inputs)
    scaled_first = None if first is None else measure.scaled(first)
    problem = Problem(measure.scaled(dense), mask, generator, measure, scaled_first, pattern, inputs)
    found = _iterated(problem, refiner)
    del problem, scaled_first
    return _completed(dense, measure, refiner, found, storage)


@torch.no_grad()
def refine_stack(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    refiner: StackRefiner,
    *,
    dtype: torch.dtype | None = None,
    storage_dtype: torch.dtype | None = None,
    generators: Sequence[torch.Generator],
) -> list[Refinement]:
    """`refine` of matrices of one shape and dtype, in the plain metric, with the steps of all of them at once.

    Parameters
    ----------
    weights, masks, generators : as in `refine`, one for each matrix, on one device.
    refiner : one that `stacks` matrices of this shape.
    dtype, storage_dtype : as in `refine`.

    Returns
    -------
    A `Refinement` for each, which differs from that of `refine` by rounding, but for a refiner that goes on differently
    after it. Where launches cost more than products (small matrices on a GPU), it takes a fraction of the time; memory:
    some five copies of all matrices in the compute dtype.

    Raises
    ------
    UsageError, NonFiniteError : as `refine`, for any of them.
    """
    for W, mask in zip(weights, masks, strict=True):
        _validate(W, mask, refiner.rank)
    first = weights[0]
    compute = compute_dtype(first.dtype, dtype)
    storage = first.dtype if storage_dtype is None else storage_dtype
    _check_dtypes(first.dtype, compute, storage)
    dense = torch.stack([W.to(compute) for W in weights])
    problem = Problem(dense, torch.stack(list(masks)), tuple(generators))
    found = _iterated_stack(problem, refiner)
    return [_completed(W, problem.metric, refiner, one, storage) for W, one in zip(dense, found, strict=True)]


@dataclass(frozen=True)
class _Found:
    """Where the steps of a refiner ended: L = left @ right and S in scaled columns, compute dtype."""

    left: Tensor
    right: Tensor
    mask: Tensor
    S: Tensor | None  # None for mask * W
    trace: tuple[Progress, ...]
    status: Literal["converged", "max_steps"] = "max_steps"


def _iterated(problem: Problem, refiner: AbstractRefiner) -> _Found:
    """The steps of `refiner`."""
    state = refiner.init(problem)
    trace: list[Progress] = []
    status: Literal["converged", "max_steps"] = "max_steps"
    for t in range(refiner.max_steps):
        state, progress = refiner.step(problem, state, t)
        _check_progress(progress, problem, refiner, t)
        trace.append(progress)
        if refiner.converged(state):
            status = "converged"
            break
    left, right = _checked_factors(*refiner.finish(problem, state), refiner, len(trace))
    mask, S = refiner.final_mask(problem, state), refiner.final_S(problem, state)
    return _Found(left, right, mask, S, tuple(trace), status)


def _iterated_stack(problem: Problem, refiner: StackRefiner) -> list[_Found]:
    """The steps of `refiner` for every matrix of a stack."""
    state = refiner.init(problem)
    traces: list[list[Progress]] = [[] for _ in problem.W]
    for t in range(refiner.max_steps):
        state, steps = refiner.step_stack(problem, state, t)
        for trace, progress in zip(traces, steps, strict=True):
            _check_progress(progress, problem, refiner, t)
            trace.append(progress)
    factors = _checked_factors(*refiner.finish(problem, state), refiner, refiner.max_steps)
    rows = zip(*factors, problem.mask, traces, strict=True)
    return [_Found(left, right, mask, None, tuple(trace)) for left, right, mask, trace in rows]


def _check_progress(progress: Progress, problem: Problem, refiner: AbstractRefiner, t: int) -> None:
    if not math.isfinite(progress.objective):
        raise NonFiniteError(
            f"{refiner.name} gave a non-finite objective in iteration {t} for W of shape "
            f"{tuple(problem.W.shape[-2:])}. Compute in float64, or check the scale of W."
        )


def _checked_factors(left: Tensor, right: Tensor, refiner: AbstractRefiner, n_steps: int) -> tuple[Tensor, Tensor]:
    if not (all_finite(left) and all_finite(right)):
        raise NonFiniteError(f"{refiner.name} gave non-finite factors after iteration {n_steps - 1}.")
    return left, right


def _completed(
    dense: Tensor, measure: Metric, refiner: AbstractRefiner, found: _Found, storage: torch.dtype
) -> Refinement:
    """The step that every refiner shares: B and A are rounded, S is fitted to them, and the errors are measured.

    No more than two matrices of the compute dtype live beside W in it: a large one decides what fits.
    """
    compute, mask, trace = dense.dtype, found.mask, found.trace
    # On the mask the error is that of S. Where S is least squares for the rounded L, that is the L to measure with.
    objective, S = math.nan, None
    if not isinstance(measure, GramMetric):
        if refiner.refits_S and refiner.rank > 0:
            objective = float(Completion(measure.scaled(dense), mask).advance(found.left, found.right)[0])
        else:
            fitted = _unfitted_S(dense, mask, found.S, measure)
            exact = found.left @ found.right
            torch.sub(measure.scaled(dense), exact, out=exact)
            objective = frobenius(exact.sub_(measure.scaled(fitted)))
            _check_S(fitted, objective, refiner)
            S = fitted.to(storage)
            del fitted, exact
    B, A = found.left.to(storage), measure.unscaled(found.right).to(storage)
    L = B.to(compute) @ A.to(compute)
    if isinstance(measure, GramMetric):
        if refiner.refits_S:
            fitted = _least_squares_S(dense, L, mask, found.S, measure)
        else:
            fitted = _unfitted_S(dense, mask, found.S, measure)
        objective = measure.norm(dense - fitted - L)
        _check_S(fitted, objective, refiner)
        S = fitted.to(storage)
        del fitted
    error = torch.sub(dense, L, out=L)
    fits = S is None
    if S is None:
        S = torch.empty(dense.shape, dtype=storage, device=dense.device)
    squares, is_finite, strays = [], all_finite(B) and all_finite(A), False
    for gap, stored, kept in row_blocks(error, S, mask, n_bytes=STRIP_BYTES):
        if fits:
            stored.copy_((gap * kept.to(compute)).add_(0.0))  # + 0 turns the -0 of a product into 0
        else:
            strays = strays or bool((stored * ~kept).any())  # packing would drop them without a word
        is_finite = is_finite and all_finite(stored)
        squares.append(torch.linalg.vector_norm(gap.sub_(stored)).square())
    if not is_finite:
        when = f" after iteration {len(trace) - 1}" if trace else ""
        raise NonFiniteError(f"rounding to {storage} overflowed{when}. Store in bfloat16 or float32.")
    if strays:
        raise UsageError(
            f"refiner {refiner.name!r} gave an S that is not zero off the mask it found. "
            "Let its final_S and final_mask agree."
        )
    rel_error = ratio(frobenius(error, float(torch.stack(squares).sum().sqrt())), frobenius(dense))
    rel_output_error = None if measure.name == "plain" else ratio(measure.norm(error), measure.norm(dense))
    if not all(math.isfinite(x) for x in (objective, rel_error, rel_output_error or 0.0)):
        raise NonFiniteError(
            f"the error of W of shape {tuple(dense.shape)} is not finite. Compute in float64, or check the scale of W."
        )
    return Refinement(
        SparseLowRank(S, B, A, mask),
        trace,
        found.status,
        rel_error,
        objective,
        measure.name,
        measure.damping,
        rel_output_error,
    )


def _check_S(S: Tensor, objective: float, refiner: AbstractRefiner) -> None:
    if not math.isfinite(objective) and not all_finite(S):
        raise NonFiniteError(
            f"{refiner.name} gave a non-finite S for W of shape {tuple(S.shape)}. "
            "Compute in float64, or check the scale of W."
        )


def _unfitted_S(dense: Tensor, mask: Tensor, found: Tensor | None, metric: Metric) -> Tensor:
    """S that does not depend on L, in the compute dtype: `found`, which is in scaled columns, or ``mask * W``."""
    if found is not None:
        return metric.unscaled(found) + 0.0  # a new tensor: it may be the `start` of the caller
    return zero_(dense.clone(), mask, off=True).add_(0.0)  # + 0 turns the -0 of a product into 0


def _least_squares_S(dense: Tensor, L: Tensor, mask: Tensor, found: Tensor | None, metric: GramMetric) -> Tensor:
    """S for the rounded L, in the compute dtype; `found` is what to begin with, in scaled columns."""
    kept, target = mask.to(dense.dtype), metric.scaled(dense - L)
    first = target * kept if found is None else found
    solved = masked_least_squares(target, first, kept, metric.parts()[0], max_steps=FINAL_STEPS, rtol=FINAL_RTOL)
    return metric.unscaled(solved.S).add_(0.0)


def _metric(
    W: Tensor,
    refiner: AbstractRefiner,
    input_scale: Tensor | None,
    gram: Tensor | None,
    metric: Metric | None,
    dtype: torch.dtype,
) -> Metric:
    """The one metric that the caller gave."""
    if sum(x is not None for x in (input_scale, gram, metric)) > 1:
        raise UsageError("pass one of input_scale, gram and metric.")
    if metric is None:
        if input_scale is not None:
            if input_scale.shape != (W.shape[1],):
                raise UsageError(f"input_scale must have shape ({W.shape[1]},), got {tuple(input_scale.shape)}.")
            metric = diagonal_metric(input_scale.to(device=W.device, dtype=dtype))
        elif gram is not None:
            metric = gram_metric(gram.to(W.device), DEFAULT_DAMPING, dtype)
        else:
            metric = Metric()
    if metric.scale is not None and metric.scale.shape != (W.shape[1],):
        raise UsageError(f"the metric is of {metric.scale.shape[0]} inputs, W of shape {tuple(W.shape)} has others.")
    # Columns scaled by a wider metric are as wide; those of a narrower one do not go with its Gram matrix.
    made = metric.parts()[0].dtype if isinstance(metric, GramMetric) else dtype
    if made != torch.promote_types(dtype, made):
        raise UsageError(
            f"the Gram metric is in {made}, narrower than the {dtype} to compute in. Make it in {dtype}, or pass "
            f"dtype={made}."
        )
    if metric.name not in refiner.metrics:
        known = ", ".join(refiner.metrics)
        raise UsageError(f"refiner {refiner.name!r} has no metric {metric.name!r}. It has: {known}.")
    return metric


def _checked_start(start: Tensor, W: Tensor, mask: Tensor) -> Tensor:
    if not all_finite(start):
        raise NonFiniteError(f"start of shape {tuple(start.shape)} holds NaN or infinity.")
    if start.shape != W.shape or start.device != W.device or bool((start * ~mask).any()):
        raise UsageError(
            f"start must be of shape {tuple(W.shape)} on {W.device} and zero off the mask, got shape "
            f"{tuple(start.shape)} on {start.device}."
        )
    return start


def _validate(W: Tensor, mask: Tensor, rank: int) -> None:
    if W.ndim != 2 or not W.is_floating_point():
        raise UsageError(f"W must be a 2-D floating tensor, got shape {tuple(W.shape)} and dtype {W.dtype}.")
    if mask.shape != W.shape or mask.dtype != torch.bool or mask.device != W.device:
        raise UsageError(
            f"mask must be a bool tensor of shape {tuple(W.shape)} on {W.device}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}."
        )
    check_rank(rank, W.shape[0], W.shape[1])
    if not all_finite(W):
        raise NonFiniteError(
            f"W of shape {tuple(W.shape)} holds NaN or infinity. Repair or re-download the checkpoint."
        )


def _check_dtypes(weight: torch.dtype, compute: torch.dtype, storage: torch.dtype) -> None:
    for what, dtype, known in (
        ("W", weight, WEIGHT_DTYPES),
        ("dtype, to compute in,", compute, (torch.float32, torch.float64)),
        ("storage_dtype", storage, WEIGHT_DTYPES),
    ):
        if dtype not in known:
            raise UsageError(f"{what} must be {' or '.join(map(str, known))}, got {dtype}.")


def check_rank(rank: int, d_out: int, d_in: int) -> None:
    """Raise `UsageError` unless 0 <= rank <= min(d_out, d_in)."""
    if as_whole(rank) is None:
        raise UsageError(f"rank must be a whole number, got {rank!r}. A percentage is for a Recipe.")
    largest = min(d_out, d_in)
    if not 0 <= rank <= largest:
        dense_rank = d_out * d_in // (d_out + d_in) if d_out + d_in else 0
        raise UsageError(
            f"rank must be in [0, {largest}] for W of shape ({d_out}, {d_in}), got {rank}. "
            f"Lower the rank: above rank {dense_rank} the factors alone outweigh dense storage."
        )
