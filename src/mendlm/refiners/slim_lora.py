"""SLiM-LoRA: what pruning took away, every input weighed by its mean size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mendlm.errors import UsageError
from mendlm.linalg import truncate_svd
from mendlm.metrics import MetricName
from mendlm.refiners._base import OneStepRefiner, Problem, Progress


@dataclass(frozen=True)
class SLiMLoRA(OneStepRefiner):
    """The rank-k compensation of ``E = W - S`` with the least error of the salience, in closed form.

    The salience of a matrix M is ``F(M) = M diag(x)``, x the mean sizes of the inputs, shifted so that none is zero. F
    is additive and invertible, hence the best L is

        L = F^-1(SVD_k(F(W) - F(S))).

    S is ``mask * W``, or what a criterion that updates weights (SparseGPT) made of it.

    Parameters
    ----------
    rank : k, 0 <= k <= min(d_out, d_in); 0 is plain pruning.
    refit : fit S to L on the mask at the end, as the authors' code does. False, the paper's text, leaves S as it is, so
        that L disturbs the kept entries.

    Raises
    ------
    UsageError : a `Problem` without mean sizes of its inputs (`InputStats.mean_abs`).

    Notes
    -----
    One full SVD. The metric does not enter L; it says what is measured, and what S is fitted in.

    References
    ----------
    .. [1] Mozaffari, Yazdanbakhsh, Mehri Dehnavi (2025), SLiM: One-shot Quantization and Sparsity with Low-rank
       Approximation for LLM Weight Compression, ICML 2025, PMLR 267:45024-45049, arXiv:2410.09615, the section on
       SLiM-LoRA. Deviations: x is ``mean|x_j|`` plus the smallest positive one of them, as its code shifts; the code
       takes root mean squares for mean sizes, which is what `ZeroShotSVD` does in the diagonal metric. The rank is a
       number (the paper: 10 % of min(d_out, d_in)). No quantization, of weights or adapters.
    """

    name: ClassVar[str] = "slim-lora"
    metrics: ClassVar[tuple[str, ...]] = ("diagonal", "gram")
    calibrated_metric: ClassVar[MetricName] = "diagonal"
    rank: int
    refit: bool = False

    @property
    def refits_S(self) -> bool:
        """As asked for."""
        return self.refit

    def step(self, problem: Problem, state: tuple[Tensor, Tensor], t: int) -> tuple[tuple[Tensor, Tensor], Progress]:
        """The whole method."""
        lost = problem.lost
        salience = problem.metric.unscaled(_shifted_sizes(problem))  # columns of `lost` are scaled already
        weighed = lost * salience
        U, sigma, Vh = truncate_svd(weighed, self.rank)
        root = sigma.sqrt()
        left, right = U * root, root[:, None] * Vh / salience
        objective = float(problem.metric.norm_of_scaled(lost - left @ right))
        total = float(weighed.square().sum())
        energy = float(sigma.square().sum()) / total if total > 0 else 1.0
        return (left, right), Progress(self.rank, objective, energy)


def _shifted_sizes(problem: Problem) -> Tensor:
    """Sizes x (d_in,) > 0, dtype and device of W."""
    inputs = problem.inputs
    if inputs is None or inputs.mean_abs is None:
        raise UsageError(
            "refiner 'slim-lora' needs the mean sizes of the inputs. Calibrate, or pass "
            "inputs=InputStats(…, mean_abs=…) to refine."
        )
    sizes = inputs.mean_abs
    positive = sizes[sizes > 0]
    floor = positive.min() if positive.numel() else torch.ones((), dtype=sizes.dtype, device=sizes.device)
    return (sizes + floor).to(problem.W.device, problem.W.dtype)
