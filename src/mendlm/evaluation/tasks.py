"""Benchmark tasks through EleutherAI's lm-evaluation-harness: its prompts, metrics and scoring, our models."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mendlm._inference import dtype_of, open_model, runtimes_of
from mendlm.errors import MendError, MissingDependencyError, UsageError
from mendlm.evaluation._answers import AnswerStore
from mendlm.evaluation._logits import device_of
from mendlm.evaluation.text import hub_reachable, load_tokenizer, quiet_datasets
from mendlm.loading import is_compressed
from mendlm.paths import local_path
from mendlm.runtime import SparseLowRankLinear, resolve_runtime

DEFAULT_BATCH_SIZE = 8

Progress = Callable[[str, int, int], None]
"""Called after each request with (model, requests answered, requests known of so far)."""


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes
    ----------
    task : its name in the harness; groups have scores too.
    metric, filter : names of the harness, such as "exact_match" and "strict-match"; "none" is no filter.
    value : as the harness gives it, a fraction for accuracies.
    stderr : of the mean over the documents; None where the harness has none (a single document, some groups).
    higher_is_better : None where the task does not say.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None = None

    @property
    def label(self) -> str:
        """Metric and filter in words: "acc", "exact_match (strict-match)"."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"


@dataclass(frozen=True)
class ModelScores:
    """The scores of one model, and how they came about.

    Attributes
    ----------
    model : the folder.
    scores : of every task in the order asked for, a group before its members.
    n_requests : questions that the tasks put to the model.
    n_computed : those that the model answered in this run; the others were in the cache.
    seconds : wall time of the evaluation, without loading the model.
    protocol : plain values (JSON): dtype, device, runtime, tokenizer, context length, cache.
    """

    model: str
    scores: tuple[Score, ...]
    n_requests: int
    n_computed: int
    seconds: float
    protocol: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"scores": [asdict(score) for score in self.scores]}


@dataclass(frozen=True)
class TaskReport:
    """Scores of one or more models on the same tasks.

    Attributes
    ----------
    models : in the order given.
    tasks : name -> {"version", "n_shot", "n_documents", "n_documents_in_all"}; the last two are None for a group.
    settings : what was asked for: tasks, limit, num_fewshot, batch_size, task_path.
    versions : of mendlm, lm_eval, transformers, torch, datasets and python.
    """

    models: tuple[ModelScores, ...]
    tasks: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"models": [model.to_dict() for model in self.models]}


def evaluate(
    models: str | Path | Sequence[str | Path],
    tasks: Sequence[str],
    *,
    task_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    runtime: str | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> TaskReport:
    """Scores of the models in folders, dense or compressed, on tasks of the lm-evaluation-harness.

    The harness (`lm_eval.simple_evaluate`) makes the prompts, chooses the examples, generates, and scores; nothing is
    added here. The numbers are those of its own command on the same weights, up to rounding.

    Parameters
    ----------
    models : one folder or several: dense transformers checkpoints, or folders that mendlm wrote. Nothing is downloaded.
    tasks : names of tasks, groups or tags of the harness, patterns such as "mmlu_*", or paths of task files.
    task_path : folder with more task files, which come before the harness's own. Python code that they name runs.
    limit : int >= 1, only the first so many documents of each task. None: all.
    num_fewshot : int >= 0, examples in the prompt; None is each task's own number. Tasks that fix 0 keep it.
    batch_size : int >= 1. It does not change the results beyond rounding.
    device, dtype : as in `mendlm.evaluation.perplexity.evaluate`.
    runtime : how compressed layers compute; None is the loader's default. Dense models beside compressed ones have no
        choice.
    cache : folder for finished requests; a run that was interrupted goes on from there. One file for each model, dtype,
        runtime and set of versions; the weights are identified by their SHA-256.
    progress : called after each request.

    Returns
    -------
    TaskReport

    Raises
    ------
    UsageError : no such folder, task or task path, a number out of range.
    CheckpointError : a model or its tokenizer cannot be loaded.
    MissingDependencyError : `lm_eval` is not installed (``pip install 'mendlm[eval]'``).
    MendError : a task or its data cannot be loaded, the harness fails, or the cache is damaged.
    NonFiniteError : the model answers NaN.

    Notes
    -----
    One model in memory at a time. Without `task_path` the harness reads its 14,000 task files first, which takes some
    ten seconds.
    """
    folders = [str(m) for m in ([models] if isinstance(models, str | Path) else models)]
    if not folders:
        raise UsageError("no model was given. Give one folder or several.")
    _check_numbers(limit, num_fewshot, batch_size)
    runtimes = runtimes_of(folders, runtime)
    if runtime is not None:
        resolve_runtime(runtime)
    _require_harness()
    from mendlm.evaluation._harness import printing_to, quiet_harness

    with quiet_harness() as stdout:
        heard = progress and printing_to(stdout, progress)
        manager, names = _find_tasks(tasks, task_path)
        roots = _load_tasks(manager, names)
        scores: list[ModelScores] = []
        about: dict[str, dict[str, Any]] = {}
        for folder, own_runtime in zip(folders, runtimes, strict=True):
            with _opened(folder, device, dtype, own_runtime, batch_size, cache, heard) as lm:
                start = time.perf_counter()
                results = _run(lm, list(roots.values()), manager, num_fewshot, limit)
                seconds = time.perf_counter() - start
                order = _in_order(results, roots)
                scores.append(_model_scores(lm, _scores(results, order), seconds))
            about = about or {name: _about(results, name) for name in order}
    return TaskReport(
        models=tuple(scores),
        tasks=about,
        settings={
            "tasks": list(tasks),
            "limit": limit,
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "task_path": None if task_path is None else str(task_path),
        },
        versions=_versions("mendlm", "lm_eval", "transformers", "torch", "datasets"),
    )


def _check_numbers(limit: int | None, num_fewshot: int | None, batch_size: int) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1 document a task, got {limit!r}. Leave it out to use all.")
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(
            f"num_fewshot must be at least 0, got {num_fewshot!r}. Leave it out for each task's own number."
        )
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size!r}.")


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as err:
        raise MissingDependencyError(
            "tasks need the lm-evaluation-harness: pip install 'mendlm[eval]'. Perplexity on a text (--text) does not."
        ) from err


