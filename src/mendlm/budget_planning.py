"""`plan_budget`: ranks and sparsities for every tensor under a budget for the whole model, as a recipe."""

from __future__ import annotations

import glob
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mendlm.budget_allocation import Allocation, Option, least_bytes, least_error
from mendlm.budgets import factor_params, packed_bytes
from mendlm.checkpoints.header import safetensors_name, tensor_bytes
from mendlm.checkpoints.plan import PlannedTensor
from mendlm.checkpoints.reader import Checkpoint
from mendlm.config import Override, Recipe
from mendlm.curves import ErrorCurve, TensorCurves
from mendlm.devices import resolve_device
from mendlm.errors import CheckpointError, UsageError
from mendlm.families import place_of, split_block
from mendlm.measuring import ModelCurves, Patterns, Tell, measure_curves
from mendlm.paths import check_parent, local_path
from mendlm.patterns import Adjustable, Pattern, n_kept_total
from mendlm.pipeline import open_model, recipe_or_default, walks
from mendlm.planning import CompressionPlan, make_plan
from mendlm.refiners import PruneOnly

Objective = Literal["block", "relative", "parameters", "absolute"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
DEFAULT_RANK_STEP = 4
DEFAULT_SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Target:
    """What is asked for; exactly one field is not None.

    Attributes
    ----------
    bytes_ratio : stored bytes of the whole checkpoint are at most this share of the dense ones (`Totals.ratio`).
        Sparsities and ranks are chosen.
    rank_ratio : the factors take at most this share of the dense bytes of the tensors that are compressed. Ranks are
        chosen, patterns stay as the recipe has them.
    error : the total relative error (`BudgetPlan.error`) is at most this, with the fewest bytes. Sparsities and ranks
        are chosen.

    Raises
    ------
    UsageError : none or several, a value that is not positive, or a share of the dense bytes that is not below 1.
    """

    bytes_ratio: float | None = None
    rank_ratio: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            got = ", ".join(given) or "none"
            raise UsageError(f"give exactly one of target_bytes, target_rank_bytes and target_error, got {got}.")
        name, value = next(iter(given.items()))
        # A rank budget of 0 is a plan without factors; an error of 0 has no allocation.
        if not (math.isfinite(value) and (value > 0 or (value == 0 and name == "target_rank_bytes"))):
            raise UsageError(f"{name} must be a positive number, got {value!r}.")
        if name != "target_error" and value >= 1:
            raise UsageError(
                f"{name} must be below 1, got {value!r}. It is a share of the dense bytes: 0.6 means 60 % of them."
            )

    def _given(self) -> dict[str, float]:
        fields = {
            "target_bytes": self.bytes_ratio,
            "target_rank_bytes": self.rank_ratio,
            "target_error": self.error,
        }
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def name(self) -> str:
        """Which field was given, as `plan_budget` calls it."""
        return next(iter(self._given()))

    @property
    def value(self) -> float:
        """Of the field that was given."""
        return next(iter(self._given().values()))


@dataclass(frozen=True)
class PlannedBudget:
    """What one tensor was given.

    Attributes
    ----------
    name, shape : which tensor.
    layer, projection : where it is, "mlp.up_proj" of layer 3; None and the whole name outside of the blocks.
    pattern, rank : chosen.
    rel_error : root of its squared error over that of W alone, as the curves predict it.
    sensitivity : of the pattern, per unit of squared error (`mendlm.sensitivity`); None without calibration.
    dense_bytes, stored_bytes : before and after.
    """

    name: str
    shape: tuple[int, int]
    layer: int | None
    projection: str
    pattern: Pattern
    rank: int
    rel_error: float
    sensitivity: float | None
    dense_bytes: int
    stored_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "layer": self.layer,
            "projection": self.projection,
            "pattern": str(self.pattern),
            "sparsity": self.pattern.sparsity,
            "rank": self.rank,
            "rel_error": self.rel_error,
            "sensitivity": self.sensitivity,
            "dense_bytes": self.dense_bytes,
            "stored_bytes": self.stored_bytes,
        }


