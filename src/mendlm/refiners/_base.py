"""The interface of a refiner: what the loop in `_loop.py` calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mendlm.errors import UsageError
from mendlm.inputs import InputStats
from mendlm.linalg import Generators
from mendlm.metrics import GramMetric, Metric, MetricName
from mendlm.patterns import Pattern

PLAIN = Metric()


@dataclass(frozen=True)
class Problem:
    """What a refiner works on.

    Attributes
    ----------
    W : (d_out, d_in), float32 or float64, in the scaled columns of the metric; never modified. A stack (n, d_out, d_in)
        where a `StackRefiner` works on several.
    mask : bool, of the shape of `W`, True = kept.
    generator : the only source of randomness, on the device of `W`; for a stack one for each matrix.
    metric : what errors are measured in; its columns are scaled already.
    start : (d_out, d_in), zero off the mask, scaled as `W`: S as the criterion left it; None for ``mask * W``.
    pattern : where zeros may be, for refiners that move the mask; None if the caller did not say.
    inputs : what calibration says about the inputs, for refiners that look at more of it than the metric; None if the
        caller did not say.
    """

    W: Tensor
    mask: Tensor
    generator: Generators
    metric: Metric = PLAIN
    start: Tensor | None = None
    pattern: Pattern | None = None
    inputs: InputStats | None = None

    @property
    def S(self) -> Tensor:
        """S as the criterion left it, (d_out, d_in), in scaled columns."""
        return self.W * self.mask if self.start is None else self.start

    @property
    def lost(self) -> Tensor:
        """``W - S`` with S as the criterion left it, (d_out, d_in), in scaled columns."""
        return self.W * ~self.mask if self.start is None else self.W - self.start

    @property
    def no_factors(self) -> tuple[Tensor, Tensor]:
        """Factors (d_out, 0) and (0, d_in): no low-rank part."""
        return self.W.new_zeros(self.W.shape[0], 0), self.W.new_zeros(0, self.W.shape[1])


@dataclass(frozen=True)
class Progress:
    """What every state reports after a step; one row of the trace.

    Attributes
    ----------
    rank : rank r of the low-rank part used in this step.
    objective : ``||W - S - L_r||`` in the metric after the step. In the plain and the diagonal metric S fits L_r on the
        mask, so that this is the error off the mask, ``||(1 - mask) * (W - L_r)||_F``.
    energy_frac : ``||L_r||^2 / ||L||^2`` in the metric, the share of the residual L that its leading r triplets hold.
    """

    rank: int
    objective: float
    energy_frac: float


class AbstractRefiner(ABC):
    """An algorithm that finds the low-rank part L = B @ A for a given mask.

    A subclass is a frozen dataclass whose fields are the hyperparameters. `init`, `step` and `finish` compute on
    tensors only, in the scaled columns of the metric; the loop owns the step budget, the trace and the check for
    non-finite values.

    Attributes
    ----------
    name : in `REFINERS` and in recipes.
    metrics : that the algorithm can minimise in.
    calibrated_metric : the one it takes where there is calibration data and nobody chose.
    moves_mask : whether it chooses the mask itself, of the same pattern.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ("plain", "diagonal", "gram")
    calibrated_metric: ClassVar[MetricName] = "gram"
    moves_mask: ClassVar[bool] = False
    rank: int

    @property
    @abstractmethod
    def max_steps(self) -> int:
        """Upper bound of the number of calls of `step`."""

    @abstractmethod
    def init(self, problem: Problem) -> Any:
        """State before the first step."""

    @abstractmethod
    def step(self, problem: Problem, state: Any, t: int) -> tuple[Any, Progress]:
        """State and progress after step `t` (from 0). May reuse the memory of `state`."""

    @property
    def refits_S(self) -> bool:
        """Whether S is fitted to L on the mask, ``mask * (W - L)``, or stays ``mask * W``."""
        return True

    def converged(self, state: Any) -> bool:
        """Whether another step would change nothing worth its time."""
        return False

    @abstractmethod
    def finish(self, problem: Problem, state: Any) -> tuple[Tensor, Tensor]:
        """Factors ``left (d_out, rank)``, ``right (rank, d_in)`` of the final L in scaled columns, compute dtype."""

    def final_S(self, problem: Problem, state: Any) -> Tensor | None:
        """S to begin the last fit with, or to keep where S is not fitted, in scaled columns; None for ``mask * W``.

        It must be zero off `final_mask`, so a refiner that moves the mask has its own.
        """
        return problem.start

    def final_mask(self, problem: Problem, state: Any) -> Tensor:
        """The mask of the final S, bool; another one than `problem.mask` only for a refiner that moves it."""
        return problem.mask


class StackRefiner(AbstractRefiner):
    """A refiner that can work on a stack of matrices of one shape at once, in the plain metric.

    `init` and `finish` then take and give stacks; matrices do not mix.
    """

    @abstractmethod
    def stacks(self, d_out: int, d_in: int) -> bool:
        """Whether it can with these settings, for matrices of this shape."""

    @abstractmethod
    def step_stack(self, problem: Problem, state: Any, t: int) -> tuple[Any, list[Progress]]:
        """As `step`, with the progress of each matrix."""


class OneStepRefiner(AbstractRefiner):
    """A closed form: `step` is the whole method, and its state are the factors."""

    @property
    def max_steps(self) -> int:
        """One."""
        return 1

    def init(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """No factors."""
        return problem.no_factors

    def finish(self, problem: Problem, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The factors found."""
        return state


def gram_of(problem: Problem, refiner: str) -> GramMetric:
    """The metric of `problem`, for a refiner that has the Gram metric alone."""
    if not isinstance(problem.metric, GramMetric):
        raise UsageError(f"refiner {refiner!r} has no metric {problem.metric.name!r}. It has: gram.")
    return problem.metric


def pattern_of(problem: Problem, refiner: str) -> Pattern:
    """The pattern of `problem`, for a refiner that moves the mask."""
    if problem.pattern is None:
        raise UsageError(f"refiner {refiner!r} moves the mask, so it needs the pattern: refine(…, pattern=NM(2, 4)).")
    return problem.pattern
