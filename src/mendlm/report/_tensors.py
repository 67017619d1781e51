"""One weight in detail: its spectrum before and after, how the refinement converged, a tile of its mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mendlm.checkpoints.folder import Packed, open_folder
from mendlm.checkpoints.plan import PlannedTensor
from mendlm.checkpoints.reader import Shard, open_checkpoint, read_weight
from mendlm.config import Recipe
from mendlm.errors import CheckpointError, MendError, UsageError, located
from mendlm.execution.tensor import tensor_generator
from mendlm.families import place_of
from mendlm.inspection import energy_frac, packed_spectrum, singular_values
from mendlm.linalg import LeadingTriplets, compute_dtype, make_solver
from mendlm.metrics import ratio
from mendlm.names import lookup
from mendlm.packing import unpack, unpack_mask
from mendlm.planning import make_plan
from mendlm.plotting import rounded
from mendlm.refiners import TLR, AbstractRefiner, Problem, Progress, refine
from mendlm.report._runs import Run
from mendlm.report.records import TensorRecord
from mendlm.selection import select

TILE = 64
MAX_POINTS = 200  # of a spectrum, even on a log scale
# Flops of the SVDs that a report takes by itself (d_out * d_in * min(d_out, d_in), one count a spectrum): one layer of
# a model of 135 M parameters is 2e9, some seconds on two cores; one projection of a 7 B model is 7e10, half a minute.
BUDGET = 2e10

TAIL, OBJECTIVE = "‖L − L_k‖", "‖W − S − L_r‖, the objective"
PRUNED, REFINED = "W − S⁰, pruned alone", "W − S, refined"


@dataclass(frozen=True)
class TensorDetail:
    """What the page shows of a chosen weight.

    Attributes
    ----------
    record : of the run.
    spectra : name of a matrix -> (index from 1, singular value) of its positive singular values, thinned out.
    energy : name of the matrix -> share of its squared norm in the leading `record.rank` of them.
    compared : whether the spectra are those of W − S with the original W, or of what is stored.
    trace : (iteration, name of the norm, value); empty if it is not known.
    trace_note : how the trace came about, or why there is none.
    tile : rows of "0" and "1" of the upper left corner of the mask.
    """

    record: TensorRecord
    spectra: dict[str, list[tuple[int, float]]]
    energy: dict[str, float]
    compared: bool
    trace: list[tuple[int, str, float]]
    trace_note: str
    tile: list[str]


class Original:
    """The dense model that runs came from.

    Raises
    ------
    UsageError : no dense checkpoint there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = open_checkpoint(folder)
        self._shards = {shard.name: shard for shard in self.checkpoint.shards}

    def check(self, run: Run) -> None:
        """Raise `UsageError` unless the files have the sizes that those had which `run` read."""
        for shard in self.checkpoint.shards:
            known = run.manifest.inputs.get(shard.name)
            if known is None or known["size_bytes"] != shard.size_bytes:
                raise UsageError(
                    f"--original {str(self.folder)!r} is not the model that {str(run.folder)!r} was compressed from: "
                    f"{shard.name!r} has {shard.size_bytes} bytes, mendlm.json says "
                    f"{'nothing of it' if known is None else known['size_bytes']}."
                )

    def weight(self, planned: PlannedTensor) -> Tensor:
        """The matrix (d_out, d_in), on the CPU."""
        shard: Shard = self._shards[planned.shard]
        return read_weight(shard, planned)

    def planned(self, recipe: Recipe) -> dict[str, PlannedTensor]:
        """How the tensors that `recipe` compresses are stored here."""
        return {tensor.name: tensor for tensor in make_plan(self.checkpoint, recipe).compressed}


