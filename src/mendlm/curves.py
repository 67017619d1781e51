"""Error curves of one weight: the squared error that is left at every rank, for one mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from mendlm.config import parse_pattern, pattern_to_dict
from mendlm.errors import CheckpointError, UsageError
from mendlm.inputs import InputStats
from mendlm.metrics import GramMetric, Metric
from mendlm.patterns import Pattern
from mendlm.refiners import TLR, AbstractRefiner, AcceleratedTLR, JointADMM, PruneOnly, refine
from mendlm.refiners._base import Problem
from mendlm.refiners._gram import GramAlternation
from mendlm.refiners._least_squares import masked_least_squares
from mendlm.refiners.tlr import solver_for

# The factors of the largest rank of a curve take this share of the dense entries: beyond it keeping entries is cheaper.
LARGEST_SHARE = 0.5
FIRST_ANCHOR = 8
# Measured on 28 projections of SmolLM2-135M against 50 steps at every anchor: with 4 steps the error saved per rank is
# in the same order (Spearman 0.998), 8 % too small throughout; singular values alone give 0.92.
STEPS = 4
# In the Gram metric S has to be fitted first, and every anchor goes on from the one before: 0.996 (0.987), 13 % too
# small.
GRAM_FIT_STEPS, GRAM_STEPS = 20, 6
# JointADMM chooses its mask; one that it chose quickly, at one rank, stands for those of all: 0.98, at a tenth of the
# cost of whole runs. The mask makes its own rank look better than its neighbours, so it is not that of an anchor: with
# rank 16 the gains below it count two fifths more against those above it than they should at 50 %, a fifth more at 2:4.
# A mask for every anchor: no better, more than twice the cost.
JOINT_ITERATIONS, JOINT_RANK = 20, 24


@dataclass(frozen=True)
class ErrorCurve:
    """What is left of one weight under one pattern.

    Attributes
    ----------
    pattern, n_kept : of the mask.
    errors : squared error in the metric at every rank of `TensorCurves.ranks`; never rising.
    sensitivity : squared relative change of the block's output for each unit of squared error
        (`mendlm.sensitivity`); None without calibration.
    """

    pattern: Pattern
    n_kept: int
    errors: tuple[float, ...]
    sensitivity: float | None = None


@dataclass(frozen=True)
class TensorCurves:
    """The curves of one weight.

    Attributes
    ----------
    name, shape : which weight.
    energy : ``||W||^2`` in the metric.
    ranks : rising, from 0.
    curves : one for each pattern.
    """

    name: str
    shape: tuple[int, int]
    energy: float
    ranks: tuple[int, ...]
    curves: tuple[ErrorCurve, ...]

    @property
    def by_pattern(self) -> dict[Pattern, ErrorCurve]:
        """The curves by what they are of."""
        return {curve.pattern: curve for curve in self.curves}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "energy": self.energy,
            "ranks": list(self.ranks),
            "curves": [
                {
                    "pattern": pattern_to_dict(c.pattern),
                    "n_kept": c.n_kept,
                    "errors": list(c.errors),
                    "sensitivity": c.sensitivity,
                }
                for c in self.curves
            ],
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises
        ------
        CheckpointError : a field is missing or of another form.
        """
        try:
            d_out, d_in = fields["shape"]
            curves = tuple(
                ErrorCurve(
                    parse_pattern(c["pattern"]),
                    int(c["n_kept"]),
                    tuple(map(float, c["errors"])),
                    None if c["sensitivity"] is None else float(c["sensitivity"]),
                )
                for c in fields["curves"]
            )
            ranks = tuple(map(int, fields["ranks"]))
            found = cls(str(fields["name"]), (int(d_out), int(d_in)), float(fields["energy"]), ranks, curves)
        except (KeyError, TypeError, ValueError, OverflowError) as err:
            raise CheckpointError(f"the curves of a tensor are damaged: {err}.") from err
        if any(len(curve.errors) != len(ranks) for curve in curves):
            raise CheckpointError(f"the curves of {found.name!r} are damaged: they do not have an error for each rank.")
        return found


class Measured(NamedTuple):
    """What `error_curve` found.

    Attributes
    ----------
    errors : squared error in the metric, one float for each rank, never rising.
    S : (d_out, d_in), zero off the mask: what is kept at rank 0, fitted to the outputs where the refiner does that.
    S_error : squared error of that S in the metric.
    """

    errors: tuple[float, ...]
    S: Tensor
    S_error: float


def rank_grid(d_out: int, d_in: int, step: int) -> tuple[int, ...]:
    """The multiples of `step` from 0 whose factors take at most half of the dense entries of (d_out, d_in).

    Raises
    ------
    UsageError : step < 1.
    """
    if step < 1:
        raise UsageError(f"rank_step must be at least 1, got {step!r}.")
    largest = int(LARGEST_SHARE * d_out * d_in / (d_out + d_in)) if d_out + d_in else 0
    return tuple(range(0, largest + 1, step))


def anchors(largest: int) -> tuple[int, ...]:
    """The ranks to measure at: 0, 8, 16, 32, … and `largest`."""
    powers = (FIRST_ANCHOR << i for i in range(max(largest, 1).bit_length()))
    return tuple(sorted({0, largest, *(rank for rank in powers if rank < largest)}))


