"""The error curves of a whole model: measured tensor by tensor, or block by block on a text; kept in a file."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

import mendlm
from mendlm._memory import trim
from mendlm.calibration.prepare import Prepared
from mendlm.checkpoints.plan import PlannedTensor
from mendlm.checkpoints.reader import Checkpoint, read_weight
from mendlm.checkpoints.staging import differences
from mendlm.checkpoints.writer import replace_file
from mendlm.config import Recipe
from mendlm.curves import ErrorCurve, TensorCurves, error_curve, rank_grid
from mendlm.errors import CheckpointError, MendError, UsageError, located
from mendlm.execution.run import BlockStarted, TensorStarted
from mendlm.execution.tensor import tensor_generator
from mendlm.families import place_of
from mendlm.inputs import InputStats, treat_dead_columns
from mendlm.linalg import compute_dtype
from mendlm.metrics import make_metric
from mendlm.paths import local_path
from mendlm.patterns import Pattern, n_kept_total
from mendlm.pipeline import prepare_calibration, stat_inputs
from mendlm.planning import CompressionPlan
from mendlm.refiners import PruneOnly
from mendlm.selection import select
from mendlm.sensitivity import Pruned, PrunedWeight, with_sensitivities

FORMAT = "mendlm-curves-2"
# A file is saved this often at most, and after this many times what saving it took: a twentieth of the time.
SECONDS_BETWEEN_SAVES, REST_OF_SAVING = 30.0, 20.0
# Of the text: they run through a block for every weight and pattern, to see what its error does.
SENSITIVITY_WINDOWS = 8
# What a recipe says that no curve depends on: the patterns are in the curves themselves, and the model is dense.
_WITHOUT_EFFECT = ("rank", "overrides", "pattern", "skip_layers", "include", "exclude", "dtype", "match_blocks")


@dataclass(frozen=True)
class CurvesDone:
    """The curves of a tensor are measured.

    Attributes
    ----------
    curves : of the tensor.
    index, n_tensors : the how-manieth (from 1) of the tensors, in all.
    done_bytes, total_bytes : dense bytes of the tensors done so far, and of all of them.
    seconds : that it took.
    """

    curves: TensorCurves
    index: int
    n_tensors: int
    done_bytes: int
    total_bytes: int
    seconds: float


MeasuringEvent = TensorStarted | CurvesDone | BlockStarted
Tell = Callable[[MeasuringEvent], None]
Patterns = Mapping[str, tuple[Pattern, ...]]


@dataclass(frozen=True)
class ModelCurves:
    """The error curves of the tensors that a recipe compresses.

    Attributes
    ----------
    fingerprint : of the model and the settings that the curves depend on.
    tensors : by name.
    """

    fingerprint: Mapping[str, Any]
    tensors: Mapping[str, TensorCurves]

    def save(self, path: Path) -> None:
        """Write them to a JSON file, in place of what it held, all or nothing.

        Raises
        ------
        StorageError : it cannot be written.
        """
        document = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "tensors": [tensor.to_dict() for tensor in self.tensors.values()],
        }
        replace_file(path, json.dumps(document, ensure_ascii=False).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        CheckpointError : it cannot be read, or is something else.
        """
        try:
            document = json.loads(path.read_bytes())
        except OSError as err:
            raise CheckpointError(f"cannot read the curves in {str(path)!r}: {err.strerror or err}.") from err
        except (ValueError, RecursionError) as err:
            raise CheckpointError(f"{str(path)!r} does not hold curves: it is not valid JSON. Delete it.") from err
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CheckpointError(f"{str(path)!r} does not hold curves of the format {FORMAT!r}. Give another file.")
        try:
            tensors = [TensorCurves.from_dict(fields) for fields in document["tensors"]]
            return cls(dict(document["fingerprint"]), {tensor.name: tensor for tensor in tensors})
        except (KeyError, TypeError, ValueError) as err:
            raise CheckpointError(f"the curves in {str(path)!r} are damaged: {err}. Delete the file.") from err

    def check(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        """Raise `UsageError` unless these are of the run that asks for them; the message says what differs."""
        if found := differences(self.fingerprint, fingerprint):
            raise UsageError(
                f"the curves in {str(path)!r} are of another run: {found}. Delete the file to measure again, or give "
                "another one."
            )

    def missing(self, patterns: Patterns) -> Patterns:
        """What of `patterns` has no curve here, by tensor name; experts, which are measured together, lack the same."""
        known = {name: curves.by_pattern for name, curves in self.tensors.items()}
        lacking: dict[tuple[int | None, str], set[Pattern]] = defaultdict(set)
        for name, asked in patterns.items():
            lacking[place_of(name)] |= {pattern for pattern in asked if pattern not in known.get(name, {})}
        found = {
            name: tuple(pattern for pattern in asked if pattern in lacking[place_of(name)])
            for name, asked in patterns.items()
        }
        return {name: left for name, left in found.items() if left}


def fingerprint_of(checkpoint: Checkpoint, recipe: Recipe, rank_step: int, device: torch.device) -> dict[str, Any]:
    """Everything that the curves depend on but the patterns, from stat and headers: cheap."""
    settings = {name: value for name, value in recipe.to_dict().items() if name not in _WITHOUT_EFFECT}
    settings["metric"] = recipe.metric_kind
    if settings["calibration"] is not None:
        settings["calibration"] = {k: v for k, v in settings["calibration"].items() if k != "propagate"}
    if criteria := [[o.match, o.criterion] for o in recipe.overrides if o.criterion is not None]:
        settings["criteria"] = criteria
    text = local_path(recipe.calibration.source) if recipe.calibration is not None else None
    stat = text.stat() if text is not None and text.is_file() else None
    return {
        "mendlm_version": mendlm.__version__,
        "device": device.type,
        "rank_step": rank_step,
        "recipe": settings,
        "calibration_file": None if stat is None else {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns},
        "inputs": stat_inputs(checkpoint),
        "headers": {shard.name: shard.header.sha256 for shard in checkpoint.shards},
    }


def measure_curves(
    checkpoint: Checkpoint,
    plan: CompressionPlan,
    patterns: Patterns,
    *,
    rank_step: int,
    device: torch.device,
    file: Path | None = None,
    activation_dir: str | Path | None = None,
    tell: Tell = lambda event: None,
) -> ModelCurves:
    """The error curves of every tensor that a plan compresses: measured, but for those that a file has.

    Parameters
    ----------
    checkpoint, plan : the dense model, and what would be done to it.
    patterns : to measure, by tensor name.
    rank_step : ranks are multiples of it.
    device : where to compute.
    file : keeps the curves. It is written every half minute and at the end, also of a run that fails or is interrupted;
        the next run measures what is missing.
    activation_dir : as for `compress`.
    tell : called with `TensorStarted`, `CurvesDone` and, in calibrated work, `BlockStarted`.

    Raises
    ------
    UsageError : as `compress`; the message names the tensor. Also where the curves in the file are of another model or
        of other settings.
    NonFiniteError, CheckpointError, StorageError : as `compress`.

    Notes
    -----
    Without calibration tensors stream: memory is that of the largest one. With it the text runs through the dense model
    once, whatever `propagate` says, and memory is that of one block.
    """
    known = ModelCurves(fingerprint_of(checkpoint, plan.recipe, rank_step, device), {})
    if file is not None and file.exists():
        loaded = ModelCurves.load(file)
        loaded.check(file, known.fingerprint)
        known = loaded
    missing = known.missing(patterns)
    if not missing:
        return known
    run = _Measuring(checkpoint, plan, missing, rank_step, device, tell)
    prepared = prepare_calibration(checkpoint, plan, device, activation_dir)
    kept = _Kept(known, file)
    try:
        for measured in run.streaming() if prepared is None else run.walking(prepared):
            kept.add(measured)
    finally:
        kept.save()
    return kept.curves


class _Kept:
    """Curves that grow, and a file that follows them."""

    def __init__(self, known: ModelCurves, file: Path | None) -> None:
        self._tensors = dict(known.tensors)
        self.curves = replace(known, tensors=self._tensors)
        self._file, self._is_saved = file, True
        self._save_at = time.monotonic() + SECONDS_BETWEEN_SAVES

    def add(self, measured: TensorCurves) -> None:
        """Curves of a tensor, beside those of its other patterns if there are some."""
        known = self._tensors.get(measured.name)
        if known is not None:
            measured = replace(measured, curves=tuple((known.by_pattern | measured.by_pattern).values()))
        self._tensors[measured.name] = measured
        self._is_saved = False
        if time.monotonic() >= self._save_at:
            self.save()

    def save(self) -> None:
        """Write what the file lacks."""
        if self._file is None or self._is_saved:
            return
        started = time.monotonic()
        self.curves.save(self._file)
        self._is_saved = True
        ended = time.monotonic()
        self._save_at = ended + max(SECONDS_BETWEEN_SAVES, REST_OF_SAVING * (ended - started))


class _Measuring:
    """One run over the tensors of a plan that lack curves of some `patterns`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: CompressionPlan,
        patterns: Patterns,
        rank_step: int,
        device: torch.device,
        tell: Tell,
    ) -> None:
        self._plan, self._patterns, self._rank_step = plan, patterns, rank_step
        self._device, self._tell = device, tell
        self._shards = {shard.name: shard for shard in checkpoint.shards}
        self._tensors = [tensor for tensor in plan.compressed if tensor.name in patterns]
        self._total_bytes = sum(tensor.dense_bytes for tensor in plan.compressed)
        self._done_bytes = self._total_bytes - sum(tensor.dense_bytes for tensor in self._tensors)
        self._n_done = len(plan.compressed) - len(self._tensors)

    def streaming(self) -> Iterator[TensorCurves]:
        """Tensor by tensor."""
        for tensor in self._tensors:
            started = time.monotonic()
            yield self._noted(tensor, self._measure(tensor, None)[0], time.monotonic() - started)

    def walking(self, prepared: Prepared) -> Iterator[TensorCurves]:
        """Block by block, on the activations of the dense model, with sensitivities."""
        from mendlm.calibration.outputs import output_error
        from mendlm.calibration.walk import Walk, modules_by_block

        model = prepared.model
        walk = Walk(
            model, prepared.text, lambda index, phase: self._tell(BlockStarted(index + 1, model.n_blocks, phase))
        )
        by_name = {tensor.name: tensor for tensor in self._tensors}
        by_block = modules_by_block(model, self._tensors)
        gram = self._plan.recipe.needs == "gram"
        for index in range(max(by_block) + 1):
            modules = by_block.get(index, {})
            n_windows = SENSITIVITY_WINDOWS if modules else 0
            with model.loaded(index) as block:
                inputs = walk.leading(n_windows)
                stats = walk.gather(index, block, modules, gram=gram and bool(modules), advance=True, phase="survey")
                states = tuple(zip(inputs, walk.leading(n_windows), strict=True))
                forward = partial(model.forward, index)
                change = partial(output_error, block, forward, states=states, device=self._device)
                for group in _by_projection(modules):
                    started, weights = time.monotonic(), []
                    for n_waiting, name in enumerate(group):
                        tensor, seen = by_name[name], stats.pop(name)
                        curves, pruned = self._measure(tensor, seen, n_waiting)
                        fitted = {
                            pattern: found.for_module(model.dtype, transposed=tensor.transposed)
                            for pattern, found in pruned.items()
                        }
                        frac = max(seen.n_tokens, 1) / prepared.text.ids.numel()
                        weights.append(PrunedWeight(curves, f"{modules[name][0]}.weight", fitted, frac))
                    done = with_sensitivities(weights, change)
                    seconds = (time.monotonic() - started) / len(group)
                    yield from (self._noted(by_name[curves.name], curves, seconds) for curves in done)
            del stats
            trim()

    def _measure(
        self, tensor: PlannedTensor, inputs: InputStats | None, n_waiting: int = 0
    ) -> tuple[TensorCurves, dict[Pattern, Pruned]]:
        """Without sensitivities; `n_waiting` tensors are measured and not noted yet."""
        place = (tensor.name, tensor.shard, self._n_done + n_waiting + 1, len(self._plan.compressed))
        self._tell(TensorStarted(*place, self._done_bytes, self._total_bytes))
        try:
            W = read_weight(self._shards[tensor.shard], tensor).to(self._device)
            return tensor_curves(W, tensor, self._plan.recipe, self._patterns[tensor.name], self._rank_step, inputs)
        except MendError as err:
            raise located(err, f"{tensor.name} in {tensor.shard}") from err

    def _noted(self, tensor: PlannedTensor, curves: TensorCurves, seconds: float) -> TensorCurves:
        self._n_done += 1
        self._done_bytes += tensor.dense_bytes
        n_tensors = len(self._plan.compressed)
        self._tell(CurvesDone(curves, self._n_done, n_tensors, self._done_bytes, self._total_bytes, seconds))
        return curves


def _by_projection(names: Iterable[str]) -> list[list[str]]:
    """The tensors of a block: one each, but those of all experts of a projection together."""
    groups: dict[tuple[int | None, str], list[str]] = defaultdict(list)
    for name in names:
        groups[place_of(name)].append(name)
    return list(groups.values())


def tensor_curves(
    W: Tensor,
    tensor: PlannedTensor,
    recipe: Recipe,
    patterns: tuple[Pattern, ...],
    rank_step: int,
    inputs: InputStats | None = None,
) -> tuple[TensorCurves, dict[Pattern, Pruned]]:
    """The curves of one weight (d_out, d_in), with the masks and the metric that `compress` would take.

    Returns
    -------
    The curves, without sensitivities, and for each pattern S of rank 0 in the compute dtype.

    Raises
    ------
    UsageError, NonFiniteError : as `select` and `refine`; they do not name the tensor.
    """
    d_out, d_in = W.shape
    dtype = compute_dtype(W.dtype)
    refiner = recipe.refiner_for(d_out, d_in, tensor.name)
    ranks = (0,) if isinstance(refiner, PruneOnly) else rank_grid(d_out, d_in, rank_step)
    used, stats = (W, None) if inputs is None else treat_dead_columns(W, inputs, recipe.dead_columns)
    with torch.no_grad():
        metric = make_metric(recipe.metric_kind, stats, damping=recipe.damping, dtype=dtype, device=W.device)
        dense = used.to(dtype)
        curves, pruned = [], {}
        for pattern in patterns:
            generator = tensor_generator(recipe.seed, tensor.name, W.device)
            selection = select(used, recipe.criterion_for(tensor.name), pattern, inputs=stats, generator=generator)
            found = error_curve(
                dense,
                selection.mask,
                refiner,
                ranks,
                metric=metric,
                start=None if selection.S is None else selection.S.to(dtype),
                pattern=pattern,
                inputs=stats,
                generator=generator,
            )
            curves.append(ErrorCurve(pattern, n_kept_total(pattern, d_out, d_in), found.errors))
            pruned[pattern] = Pruned(found.S, found.S_error)
        energy = metric.norm(dense) ** 2
    return TensorCurves(tensor.name, (d_out, d_in), energy, ranks, tuple(curves)), pruned