def _versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}


# Tasks: found and loaded before any model is.


def _find_tasks(tasks: Sequence[str], task_path: str | Path | None) -> tuple[Any, list[str]]:
    """The harness's manager of task files, and the names meant, patterns resolved, each once."""
    from lm_eval.tasks import TaskManager

    wanted = [name.strip() for name in tasks if name.strip()]
    if not wanted:
        raise UsageError("no task was given. Try --tasks arc_challenge, or lm_eval ls tasks for the list.")
    if task_path is not None:
        task_path = local_path(task_path)
        if not task_path.is_dir():
            raise UsageError(
                f"the task path {str(task_path)!r} is no folder. Give the folder that holds the task files."
            )
        # Reading the harness's own files takes long: without them first.
        manager = TaskManager(include_path=str(task_path), include_defaults=False)
        if not manager.all_tasks:
            raise UsageError(f"the task path {str(task_path)!r} holds no task files (*.yaml).")
        if all(_matches(manager, name) for name in wanted) and _is_closed(manager, wanted):
            return manager, _expanded(manager, wanted)
    elif all(_is_file(name) for name in wanted):
        return TaskManager(include_defaults=False), list(dict.fromkeys(wanted))
    manager = TaskManager(include_path=None if task_path is None else str(task_path))
    for name in wanted:
        if not _matches(manager, name):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise UsageError(
                f"unknown task {name!r}.{hint} lm_eval ls tasks lists the harness's tasks; --task-path adds your own."
            )
    return manager, _expanded(manager, wanted)


def _is_file(name: str) -> bool:
    return name.endswith(".yaml") and Path(name).is_file()


def _matches(manager: Any, name: str) -> list[str]:
    """Names in the index that `name`, which may be a pattern or a file, stands for."""
    if name in manager.task_index or _is_file(name):
        return [name]
    return fnmatch.filter(manager.all_tasks, name)


def _expanded(manager: Any, wanted: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(found for name in wanted for found in _matches(manager, name)))


def _is_closed(manager: Any, wanted: Sequence[str]) -> bool:
    """Whether the groups among the tasks are made of tasks of this index alone."""
    todo, seen = _expanded(manager, wanted), set()
    while todo:
        name = todo.pop()
        entry = manager.task_index.get(name)
        if name in seen or entry is None:
            if entry is None and not _is_file(name):
                return False
            continue
        seen.add(name)
        members = (entry.cfg or {}).get("task") if entry.cfg and "group" in entry.cfg else None
        for member in [members] if isinstance(members, str) else members or []:
            if isinstance(member, str):
                todo.append(member)
            elif isinstance(member, Mapping) and isinstance(member.get("task"), str):
                todo.append(member["task"])
    return True


