"""Records: what was done to each tensor, as typed rows that go through `mendlm.json` unchanged."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mendlm.budgets import stored_frac
from mendlm.errors import CheckpointError, UsageError

MANIFEST_FILE = "mendlm.json"
RUN_FILE = "mendlm.run.json"
EXPORT_FILE = "mendlm.export.json"


_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "None": (type(None),)}


@functools.cache
def _plain_fields(cls: Any) -> Mapping[str, tuple[type, ...]]:
    """The fields of a dataclass that hold one plain value -> what it may be."""
    names = {field.name: str(field.type).split(" | ") for field in dataclasses.fields(cls)}
    return {
        field: tuple(kind for name in of for kind in _KINDS[name]) for field, of in names.items() if of[0] in _KINDS
    }


def _check_kinds(cls: Any, row: Mapping[str, Any]) -> None:
    """Raise TypeError for a value of a row that its field in the dataclass does not hold."""
    for field, kinds in _plain_fields(cls).items():
        value = row.get(field)
        if field in row and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise TypeError(f"{field} is {value!r}")


@dataclass(frozen=True)
class TensorRecord:
    """One compressed tensor.

    Attributes
    ----------
    name, shard : which tensor, in which file.
    shape : (d_out, d_in).
    dtype, storage_dtype : before and after, e.g. "float32" and "bfloat16".
    criterion : how the mask was chosen.
    n_kept : entries of S that may differ from zero; exact.
    sparsity : fraction of entries of S that are zero, ``1 - n_kept / (d_out * d_in)``.
    rank : of L = B @ A.
    n_iter : iterations done.
    status : "converged" or "max_steps".
    objective : ``||(1 - mask) * (W - L)||_F`` before rounding.
    rel_error : ``||W - S - B @ A||_F / ||W||_F`` of what is stored.
    energy_frac : share of the last residual that its leading triplets hold; None if no iteration was done.
    dense_bytes, stored_bytes : before and after, data alone.
    metric : that the refiner minimised in: "plain", "diagonal" or "gram".
    damping : added to the diagonal of the Gram matrix, as a share of its mean: by the metric, or else by the criterion;
        None if neither has one.
    rel_output_error : error of what is stored relative to W, in the metric: ``||X (W - S - B @ A)^T||_F / ||X W^T||_F``
        on the calibration text for "gram"; None for "plain".
    n_tokens : calibration tokens that reached this weight; None without calibration.
    n_dead : inputs that were zero for all of them; None without calibration.
    """

    name: str
    shard: str
    shape: tuple[int, int]
    dtype: str
    storage_dtype: str
    criterion: str
    n_kept: int
    sparsity: float
    rank: int
    n_iter: int
    status: str
    objective: float
    rel_error: float
    energy_frac: float | None
    dense_bytes: int
    stored_bytes: int
    metric: str = "plain"
    damping: float | None = None
    rel_output_error: float | None = None
    n_tokens: int | None = None
    n_dead: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return dataclasses.asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; fields of a newer version are ignored."""
        known = {
            f.name: row[f.name] for f in dataclasses.fields(cls) if f.name in row or f.default is dataclasses.MISSING
        }
        d_out, d_in = known["shape"]
        _check_kinds(cls, known)
        return cls(**(known | {"shape": (int(d_out), int(d_in))}))


