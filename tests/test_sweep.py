"""Sweeps: which points a grid has, how processes end, what is kept, and that nothing runs twice."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

import mendlm
from mendlm import Recipe
from mendlm.checkpoints.staging import lock_folder
from mendlm.cli import main
from mendlm.errors import CheckpointError, MendError, StorageError, UsageError
from mendlm.evaluation.perplexity import evaluate
from mendlm.pipeline import plan
from mendlm.report.records import read_manifest
from mendlm.sweeping import PointDone, SweepRecord, _sweep, frontier, plan_sweep, read_sweep, runner, sweep
from mendlm.sweeping.grid import Grid, read_grid
from mendlm.sweeping.records import line_of
from mendlm.sweeping.runner import EvaluationSettings, Job, run_jobs
from mendlm.sweeping.tables import markdown, rows_of

TEXT = "The rain in Spain stays mainly in the plain. " * 12
CALIBRATION = {"source": "random-tokens", "n_sequences": 2, "seqlen": 32}
ON = {"n_windows": 2, "seqlen": 64}


def grid(fields: dict[str, Any], **section: Any) -> Grid:
    return read_grid(fields | {"sweep": section}, lambda recipe: None)


def names(found: Grid) -> list[str]:
    return [point.name for point in found.points]


# --- the grid ---


def test_axes_multiply_the_first_slowest() -> None:
    found = grid({"n_iter": 3}, axes={"pattern": ["2:4", {"sparsity": 0.6}], "rank": [4, "10%"]})
    assert names(found) == [
        "pattern=2:4 rank=4",
        "pattern=2:4 rank=10%",
        "pattern=sparsity:0.6 rank=4",
        "pattern=sparsity:0.6 rank=10%",
    ]
    assert found.points[1].recipe == Recipe(pattern="2:4", rank="10%", n_iter=3)
    assert found.points[2].recipe == Recipe(pattern={"sparsity": 0.6}, rank=4, n_iter=3)
    assert found.points[2].values == {"pattern": {"sparsity": 0.6}, "rank": 4}
    assert not found.skipped


def test_inner_fields_and_short_names_are_axes() -> None:
    found = grid(
        {"calibration": "random-tokens", "pattern": {"sparsity": 0.5, "scope": "row"}, "refiner": "zero-shot-svd"},
        axes={"sparsity": [0.25, 0.75], "calibration.n_sequences": [8], "refiner_options.refit": [False]},
    )
    recipe = Recipe(
        calibration={"source": "random-tokens", "n_sequences": 8},
        pattern={"sparsity": 0.75, "scope": "row"},
        refiner="zero-shot-svd",
        refiner_options={"refit": False},
    )
    assert found.points[1].recipe == recipe


def test_a_preset_lies_under_the_fields_of_the_file_and_the_point() -> None:
    found = grid({"calibration": CALIBRATION}, axes={"preset": ["fast", "best"], "rank": [4]})
    best = yaml.safe_load((Path(mendlm.__file__).parent / "recipes" / "best.yaml").read_text())
    recipe = found.points[1].recipe
    assert (recipe.refiner, recipe.rank) == (best["refiner"], 4)
    assert recipe.calibration is not None
    assert recipe.calibration.seqlen == 32
    assert recipe.match_blocks is not None
    assert found.points[0].recipe.match_blocks is None


def test_labels_stand_for_several_fields() -> None:
    methods = {"plain": {"refiner": "tlr"}, "PCP": {"refiner": "pcp", "metric": "plain"}}
    found = grid({}, axes={"method": methods, "rank": [4]})
    assert names(found) == ["method=plain rank=4", "method=PCP rank=4"]
    assert found.points[1].recipe == Recipe(refiner="pcp", metric="plain", rank=4)


def test_what_only_prunes_has_no_rank_and_comes_once() -> None:
    found = grid({"rank": 8}, axes={"refiner": ["none", "tlr"], "rank": [4, 8], "metric": ["plain"]})
    tlr = ["refiner=tlr rank=4 metric=plain", "refiner=tlr rank=8 metric=plain"]
    assert names(found) == ["refiner=none metric=plain", *tlr]


def test_what_only_prunes_has_a_metric() -> None:
    found = grid({"calibration": CALIBRATION, "damping": 0.1}, axes={"refiner": ["none"], "metric": ["plain", "gram"]})
    assert [point.recipe.metric for point in found.points] == ["plain", "gram"]  # with gram S is fitted
    assert {point.recipe.damping for point in found.points} == {0.1}


def test_points_and_exclusions() -> None:
    found = grid(
        {},
        axes={"pattern": ["2:4", "4:8"], "rank": [4, 8, 16]},
        exclude=[{"pattern": "4:8", "rank": [8, 16]}],
        points=[{"name": "mine", "rank": 32}, {"rank": 2, "pattern": "2:4"}, {"name": "mine", "rank": 33}],
    )
    assert names(found) == [
        *(f"pattern=2:4 rank={rank}" for rank in (4, 8, 16)),
        "pattern=4:8 rank=4",
        "mine",
        "rank=2 pattern=2:4",
        "mine (2)",
    ]


def test_impossible_combinations_are_named_and_skipped_or_refused() -> None:
    axes = {"refiner": ["tlr", "pcp"], "metric": ["plain", "gram"]}
    found = grid({"calibration": CALIBRATION, "rank": 4}, axes=axes)
    assert len(found.points) == 3
    assert [skip.name for skip in found.skipped] == ["refiner=pcp metric=gram"]
    assert "refiner 'pcp' has no metric 'gram'" in found.skipped[0].reason
    with pytest.raises(UsageError, match=r"'pcp' has no metric 'gram'.*Point: refiner=pcp metric=gram\."):
        grid({"calibration": CALIBRATION}, axes=axes, impossible="refuse")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("rank: 4\n", r"there is no section 'sweep'.*\[g\.yaml\]"),
        ("sweep:\n  points: []\n", r"neither axes nor points\. \[g\.yaml, line 1, field sweep\]"),
        ("sweep:\n  axis: {}\n", r"unknown recipe field 'axis' in sweep\. Did you mean 'axes'.*line 2"),
        ("sweep:\n  axes:\n    rnak: [4]\n", r"'rnak' is no field of a recipe\. Did you mean 'rank'.*line 3"),
        ("sweep:\n  axes:\n    rank: [4, 4]\n", r"value 4 of axis 'rank' is given twice.*line 3"),
        ("sweep:\n  axes:\n    rank:\n    - 4\n    - -4\n", r"got -4\. It is so in every combination.*line 5"),
        ("sweep:\n  axes:\n    metric:\n    - plain\n    - gram\n", r"'gram' weighs the inputs.*line 5, field .*\[1\]"),
        ("rank: x\nsweep:\n  axes:\n    seed: [1]\n", r"rank must be .* got 'x'.*line 1, field rank"),
        ("sweep:\n  points:\n  - {rank: 4}\n  - {metric: gram}\n", r"Point: metric=gram\. \[g\.yaml, line 4"),
        ("sweep:\n  axes: {rank: [4]}\n  exclude: [{rank: 5}]\n", r"axis 'rank' has no value 5.*line 3"),
        ("sweep:\n  axes: {rank: [4]}\n  exclude: [{seed: 5}]\n", r"'seed' is no axis of the sweep.*line 3"),
        ("sweep:\n  n_windows: 0\n", r"sweep\.n_windows: .*got 0\. \[g\.yaml, line 2"),
        ("sweep:\n  axes: {preset: [fst]}\n", r"no recipe 'fst'.*Did you mean 'fast'"),
    ],
)
def test_errors_say_where(document: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(document)
    with pytest.raises(UsageError, match=message):
        read_grid(tmp_path / "g.yaml", lambda recipe: None)


# --- records ---


def record(name: str, stored_bytes: int | None, ppl: float | None, **fields: Any) -> SweepRecord:
    return SweepRecord(
        name=name,
        key=name,
        values={},
        status="failed" if ppl is None else "done",
        error="it broke." if ppl is None else None,
        recipe=None,
        recipe_sha256=None,
        inputs_sha256="",
        evaluation={"text": "t", "n_windows": 1, "seqlen": 2, "dtype": "float32"},
        ppl=ppl,
        nll=None if ppl is None else math.log(ppl),
        dense_bytes=None if stored_bytes is None else 100,
        stored_bytes=stored_bytes,
        versions={"mendlm": "0", "torch": "0"},
        **fields,
    )


def test_the_frontier_is_what_none_beats() -> None:
    points = [("a", 10, 9.0), ("b", 20, 5.0), ("c", 20, 6.0), ("d", 30, 5.0), ("e", 40, 2.0), ("twin", 20, 5.0)]
    records = [record(*point) for point in points] + [record("f", None, None), record("g", 1, math.inf)]

    def beaten(one: tuple[str, int, float]) -> bool:
        return any(b <= one[1] and p <= one[2] and (b, p) != one[1:] for _, b, p in points)

    assert {r.name for r in frontier(records)} == {point[0] for point in points if not beaten(point)}
    assert [r.stored_bytes for r in frontier(records)] == [10, 20, 20, 40]
    assert frontier([]) == ()


def test_records_survive_their_file_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    first, infinite = record("a", 10, 9.0), dataclasses.replace(record("b", 20, 5.0), ppl=math.inf, nll=800.0)
    again = dataclasses.replace(first, ppl=8.0)
    file = tmp_path / "sweep.jsonl"
    file.write_bytes(line_of(first) + line_of(infinite) + line_of(again) + b'{"format": "mend')
    assert read_sweep(tmp_path) == (again, infinite)
    assert json.loads(file.read_bytes().splitlines()[1])["ppl"] is None
    assert json.loads(file.read_bytes().splitlines()[0])["ratio"] == 0.1
    _sweep._append(file, line_of(record("c", 30, 2.0)))
    assert [r.name for r in read_sweep(file)] == ["a", "b", "c"]
    file.write_bytes(b'{"format": "other"}\n')
    with pytest.raises(CheckpointError, match=r"line 1 of .* is no record of a sweep"):
        read_sweep(file)
    with pytest.raises(UsageError, match="give a folder that mendlm sweep wrote"):
        read_sweep(tmp_path / "nothing")


def test_the_table_has_the_smallest_first_and_marks_the_frontier() -> None:
    records = (record("dense", 100, 4.0), record("a|b", 50, 8.0), record("worse", 50, 9.0), record("f", None, None))
    rows = rows_of(records)
    assert [row[:4] for row in rows] == [
        ["*", "a|b", "8.00", "2.00"],
        ["", "worse", "9.00", "2.25"],
        ["*", "dense", "4.00", "1.00"],
    ]
    assert [row[5] for row in rows] == ["50.0 %", "50.0 %", "100.0 %"]
    page = markdown(_sweep.SweepResult(Path("out"), records, (), ("later",)), "tiny")
    assert "| * | a\\|b | 8.00 |" in page
    assert "- f: it broke." in page
    assert "## Left\n\n- later" in page


# --- processes ---


class Log:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, Any]] = []

    def started(self, job: Job) -> None:
        self.events.append(("started", job.name, None))

    def noted(self, job: Job, what: str) -> None:
        self.events.append(("noted", job.name, what))
        if what == "interrupt me":
            raise KeyboardInterrupt

    def measured(self, job: Job, figures: dict[str, Any]) -> None:
        self.events.append(("measured", job.name, figures))

    def failed(self, job: Job, error: str) -> None:
        self.events.append(("failed", job.name, error))


# Stands for a worker: does what the name of its job says.
_STAND_IN = """
import json, os, sys
job = json.loads(sys.stdin.readline())
def say(message):
    sys.stdout.write(json.dumps(message) + chr(10)); sys.stdout.flush()
