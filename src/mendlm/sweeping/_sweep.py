"""`sweep`: every point of a grid compressed and evaluated once, its record kept, and which points none beats."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mendlm.checkpoints.finish import hash_files, input_files, to_json
from mendlm.checkpoints.reader import Checkpoint
from mendlm.checkpoints.staging import check_target, differences, lock_folder
from mendlm.checkpoints.writer import is_remnant, replace_file, storage_errors
from mendlm.config import Recipe
from mendlm.devices import resolve_device
from mendlm.errors import CheckpointError, MendError, UsageError
from mendlm.evaluation.text import dataset_source, text_source
from mendlm.names import lookup
from mendlm.paths import local_path
from mendlm.pipeline import open_model, stat_inputs
from mendlm.planning import make_plan
from mendlm.report.records import Totals
from mendlm.sweeping.grid import Point, Skipped, read_grid
from mendlm.sweeping.records import DENSE, FORMAT, SWEEP_FILE, SweepRecord, frontier, line_of, read_sweep
from mendlm.sweeping.runner import EvaluationSettings, Job, remove_work, run_jobs
from mendlm.sweeping.tables import markdown

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SETUP_FILE = "sweep.json"
TABLE_FILE = "sweep.md"
Keep = Literal["none", "pareto", "all"]
KEEP: tuple[Keep, ...] = ("none", "pareto", "all")


@dataclass(frozen=True)
class PlannedPoint:
    """A point before it runs.

    Attributes
    ----------
    name, values : of the point.
    key : of its record.
    recipe : None for the model as it is.
    totals : bytes before and after.
    """

    name: str
    values: Mapping[str, Any]
    key: str
    recipe: Recipe | None
    totals: Totals

    @property
    def folder(self) -> str | None:
        """Where its compressed model goes, relative to the folder of the sweep."""
        return None if self.recipe is None else f"points/{self.key[:16]}"


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would do.

    Attributes
    ----------
    model, out : the dense model, the folder of the sweep.
    points : in their order; the first is the model as it is.
    skipped : impossible combinations.
    records : key -> record of the points that are done.
    """

    model: Path
    out: Path
    points: tuple[PlannedPoint, ...]
    skipped: tuple[Skipped, ...]
    records: Mapping[str, SweepRecord]

    @property
    def missing(self) -> tuple[PlannedPoint, ...]:
        """The points that are not done."""
        return tuple(point for point in self.points if point.key not in self.records)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        points = [
            {"name": p.name, "values": dict(p.values), "key": p.key, "done": p.key in self.records}
            | {"recipe": None if p.recipe is None else p.recipe.to_dict(), "totals": p.totals.to_dict()}
            for p in self.points
        ]
        return {"out": str(self.out), "points": points, "skipped": [vars(skip) for skip in self.skipped]}


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gave.

    Attributes
    ----------
    out : its folder.
    records : of the points that have run, in the order of the points.
    skipped : impossible combinations.
    left : names of the points that were not started.
    """

    out: Path
    records: tuple[SweepRecord, ...]
    skipped: tuple[Skipped, ...]
    left: tuple[str, ...]

    @property
    def frontier(self) -> tuple[SweepRecord, ...]:
        """The records that none beats in both bytes and perplexity, by bytes."""
        return frontier(self.records)

    @property
    def failed(self) -> tuple[SweepRecord, ...]:
        """The records of points that failed."""
        return tuple(record for record in self.records if record.status == "failed")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "out": str(self.out),
            "records": [record.to_dict() for record in self.records],
            "frontier": [record.name for record in self.frontier],
            "failed": [record.name for record in self.failed],
            "skipped": [vars(skip) for skip in self.skipped],
            "left": list(self.left),
        }


@dataclass(frozen=True)
class PointStarted:
    """A point runs: `name`; `n_done` of `n_points` are done."""

    name: str
    n_done: int
    n_points: int


@dataclass(frozen=True)
class PointNote:
    """The point `name` is at `what`; `n_done` of `n_points` are done."""

    name: str
    what: str
    n_done: int
    n_points: int


@dataclass(frozen=True)
class PointDone:
    """A point has ended, well or not; with it `n_done` of `n_points` are done."""

    record: SweepRecord
    n_done: int
    n_points: int


SweepEvent = PointStarted | PointNote | PointDone


def plan_sweep(
    source: str | Path | Mapping[str, Any],
    model: str | Path,
    out: str | Path,
    *,
    text: str | Path | None = None,
    dataset: str | None = None,
    n_windows: int | None = None,
    seqlen: int | None = None,
    device: str | torch.device = "cpu",
) -> SweepPlan:
    """What `sweep` would do with the same arguments; nothing is written or run.

    Raises
    ------
    UsageError, MendError : as `sweep`.
    """
    evaluation = EvaluationSettings(None if text is None else str(text), dataset, n_windows, seqlen)
    return _Setup(source, model, out, evaluation, device).plan


def sweep(
    source: str | Path | Mapping[str, Any],
    model: str | Path,
    out: str | Path,
    *,
    text: str | Path | None = None,
    dataset: str | None = None,
    n_windows: int | None = None,
    seqlen: int | None = None,
    device: str | torch.device = "cpu",
    workers: int = 1,
    minutes: float | None = None,
    keep: str = "none",
    on_event: Callable[[SweepEvent], None] | None = None,
) -> SweepResult:
    """Compress a model by every recipe of a grid and evaluate each, once.

    Parameters
    ----------
    source : a YAML or JSON file, or the same as a mapping: the fields of a recipe, and `SweepSettings` as ``sweep``.
    model : a dense checkpoint folder.
    out : folder of the records; points that have one there are not run again, failed ones are.
    text, dataset, n_windows, seqlen : what to evaluate on; None is what the file says. One of the first two is needed.
    device : cpu, cuda or cuda:N.
    workers : points at a time.
    minutes : start no point after so many.
    keep : which compressed folders stay: "none", "pareto" (of points that none beats), "all".
    on_event : called before and after each point, and now and then meanwhile.

    Returns
    -------
    SweepResult : also written as a table, ``out/sweep.md``.

    Raises
    ------
    UsageError : a bad file, an impossible point, a bad text; `out` holds a sweep of something else.
    MendError : the model itself cannot be evaluated, which is the first thing that runs.
    StorageError : `out` cannot be written, or another sweep writes to it.

    Notes
    -----
    Each point is a process of its own, about 5 s of CPU time to start. What ends one (an error, the system for want of
    memory) becomes its record, and the sweep goes on. Disk: one compressed model for each worker, and those kept.
    KeyboardInterrupt leaves records and unfinished work for the same call to go on from.
    """
    lookup(dict.fromkeys(KEEP), keep, "keep")
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers!r}.")
    evaluation = EvaluationSettings(None if text is None else str(text), dataset, n_windows, seqlen)
    setup = _Setup(source, model, out, evaluation, device)
    with _opened(setup.out):
        setup.write()
        run = _Run(setup, keep, on_event or (lambda event: None))
        dense, *rest = setup.plan.points
        run.go([dense], workers=1, minutes=None)
        wrong = run.records[dense.key].error
        if wrong is not None:
            raise MendError(f"the model itself could not be evaluated, so no point was run: {wrong}")
        try:
            run.go(rest, workers=workers, minutes=minutes)
        finally:
            result = run.result()
            replace_file(setup.out / TABLE_FILE, markdown(result, Path(model).resolve().name).encode())
    return result


class _Setup:
    """A sweep, validated: its points, what they are evaluated on, and what its folder holds already."""

    def __init__(
        self,
        source: str | Path | Mapping[str, Any],
        model: str | Path,
        out: str | Path,
        evaluation: EvaluationSettings,
        device: str | torch.device,
    ) -> None:
        where = resolve_device(str(device))
        self.device = str(where)
        self._hashes: dict[Path, str] = {}
        self._checkpoint = checkpoint = open_model(model)
        self.model = checkpoint.folder
        self.out = check_target(out, checkpoint.folder, is_checkpoint=False)

        def check(recipe: Recipe) -> None:
            make_plan(checkpoint, recipe)

        grid = read_grid(source, check)
        self.evaluation = _resolved(evaluation, grid.settings)
        text, dataset = self.evaluation.text, self.evaluation.dataset
        about = (dataset_source(dataset) if dataset is not None else text_source(text)).protocol()
        self.facts = {name: about[name] for name in ("text", "text_sha256")} | {
            "n_windows": self.evaluation.n_windows,
            "seqlen": self.evaluation.seqlen,
        }
        old = _read_setup(self.out)
        stats = stat_inputs(checkpoint)
        known = old is not None and old["stats"] == stats
        self.inputs = old["inputs"] if old and known else hash_files(checkpoint.folder, input_files(checkpoint))
        self.document = {
            "format": FORMAT,
            "inputs": self.inputs,
            "evaluation": self.facts,
            "device": where.type,
            "stats": stats,
        }
        records = {r.key: r for r in (read_sweep(self.out) if (self.out / SWEEP_FILE).exists() else ())}
        if old is not None:
            ours = {name: self.document[name] for name in ("inputs", "evaluation", "device")}
            if not any(record.status == "done" for record in records.values()):
                del ours["evaluation"]  # of nothing so far: a wrong seqlen, say, leaves a folder that can be used
            if changes := differences({name: old[name] for name in ours}, ours):
                raise UsageError(f"OUT {str(out)!r} holds another sweep: {changes}. Choose another folder.")
        self.plan = SweepPlan(
            model=self.model,
            out=self.out,
            points=self._points(checkpoint, grid.points),
            skipped=grid.skipped,
            records={key: record for key, record in records.items() if record.status == "done"},
        )

    def _points(self, checkpoint: Checkpoint, points: Sequence[Point]) -> tuple[PlannedPoint, ...]:
        planned = [(point, make_plan(checkpoint, point.recipe).totals) for point in points]
        totals = planned[0][1]
        dense = replace(totals, n_compressed=0, stored_params=totals.dense_params, stored_bytes=totals.dense_bytes)
        return (
            PlannedPoint(DENSE, {}, self._key(None), None, dense),
            *(PlannedPoint(p.name, p.values, self._key(p.recipe), p.recipe, totals) for p, totals in planned),
        )

    def _key(self, recipe: Recipe | None) -> str:
        fields = None if recipe is None else recipe.to_dict()
        if fields is not None and recipe is not None and _calibration_file(recipe) is not None:
            fields["calibration"]["source"] = "file"  # its content counts, not where it is
        what = {"recipe": fields, "evaluation": self.facts | {"device": self.document["device"]}}
        return _digest(what | {"inputs": self.inputs_sha256(recipe)})

    def inputs_sha256(self, recipe: Recipe | None) -> str:
        """Of the files of the model, and of the calibration file if there is one."""
        inputs: dict[str, Any] = {name: entry["sha256"] for name, entry in self.inputs.items()}
        file = None if recipe is None else _calibration_file(recipe)
        if file is not None:
            if file not in self._hashes:
                self._hashes[file] = _sha256(file)
            inputs["calibration"] = self._hashes[file]
        return _digest(inputs)

    def changed(self, recipe: Recipe | None, evaluation: Mapping[str, Any]) -> str | None:
        """What has become another file since the sweep began, as a sentence: the figures of a point are not of its key.

        Parameters
        ----------
        recipe : of the point.
        evaluation : that its figures are of.
        """
        source = None if recipe is None else recipe.calibration
        file = None if source is None else local_path(source.source)
        try:
            if evaluation["text_sha256"] != self.facts["text_sha256"]:
                what = "text"
            elif file in self._hashes and _sha256(file) != self._hashes[file]:
                what = "calibration"
            elif not self._has_same_model():
                what = "model"
            else:
                return None
        except CheckpointError as err:
            return str(err)
        return f"the {what} changed while the sweep ran. Put it back as it was, or choose another folder."

    def _has_same_model(self) -> bool:
        if stat_inputs(self._checkpoint) == self.document["stats"]:
            return True
        return hash_files(self.model, input_files(self._checkpoint)) == self.inputs

    def write(self) -> None:
        """Write what the sweep is about into its folder."""
        replace_file(self.out / SETUP_FILE, to_json(self.document))

    def job(self, point: PlannedPoint) -> Job:
        """What has to be run for a point."""
        return Job(
            name=point.name,
            model=str(self.model),
            evaluation=self.evaluation,
            recipe=None if point.recipe is None else point.recipe.to_dict(),
            out=None if point.folder is None else str(self.out / point.folder),
            device=self.device,
        )


class _Run:
    """Keeps the record of every job; a `Watcher`."""

    def __init__(self, setup: _Setup, keep: str, tell: Callable[[SweepEvent], None]) -> None:
        self._setup, self._keep, self._tell = setup, keep, tell
        self._points = {point.name: point for point in setup.plan.points}
        self.records = dict(setup.plan.records)

    def go(self, points: Sequence[PlannedPoint], *, workers: int, minutes: float | None) -> None:
        """Run those of the points that are not done."""
        missing = [point for point in points if point.key not in self.records]
        run_jobs((self._setup.job(point) for point in missing), self, workers=workers, minutes=minutes)

    def result(self) -> SweepResult:
        """What there is."""
        points = self._setup.plan.points
        return SweepResult(
            out=self._setup.out,
            records=tuple(
                replace(self.records[p.key], name=p.name, values=p.values) for p in points if p.key in self.records
            ),
            skipped=self._setup.plan.skipped,
            left=tuple(point.name for point in points if point.key not in self.records),
        )

    def _counts(self) -> tuple[int, int]:
        return sum(point.key in self.records for point in self._points.values()), len(self._points)

    def started(self, job: Job) -> None:
        """Tell."""
        self._tell(PointStarted(job.name, *self._counts()))

    def noted(self, job: Job, what: str) -> None:
        """Tell."""
        self._tell(PointNote(job.name, what, *self._counts()))

    def measured(self, job: Job, figures: dict[str, Any]) -> None:
        """Keep the figures, if they are of what the point is known by."""
        point = self._points[job.name]
        if wrong := self._setup.changed(point.recipe, figures["evaluation"]):
            if point.folder is not None:
                remove_work(self._setup.out / point.folder)
            self.failed(job, wrong)
            return
        self._add(job, figures | {"status": "done", "error": None})

    def failed(self, job: Job, error: str) -> None:
        """Keep the sentence."""
        self._add(job, {"status": "failed", "error": error, "evaluation": self._setup.facts, "device": job.device})

    def _add(self, job: Job, outcome: Mapping[str, Any]) -> None:
        point = self._points[job.name]
        record = SweepRecord.from_dict(
            {
                "name": point.name,
                "key": point.key,
                "values": point.values,
                "recipe": job.recipe,
                "recipe_sha256": None if job.recipe is None else _digest(job.recipe),
                "inputs_sha256": self._setup.inputs_sha256(point.recipe),
                "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "folder": point.folder,
                **outcome,
            }
        )
        _append(self._setup.out / SWEEP_FILE, line_of(record))
        self.records[point.key] = record
        self._clean(record)
        self._tell(PointDone(record, *self._counts()))

    def _clean(self, record: SweepRecord) -> None:
        """Remove the folders that are not to be kept."""
        if self._keep == "all" or record.folder is None:
            return
        best = {r.key for r in self.result().frontier} if self._keep == "pareto" else set()
        mine = self.result().records if record.key in best else (record,)
        for other in mine:
            if other.folder is not None and other.key not in best:
                remove_work(self._setup.out / other.folder)
        with contextlib.suppress(OSError):
            (self._setup.out / "points").rmdir()


def _resolved(given: EvaluationSettings, settings: Any) -> EvaluationSettings:
    """What was given, over what the file says."""
    from_file = given.text is None and given.dataset is None
    text = settings.text if from_file else given.text
    dataset = settings.dataset if from_file else given.dataset
    if (text is None) == (dataset is None):
        which = "neither was" if text is None else "both were"
        raise UsageError(
            f"sweep needs either --text FILE or --dataset NAME, or one of them in its file; {which} given. "
            "Try --dataset wikitext2."
        )
    n_windows = settings.n_windows if given.n_windows is None else given.n_windows
    seqlen = settings.seqlen if given.seqlen is None else given.seqlen
    return EvaluationSettings(text, dataset, n_windows, seqlen)


def _calibration_file(recipe: Recipe) -> Path | None:
    """The file that a recipe is calibrated on, if it is one."""
    path = None if recipe.calibration is None else local_path(recipe.calibration.source)
    return path if path is not None and path.is_file() else None


def _sha256(file: Path) -> str:
    sha256: str = hash_files(file.parent, [file.name])[file.name]["sha256"]
    return sha256


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_setup(out: Path) -> dict[str, Any] | None:
    """`sweep.json` of a folder; None if there is none.

    Raises
    ------
    UsageError : the folder holds something else.
    CheckpointError : the file is damaged.
    """
    path = out / SETUP_FILE
    if not path.exists():
        names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
        if not all(name == "lock" or is_remnant(name, SETUP_FILE) for name in names):  # one that was killed at once
            raise UsageError(f"OUT {str(out)!r} is not empty and holds no sweep. Choose another folder.")
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        if document["format"] != FORMAT or not {"inputs", "evaluation", "device", "stats"} <= document.keys():
            raise ValueError(f"format {document['format']!r}")
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{str(path)!r} was not written by mendlm sweep, or is damaged: {err!r}.") from err
    return document


@contextlib.contextmanager
def _opened(out: Path) -> Iterator[None]:
    """Make the folder of a sweep and lock it; the lock goes away with the process, however it ends."""
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (out / "lock").unlink()
        os.close(lock)


def _append(path: Path, line: bytes) -> None:
    """Append a line to a file and wait until it is on the disk; what an earlier crash cut off goes away."""
    with storage_errors(path), path.open("ab+") as file:
        file.seek(0)
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