@dataclass(frozen=True)
class BlockRecord:
    """The matching of one block.

    Attributes
    ----------
    block : its index.
    status : "improved", or "kept": no step had a lower loss, and what is stored is what it was before.
    loss_before, loss_after : mean over the tokens of the windows held out of ``||out - target||^2 / ||target||^2``, of
        what is stored.
    n_steps : steps taken.
    best_step : the step that is stored; 0 if none is.
    vectors : names of the norms and biases that are not those of the original model.
    n_windows, n_held_out : windows that it was tuned on, and others that decided.
    """

    block: int
    status: str
    loss_before: float
    loss_after: float
    n_steps: int
    best_step: int
    vectors: tuple[str, ...]
    n_windows: int
    n_held_out: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return dataclasses.asdict(self) | {"vectors": list(self.vectors)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; fields of a newer version are ignored."""
        known = {f.name: row[f.name] for f in dataclasses.fields(cls)}
        _check_kinds(cls, known)
        return cls(**(known | {"vectors": tuple(known["vectors"])}))


@dataclass(frozen=True)
class Totals:
    """Sums over a whole checkpoint, compressed and copied tensors together.

    Attributes
    ----------
    n_tensors, n_compressed : tensors of the input, and how many of them are compressed.
    dense_params, stored_params : entries before; values kept, factor entries and copied entries after (no mask bits).
    dense_bytes, stored_bytes : data before and after, without headers.
    """

    n_tensors: int
    n_compressed: int
    dense_params: int
    stored_params: int
    dense_bytes: int
    stored_bytes: int

    @property
    def ratio(self) -> float:
        """``stored_bytes / dense_bytes``: 0.6 means that the weights take 60 % of the space they took."""
        return stored_frac(self.stored_bytes, self.dense_bytes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, and the ratio for readers."""
        return dataclasses.asdict(self) | {"ratio": self.ratio}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        known = {f.name: row[f.name] for f in dataclasses.fields(cls)}
        _check_kinds(cls, known)
        return cls(**known)


@dataclass(frozen=True)
class Manifest:
    """`mendlm.json`: everything that decides the bytes of a compressed folder, and what came out.

    Attributes
    ----------
    mendlm_version : that wrote the folder.
    versions : of python, torch, safetensors and numpy.
    recipe : `Recipe.to_dict()`.
    inputs, outputs : file name -> {"sha256", "size_bytes"}.
    totals, records : what was done.
    calibration : facts about the calibration text (source, sha256 of the tokens, …); None for data-free work.
    matching : of the blocks that were matched, in their order.
    """

    mendlm_version: str
    versions: Mapping[str, str]
    recipe: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]
    outputs: Mapping[str, Mapping[str, Any]]
    totals: Totals
    records: tuple[TensorRecord, ...]
    calibration: Mapping[str, Any] | None = None
    matching: tuple[BlockRecord, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `mendlm.json`."""
        return {
            "format": "mendlm",
            "version": 1,
            "mendlm_version": self.mendlm_version,
            "versions": dict(self.versions),
            "recipe": dict(self.recipe),
            "seed": self.recipe["seed"],
            "calibration": None if self.calibration is None else dict(self.calibration),
            "inputs": dict(self.inputs),
            "outputs": dict(self.outputs),
            "totals": self.totals.to_dict(),
            "matching": [block.to_dict() for block in self.matching],
            "records": [record.to_dict() for record in self.records],
        }

    @classmethod
    def from_dict(cls, parsed: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; KeyError, TypeError or ValueError if something is missing."""
        return cls(
            mendlm_version=parsed["mendlm_version"],
            versions=parsed["versions"],
            recipe=parsed["recipe"],
            calibration=parsed.get("calibration"),
            inputs=parsed["inputs"],
            outputs=parsed["outputs"],
            totals=Totals.from_dict(parsed["totals"]),
            matching=tuple(BlockRecord.from_dict(row) for row in parsed.get("matching", ())),
            records=tuple(TensorRecord.from_dict(row) for row in parsed["records"]),
        )


def summarize(rows: Iterable[tuple[bool, int, int, int, int]]) -> Totals:
    """Totals of (compressed?, dense_params, stored_params, dense_bytes, stored_bytes), one row a tensor."""
    table = list(rows)
    sums = [sum(row[i] for row in table) for i in range(1, 5)]
    return Totals(len(table), sum(row[0] for row in table), *sums)


def parse_json(text: str) -> Any:
    """What the JSON document `text` says; a ValueError also for NaN and Infinity, which Python reads and JSON lacks."""
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"it has {name} where a number must be")


def read_manifest(folder: str | Path) -> Manifest:
    """Read `mendlm.json` of a folder that mendlm wrote.

    Raises
    ------
    UsageError : the folder holds no `mendlm.json`.
    CheckpointError : the file is damaged, or of a version that this mendlm does not know.
    """
    path = (Path(folder) if isinstance(folder, str) else folder) / MANIFEST_FILE
    try:
        parsed = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as err:
        raise UsageError(
            f"{str(folder)!r} holds no {MANIFEST_FILE}: give a folder that mendlm compress wrote."
        ) from err
    except OSError as err:
        raise CheckpointError(f"cannot read {str(path)!r}: {err.strerror or err}.") from err
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{str(path)!r} is not valid JSON: {err}. Compress the model again.") from err
    if not isinstance(parsed, dict) or parsed.get("format") != "mendlm":
        raise CheckpointError(f"{str(path)!r} was not written by mendlm compress.")
    if parsed.get("version") != 1:
        raise CheckpointError(
            f"{str(path)!r} has version {parsed.get('version')!r}, this mendlm reads version 1. Update mendlm."
        )
    try:
        return Manifest.from_dict(parsed)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CheckpointError(f"{str(path)!r} is incomplete or damaged ({err!r}). Compress the model again.") from err


def read_records(folder: str | Path) -> tuple[TensorRecord, ...]:
    """The records of the compressed tensors of a folder that mendlm wrote; errors as `read_manifest`."""
    return read_manifest(folder).records
