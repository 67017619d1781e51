"""DSnoT: a mask repaired by swaps that bring the expected output of the pruned row back to that of the dense one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mendlm.criteria._base import AbstractCriterion, Needs, Selection, statistics
from mendlm.criteria.simple import Magnitude
from mendlm.criteria.wanda import Wanda
from mendlm.errors import UsageError
from mendlm.inputs import InputStats
from mendlm.linalg import compute_dtype
from mendlm.masks import mask_from_scores
from mendlm.patterns import NM, Pattern, Scope, Tiles

Initial = Literal["wanda", "magnitude"]
INITIAL: dict[Initial, type[AbstractCriterion]] = {"wanda": Wanda, "magnitude": Magnitude}
# The code of the paper sums expected errors over the tokens of a window before it compares with the threshold.
WINDOW = 2048


@dataclass(frozen=True)
class DSnoT(AbstractCriterion):
    """Swap pruned for kept weights of a row while the expected error of its output is above a threshold.

    With the means of the inputs, the output of a row loses ``e = sum of w_j mean_j over the pruned j`` in expectation.
    A swap grows the pruned weight that lowers ``|e|`` most for its variance,

        argmax of sign(e) w_j mean_j / var_j ** regrowing_power,

    and prunes a kept one: under an unstructured pattern the least of ``|w_j| ||X_j||`` among those whose loss moves e
    towards 0, under n:m the one of the same group that the initial criterion ranks lowest. A weight moves once, and
    under n:m a swap that would raise ``|e|`` or change the sign of e is left out.

    Parameters
    ----------
    initial : criterion of the first mask, "wanda" or "magnitude".
    max_cycles : most candidates to grow that a row looks at, >= 0; 0 is the initial mask.
    update_threshold : smallest ``|e|`` that is worth a swap, >= 0, summed over 2,048 tokens.
    regrowing_power : of the variance, >= 0.
    same_sign : end a row before the swap that changes the sign of e. Of no account under n:m.

    Raises
    ------
    UsageError : a field out of range, statistics without means (`InputStats.mean`), or a pattern of tiles.

    Notes
    -----
    Every row keeps its count, every n:m group its n. Cost: four sorts of W by row and `max_cycles` steps on single
    entries of all rows together. e is an expectation, not an error: inputs with zero mean do not count in it, and the
    output error can rise.
    Measured on layers 0 and 15 of SmolLM2-135M, Wanda masks, 8,192 tokens: ``|e|`` falls by 80 to 99 %, the output
    error moves by -2 to +16 % (down_proj of layer 15, 2:4: 0.287 to 0.281; q_proj, 50 %: 0.103 to 0.118).
    Variances come from moments that are gathered in float32 (`InputAccumulator`): where the mean of an input is 3,000
    and more times its standard deviation, no digit of its variance is left.

    References
    ----------
    .. [1] Zhang et al. (2024), Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs, ICLR 2024,
       arXiv:2310.08915, Section 3 and Algorithm 1; fields and defaults of its code (lib/prune.py, ``prune_DSnoT``;
       ``--update_threshold`` 0.1 there is of sums over the 2,048 tokens of a window). Deviations: a row also ends where
       no candidate is left, where its code goes on with weights that were swapped before and loses count; under n:m
       its code makes swaps that raise ``|e|`` and ends a row where the sign would change (q_proj of layer 0: output
       error 0.051 before, 0.117 after its swaps, 0.058 after these);
       no "sparsegpt" as the initial criterion, whose updated weights a swap would undo; its code repairs attention
       alone unless ``--skip_layer`` says otherwise, as the recipes ``dsnot-50`` and ``dsnot-2-4`` do.
    """

    name: ClassVar[str] = "dsnot"
    needs: ClassVar[Needs] = "second_moment"
    default_scope: ClassVar[Scope] = "row"
    initial: Initial = "wanda"
    max_cycles: int = 50
    update_threshold: float = 0.1
    regrowing_power: float = 1.0
    same_sign: bool = False

    def __post_init__(self) -> None:
        if self.initial not in INITIAL:
            raise UsageError(f"initial must be one of {', '.join(INITIAL)}, got {self.initial!r}.")
        if self.max_cycles < 0:
            raise UsageError(f"max_cycles must be at least 0, got {self.max_cycles}.")
        for name, value in (("update_threshold", self.update_threshold), ("regrowing_power", self.regrowing_power)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} must be a number >= 0, got {value!r}.")

    def scores(self, W: Tensor, inputs: InputStats | None, generator: torch.Generator) -> Tensor:
        """Those of the initial criterion."""
        return INITIAL[self.initial]().scores(W, inputs, generator)

    def select(self, W: Tensor, pattern: Pattern, inputs: InputStats | None, generator: torch.Generator) -> Selection:
        """The initial mask, repaired."""
        stats = statistics(inputs)
        if stats.mean is None:
            raise UsageError("this needs the means of the inputs. Calibrate, or pass inputs=InputStats(…, mean=…).")
        if isinstance(pattern, Tiles):
            raise UsageError(f"criterion 'dsnot' swaps single weights, got pattern {pattern}. Take another criterion.")
        initial = self.scores(W, inputs, generator)
        mask = mask_from_scores(initial, pattern)
        if not W.numel():
            return Selection(mask)
        dtype = compute_dtype(W.dtype)
        mean = stats.mean.to(W.device)
        variance = (stats.second_moment.to(W.device) - mean.square()).clamp_min(torch.finfo(dtype).tiny)
        signal = W.to(dtype) * mean.to(dtype)
        growth = signal / variance.pow(self.regrowing_power).clamp_min(torch.finfo(dtype).tiny).to(dtype)
        if isinstance(pattern, NM):
            self._repair(mask, signal, growth, _InGroup(initial, mask, pattern.m))
        else:
            cost = Wanda().scores(W, inputs, generator)
            self._repair(mask, signal, growth, _InRow(cost, signal, mask, self.max_cycles))
        return Selection(mask)

    def _repair(self, mask: Tensor, signal: Tensor, growth: Tensor, partners: _InGroup | _InRow) -> None:
        """Swap entries of `mask` (d_out, d_in) in place; `signal` is ``w_j mean_j``, `growth` ranks what to grow."""
        error = (signal * ~mask).sum(dim=1, keepdim=True)
        first_sign = error.sign()
        threshold = self.update_threshold / WINDOW
        lowers, raises = (torch.where(~mask & (g > 0), g, -math.inf) for g in (growth, -growth))
        candidates = _Queues(lowers, raises, self.max_cycles)
        active = torch.ones_like(error, dtype=torch.bool)
        for _ in range(self.max_cycles):
            active &= error.abs() > threshold
            positive = error > 0
            grown, found = candidates.head(positive)
            pruned, has_partner = partners.find(grown, positive)
            after = error + signal.gather(1, pruned) - signal.gather(1, grown)
            active &= found
            swapped = active & has_partner
            if isinstance(partners, _InGroup):
                swapped &= (after.sign() == first_sign) & (after.abs() < error.abs())
            else:
                if self.same_sign:
                    swapped &= after.sign() == first_sign
                active = swapped
            if not bool(active.any()):
                break
            mask.scatter_(1, grown, mask.gather(1, grown) | swapped)
            mask.scatter_(1, pruned, mask.gather(1, pruned) & ~swapped)
            candidates.advance(positive)
            partners.take(pruned, positive, swapped)
            error = torch.where(swapped, after, error)


class _Queues:
    """Per row two queues of columns by falling key, one for rows with a positive error and one for the others.

    Parameters
    ----------
    positive, negative : keys (d_out, d_in) of the two; -inf for what is in neither.
    length : of a queue, at most.
    """

    def __init__(self, positive: Tensor, negative: Tensor, length: int) -> None:
        length = min(max(length, 1), positive.shape[1])
        ordered = [keys.sort(dim=1, descending=True, stable=True) for keys in (positive, negative)]
        self._columns = [indices[:, :length].contiguous() for _, indices in ordered]
        self._filled = [(values[:, :length] > -math.inf).sum(dim=1, keepdim=True) for values, _ in ordered]
        self._next = [torch.zeros_like(filled) for filled in self._filled]

    def head(self, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (d_out, 1) at the head of the queue of each row, and whether there was one left."""
        columns = [c.gather(1, n.clamp_max(c.shape[1] - 1)) for c, n in zip(self._columns, self._next, strict=True)]
        left = [n < filled for n, filled in zip(self._next, self._filled, strict=True)]
        return torch.where(positive, columns[0], columns[1]), torch.where(positive, left[0], left[1])

    def advance(self, positive: Tensor) -> None:
        """Drop the heads; harmless for rows that have ended."""
        self._next[0] += positive
        self._next[1] += ~positive