if job["name"] == "good":
    print("no JSON"); say({"note": "half"}); say({"figures": {"threads": os.environ.get("OMP_NUM_THREADS")}})
elif job["name"] == "killed":
    say({"note": "half"}); os.kill(os.getpid(), 9)
elif job["name"] == "broken":
    sys.exit("no such thing")
elif job["name"] == "refused":
    say({"error": {"type": "UsageError", "message": "rank is too large."}})
else:
    say({"note": "interrupt me"}); sys.stdin.read(); open(job["out"], "w").write("stopped")
"""


def jobs(*names: str, out: Path | None = None) -> Iterable[Job]:
    return (Job(name, "model", EvaluationSettings(), None, None if out is None else str(out)) for name in names)


def test_a_process_that_dies_costs_its_point_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_PROGRAM", _STAND_IN)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    log = Log()
    run_jobs(jobs("killed", "broken", "refused", "good"), log)
    assert [event for event in log.events if event[0] in ("failed", "measured")] == [
        ("failed", "killed", "its process was ended by SIGKILL. Probably out of memory."),
        ("failed", "broken", "its process failed with exit code 1: no such thing"),
        ("failed", "refused", "rank is too large."),
        ("measured", "good", {"threads": None}),
    ]
    assert ("noted", "good", "half") in log.events


def test_workers_share_the_cpus_and_no_time_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_PROGRAM", _STAND_IN)
    monkeypatch.setattr(runner, "_n_cpus", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    log = Log()
    run_jobs(jobs("good", "good"), log, workers=2)
    assert [kind for kind, *_ in log.events[:2]] == ["started", "started"]
    assert [what for kind, _, what in log.events if kind == "measured"] == [{"threads": "3"}] * 2
    log = Log()
    run_jobs(jobs("good"), log, minutes=0)
    assert not log.events


def test_an_interrupt_lets_the_work_stop_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner, "_PROGRAM", _STAND_IN)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs("long", out=tmp_path / "said"), Log())
    assert (tmp_path / "said").read_text() == "stopped"


# --- whole sweeps ---


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run jobs in this process, which spares the start of others; the names of those that ran."""
    from mendlm.sweeping._worker import measure

    ran: list[str] = []

    def run(jobs: Iterable[Job], watcher: runner.Watcher, *, workers: int = 1, minutes: float | None = None) -> None:
        for job in jobs if minutes != 0 else ():
            ran.append(job.name)
            watcher.started(job)
            try:
                figures = measure(dataclasses.asdict(job) | dataclasses.asdict(job.evaluation), lambda message: None)
            except MendError as err:
                watcher.failed(job, str(err))
            else:
                watcher.measured(job, figures)

    monkeypatch.setattr(_sweep, "run_jobs", run)
    return ran


