"""`mendlm eval --tasks`: its options, its progress and its table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mendlm.cli._console import Column, format_seconds, json_only, print_facts, print_json, print_table
from mendlm.cli._progress import ProgressView, counted, progress_view
from mendlm.errors import UsageError

if TYPE_CHECKING:
    from mendlm.evaluation.tasks import ModelScores, Score, TaskReport

EXAMPLES = """[dim]Benchmark tasks by the lm-evaluation-harness, the original beside the compressed folder:[/dim]

[green]mendlm eval SmolLM2-135M out --tasks arc_challenge,gsm8k,truthfulqa_mc1,truthfulqa_mc2,mmlu[/green]

[dim]A quick look without a network, from task files on disk; when interrupted it goes on from the cache:[/dim]

[green]mendlm eval out --tasks arc_challenge_local --task-path lm_eval_tasks --limit 100 --cache answers[/green]"""

TasksOption = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="A,B,…",
        help="Tasks, groups or patterns of the lm-evaluation-harness.",
        show_default=False,
    ),
]
TaskPathOption = Annotated[
    Path | None,
    typer.Option(
        "--task-path",
        metavar="DIR",
        help="More task files; Python code that they name runs.",
        show_default=False,
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N documents a task. Default: all.")
]
NumFewshotOption = Annotated[
    int | None,
    typer.Option("--num-fewshot", min=0, metavar="K", help="Examples in the prompt. Default: each task's own number."),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, metavar="N", help="Requests at a time, for --tasks. Default: 8."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Keep the answers to --tasks here; an interrupted run goes on from them.",
        show_default=False,
    ),
]


def wanted(ctx: typer.Context, for_text: Mapping[str, object]) -> bool:
    """Whether the command is to evaluate tasks and not texts.

    Parameters
    ----------
    ctx : of the command.
    for_text : options that go with a text alone, by flag; None or an empty list is "not given".

    Raises
    ------
    UsageError : options of both kinds.
    """
    if ctx.params["tasks"] is not None:
        if given := [flag for flag, value in for_text.items() if value not in (None, [])]:
            raise UsageError(f"{given[0]} measures a text and does not go with --tasks. Run them one after the other.")
        return True
    if given := [name for name in _FOR_TASKS if ctx.params[name] is not None]:
        raise UsageError(f"--{given[0].replace('_', '-')} goes with --tasks, which was not given.")
    return False


_FOR_TASKS = ("task_path", "limit", "num_fewshot", "batch_size", "cache")


def run_tasks(ctx: typer.Context, models: Sequence[str], *, as_json: bool) -> None:
    """Evaluate and print, as `mendlm.evaluation.tasks.evaluate` and the options in `ctx` say."""
    chosen = ctx.params
    ctx.find_root().obj.interrupt_hint = (
        "With --cache DIR the next run goes on where this one stopped."
        if chosen["cache"] is None
        else "Run the same command again to go on from the requests answered so far."
    )
    with json_only(as_json) as stream:
        from mendlm.devices import resolve_device
        from mendlm.evaluation.tasks import DEFAULT_BATCH_SIZE, evaluate

        where = None if chosen["device"] is None else resolve_device(chosen["device"])
        with progress_view(stream, "eval") as view:
            view.noted("reading the tasks")
            report = evaluate(
                models,
                chosen["tasks"].split(","),
                **{name: chosen[name] for name in ("task_path", "limit", "num_fewshot", "dtype", "runtime", "cache")},
                batch_size=chosen["batch_size"] or DEFAULT_BATCH_SIZE,
                device=where,
                progress=_shown_on(view, models),
            )
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)


def _shown_on(view: ProgressView, models: Sequence[str]) -> Callable[[str, int, int], None]:
    """A callback that tells `view` of requests over all models; a line each whole per cent."""
    names = dict(zip(models, _short_names(models), strict=True))
    begun: list[str] = []
    shown = -1

    def on_request(model: str, done: int, total: int) -> None:
        nonlocal shown
        if model not in begun:
            begun.append(model)
        done, total = done + (len(begun) - 1) * total, total * len(models)
        if done * 100 // total != shown:
            if shown < 0 or not done % total:
                view.started(names[model], done, total)
            shown = done * 100 // total
            view.advanced(done, total, f"{counted(done, total)} {names[model]}")

    return on_request


def _short_names(models: Sequence[str]) -> list[str]:
    """Names of the folders alone where they differ."""
    names = [Path(model).resolve().name for model in models]
    counts = Counter(names)
    return [name if counts[name] == 1 else model for name, model in zip(names, models, strict=True)]


def _show(report: TaskReport) -> None:
    limit = report.settings["limit"]
    columns = [Column("task", is_number=False), Column("shots"), Column("documents"), Column("metric", is_number=False)]
    columns += [Column(name) for name in _short_names([m.model for m in report.models])]
    rows, before = [], None
    for scores in zip(*(model.scores for model in report.models), strict=True):
        first = scores[0]
        facts = report.tasks[first.task]
        head = [first.task, _count(facts["n_shot"]), _count(facts["n_documents"])]
        rows.append([*(head if first.task != before else [""] * 3), _metric(first), *map(_value, scores)])
        before = first.task
    print_table(columns, rows)
    for model, name in zip(report.models, _short_names([m.model for m in report.models]), strict=True):
        print_facts([(name, _how(model))])
    if limit is not None:
        print_facts([("note", f"only the first {limit} documents of each task: compare with the same limit alone")])


def _count(value: object) -> str:
    return "" if value is None else str(value)


def _metric(score: Score) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
    return f"{score.label}{arrow}"


def _value(score: Score) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _how(model: ModelScores) -> str:
    protocol = model.protocol
    runtime = "" if protocol["runtime"] is None else f", runtime {protocol['runtime']}"
    return (
        f"{protocol['dtype']} on {protocol['device']}{runtime}; {model.n_computed:,} of {model.n_requests:,} requests "
        f"computed, {format_seconds(model.seconds)}"
    )