def error_curve(
    W: Tensor,
    mask: Tensor,
    refiner: AbstractRefiner,
    ranks: Sequence[int],
    *,
    metric: Metric,
    start: Tensor | None,
    pattern: Pattern,
    inputs: InputStats | None = None,
    generator: torch.Generator,
) -> Measured:
    """Squared error ``||W - S - L_r||^2`` in the metric at every rank r, about as the refiner would leave it.

    Parameters
    ----------
    W : (d_out, d_in) finite, float32 or float64. Not modified.
    mask : (d_out, d_in) bool, True = kept.
    refiner : that will do the work; its rank counts for nothing.
    ranks : rising, from 0; 0 alone for a refiner without a low-rank part.
    metric, start, pattern, inputs, generator : as for `refine`.

    Returns
    -------
    Measured

    Notes
    -----
    Without a refit of S the error at rank r would be the energy of the singular values of ``W - S`` beyond the r-th;
    refitting, which is worth as much again, changes level and slope. So it is measured at a few ranks (`anchors`), and
    the singular values give the shape in between: their energy is multiplied by a factor, the measured one at the
    anchors, and interpolated geometrically.

    For TLR, accelerated TLR and `JointADMM` a few accelerated steps stand for the run, the last with a mask of its own;
    any other refiner runs as it is.

    Cost: one SVD without vectors, and per anchor 4 steps of accelerated TLR; in the Gram metric 20 products with the
    Gram matrix and 6 more per anchor, and for `JointADMM` 20 at first.
    """
    first = None if start is None else metric.scaled(start)
    problem = Problem(metric.scaled(W), mask, generator, metric, first, pattern, inputs)
    if isinstance(refiner, JointADMM):
        quick = replace(
            refiner, rank=min(JOINT_RANK, *W.shape), n_iter=min(JOINT_ITERATIONS, refiner.n_iter), solver="auto"
        )
        problem = replace(problem, mask=quick.choose_mask(problem), start=None)
    problem = _fitted(problem, refiner)
    sigma = torch.linalg.svdvals(metric.whiten(problem.lost)).double()
    energies = sigma.square().flip(0).cumsum(0).flip(0).tolist()
    tail = [energies[rank] if rank < len(energies) else 0.0 for rank in ranks]
    near = _nearest(ranks)
    places = [index for index, rank in enumerate(ranks) if rank in near]
    errors = tuple(tail)
    if not isinstance(refiner, PruneOnly) and len(places) > 1:
        errors = between(
            tail, places, _measure(W, problem, refiner, [ranks[index] for index in places], tail[0], start)
        )
    return Measured(errors, metric.unscaled(problem.S), tail[0])


def between(tail: Sequence[float], places: Sequence[int], measured: Sequence[float]) -> tuple[float, ...]:
    """A curve with the shape of `tail` through the `measured` values at `places`, made never to rise.

    Parameters
    ----------
    tail : never rising, >= 0.
    places : rising indices into `tail`, the first and the last among them.
    measured : >= 0, one for each place.
    """
    # A tail of 0 has no level, and any level gives 0.
    levels = [value / tail[place] if tail[place] > 0 else 1.0 for place, value in zip(places, measured, strict=True)]
    tiny = 1e-12
    curve, least = [], math.inf
    for (a, b), (low, high) in zip(pairwise(places), pairwise(levels), strict=True):
        for index in range(a, b + 1 if b == places[-1] else b):
            share = (index - a) / (b - a)
            level = max(low, tiny) ** (1 - share) * max(high, tiny) ** share
            least = min(least, level * tail[index])
            curve.append(least)
    return tuple(curve)


def _nearest(ranks: Sequence[int]) -> set[int]:
    """The ranks of the grid that are nearest to the anchors."""
    return {min(ranks, key=lambda rank: (abs(rank - anchor), rank)) for anchor in anchors(ranks[-1])}


def _fitted(problem: Problem, refiner: AbstractRefiner) -> Problem:
    """The problem with S fitted to the outputs, where the refiner does that at rank 0."""
    metric = problem.metric
    if not isinstance(metric, GramMetric) or not refiner.refits_S:
        return problem
    kept = problem.mask.to(problem.W.dtype)
    G = metric.parts()[0]
    return replace(problem, start=masked_least_squares(problem.W, problem.S, kept, G, max_steps=GRAM_FIT_STEPS).S)


def _measure(
    W: Tensor, problem: Problem, refiner: AbstractRefiner, ranks: Sequence[int], first: float, start: Tensor | None
) -> list[float]:
    """Squared errors at `ranks`; `first` is that at rank 0 for refiners that leave the mask alone."""
    metric = problem.metric
    if not isinstance(refiner, TLR | AcceleratedTLR | JointADMM):
        return [_run(W, problem, replace(refiner, rank=rank), start) for rank in ranks]  # type: ignore[type-var]
    if isinstance(metric, GramMetric):
        alternation = GramAlternation(problem, metric, solver_for(problem, "auto", ranks[-1]))
        found = [first]
        for rank in ranks[1:]:
            objective = [alternation.step(rank).objective for _ in range(GRAM_STEPS)][-1]
            found.append(objective**2)
        return found
    found = [first]
    for rank in ranks[1:]:
        quick = AcceleratedTLR(rank=rank, n_iter=STEPS)
        state = quick.init(problem)
        objectives = []
        for t in range(STEPS):
            state, progress = quick.step(problem, state, t)
            objectives.append(progress.objective)
        found.append(min(objectives) ** 2)
    return found


def _run(W: Tensor, problem: Problem, refiner: AbstractRefiner, start: Tensor | None) -> float:
    """The squared error that a whole run leaves."""
    generator = torch.Generator(device=W.device).manual_seed(0)
    out = refine(
        W,
        problem.mask,
        refiner,
        metric=problem.metric,
        start=start,
        pattern=problem.pattern,
        inputs=problem.inputs,
        generator=generator,
    )
    return problem.metric.norm(W - out.S - out.B @ out.A) ** 2
