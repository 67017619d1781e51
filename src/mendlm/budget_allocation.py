"""Shares a budget out among tensors: the convex hull of each one's options, then the best error saved per byte."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mendlm.errors import UsageError


class Option(NamedTuple):
    """One way to store a tensor: its bytes, and its part of the sum that is to be small."""

    n_bytes: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes
    ----------
    indices : the option of every tensor, in the order of the tensors.
    n_bytes, error : sums over the chosen options.
    """

    indices: tuple[int, ...]
    n_bytes: int
    error: float


class _Step(NamedTuple):
    """From one corner of a tensor's hull to the next."""

    gain: float  # error saved per byte
    tensor: int
    option: int  # that it leads to
    n_bytes: int


def lower_hull(options: Sequence[Option]) -> list[int]:
    """Indices of the corners of the lower convex hull of `options`, from the fewest bytes to the least error.

    Every corner has more bytes and less error than the one before, and saves less per byte than that one did. Of equal
    options the first counts.
    """
    ordered = sorted(range(len(options)), key=lambda i: (options[i].n_bytes, options[i].error, i))
    corners: list[int] = []
    for i in ordered:
        if corners and options[i].error >= options[corners[-1]].error:
            continue
        while len(corners) > 1 and _gain(options, corners[-1], i) >= _gain(options, corners[-2], corners[-1]):
            corners.pop()
        corners.append(i)
    return corners


def least_error(
    tensors: Sequence[Sequence[Option]], max_bytes: int, alternatives: Iterable[Sequence[int]] = ()
) -> Allocation:
    """The options with the smallest sum of errors whose bytes are at most `max_bytes`.

    Every tensor starts at its fewest bytes. The steps along the hulls are taken in the order of the error that they
    save per byte; after one that does not fit its tensor stays as it is, and smaller steps of others may still fit.

    Parameters
    ----------
    tensors : the options of every tensor, at least one each.
    max_bytes : the budget.
    alternatives : whole allocations, as the index of an option for each tensor; the best of them that fits is taken if
        it has less error.

    Raises
    ------
    UsageError : the fewest bytes are more than the budget, a tensor without options, or an error that is no number.

    Notes
    -----
    The greedy order on convex hulls solves the continuous relaxation [1]_, so that the error is above the optimum by at
    most that of one step. A larger budget never gives a larger error. Equal gains are taken in the order of the
    tensors. O(n log n) for n options in all.

    References
    ----------
    .. [1] Shoham, Gersho (1988), Efficient bit allocation for an arbitrary set of quantizers, IEEE Transactions on
       Acoustics, Speech, and Signal Processing 36(9), Section III. Deviation: it stops at the first step too many.
    """
    chosen, steps = _start(tensors)
    n_bytes = _total_bytes(tensors, chosen)
    if n_bytes > max_bytes:
        raise UsageError(f"the fewest bytes that the options allow are {n_bytes}, above the budget of {max_bytes}.")
    stopped: set[int] = set()
    for step in steps:
        if step.tensor in stopped:
            continue
        if n_bytes + step.n_bytes > max_bytes:
            stopped.add(step.tensor)
            continue
        chosen[step.tensor] = step.option
        n_bytes += step.n_bytes
    found = _allocation(tensors, chosen)
    fitting = _among(tensors, alternatives, lambda other: other.n_bytes <= max_bytes)
    return min([found, *fitting], key=lambda allocation: (allocation.error, allocation.n_bytes))


def least_bytes(
    tensors: Sequence[Sequence[Option]], max_error: float, alternatives: Iterable[Sequence[int]] = ()
) -> Allocation:
    """The options with the fewest bytes whose errors sum to at most `max_error`.

    The steps of `least_error`, up to the first that is enough. `alternatives` as there: the one with the fewest bytes
    that is good enough is taken, if it has fewer.

    Raises
    ------
    UsageError : the smallest sum of errors is above `max_error`, a tensor without options, or an error that is no
        number.

    Notes
    -----
    The bytes are above the optimum by at most those of one step. A larger `max_error` never takes more bytes.
    """
    first, steps = _start(tensors)

    def after(n_steps: int) -> Allocation:
        chosen = list(first)
        for step in steps[:n_steps]:
            chosen[step.tensor] = step.option
        return _allocation(tensors, chosen)

    counts = range(len(steps) + 1)
    enough = bisect.bisect_left(counts, True, key=lambda n: after(n).error <= max_error)
    found = after(min(enough, len(steps)))
    if found.error > max_error:
        raise UsageError(f"the smallest error that the options allow is {found.error:.6g}, above {max_error:.6g}.")
    fitting = _among(tensors, alternatives, lambda other: other.error <= max_error)
    return min([found, *fitting], key=lambda allocation: (allocation.n_bytes, allocation.error))


def _start(tensors: Sequence[Sequence[Option]]) -> tuple[list[int], list[_Step]]:
    """The option with the fewest bytes of every tensor, and all steps from there, the best first."""
    chosen, steps = [], []
    for tensor, options in enumerate(tensors):
        if not options:
            raise UsageError(f"tensor {tensor} has no options.")
        if not all(math.isfinite(option.error) for option in options):
            raise UsageError(f"an error of tensor {tensor} is not finite.")
        corners = lower_hull(options)
        chosen.append(corners[0])
        for before, after in itertools.pairwise(corners):
            n_bytes = options[after].n_bytes - options[before].n_bytes
            steps.append(_Step(_gain(options, before, after), tensor, after, n_bytes))
    # Within a tensor gains fall strictly, so that its steps stay in their order.
    steps.sort(key=lambda step: (-step.gain, step.tensor))
    return chosen, steps


def _gain(options: Sequence[Option], before: int, after: int) -> float:
    """Error saved per byte; `before` has fewer bytes."""
    saved = options[before].error - options[after].error
    more = options[after].n_bytes - options[before].n_bytes
    return saved / more


def _among(
    tensors: Sequence[Sequence[Option]], alternatives: Iterable[Sequence[int]], fits: Callable[[Allocation], bool]
) -> list[Allocation]:
    allocations = (_allocation(tensors, indices) for indices in alternatives)
    return [allocation for allocation in allocations if fits(allocation)]


def _allocation(tensors: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Allocation:
    return Allocation(tuple(chosen), _total_bytes(tensors, chosen), _total_error(tensors, chosen))


def _total_bytes(tensors: Sequence[Sequence[Option]], chosen: Sequence[int]) -> int:
    return sum(options[index].n_bytes for options, index in zip(tensors, chosen, strict=True))


def _total_error(tensors: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return math.fsum(options[index].error for options, index in zip(tensors, chosen, strict=True))