@dataclass(frozen=True)
class Uniform:
    """The best plan with one pattern (or the recipe's own) and one rank for all tensors that meets the target.

    Attributes
    ----------
    pattern : None where the recipe's patterns stay and are not the same everywhere.
    rank : of every tensor, or the largest that its curve has.
    error, stored_bytes : as those of `BudgetPlan`.
    """

    pattern: Pattern | None
    rank: int
    error: float
    stored_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "pattern": None if self.pattern is None else str(self.pattern),
            "rank": self.rank,
            "error": self.error,
            "stored_bytes": self.stored_bytes,
        }


@dataclass(frozen=True)
class BudgetPlan:
    """What `plan_budget` chose.

    Attributes
    ----------
    target, objective : what was asked for.
    recipe : with an override for every tensor; `compress` takes it.
    plan : of that recipe: what it gives, byte by byte.
    tensors : one for each compressed tensor, in the order of `plan`.
    error : the total relative error that the curves predict: ``sqrt(sum_t w_t e_t / sum_t w_t n_t)`` with the squared
        error e_t and the squared norm n_t of every tensor in the metric, and the weights w_t of the objective; for
        "block" ``sqrt(sum_t s_t e_t / n_blocks)`` with the sensitivities s_t, the root mean square over the blocks
        of the relative error of their outputs, if changes add up.
    rank_ratio : bytes of the factors over the dense bytes of the compressed tensors.
    uniform : the best uniform plan under the same target; None if there is none.
    curves : that were used.
    seconds : wall time.
    """

    target: Target
    objective: Objective
    recipe: Recipe
    plan: CompressionPlan
    tensors: tuple[PlannedBudget, ...]
    error: float
    rank_ratio: float
    uniform: Uniform | None
    curves: ModelCurves
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "target": self.target.name,
            "value": self.target.value,
            "objective": self.objective,
            "error": self.error,
            "rank_ratio": self.rank_ratio,
            "uniform": None if self.uniform is None else self.uniform.to_dict(),
            "totals": self.plan.totals.to_dict(),
            "recipe": self.recipe.to_dict(),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "seconds": self.seconds,
        }


def plan_budget(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    target_bytes: float | None = None,
    target_rank_bytes: float | None = None,
    target_error: float | None = None,
    objective: Objective | None = None,
    sparsities: Sequence[float] | None = None,
    rank_step: int = DEFAULT_RANK_STEP,
    curves: str | Path | None = None,
    device: str | torch.device = "cpu",
    activation_dir: str | Path | None = None,
    on_event: Tell = lambda event: None,
) -> BudgetPlan:
    """Choose rank and sparsity of every tensor by the error that a byte saves.

    Parameters
    ----------
    model : a local checkpoint folder, as for `compress`.
    recipe : everything that is not chosen: criterion, refiner, metric, calibration, and the patterns where they stay;
        ``Recipe()`` if not given.
    target_bytes, target_rank_bytes, target_error : see `Target`; exactly one.
    objective : which errors are added up. "block": of every tensor the squared error times its sensitivity, which is
        what it changes in the output of its block (`mendlm.sensitivity`); "relative": the squared error over the
        squared norm of W, in the metric; "parameters": that, times the entries of W; "absolute": squared errors as
        they are. Default "block" where calibration text runs through the model, else "relative".
    sparsities : to choose from where sparsities are chosen, for tensors whose pattern has a free sparsity; that of the
        recipe is always among them. Default 0.3, 0.4, … 0.8. One pattern is one measurement.
    rank_step : ranks are multiples of it.
    curves : a JSON file that keeps the curves: those in it are taken, the others are measured and added to it. What an
        interrupted or failed run has measured is in it, too.
    device, activation_dir : as for `compress`.
    on_event : called with `TensorStarted`, `CurvesDone` and, in calibrated work, `BlockStarted`.

    Returns
    -------
    BudgetPlan. Its error is never above that of the best uniform plan under the same target.

    Raises
    ------
    UsageError : as `plan`; targets that exclude each other or cannot be met; a recipe that leaves nothing to choose;
        objective "block" without calibration; curves of another model or of other settings.
    CheckpointError, NonFiniteError, StorageError : as `compress`.

    Notes
    -----
    Cost: `mendlm.curves.error_curve` for every tensor and pattern, and in calibrated work one pass of the text through
    the dense model and, for every tensor and pattern, one of a few windows through its block; with the curves at hand
    seconds.
    """
    started = time.monotonic()
    target = Target(target_bytes, target_rank_bytes, target_error)
    recipe = recipe_or_default(recipe)
    objective = _objective(objective, recipe)
    if recipe.layer_sparsity is not None:
        raise UsageError("layer_sparsity 'owl' chooses sparsities itself. Leave it out, or compress without a plan.")
    if rank_step < 1:
        raise UsageError(f"rank_step must be at least 1, got {rank_step!r}.")
    where = resolve_device(str(device))
    checkpoint = open_model(model)
    base = make_plan(checkpoint, recipe)
    patterns = _patterns(base, target, sparsities)
    _check_reachable(base, target, patterns)
    file = None if curves is None else local_path(curves)
    if file is not None:
        check_parent(file, f"curves {str(file)!r}")
    measured = measure_curves(
        checkpoint,
        base,
        patterns,
        rank_step=rank_step,
        device=where,
        file=file,
        activation_dir=activation_dir,
        tell=on_event,
    )
    return _Choice(checkpoint, base, target, objective, patterns, measured).result(started)