def _load_tasks(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """The harness's tasks and groups of these names with their data, those of a tag one by one."""
    import datasets

    offline = not hub_reachable()
    roots: dict[str, Any] = {}
    for name in names:
        try:
            with quiet_datasets(datasets, offline):
                loaded = manager.load([name])
        except Exception as err:  # files and code of others
            reason = f"{type(err).__name__}: {_first_line(err)}"
            if offline and isinstance(err, OSError):
                raise MendError(
                    f"task {name!r} needs a data set that is not in the cache, and there is no network (or "
                    f"HF_HUB_OFFLINE is set): {reason} Use --task-path with task files that read local data, or run "
                    "once with a network."
                ) from err
            raise MendError(f"task {name!r} cannot be loaded: {reason} Check its file and its data.") from err
        if not loaded["tasks"]:
            raise UsageError(f"task {name!r} is empty: it names no tasks.")
        members = {child for children in loaded["group_map"].values() for child in children}
        roots |= {n: it for n, it in (loaded.get("groups", {}) | loaded["tasks"]).items() if n not in members}
    try:
        manager.load(list(roots.values()))  # nothing is loaded again; it looks for tasks that are in two groups
    except ValueError as err:
        raise UsageError(f"{_first_line(err)} Leave one of them out.") from err
    return roots


def _first_line(err: BaseException) -> str:
    line = (str(err).strip() or "no reason given").splitlines()[0][:300]
    return line if line.endswith((".", "!", "?")) else f"{line}."


# One model under the harness.


def _run(lm: Any, tasks: list[Any], manager: Any, num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
    import lm_eval

    try:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            lm,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except (MendError, MemoryError):
        raise
    except Exception as err:  # tasks are code of others
        raise MendError(
            f"the harness could not evaluate {lm.folder!r}: {type(err).__name__}: {_first_line(err)}"
        ) from err
    return results


def _in_order(results: Mapping[str, Any], roots: Iterable[str]) -> list[str]:
    """Names with results in the order asked for, a group before its members."""
    subtasks: Mapping[str, Sequence[str]] = results.get("group_subtasks", {})

    def below(name: str) -> Iterator[str]:
        yield name
        for child in subtasks.get(name, ()):
            yield from below(child)

    names = dict.fromkeys(name for root in roots for name in below(root))
    return [name for name in names if name in results["results"]]


def _scores(results: Mapping[str, Any], order: Sequence[str]) -> tuple[Score, ...]:
    scores = []
    for task in order:
        values: Mapping[str, Any] = results["results"][task]
        directions = results.get("higher_is_better", {}).get(task) or {}
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            stderr = float(error) if isinstance(error, int | float) else None
            scores.append(Score(task, metric, filter_name, float(value), stderr, directions.get(metric)))
    return tuple(scores)


def _model_scores(lm: Any, scores: tuple[Score, ...], seconds: float) -> ModelScores:
    protocol = lm.how | {
        "context_length": lm.max_length,
        "batch_size": lm.batch_size,
        "chat_template": False,
        "cache": None if lm.store is None else str(lm.store.path),
    }
    return ModelScores(lm.folder, scores, lm.n_requests, lm.n_computed, seconds, protocol)


def _about(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    samples = results.get("n-samples", {}).get(task, {})
    return {
        "version": results.get("versions", {}).get(task),
        "n_shot": results.get("n-shot", {}).get(task),
        "n_documents": samples.get("effective"),
        "n_documents_in_all": samples.get("original"),
    }


@contextlib.contextmanager
def _opened(
    folder: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    runtime: str | None,
    batch_size: int,
    cache: str | Path | None,
    progress: Progress | None,
) -> Iterator[Any]:
    """The model of a folder as the harness wants it, with its cache open."""
    from mendlm.evaluation._harness import LanguageModel

    tokenizer = load_tokenizer(folder)
    model = open_model(folder, device=device, dtype=dtype, runtime=runtime)
    how = {
        "dtype": dtype_of(model),
        "device": str(device_of(model)),
        "runtime": _runtime_of(model) if is_compressed(folder) else None,
        "tokenizer": type(tokenizer).__name__,
    }
    with contextlib.ExitStack() as stack:
        libraries = _versions("lm_eval", "transformers", "torch")
        store = None if cache is None else stack.enter_context(AnswerStore.for_model(cache, folder, how, libraries))
        yield LanguageModel(folder, model, tokenizer, batch_size, how, store, progress)


def _runtime_of(model: Any) -> str:
    """Of a compressed model; merged layers may have become ordinary ones."""
    return next((layer.runtime for layer in model.modules() if isinstance(layer, SparseLowRankLinear)), "merged")