def choose(run: Run, names: Sequence[str]) -> tuple[str, ...]:
    """The weights to show in detail: `names`, or the projections of the middle block as far as `BUDGET` goes.

    By default it is one weight at least, and of several experts the first.

    Raises
    ------
    UsageError : a name that is not of a compressed weight.
    """
    records = {record.name: record for record in run.manifest.records}
    if names:
        full = [name if name in records else f"{name}.weight" for name in names]
        for name, found in zip(names, full, strict=True):
            if found not in records:
                lookup(records, name, "compressed tensor")
        return tuple(dict.fromkeys(full))
    layers = sorted({layer for name in records if (layer := place_of(name)[0]) is not None})
    middle = layers[len(layers) // 2] if layers else None
    firsts: dict[str, str] = {}
    for name in records:
        layer, projection = place_of(name)
        if layer == middle:
            firsts.setdefault(projection, name)
    chosen: list[str] = []
    spent = 0.0
    for name in firsts.values():
        d_out, d_in = records[name].shape
        cost = 2.0 * d_out * d_in * min(d_out, d_in)
        if not chosen or spent + cost <= BUDGET:
            chosen.append(name)
            spent += cost
    return tuple(chosen)


class Details:
    """Makes the details of weights of one run.

    Raises
    ------
    UsageError, CheckpointError : as `open_folder`; the original is another model.
    """

    def __init__(self, run: Run, original: Original | None) -> None:
        self._run, self._original = run, original
        self._packed = open_folder(run.folder).packed
        self._recipe, self._problem = _recipe_of(run)
        self._planned: dict[str, PlannedTensor] = {}
        if original is not None:
            original.check(run)
            if self._recipe is not None:
                self._planned = original.planned(self._recipe)

    def of(self, record: TensorRecord) -> TensorDetail:
        """The details of one weight.

        Raises
        ------
        CheckpointError, NonFiniteError : what is stored is damaged.
        UsageError : the original is another model.

        Notes
        -----
        Two or three SVDs (values only) of a (d_out, d_in) matrix, and with the original of a recipe without calibration
        the whole refinement once more.
        """
        try:
            packed = self._packed[record.name]
        except KeyError as err:
            raise CheckpointError(
                f"mendlm.json of {str(self._run.folder)!r} lists {record.name!r}, which the folder does not hold. "
                "Compress the model again."
            ) from err
        tile = _tile(unpack_mask(packed.bitmask.read(), packed.shape[1]))
        planned = self._planned.get(record.name)
        try:
            if self._original is None or planned is None:
                spectra, energy = self._stored(record, packed)
                note = "" if self._original is None else f" {self._problem}"
                return TensorDetail(record, spectra, energy, False, [], f"Not known without the original.{note}", tile)
            W = self._original.weight(planned)
            spectra, energy = self._compared(record, packed, W)
            trace, note = self._trace(record, planned, W)
            return TensorDetail(record, spectra, energy, True, trace, note, tile)
        except MendError as err:
            raise located(err, f"{record.name} of {self._run.folder}") from err

    def _stored(
        self, record: TensorRecord, packed: Packed
    ) -> tuple[dict[str, list[tuple[int, float]]], dict[str, float]]:
        found = packed_spectrum(record.name, packed)
        parts = {"S + B @ A, what is stored": found.sigma}
        for name, sigma in (("S", found.sigma_sparse), ("B @ A", found.sigma_low_rank)):
            if sigma is not None:
                parts[name] = sigma
        return _thinned(parts), _energies(parts, record.rank)

    def _compared(
        self, record: TensorRecord, packed: Packed, W: Tensor
    ) -> tuple[dict[str, list[tuple[int, float]]], dict[str, float]]:
        compute = compute_dtype(W.dtype)
        bitmask = packed.bitmask.read()
        S = unpack(packed.values.read(), bitmask, packed.shape[1]).to(compute)
        dense = W.to(compute)
        self._check_error(record, dense - S - packed.B.read().to(compute) @ packed.A.read().to(compute), dense)
        mask = unpack_mask(bitmask, packed.shape[1])
        matrices = {PRUNED: dense * ~mask, REFINED: dense - S}
        parts = {name: singular_values(record.name, M) for name, M in matrices.items()}
        return _thinned(parts), _energies(parts, record.rank)

    def _check_error(self, record: TensorRecord, error: Tensor, dense: Tensor) -> None:
        found = ratio(float(torch.linalg.vector_norm(error)), float(torch.linalg.vector_norm(dense)))
        dropped = self._run.manifest.recipe.get("dead_columns") == "drop" and record.n_dead
        if not dropped and abs(found - record.rel_error) > 1e-3 * max(found, record.rel_error) + 1e-6:
            raise UsageError(
                f"with --original the relative error is {found:.5g}, mendlm.json says {record.rel_error:.5g}: it is "
                "not the model that was compressed. Give that one."
            )

    def _trace(
        self, record: TensorRecord, planned: PlannedTensor, W: Tensor
    ) -> tuple[list[tuple[int, str, float]], str]:
        recipe = self._recipe
        if record.n_iter == 0 or record.rank == 0:
            return [], "There was no low-rank part to iterate for."
        if recipe is None or record.n_tokens is not None:
            return [], "The run was calibrated: the trace depends on activations that were not kept."
        refiner = recipe.refiner_for(*record.shape, record.name)
        generator = tensor_generator(recipe.seed, record.name)
        pattern = recipe.pattern if planned.pattern is None else planned.pattern
        watched = _Watched(refiner) if isinstance(refiner, TLR) else None
        with torch.no_grad():
            selection = select(W, recipe.criterion_for(record.name), pattern, generator=generator)
            out = refine(
                W,
                selection.mask,
                refiner if watched is None else watched,
                start=selection.S,
                pattern=pattern,
                storage_dtype=getattr(torch, record.storage_dtype),
                generator=generator,
            )
        rows = [(t, TAIL, value) for t, value in enumerate(watched.tails if watched else [])]
        rows += [(t, OBJECTIVE, step.objective) for t, step in enumerate(out.trace, start=1)]
        off = abs(out.objective - record.objective) / max(record.objective, torch.finfo(torch.float32).tiny)
        note = f"Recomputed from the original; it ends at {out.objective:.5g}, the run at {record.objective:.5g}."
        if off > 0.01:
            note += " They differ: the run was made by another version or with other settings of its libraries."
        return [row for row in rows if math.isfinite(row[2]) and row[2] > 0], note


class _Watched(AbstractRefiner):
    """TLR that also measures ``||L - L_k||_F`` of the residual ``L = W - S`` before the first step and after each.

    Attributes
    ----------
    tails : these norms; that of plain pruning is what a zero-shot SVD of rank k would leave.
    """

    name: ClassVar[str] = TLR.name

    def __init__(self, inner: TLR) -> None:
        self._inner, self.rank = inner, inner.rank
        self.tails: list[float] = []
        self._solver: LeadingTriplets | None = None

    @property
    def max_steps(self) -> int:
        """As TLR."""
        return self._inner.max_steps

    def init(self, problem: Problem) -> Any:
        """As TLR, and the first tail."""
        generator = torch.Generator(device=problem.W.device).manual_seed(0)
        self._solver = make_solver("auto", problem.W.shape, self.rank, like=problem.W, generator=generator)
        state = self._inner.init(problem)
        self._solver.leading(problem.lost, self.rank)
        self._measure(problem.lost)
        return state

    def step(self, problem: Problem, state: Any, t: int) -> tuple[Any, Progress]:
        """As TLR, and the tail."""
        state, progress = self._inner.step(problem, state, t)
        self._measure(state.residual)
        return state, progress

    def finish(self, problem: Problem, state: Any) -> tuple[Tensor, Tensor]:
        """As TLR."""
        return self._inner.finish(problem, state)

    def _measure(self, residual: Tensor) -> None:
        if self._solver is None:
            raise RuntimeError("init comes first")
        share = float(self._solver.leading(residual, self.rank).energy_frac)
        self.tails.append(float(torch.linalg.vector_norm(residual)) * math.sqrt(max(0.0, 1 - share)))


def _recipe_of(run: Run) -> tuple[Recipe | None, str]:
    """The recipe of a run, or None and why there is none."""
    try:
        return Recipe(**run.manifest.recipe), ""
    except (UsageError, TypeError) as err:
        return None, f"The recipe cannot be made here: {err}"


def _tile(mask: Tensor) -> list[str]:
    return ["".join("1" if kept else "0" for kept in row) for row in mask[:TILE, :TILE].tolist()]


def _energies(parts: dict[str, Tensor], rank: int) -> dict[str, float]:
    return {
        name: float(energy_frac(sigma)[min(rank, sigma.numel()) - 1]) if rank and sigma.numel() else 0.0
        for name, sigma in parts.items()
    }


def _thinned(parts: dict[str, Tensor]) -> dict[str, list[tuple[int, float]]]:
    """(index, value) of the singular values that are no rounding error of 0, at most `MAX_POINTS` a matrix."""
    return {name: _points(sigma) for name, sigma in parts.items()}


def _points(sigma: Tensor) -> list[tuple[int, float]]:
    if not sigma.numel():
        return []
    floor = float(sigma[0]) * sigma.numel() * torch.finfo(sigma.dtype).eps
    n = int((sigma > floor).sum())
    if n <= MAX_POINTS:
        indices = range(1, n + 1)
    else:
        indices = sorted({round(n ** (i / (MAX_POINTS - 1))) for i in range(MAX_POINTS)})  # type: ignore[assignment]
    return [(i, rounded(float(sigma[i - 1]))) for i in indices]