def _objective(asked: Objective | None, recipe: Recipe) -> Objective:
    """The objective that was asked for, or the default."""
    if asked is None:
        return "block" if walks(recipe) else "relative"
    if asked not in OBJECTIVES:
        raise UsageError(f"objective must be one of {', '.join(OBJECTIVES)}, got {asked!r}.")
    if asked == "block" and not walks(recipe):
        raise UsageError(
            "objective 'block' looks at the outputs of blocks, so it needs calibration data, and a criterion or a "
            "metric that weighs the inputs. Calibrate, or take objective 'relative'."
        )
    return asked


def _patterns(base: CompressionPlan, target: Target, sparsities: Sequence[float] | None) -> Patterns:
    """The patterns to choose from, by tensor name; the recipe's own is the first."""
    if sparsities is not None and target.rank_ratio is not None:
        raise UsageError(
            "target_rank_bytes leaves the patterns as they are, so sparsities has no effect. Leave it out."
        )
    grid = DEFAULT_SPARSITIES if sparsities is None else tuple(sparsities)
    for sparsity in grid:
        if not 0 <= sparsity < 1:
            raise UsageError(f"sparsities must be in [0, 1), got {sparsity!r}.")
    found: dict[str, tuple[Pattern, ...]] = {}
    for tensor in base.compressed:
        own = tensor.pattern
        if own is None:
            raise UsageError(f"{tensor.name!r} has no pattern.")
        others: list[Pattern] = []
        if target.rank_ratio is None and isinstance(own, Adjustable):
            others = [replace(own, sparsity=sparsity) for sparsity in sorted(set(grid)) if sparsity != own.sparsity]
        found[tensor.name] = (own, *others)
    if sparsities is not None and not any(isinstance(own, Adjustable) for own, *_ in found.values()):
        raise UsageError("every pattern is n:m, so sparsities has no effect. Leave it out, or take another pattern.")
    if base.recipe.refiner == PruneOnly.name and all(len(choice) == 1 for choice in found.values()):
        raise UsageError(
            f"{target.name} leaves nothing to choose: refiner {base.recipe.refiner!r} has no ranks, and the patterns "
            "stay as they are. Take a refiner with a low-rank part, or --target-bytes with an unstructured pattern."
        )
    return found


def _check_reachable(base: CompressionPlan, target: Target, patterns: Patterns) -> None:
    """Refuse a share of the bytes that not even the sparsest patterns without factors meet, before work of hours."""
    if target.bytes_ratio is None:
        return
    least = base.totals.stored_bytes
    for tensor in base.compressed:
        sides = _sides(tensor)
        kept = min(n_kept_total(pattern, *sides) for pattern in patterns[tensor.name])
        least += packed_bytes(*sides, kept, 0, _itemsize(tensor)) - tensor.stored_bytes
    if least > math.floor(target.bytes_ratio * base.totals.dense_bytes):
        raise UsageError(
            f"{target.name} {target.value:g} cannot be met: the least that the sparsities to choose from allow is "
            f"{least / base.totals.dense_bytes:.4g}. Allow higher sparsities."
        )


@dataclass(frozen=True)
class _Setting:
    pattern: Pattern
    rank: int