def test_a_sweep_gives_what_compress_and_eval_give(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("n_iter: 3\nsweep:\n  n_windows: 2\n  seqlen: 64\n  axes: {pattern: [2:4], rank: [4]}\n")
    out = tmp_path / "out"
    assert main(["sweep", str(file), str(tiny_llama), str(out), "--text", str(text), "--keep", "all", "--json"]) == 0
    dense, point = read_sweep(out)
    assert (dense.name, dense.recipe, dense.folder, dense.ratio) == ("dense", None, None, 1.0)
    assert dense.ppl == pytest.approx(evaluate(tiny_llama, text=text, **ON).ppl, rel=1e-5)
    recipe = Recipe(pattern="2:4", rank=4, n_iter=3)
    result = mendlm.compress(tiny_llama, tmp_path / "same", recipe)
    assert (point.name, point.status, point.recipe) == ("pattern=2:4 rank=4", "done", recipe.to_dict())
    assert (point.stored_bytes, point.dense_bytes) == (result.totals.stored_bytes, result.totals.dense_bytes)
    assert point.ppl == pytest.approx(evaluate(tmp_path / "same", text=text, **ON).ppl, rel=1e-5)
    assert point.mean_rel_error == pytest.approx(sum(r.rel_error for r in result.records) / len(result.records))
    assert point.nll == pytest.approx(math.log(point.ppl))
    assert point.evaluation["n_tokens"] == 2 * 63
    assert point.peak_memory_bytes is not None
    assert point.peak_memory_bytes > point.dense_bytes
    assert point.folder is not None
    assert read_manifest(out / point.folder).recipe == point.recipe
    assert not (out / "lock").exists()


def test_a_folder_in_which_nothing_was_measured_takes_another_text_length(
    tiny_llama: Path, text: Path, tmp_path: Path, in_process: list[str]
) -> None:
    grid_of = {"n_iter": 2, "sweep": {"axes": {"rank": [2]}}}
    with pytest.raises(MendError, match=r"seqlen 99999 is longer than"):
        sweep(grid_of, tiny_llama, tmp_path / "out", text=text, **ON | {"seqlen": 99999})
    result = sweep(grid_of, tiny_llama, tmp_path / "out", text=text, **ON)
    assert [record.status for record in result.records] == ["done", "done"]
    with pytest.raises(UsageError, match=r"holds another sweep: .*seqlen was 64, now 32"):
        sweep(grid_of, tiny_llama, tmp_path / "out", text=text, **ON | {"seqlen": 32})


def test_points_that_are_done_do_not_run_again(
    tiny_llama: Path, text: Path, tmp_path: Path, in_process: list[str]
) -> None:
    out, how = tmp_path / "out", {"text": text, **ON}
    first = {"n_iter": 2, "sweep": {"axes": {"rank": [2]}}}
    more = {"n_iter": 2, "sweep": {"axes": {"rank": [2, 4]}}}
    events: list[Any] = []
    sweep(first, tiny_llama, out, on_event=events.append, **how)
    assert in_process == ["dense", "rank=2"]
    assert [(e.record.name, e.n_done, e.n_points) for e in events if isinstance(e, PointDone)] == [
        ("dense", 1, 2),
        ("rank=2", 2, 2),
    ]
    assert not (out / "points").exists()
    planned = plan_sweep(more, tiny_llama, out, **how)
    assert [point.name for point in planned.missing] == ["rank=4"]
    none = sweep(more, tiny_llama, out, minutes=0, **how)
    assert none.left == ("rank=4",)
    result = sweep(more, tiny_llama, out, **how)
    assert in_process == ["dense", "rank=2", "rank=4"]
    assert [r.name for r in result.records] == ["dense", "rank=2", "rank=4"]
    assert (out / "sweep.md").read_text().count("| rank=") == 2
    with pytest.raises(UsageError, match=r"holds another sweep: .*seqlen was 64, now 32"):
        sweep(more, tiny_llama, out, **how | {"seqlen": 32})


def test_another_calibration_text_is_another_point(
    tiny_llama: Path, text: Path, tmp_path: Path, in_process: list[str]
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("How now brown cow. " * 20)
    fields = {"calibration": CALIBRATION | {"source": str(words)}, "sweep": {"axes": {"refiner": ["none"]}}}
    how = {"model": tiny_llama, "out": tmp_path / "out", "text": text, **ON}
    first = plan_sweep(fields, **how)
    words.write_text("How now brown fox. " * 20)
    second = plan_sweep(fields, **how)
    assert first.points[0].key == second.points[0].key
    assert first.points[1].key != second.points[1].key
    words.rename(tmp_path / "moved.txt")
    fields["calibration"]["source"] = str(tmp_path / "moved.txt")  # type: ignore[index]
    assert plan_sweep(fields, **how).points[1].key == second.points[1].key


@pytest.mark.parametrize("what", ["text", "calibration", "model"])
def test_figures_of_a_file_that_changed_meanwhile_are_not_kept(
    what: str, tiny_llama: Path, tmp_path: Path, in_process: list[str]
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    files = {"text": tmp_path / "text.txt", "calibration": tmp_path / "words.txt", "model": model / "config.json"}
    for name in ("text", "calibration"):
        files[name].write_text(TEXT)
    before = files[what].read_text()
    fields = {"n_iter": 2, "calibration": CALIBRATION | {"source": str(files["calibration"])}}
    fields |= {"sweep": {"axes": {"rank": [2, 4]}}}

    def edit(event: Any) -> None:
        if isinstance(event, PointDone) and event.record.name == "rank=2":
            files[what].write_text(f"{before} ")

    result = sweep(fields, model, tmp_path / "out", text=files["text"], on_event=edit, **ON)
    assert [record.status for record in result.records] == ["done", "done", "failed"]
    assert f"the {what} changed while the sweep ran" in str(result.failed[0].error)
    files[what].write_text(before)
    again = sweep(fields, model, tmp_path / "out", text=files["text"], **ON)
    assert [record.status for record in again.records] == ["done"] * 3


def test_a_full_disk_leaves_the_sweep_to_be_gone_on_with(
    tiny_llama: Path, text: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, out = {"n_iter": 2, "sweep": {"axes": {"rank": [2]}}}, tmp_path / "out"
    sweep(fields, tiny_llama, out, text=text, **ON)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="no space left"):
            sweep(fields, tiny_llama, out, text=text, **ON)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sweep(fields, tiny_llama, out, text=text, **ON).left == ()
    assert in_process == ["dense", "rank=2"]


def test_a_sweep_that_was_killed_at_once_begins_anew(
    tiny_llama: Path, text: Path, tmp_path: Path, in_process: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".sweep.json.4711").write_text("{")  # as a write that was cut off leaves it
    fields = {"n_iter": 2, "sweep": {"axes": {"rank": [2]}}}
    assert sweep(fields, tiny_llama, tmp_path / "out", text=text, **ON).left == ()


def test_a_point_that_fails_is_recorded_and_tried_again(
    tiny_llama: Path,
    text: Path,
    tmp_path: Path,
    in_process: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "grid.yaml"
    section = {"axes": {"rank": [2, 4]}, "text": str(text), **ON}
    file.write_text(yaml.safe_dump({"n_iter": 2, "sweep": section}))
    from mendlm.sweeping import _worker

    compress = _worker.compress

    def failing(model: Any, out: Any, recipe: Recipe, **how: Any) -> Any:
        if recipe.rank == 2:
            raise MendError("the disk is full.")
        return compress(model, out, recipe, **how)

    monkeypatch.setattr(_worker, "compress", failing)
    command = ["sweep", str(file), str(tiny_llama), str(tmp_path / "out")]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "failed: rank=2: the disk is full." in said.err
    assert "1 of 3 points failed" in said.err
    assert "rank=4" in said.out
    failed = read_sweep(tmp_path / "out")[1]
    assert (failed.status, failed.error, failed.ppl) == ("failed", "the disk is full.", None)
    monkeypatch.setattr(_worker, "compress", compress)
    assert main([*command, "--json"]) == 0
    assert in_process == ["dense", "rank=2", "rank=4", "rank=2"]
    document = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in document["records"]] == ["done"] * 3
    assert document["failed"] == []


def test_only_what_none_beats_is_kept(tiny_llama: Path, text: Path, tmp_path: Path, in_process: list[str]) -> None:
    fields = {"n_iter": 2, "sweep": {"axes": {"rank": [2, 4, 6]}}}
    result = sweep(fields, tiny_llama, tmp_path / "out", text=text, keep="pareto", **ON)
    kept = {path.name for path in (tmp_path / "out" / "points").iterdir()}
    assert kept == {Path(r.folder).name for r in result.frontier if r.folder is not None}


def test_a_model_that_cannot_be_evaluated_ends_the_sweep(
    tiny_llama: Path, text: Path, tmp_path: Path, in_process: list[str]
) -> None:
    fields = {"sweep": {"axes": {"rank": [2]}}}
    with pytest.raises(MendError, match=r"the model itself could not be evaluated.*n_windows must be in"):
        sweep(fields, tiny_llama, tmp_path / "out", text=text, n_windows=999, seqlen=64)
    assert in_process == ["dense"]


def test_wrong_use_is_refused_before_anything_runs(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out, fields = tmp_path / "out", {"sweep": {"axes": {"rank": [2, 1000]}}}
    with pytest.raises(UsageError, match=r"rank must be in .*1000"):
        sweep(fields, tiny_llama, out, text=text)
    fields = {"sweep": {"axes": {"rank": [2]}}}
    with pytest.raises(UsageError, match="neither was given"):
        sweep(fields, tiny_llama, out)
    with pytest.raises(UsageError, match="unknown keep 'best'"):
        sweep(fields, tiny_llama, out, text=text, keep="best")
    with pytest.raises(UsageError, match="no such file"):
        sweep(fields, tiny_llama, out, text=tmp_path / "nothing.txt")
    assert not out.exists()
    out.mkdir()
    lock = lock_folder(out)
    with pytest.raises(StorageError, match="another run is writing to the same OUT"):
        sweep(fields, tiny_llama, out, text=text)
    os.close(lock)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="is not empty and holds no sweep"):
        sweep(fields, tiny_llama, tmp_path / "full", text=text)


def test_a_dry_run_lists_the_points_and_writes_nothing(
    tiny_llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "grid.yaml"
    axes = {"refiner": ["tlr", "pcp"], "rank": [2], "metric": ["plain", "gram"]}
    file.write_text(yaml.safe_dump({"calibration": CALIBRATION, "sweep": {"axes": axes}}, sort_keys=False))
    command = ["sweep", str(file), str(tiny_llama), str(tmp_path / "out"), "--text", str(text), "--dry-run"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "refiner=tlr rank=2 metric=gram" in said
    assert "skipped  refiner=pcp rank=2 metric=gram: refiner 'pcp' has no metric 'gram'" in said
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [point["done"] for point in document["points"]] == [False] * 4
    assert document["points"][1]["totals"]["ratio"] == plan(tiny_llama, Recipe(rank=2)).totals.ratio
    assert not (tmp_path / "out").exists()