class _InRow:
    """What to prune under an unstructured pattern: the kept entry of least `cost` whose loss moves the error to 0."""

    def __init__(self, cost: Tensor, signal: Tensor, mask: Tensor, length: int) -> None:
        lowers, raises = (torch.where(mask & kind, -cost, -math.inf) for kind in (signal < 0, signal > 0))
        self._queues = _Queues(lowers, raises, length)

    def find(self, grown: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (d_out, 1), and whether there was one."""
        return self._queues.head(positive)

    def take(self, pruned: Tensor, positive: Tensor, swapped: Tensor) -> None:
        """Never find `pruned` again; rows that did not swap have ended."""
        self._queues.advance(positive)


class _InGroup:
    """What to prune under n:m: the first kept entry of the group of `grown` by rising `scores`."""

    def __init__(self, scores: Tensor, mask: Tensor, m: int) -> None:
        self._scores = scores.masked_fill(~mask, math.inf)
        self._offsets = torch.arange(m, device=mask.device)

    def find(self, grown: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (d_out, 1), and whether there was one."""
        columns = grown - grown % len(self._offsets) + self._offsets
        lowest, place = self._scores.gather(1, columns).min(dim=1, keepdim=True)
        return columns.gather(1, place), lowest.isfinite()

    def take(self, pruned: Tensor, positive: Tensor, swapped: Tensor) -> None:
        """Never find `pruned` again in rows that swapped."""
        self._scores.scatter_(1, pruned, torch.where(swapped, math.inf, self._scores.gather(1, pruned)))
