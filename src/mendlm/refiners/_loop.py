"""`refine`: the one loop that runs every refiner, and the last step that every refiner shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mendlm.decomposition import SparseLowRank
from mendlm.errors import NonFiniteError, UsageError
from mendlm.linalg import all_finite, compute_dtype
from mendlm.refiners._base import AbstractRefiner, Problem, Progress


@dataclass(frozen=True)
class Refinement:
    """What `refine` returns.

    Attributes
    ----------
    decomposition : S, B, A and the mask, in the storage dtype.
    trace : one `Progress` per step.
    status : "converged" if the refiner's stop rule ended it, "max_steps" if its step budget did.
    rel_error : ``||W - S - B @ A||_F / ||W||_F`` of the stored (rounded) factors; 0 for W = 0.
    objective : ``||(1 - mask) * (W - L)||_F`` of the final L before rounding, in the metric of the input scale.
    """

    decomposition: SparseLowRank
    trace: tuple[Progress, ...]
    status: Literal["converged", "max_steps"]
    rel_error: float
    objective: float

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


def refine(
    W: Tensor,
    mask: Tensor,
    refiner: AbstractRefiner,
    *,
    input_scale: Tensor | None = None,
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
    input_scale : (d_in,), > 0: the objective is measured on ``W * input_scale``. Default: plain Frobenius norm.
    dtype : compute dtype; float32 for bf16, fp16 and float32 input, float64 for float64 input.
    storage_dtype : dtype of S, B and A; that of `W` if not given.
    generator : source of randomness on the device of `W`; seed 0 if not given. Same seed, same result.

    Returns
    -------
    Refinement. B and A are rounded to the storage dtype first and S is fitted to them (unless `refiner.refits_S` is
    False), so that on the mask the error is that of rounding S alone.

    Raises
    ------
    UsageError : shapes or dtypes that do not fit, a rank outside [0, min(d_out, d_in)], a scale that is not positive.
    NonFiniteError : NaN or infinity in `W`, in `input_scale`, or in a result; the message names the iteration.

    References
    ----------
    .. [1] Shen et al. (2025), Targeted Low-rank Refinement, ICML 2025, PMLR 267, Algorithm 1. Deviation: S is refitted
       on the mask after B and A are rounded; before rounding it equals the paper's S when the last residual has rank k.
    """
    rank = refiner.rank
    _validate(W, mask, rank, input_scale)
    compute = compute_dtype(W.dtype, dtype)
    storage = W.dtype if storage_dtype is None else storage_dtype
    if generator is None:
        generator = torch.Generator(device=W.device).manual_seed(0)
    dense = W.to(compute)
    scale = None if input_scale is None else input_scale.to(device=W.device, dtype=compute)
    problem = Problem(dense if scale is None else dense * scale, mask, generator)

    state = refiner.init(problem)
    trace: list[Progress] = []
    status: Literal["converged", "max_steps"] = "max_steps"
    for t in range(refiner.max_steps):
        state, progress = refiner.step(problem, state, t)
        if not math.isfinite(progress.objective):
            raise NonFiniteError(
                f"{refiner.name} gave a non-finite objective in iteration {t} for W of shape {tuple(W.shape)}. "
                "Compute in float64, or check the scale of W."
            )
        trace.append(progress)
        if refiner.converged(state):
            status = "converged"
            break
    left, right = refiner.finish(problem, state)
    if not (all_finite(left) and all_finite(right)):
        raise NonFiniteError(f"{refiner.name} gave non-finite factors after iteration {len(trace) - 1}.")
    # Products with a 0/1 tensor of the compute dtype: far faster on a CPU than torch.where with a bool mask.
    kept = mask.to(compute)
    objective = float(torch.linalg.vector_norm((problem.W - left @ right).mul_(1 - kept)))

    if scale is not None:
        right = right / scale
    B, A = left.to(storage), right.to(storage)
    L = B.to(compute) @ A.to(compute)
    S = (dense - L) if refiner.refits_S else dense.clone()
    S = S.mul_(kept).add_(0.0).to(storage)  # + 0 turns the -0 of a product into 0
    if not all(all_finite(x) for x in (S, B, A)):
        raise NonFiniteError(
            f"rounding to {storage} overflowed after iteration {len(trace) - 1}. Store in bfloat16 or float32."
        )
    norm = float(torch.linalg.vector_norm(dense))
    rel_error = float(torch.linalg.vector_norm((dense - L).sub_(S))) / norm if norm > 0 else 0.0
    return Refinement(SparseLowRank(S, B, A, mask), tuple(trace), status, rel_error, objective)


def _validate(W: Tensor, mask: Tensor, rank: int, input_scale: Tensor | None) -> None:
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
    if input_scale is None:
        return
    if input_scale.shape != (W.shape[1],):
        raise UsageError(f"input_scale must have shape ({W.shape[1]},), got {tuple(input_scale.shape)}.")
    if not all_finite(input_scale):
        raise NonFiniteError("input_scale holds NaN or infinity.")
    if not bool((input_scale > 0).all()):
        column = int((input_scale <= 0).nonzero()[0])
        raise UsageError(
            f"input_scale must be positive, got {float(input_scale[column])!r} in column {column}. "
            "Replace the scale of a dead input by a small positive number."
        )


def check_rank(rank: int, d_out: int, d_in: int) -> None:
    """Raise `UsageError` unless 0 <= rank <= min(d_out, d_in)."""
    largest = min(d_out, d_in)
    if not 0 <= rank <= largest:
        dense_rank = d_out * d_in // (d_out + d_in) if d_out + d_in else 0
        raise UsageError(
            f"rank must be in [0, {largest}] for W of shape ({d_out}, {d_in}), got {rank}. "
            f"Lower the rank: above rank {dense_rank} the factors alone outweigh dense storage."
        )
