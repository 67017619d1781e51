"""`bench`: tokens per second, memory and load time of a compressed folder's runtimes beside the dense model."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mendlm import errors
from mendlm._inference import inference_dtype
from mendlm._processes import ended, line_of, program_of
from mendlm.devices import resolve_device
from mendlm.errors import MendError, UsageError
from mendlm.loading import is_compressed
from mendlm.names import lookup
from mendlm.runtime import RUNTIMES

_PROGRAM = program_of("mendlm._speed_worker")


@dataclass(frozen=True)
class SpeedRow:
    """One runtime, measured in a process of its own; or why it was not.

    Attributes
    ----------
    name : "dense" or the runtime.
    folder : that was loaded.
    runtime : None for a dense folder.
    unavailable : why it cannot run here; the numbers are None then. None if it ran.
    prefill_tokens_per_second : batch_size * prompt_tokens over the median time of reading the prompts at once.
    decode_tokens_per_second : batch_size * new_tokens over the median time of as many steps with the cache.
    prefill_ratio, decode_ratio : to the baseline's; None if there is none.
    weights_bytes : of all parameters and buffers in memory.
    peak_memory_bytes : largest resident memory of the process, loading, Python and its libraries included.
    peak_device_bytes : largest memory that torch had on the device; None on a CPU.
    load_seconds : of `mendlm.load`, imports not included.
    file_bytes : of the folder's safetensors files.
    prefill_seconds, decode_seconds : of each repeat.
    """

    name: str
    folder: str
    runtime: str | None
    unavailable: str | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    prefill_ratio: float | None = None
    decode_ratio: float | None = None
    weights_bytes: int | None = None
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None
    load_seconds: float | None = None
    file_bytes: int | None = None
    prefill_seconds: tuple[float, ...] = ()
    decode_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class BenchResult:
    """Speed and memory of the runtimes of one model.

    Attributes
    ----------
    model : the folder.
    baseline : name of the row that ratios refer to: "dense", or "merged" where no dense folder was given.
    rows : the baseline first.
    settings : plain values (JSON): prompt_tokens, new_tokens, batch_size, repeats, dtype, device, threads.
    machine : plain values: device_name, torch, transformers, python.
    """

    model: str
    baseline: str
    rows: tuple[SpeedRow, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class RowStarted:
    """The `index`-th (from 1) of `n_rows` rows is being measured."""

    name: str
    index: int
    n_rows: int


@dataclass(frozen=True)
class RowDone:
    """`row` is measured, without ratios yet; it is the `index`-th (from 1) of `n_rows`."""

    row: SpeedRow
    index: int
    n_rows: int


Progress = Callable[[RowStarted | RowDone], None]


def bench(
    model: str | Path,
    *,
    runtimes: Sequence[str] | None = None,
    dense: str | Path | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 3,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure prefill, decode, memory and loading of a model's runtimes, each in a process of its own.

    Parameters
    ----------
    model : a folder that mendlm wrote; or a dense one, which is then measured alone.
    runtimes : names of `mendlm.runtime.RUNTIMES`; None is all. One that cannot run here gets a row that says why.
    dense : folder of the original, the baseline of the ratios. None: the merged runtime stands for it, and is measured
        whether it is among `runtimes` or not.
    prompt_tokens : int >= 1, read at once: prefill. They are random, the same in every row.
    new_tokens : int >= 1, read one after the other with the cache: decode.
    batch_size : int >= 1, sequences side by side.
    repeats : int >= 1; rates are of the median time, after one round to warm up.
    dtype : compute dtype, a `torch.dtype` or its name; None is float32 on a CPU, elsewhere the checkpoint's.
    device : where to run; CPU if None.
    threads : of torch on the CPU; None is torch's choice.
    progress : called before and after each row.

    Returns
    -------
    BenchResult

    Raises
    ------
    UsageError : no such folder, an unknown runtime, a number out of range, more tokens than the model has positions.
    MendError : nothing could be measured.

    Notes
    -----
    One process at a time; each starts Python, imports torch and loads the model, which takes some seconds.
    """
    numbers = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size, "repeats": repeats}
    for name, value in (numbers | ({} if threads is None else {"threads": threads})).items():
        if not isinstance(value, int):
            raise UsageError(f"{name} must be a whole number, got {value!r}.")
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value!r}.")
    if isinstance(runtimes, str):
        raise UsageError(f"runtimes must be a list of names, got {runtimes!r}. Give [{runtimes!r}].")
    n_cores = os.cpu_count() or 1
    if threads is not None and threads > n_cores:
        raise UsageError(f"threads must be at most {n_cores}, the cores of this machine, got {threads!r}.")
    compute = inference_dtype(dtype, device)
    where = str(resolve_device("cpu" if device is None else str(device)))
    rows = _planned(model, runtimes, dense)
    dtype_name = None if compute is None else str(compute).removeprefix("torch.")
    job = numbers | {"dtype": dtype_name, "device": where, "threads": threads}
    measured: list[SpeedRow] = []
    facts: dict[str, Any] = {}
    for index, row in enumerate(rows, start=1):
        if progress is not None:
            progress(RowStarted(row.name, index, len(rows)))
        answer = _measure(job | {"folder": row.folder, "runtime": row.runtime})
        if "error" in answer:
            row = replace(row, unavailable=_reason(answer["error"], is_baseline=index == 1))
        else:
            facts = facts or answer["facts"]
            row = _filled(row, answer, numbers)
        measured.append(row)
        if progress is not None:
            progress(RowDone(row, index, len(rows)))
    if not facts:
        reasons = "; ".join(f"{row.name}: {row.unavailable}" for row in measured)
        raise MendError(f"nothing could be measured: {reasons}")
    settings = job | {"dtype": facts.pop("dtype"), "threads": facts.pop("threads")}
    with_ratios = tuple(_with_ratios(row, measured[0]) for row in measured)
    return BenchResult(str(model), measured[0].name, with_ratios, settings, facts)