class _Choice:
    """One allocation: options of all tensors, what was chosen, and what it gives."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        base: CompressionPlan,
        target: Target,
        objective: Objective,
        patterns: Patterns,
        curves: ModelCurves,
    ) -> None:
        self._checkpoint, self._base, self._target, self._objective = checkpoint, base, target, objective
        self._curves = curves
        self._compressed = base.compressed
        self._settings: list[list[_Setting]] = []
        self._options: list[list[Option]] = []
        self._stored: list[list[int]] = []
        for tensor in self._compressed:
            self._add(tensor, curves.tensors[tensor.name], patterns[tensor.name])
        self._total = self._whole()
        self._fixed = base.totals.stored_bytes - sum(tensor.stored_bytes for tensor in self._compressed)
        self._dense = sum(tensor.dense_bytes for tensor in self._compressed)

    def _add(self, tensor: PlannedTensor, curves: TensorCurves, patterns: Sequence[Pattern]) -> None:
        d_out, d_in = curves.shape
        itemsize = _itemsize(tensor)
        settings, options, stored = [], [], []
        by_pattern = curves.by_pattern
        for pattern in patterns:
            curve = by_pattern[pattern]
            weight = _weight(self._objective, curves, curve)
            for rank, error in zip(curves.ranks, curve.errors, strict=True):
                n_bytes = packed_bytes(d_out, d_in, curve.n_kept, rank, itemsize)
                factor_bytes = factor_params(d_out, d_in, rank) * itemsize
                settings.append(_Setting(pattern, rank))
                stored.append(n_bytes)
                options.append(Option(n_bytes if self._target.rank_ratio is None else factor_bytes, weight * error))
        self._settings.append(settings)
        self._options.append(options)
        self._stored.append(stored)

    def _whole(self) -> float:
        """What a relative error is relative to: the weighted squared norms, or 1 for each block."""
        if self._objective == "block":
            return float(len({place_of(tensor.name)[0] for tensor in self._compressed}))
        curves = [self._curves.tensors[tensor.name] for tensor in self._compressed]
        return math.fsum(_weight(self._objective, one, one.curves[0]) * one.energy for one in curves)

    def result(self, started: float) -> BudgetPlan:
        """Allocate, and check the result by a plan of its recipe."""
        uniform = self._uniform()
        chosen = self._allocate([list(found) for found in uniform])
        recipe = self._recipe(chosen)
        plan = make_plan(self._checkpoint, recipe)
        if plan.totals.stored_bytes != self._fixed + self._stored_bytes(chosen.indices):
            raise RuntimeError("the recipe of a budget does not give the bytes that were planned.")
        factors = sum(factor_params(*_sides(t), t.rank) * _itemsize(t) for t in plan.compressed)
        best = self._best(uniform)
        return BudgetPlan(
            target=self._target,
            objective=self._objective,
            recipe=recipe,
            plan=plan,
            tensors=tuple(
                self._row(tensor, settings[index])
                for tensor, settings, index in zip(plan.compressed, self._settings, chosen.indices, strict=True)
            ),
            error=self._relative(chosen.error),
            rank_ratio=factors / self._dense,
            uniform=best,
            curves=self._curves,
            seconds=time.monotonic() - started,
        )

    def _allocate(self, alternatives: list[list[int]]) -> Allocation:
        target = self._target
        if target.error is not None:
            limit = target.error**2 * self._total
            reached = math.fsum(min(option.error for option in options) for options in self._options)
            if reached > limit:
                raise UsageError(
                    f"target_error {target.error:g} cannot be met: the smallest error of the ranks and sparsities to "
                    f"choose from is {self._relative(reached):.4g}. Allow lower sparsities."
                )
            return least_bytes(self._options, limit, alternatives)
        return least_error(self._options, self._max_bytes(), alternatives)

    def _max_bytes(self) -> int:
        """The budget, in the bytes of the options."""
        if self._target.rank_ratio is not None:
            return math.floor(self._target.rank_ratio * self._dense)
        return math.floor(self._target.value * self._base.totals.dense_bytes) - self._fixed

    def _uniform(self) -> dict[tuple[int, ...], tuple[Pattern | None, int]]:
        """Allocations with one pattern, or each tensor's own, and one rank (or the largest that there is) for all."""
        shared = [setting.pattern for setting in self._settings[0]]
        patterns: list[Pattern | None] = [*dict.fromkeys(shared), None]
        ranks = sorted({setting.rank for settings in self._settings for setting in settings})
        tables = [
            {(setting.pattern, setting.rank): i for i, setting in enumerate(settings)} for settings in self._settings
        ]
        largest = [max(setting.rank for setting in settings) for settings in self._settings]
        found: dict[tuple[int, ...], tuple[Pattern | None, int]] = {}
        for pattern in patterns:
            own = [pattern or settings[0].pattern for settings in self._settings]
            for rank in ranks:
                keys = [(p, min(rank, most)) for p, most in zip(own, largest, strict=True)]
                if all(key in table for key, table in zip(keys, tables, strict=True)):
                    indices = tuple(table[key] for key, table in zip(keys, tables, strict=True))
                    found.setdefault(indices, (pattern, rank))
        return found

    def _best(self, uniform: dict[tuple[int, ...], tuple[Pattern | None, int]]) -> Uniform | None:
        """The best of the uniform allocations that meet the target."""
        found: list[tuple[tuple[float, float], Uniform]] = []
        for indices, (pattern, rank) in uniform.items():
            options = [options[i] for options, i in zip(self._options, indices, strict=True)]
            error = math.fsum(option.error for option in options)
            n_bytes = sum(option.n_bytes for option in options)
            stored = self._fixed + self._stored_bytes(indices)
            entry = Uniform(pattern, rank, self._relative(error), stored)
            if self._target.error is None:
                if n_bytes <= self._max_bytes():
                    found.append(((error, stored), entry))
            elif error <= self._target.error**2 * self._total:
                found.append(((stored, error), entry))
        return min(found, key=lambda pair: pair[0])[1] if found else None

    def _stored_bytes(self, indices: Sequence[int]) -> int:
        return sum(stored[i] for stored, i in zip(self._stored, indices, strict=True))

    def _relative(self, error: float) -> float:
        return math.sqrt(max(error, 0.0) / self._total) if self._total > 0 else 0.0

    def _recipe(self, chosen: Allocation) -> Recipe:
        """The base recipe with what was chosen, one override a tensor."""
        overrides = []
        for tensor, settings, index in zip(self._compressed, self._settings, chosen.indices, strict=True):
            setting = settings[index]
            fields: dict[str, Any] = {"match": glob.escape(tensor.name)}
            if len({other.pattern for other in settings}) > 1:
                fields["sparsity"] = setting.pattern.sparsity
            if self._base.recipe.refiner != PruneOnly.name:  # also where 0 is the only rank: the recipe has another
                fields["rank"] = setting.rank
            if len(fields) > 1:
                overrides.append(Override(**fields))
        base = self._base.recipe
        return Recipe(**(base.to_dict() | {"refiner": base.refiner, "overrides": (*base.overrides, *overrides)}))

    def _row(self, tensor: PlannedTensor, setting: _Setting) -> PlannedBudget:
        curves = self._curves.tensors[tensor.name]
        curve = curves.by_pattern[setting.pattern]
        error = curve.errors[curves.ranks.index(setting.rank)]
        block = split_block(tensor.name)
        return PlannedBudget(
            name=tensor.name,
            shape=curves.shape,
            layer=None if block is None else block[1],
            projection=tensor.name if block is None else block[2].removesuffix(".weight"),
            pattern=setting.pattern,
            rank=setting.rank,
            rel_error=math.sqrt(error / curves.energy) if curves.energy > 0 else 0.0,
            sensitivity=curve.sensitivity,
            dense_bytes=tensor.dense_bytes,
            stored_bytes=tensor.stored_bytes,
        )


def _weight(objective: Objective, curves: TensorCurves, curve: ErrorCurve) -> float:
    """What a squared error of a tensor counts."""
    if objective == "block":
        if curve.sensitivity is None:
            raise CheckpointError(
                f"the curves of {curves.name!r} are damaged: they have no sensitivity. Delete the file."
            )
        return curve.sensitivity
    if objective == "absolute":
        return 1.0
    if curves.energy <= 0:
        return 0.0
    return (math.prod(curves.shape) if objective == "parameters" else 1) / curves.energy


def _itemsize(tensor: PlannedTensor) -> int:
    """Bytes of a stored entry."""
    return tensor_bytes(safetensors_name(getattr(torch, tensor.storage_dtype)), (1,))


def _sides(tensor: PlannedTensor) -> tuple[int, int]:
    d_out, d_in = tensor.shape
    return d_out, d_in
