"""`report`: what compression did to one or several models, as one HTML file."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mendlm import plotting
from mendlm.checkpoints.writer import storage_errors, write_file
from mendlm.errors import StorageError, UsageError
from mendlm.evaluation.printed import Evaluation, evaluation_of, read_evaluations
from mendlm.paths import check_parent, local_path
from mendlm.report._figures import Figure, Point
from mendlm.report._page import Content, render
from mendlm.report._runs import Run, read_runs, same_model
from mendlm.report._tensors import Details, Original, TensorDetail, choose
from mendlm.sweeping import SweepRecord, read_sweep
from mendlm.sweeping.records import DENSE, SWEEP_FILE

DEFAULT_FILE = "report.html"
Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what was done)."""


@dataclass(frozen=True)
class ReportResult:
    """What `report` wrote.

    Attributes
    ----------
    path : of the page.
    n_bytes : its size.
    runs : labels of the runs on it.
    tensors : label of the run -> names of the weights shown in detail.
    figures : files of the figures; empty without `figures`.
    seconds : wall time.
    """

    path: Path
    n_bytes: int
    runs: tuple[str, ...]
    tensors: dict[str, tuple[str, ...]]
    figures: tuple[Path, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "path": str(self.path),
            "n_bytes": self.n_bytes,
            "runs": list(self.runs),
            "tensors": {label: list(names) for label, names in self.tensors.items()},
            "figures": [str(file) for file in self.figures],
            "seconds": self.seconds,
        }