def _planned(model: str | Path, runtimes: Sequence[str] | None, dense: str | Path | None) -> list[SpeedRow]:
    """Empty rows, the baseline first."""
    if not is_compressed(model):
        if runtimes is not None or dense is not None:
            raise UsageError(f"{str(model)!r} is not compressed by mendlm, so it has neither runtimes nor an original.")
        return [SpeedRow("dense", str(model), None)]
    names = list(RUNTIMES if runtimes is None else dict.fromkeys(runtimes))
    for name in names:
        lookup(RUNTIMES, name, "runtime")
    if not names:
        raise UsageError("runtimes is empty. Leave it out to measure all.")
    first = []
    if dense is None:
        names = ["merged", *(name for name in names if name != "merged")]
    elif is_compressed(dense):
        raise UsageError(f"{str(dense)!r} is compressed by mendlm. Give the original, or leave out --dense.")
    else:
        first = [SpeedRow("dense", str(dense), None)]
    return first + [SpeedRow(name, str(model), name) for name in names]


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    """What `_speed_worker.main` says of `job` in a new process; {"error": ...} if it ended without a word."""
    program = [sys.executable, "-P", "-c", _PROGRAM]
    done = subprocess.run(
        program, input=line_of(job), capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if done.returncode >= 0:
        with contextlib.suppress(ValueError, IndexError):
            answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return answer
    return {"error": {"type": "MendError", "message": ended(done.returncode, done.stderr)}}


def _reason(error: dict[str, str], *, is_baseline: bool) -> str:
    """Why a row has no numbers; a wrong use that the baseline finds is wrong for every row, and raised."""
    kind = getattr(errors, error["type"], None)
    if is_baseline and isinstance(kind, type) and issubclass(kind, UsageError):
        raise kind(error["message"])
    return error["message"] if kind is not None else f"{error['type']}: {error['message']}"


def _filled(row: SpeedRow, answer: dict[str, Any], numbers: dict[str, int]) -> SpeedRow:
    def rate(n_tokens: int, seconds: Sequence[float]) -> float:
        return numbers["batch_size"] * n_tokens / statistics.median(seconds)

    prefill, decode = tuple(answer["prefill_seconds"]), tuple(answer["decode_seconds"])
    return replace(
        row,
        prefill_tokens_per_second=rate(numbers["prompt_tokens"], prefill),
        decode_tokens_per_second=rate(numbers["new_tokens"], decode),
        weights_bytes=answer["weights_bytes"],
        peak_memory_bytes=answer["peak_memory_bytes"],
        peak_device_bytes=answer["peak_device_bytes"],
        load_seconds=answer["load_seconds"],
        file_bytes=answer["file_bytes"],
        prefill_seconds=prefill,
        decode_seconds=decode,
    )


def _with_ratios(row: SpeedRow, baseline: SpeedRow) -> SpeedRow:
    def ratio(ours: float | None, theirs: float | None) -> float | None:
        return None if ours is None or theirs is None else ours / theirs

    return replace(
        row,
        prefill_ratio=ratio(row.prefill_tokens_per_second, baseline.prefill_tokens_per_second),
        decode_ratio=ratio(row.decode_tokens_per_second, baseline.decode_tokens_per_second),
    )
