"""The record of one point of a sweep, the file they are kept in, and the points that no other one beats."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from mendlm.budgets import stored_frac
from mendlm.errors import CheckpointError, UsageError
from mendlm.paths import local_path

FORMAT = "mendlm-sweep-1"
SWEEP_FILE = "sweep.jsonl"
DENSE = "dense"  # name of the point that is the model as it was
T = TypeVar("T")


@dataclass(frozen=True)
class SweepRecord:
    """One point of a sweep: a recipe, and what it gave.

    Attributes
    ----------
    name : what sets it apart in its sweep, e.g. "criterion=wanda rank=16"; "dense" for the model as it was.
    key : SHA-256 of what decides the figures: resolved recipe, files of the model, calibration file, evaluation.
    values : axis -> value or label, or the fields of an explicit point; empty for "dense".
    status : "done", or "failed": the figures are None then.
    error : the sentence that a failed point ended with; None if it is done.
    recipe : `Recipe.to_dict()`; None for "dense".
    recipe_sha256, inputs_sha256 : of the resolved recipe, and of the model's files with the calibration file.
    evaluation : "text", "text_sha256", "n_windows", "seqlen", "n_tokens", "dtype".
    ppl, nll : perplexity, and mean negative log-likelihood per predicted token in nats.
    dense_bytes, stored_bytes : data of all tensors before and after.
    mean_rel_error : of the compressed tensors; None for "dense".
    seconds : wall time of the compression without the start of Python; 0 for "dense".
    resumed : tensors that an earlier, unfinished run had done; `seconds` is without them.
    eval_seconds : wall time of the windows.
    peak_memory_bytes : largest resident memory until the folder was written, the sum of the process and of the workers
        that it had; for "dense", of the evaluation.
    peak_device_bytes : largest memory that torch had on the device by then; None on a CPU.
    device, n_threads : that it ran on; CPU threads of each process at work.
    versions : of mendlm, python, torch and transformers.
    finished_at : time of day, ISO 8601 in UTC.
    folder : of the compressed model, relative to that of the sweep; it is there only if it was kept. None for "dense".
    """

    name: str
    key: str
    values: Mapping[str, Any]
    status: Literal["done", "failed"]
    error: str | None
    recipe: Mapping[str, Any] | None
    recipe_sha256: str | None
    inputs_sha256: str
    evaluation: Mapping[str, Any]
    ppl: float | None = None
    nll: float | None = None
    dense_bytes: int | None = None
    stored_bytes: int | None = None
    mean_rel_error: float | None = None
    seconds: float | None = None
    resumed: int = 0
    eval_seconds: float | None = None
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None
    device: str | None = None
    n_threads: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    finished_at: str | None = None
    folder: str | None = None

    @property
    def ratio(self) -> float | None:
        """``stored_bytes / dense_bytes``; None if the point failed."""
        if self.stored_bytes is None or self.dense_bytes is None:
            return None
        return stored_frac(self.stored_bytes, self.dense_bytes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, and the ratio for readers; an infinite perplexity is None (JSON has no infinity)."""
        ppl = self.ppl if self.ppl is None or math.isfinite(self.ppl) else None
        return dataclasses.asdict(self) | {"ppl": ppl, "ratio": self.ratio}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; fields of a newer version are ignored.

        Raises
        ------
        KeyError, TypeError, ValueError, OverflowError : it is not one.
        """
        known = {f.name: row[f.name] for f in dataclasses.fields(cls) if f.name in row}
        if known.get("ppl") is None and known.get("nll") is not None:
            known["ppl"] = math.inf
        found: Self = _adapter().validate_python(known)
        if found.ratio is not None and found.ratio < 0:
            raise ValueError("bytes below 0")
        return found


@cache
def _adapter() -> Any:
    """What checks the types of a record's fields; made once, as that takes the time of hundreds of checks."""
    from pydantic import TypeAdapter

    return TypeAdapter(SweepRecord)


def frontier(records: Iterable[SweepRecord]) -> tuple[SweepRecord, ...]:
    """The records that none beats in both bytes and perplexity, by bytes; failed and infinite ones are none."""
    done = [r for r in records if r.ppl is not None and math.isfinite(r.ppl) and r.stored_bytes is not None]
    return unbeaten(done, _point)


def unbeaten(found: Iterable[T], point_of: Callable[[T], tuple[int, float]]) -> tuple[T, ...]:
    """What none beats in both coordinates of its point, in their order: of equal points all.

    One beats another if it is no worse in both and better in one; lower is better.
    """
    best: list[T] = []
    for one in sorted(found, key=point_of):
        if not best or point_of(one) == point_of(best[-1]) or point_of(one)[1] < point_of(best[-1])[1]:
            best.append(one)
    return tuple(best)


def _point(record: SweepRecord) -> tuple[int, float]:
    if record.stored_bytes is None or record.ppl is None:
        raise ValueError(f"{record.name} has no figures")
    return record.stored_bytes, record.ppl


def read_sweep(path: str | Path) -> tuple[SweepRecord, ...]:
    """The records of a sweep, from its folder or its file; of a point that ran again the last.

    Raises
    ------
    UsageError : there is no such file.
    CheckpointError : a line is damaged; one that is cut off at the end of the file is left out.
    """
    file = local_path(path)
    file = file / SWEEP_FILE if file.is_dir() else file
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError as err:
        raise UsageError(f"{str(file)!r} is not there: give a folder that mendlm sweep wrote.") from err
    except OSError as err:
        raise CheckpointError(f"cannot read {str(file)!r}: {err.strerror or err}.") from err
    return _latest(_records(file, lines))


def _records(file: Path, lines: Sequence[bytes]) -> Iterable[SweepRecord]:
    for number, line in enumerate(lines[:-1], start=1):  # what comes after the last line break was cut off
        try:
            row = json.loads(line)
            if row["format"] != FORMAT:
                raise ValueError(f"format {row['format']!r}")
            yield SweepRecord.from_dict(row)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as err:
            why = " ".join(str(err).split())[:300]
            raise CheckpointError(
                f"line {number} of {str(file)!r} is no record of a sweep ({why}). Delete that line: its point runs "
                "again."
            ) from err


def _latest(records: Iterable[SweepRecord]) -> tuple[SweepRecord, ...]:
    return tuple({record.key: record for record in records}.values())


def line_of(record: SweepRecord) -> bytes:
    """A record as a line of `sweep.jsonl`."""
    return json.dumps({"format": FORMAT} | record.to_dict(), allow_nan=False).encode() + b"\n"