def report(
    outs: str | Path | Sequence[str | Path],
    dest: str | Path = DEFAULT_FILE,
    *,
    original: str | Path | None = None,
    evaluations: Sequence[str | Path] = (),
    text: str | Path | None = None,
    n_windows: int | None = None,
    tensors: Sequence[str] = (),
    figures: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ReportResult:
    """Write a page about compressed models: one HTML file that needs no network.

    Parameters
    ----------
    outs : folders that `compress` wrote, and folders or files of `sweep`; one alone or several side by side.
    dest : the file to write.
    original : the dense model they came from. With it the page shows the singular values of W - S before and after, and
        how the refinement converged, which is computed again.
    evaluations : files that ``mendlm eval --json`` printed; each perplexity goes to the model it names.
    text : measure perplexities on this text now, of every run and of the original.
    n_windows : only on the first so many windows of `text`.
    tensors : weights to show in detail; the projections of the middle block by default.
    figures : a folder for the same charts as .png and .svg files.
    overwrite : replace `dest`, and figures of the same names.
    progress : called after each step.

    Raises
    ------
    UsageError : a folder that is none of ours, a name that is unknown, `dest` exists, another original.
    CheckpointError, NonFiniteError : what is stored is damaged.
    MissingDependencyError : Altair or vl-convert is not installed (``pip install 'mendlm[plot]'``).
    StorageError : a file cannot be written. Nothing that looks whole is left of it.

    Notes
    -----
    Time goes into the weights shown in detail: two SVDs (values only) each, and with `original` one more refinement.
    Memory is that of refining one weight.
    """
    started = time.monotonic()
    dest = local_path(dest)
    _check_output(dest, overwrite)
    if n_windows is not None and text is None:
        raise UsageError("n_windows says how much of a text is measured, and no text was given. Give one.")
    plotting.check_plot(Path("chart.svg"))
    paths = [local_path(out) for out in ([outs] if isinstance(outs, str | Path) else outs)]
    if not paths:
        raise UsageError("there is nothing to report on. Give a folder that mendlm compress wrote.")
    sweeps = tuple(record for path in paths if _is_sweep(path) for record in read_sweep(path))
    runs = read_runs([path for path in paths if not _is_sweep(path)])
    dense = None if original is None else Original(local_path(original))
    known = read_evaluations(evaluations)
    chosen = {run.label: _choose(run, runs, tensors) for run in runs}
    measured = _to_measure(runs, dense) if text is not None else []
    steps = _Steps(sum(map(len, chosen.values())) + len(measured) + 1, progress)
    details = {run.label: _details(run, dense, chosen[run.label], steps) for run in runs}
    for folder in measured:
        known = (*known, _measure(folder, text, n_windows))
        steps.done(f"perplexity of {folder.name}")
    html, drawn = render(_content(runs, details, sweeps, known, dense))
    data = html.encode()
    files = () if figures is None else _save_figures(drawn, runs, details, local_path(figures), overwrite)
    _write(dest, data)
    steps.done(f"{dest.name}")
    return ReportResult(
        path=dest,
        n_bytes=len(data),
        runs=tuple(run.label for run in runs),
        tensors=chosen,
        figures=files,
        seconds=time.monotonic() - started,
    )


class _Steps:
    """Counts what is done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def done(self, what: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, what)


def _is_sweep(path: Path) -> bool:
    return path.suffix == ".jsonl" or (path / SWEEP_FILE).is_file()


def _check_output(dest: Path, overwrite: bool) -> None:
    if dest.is_dir():
        raise UsageError(f"{str(dest)!r} is a folder. Give the name of a file, such as {DEFAULT_FILE}.")
    if dest.exists() and not overwrite:
        raise UsageError(f"{str(dest)!r} exists. Pass --overwrite, or choose another name with --output.")
    check_parent(dest, repr(str(dest)))


def _choose(run: Run, runs: Sequence[Run], names: Sequence[str]) -> tuple[str, ...]:
    """As `choose`; where there are several runs, a name has to be of one of them."""
    if len(runs) > 1 and names:
        here = {record.name for record in run.manifest.records}
        elsewhere = {record.name for other in runs for record in other.manifest.records} - here
        names = [name for name in names if not {name, f"{name}.weight"} & elsewhere]
        if not names:
            return ()
    return choose(run, names)


def _to_measure(runs: Sequence[Run], original: Original | None) -> list[Path]:
    return [run.folder for run in runs] + ([] if original is None else [original.folder])


def _measure(folder: Path, text: str | Path | None, n_windows: int | None) -> Evaluation:
    from mendlm.evaluation.perplexity import evaluate

    return evaluation_of(evaluate(folder, text=text, n_windows=n_windows).to_dict())


def _details(run: Run, original: Original | None, names: Sequence[str], steps: _Steps) -> list[TensorDetail]:
    records = {record.name: record for record in run.manifest.records}
    maker, found = Details(run, original), []
    for name in names:
        found.append(maker.of(records[name]))
        steps.done(f"{name} of {run.label}")
    return found


def _content(
    runs: Sequence[Run],
    details: dict[str, list[TensorDetail]],
    sweeps: tuple[SweepRecord, ...],
    evaluations: Sequence[Evaluation],
    original: Original | None,
) -> Content:
    """Give every perplexity to its model, and to none where several runs have the name that it says."""
    owners = {e: [run.label for run in runs if same_model(e, run.folder)] for e in evaluations}
    mine = {run.label: tuple(e for e in evaluations if owners[e] == [run.label]) for run in runs}
    others = tuple(e for e in evaluations if len(owners[e]) != 1)
    dense: list[Point] = []
    if original is not None and runs:
        name, n_bytes = original.folder.absolute().name, runs[0].manifest.totals.dense_bytes
        found = [e for e in others if same_model(e, original.folder)]
        dense += [Point(name, DENSE, n_bytes, e.ppl, None, e.protocol) for e in found]
    return Content(
        tuple(replace(run, evaluations=mine[run.label]) for run in runs), details, sweeps, others, tuple(dense)
    )


def _save_figures(
    drawn: dict[str, Figure],
    runs: Sequence[Run],
    details: dict[str, list[TensorDetail]],
    folder: Path,
    overwrite: bool,
) -> tuple[Path, ...]:
    """Draw the figures into a folder, under the names of their runs and weights."""
    stems = {key: _stem(key, runs, details) for key in drawn}
    files = {folder / f"{stem}{kind}": drawn[key] for key, stem in stems.items() for kind in (".svg", ".png")}
    existing = next((file for file in files if file.exists()), None)
    if existing is not None and not overwrite:
        raise UsageError(f"{str(existing)!r} exists. Pass --overwrite, or choose another folder for figures.")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file, figure in files.items():
        plotting.save(figure.spec, file)
    return tuple(files)


def _stem(key: str, runs: Sequence[Run], details: dict[str, list[TensorDetail]]) -> str:
    """A file name for the figure `key` of the page: "run0-tensor3-spectrum" as "out-model.layers.15.…-spectrum"."""
    found = re.fullmatch(r"run(\d+)-(?:tensor(\d+)-)?(.+)", key)
    if found is None:
        return key
    run = runs[int(found[1])]
    parts = [run.label] if len(runs) > 1 else []
    if found[2] is not None:
        parts.append(details[run.label][int(found[2])].record.name.removesuffix(".weight"))
    return re.sub(r"[^\w.-]+", "_", "-".join([*parts, found[3].removesuffix("-chart")])).lstrip(".")


def _write(dest: Path, data: bytes) -> None:
    """Beside the file first, then in its place: what is there is whole."""
    partial = dest.with_name(f".{dest.name}.partial")
    try:
        with storage_errors(dest):
            write_file(partial, data)
            partial.replace(dest)
    except StorageError:
        partial.unlink(missing_ok=True)
        raise
