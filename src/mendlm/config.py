"""`Recipe`: what to do with a model, validated when it is made, the same in Python, YAML, JSON and `mendlm.json`."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from mendlm.budgets import parse_rank, resolve_rank
from mendlm.criteria import CRITERIA, AbstractCriterion, Needs
from mendlm.errors import UsageError
from mendlm.inputs import DeadColumns
from mendlm.names import literal_name, lookup
from mendlm.patterns import NM, Adjustable, Pattern, Tiles, Unstructured
from mendlm.recipe_errors import recipe_error
from mendlm.refiners import REFINERS, AbstractRefiner, PruneOnly

DEFAULT_RANK = "5%"
StorageName = Literal["bfloat16", "float16", "float32"]


def parse_pattern(value: object) -> Pattern:
    """A pattern from an instance, a string or a mapping.

    ``"2:4"``, ``{"n": 2, "m": 4}``, ``{"sparsity": 0.5, "scope": "row"}``, ``{"sparsity": 0.5, "tile": "16x16"}`` (also
    ``[16, 16]``).

    Raises
    ------
    UsageError : none of these, or values out of range.
    """
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value)):
        return NM(int(match[1]), int(match[2]))
    if isinstance(value, Mapping):
        keys = set(value)
        if keys == {"n", "m"} and all(type(v) is int for v in value.values()):
            return NM(value["n"], value["m"])
        if "sparsity" in keys and (keys <= {"sparsity", "scope"} or keys == {"sparsity", "tile"}):
            if "tile" in keys:
                return Tiles(value["sparsity"], *_parse_tile(value["tile"]))
            return Unstructured(value["sparsity"], value.get("scope", "tensor"))
    raise UsageError(
        "pattern must be 'n:m' such as '2:4', {n: 2, m: 4}, {sparsity: 0.5, scope: tensor} or "
        f"{{sparsity: 0.5, tile: 16x16}}, got {value!r}."
    )


def _parse_tile(value: object) -> tuple[int, int]:
    """(rows, columns) of a tile from ``"16x16"`` or a pair of whole numbers."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", value)):
        return int(match[1]), int(match[2])
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int for side in value):
        return value[0], value[1]
    raise UsageError(f"tile must be rows x columns such as '16x16' or [16, 16], got {value!r}.")


def pattern_to_dict(pattern: Pattern) -> dict[str, Any]:
    """The inverse of `parse_pattern`, as a mapping."""
    if isinstance(pattern, NM):
        return {"n": pattern.n, "m": pattern.m}
    if isinstance(pattern, Tiles):
        return {"sparsity": pattern.sparsity, "tile": [pattern.rows, pattern.cols]}
    return {"sparsity": pattern.sparsity, "scope": pattern.scope}


def _parse_criterion(value: object) -> object:
    if isinstance(value, str):
        lookup(CRITERIA, value, "criterion")
    return value


def _parse_calibration(value: object) -> object:
    return {"source": value} if isinstance(value, str) else value


def _parse_layer_sparsity(value: object) -> object:
    if isinstance(value, str):
        return lookup({"owl": Owl(), "uniform": None}, value, "layer_sparsity")
    return value


def _parse_matching(value: object) -> object:
    if type(value) is int:
        return {"n_steps": value} if value else None
    return value


def _parse_globs(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _parse_dtype(value: object) -> object:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _parse_optional_pattern(value: object) -> Pattern | None:
    return None if value is None else parse_pattern(value)


def _parse_optional_rank(value: object) -> int | str | None:
    return None if value is None else parse_rank(value)


Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_parse_globs)]


class Calibration(BaseModel):
    """What text a model is calibrated on, and how it runs through the model.

    Parameters
    ----------
    source : "c4", "wikitext2", "self" (text the model writes itself), "random-tokens", or a .txt, .jsonl or .parquet
        file.
    n_sequences : windows of text.
    seqlen : tokens of a window; None is 2048, or what the model's positions allow if that is less.
    windows : "random" cuts every window at a random place, as the Wanda code does, "leading" takes the first ones.
    propagate : "sequential" gives every block the outputs of the compressed blocks before it, "dense" those of the
        original ones.
    batch_size : windows that run through a block together.
    dtype : to run the model in; None is float32 on a CPU and the checkpoint's own on a GPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, Field(min_length=1)]
    n_sequences: Annotated[int, Field(ge=1, strict=True)] = 128
    seqlen: Annotated[int, Field(ge=2, strict=True)] | None = None
    windows: Literal["random", "leading"] = "random"
    propagate: Literal["sequential", "dense"] = "sequential"
    batch_size: Annotated[int, Field(ge=1, strict=True)] = 4
    dtype: Annotated[StorageName | None, BeforeValidator(_parse_dtype)] = None


class Override(BaseModel):
    """Settings for the tensors whose names match a glob; what is None stays as the recipe has it.

    A `criterion` other than the recipe's has its own defaults: `criterion_options` are not for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    match: Annotated[str, Field(min_length=1)]
    criterion: Annotated[str | None, BeforeValidator(_parse_criterion)] = None
    pattern: Annotated[Pattern | None, PlainValidator(_parse_optional_pattern)] = None
    sparsity: Annotated[float, Field(ge=0, le=1)] | None = None
    rank: Annotated[int | str | None, PlainValidator(_parse_optional_rank)] = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields that are not None."""
        fields = {
            "match": self.match,
            "criterion": self.criterion,
            "pattern": None if self.pattern is None else pattern_to_dict(self.pattern),
            "sparsity": self.sparsity,
            "rank": self.rank,
        }
        return {name: value for name, value in fields.items() if value is not None}


class _Same:
    """A tuple as a key by identity: to hash thousands of overrides takes as long as to compare them all with a name."""

    def __init__(self, overrides: tuple[Override, ...]) -> None:
        self.overrides = overrides

    def __hash__(self) -> int:
        return id(self.overrides)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.overrides is self.overrides


@functools.lru_cache(maxsize=4)
def _by_match(key: _Same) -> tuple[dict[str, list[int]], list[tuple[int, str]]]:
    """Places of the overrides of one tensor, by its name, and places and globs of the others."""
    exact: dict[str, list[int]] = {}
    globs = []
    for place, override in enumerate(key.overrides):
        name = literal_name(override.match)
        if name is None:
            globs.append((place, override.match))
        else:
            exact.setdefault(name, []).append(place)
    return exact, globs


class Owl(BaseModel):
    """Outlier-weighed layer sparsity (Yin et al. 2024, arXiv:2310.05175): blocks with more outliers are pruned less.

    Parameters
    ----------
    threshold : M, an entry is an outlier if its score is above M times the mean score of its tensor.
    spread : lambda, the sparsity of a block stays within this of the recipe's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: Annotated[float, Field(gt=0)] = 5.0
    spread: Annotated[float, Field(ge=0, lt=1)] = 0.08


class Matching(BaseModel):
    """Block matching: after a block is compressed, tune what is stored of it on the original model's hidden states.

    Parameters
    ----------
    n_steps : of the optimiser for each block, at most.
    lr : highest step of a parameter, as a share of its root mean square.
    batch_size : windows of a step.
    held_out : share of the windows, at least one, that the tuning does not see and that decide what is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_steps: Annotated[int, Field(ge=1, strict=True)] = 100
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.008
    batch_size: Annotated[int, Field(ge=1, strict=True)] = 2
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.125


class Recipe(BaseModel):
    """How to compress a model. Frozen; equal recipes do the same.

    Parameters
    ----------
    criterion : a name in `mendlm.criteria.CRITERIA`, or a criterion object.
    criterion_options : the criterion's further fields.
    calibration : a `Calibration`, or its source alone; None for data-free work.
    metric : what the refiner minimises: "plain" the error of the weights, "diagonal" with every input weighed by its
        root mean square, "gram" the error of the outputs on the calibration text; "auto" is "plain" without
        calibration, and with it what suits the refiner: "gram" for the TLR refiners, "joint-admm", "hassle-free" and
        "eora", "diagonal" for "oats" and "slim-lora", "plain" for the others.
    damping : added to the diagonal of a Gram matrix, as a share of its mean.
    dead_columns : what to do with inputs that calibration never saw: "keep", "drop" or "error".
    layer_sparsity : "owl" or an `Owl`: sparsities by block, around that of an unstructured pattern.
    overrides : criterion, pattern, sparsity or rank by tensor name; the last match wins.
    skip_layers : blocks that stay dense; -1 is the last.
    pattern : `Unstructured`, `NM` or `Tiles`; also ``"2:4"``, ``{"n": 2, "m": 4}``,
        ``{"sparsity": 0.5, "scope": "row"}``. Without a scope weights compete as in the criterion's paper.
    refiner : a name in `mendlm.refiners.REFINERS`, or a refiner object, whose fields then become the fields below.
    rank : of L, an int or a percentage of min(d_out, d_in) such as ``"5%"`` (rounded down, at least 1). Default 5 %, or
        the rank of the refiner object.
    n_iter, solver : fields of the refiner; None means its default.
    refiner_options : the refiner's further fields.
    match_blocks : a `Matching`, or its number of steps alone; None or 0 for none. Needs calibration.
    include, exclude : globs on tensor names. `include` replaces the family's choice, `exclude` takes away from it.
    dtype : storage dtype of every floating tensor, also of those that are only copied; None keeps what is there.
    seed : of everything random.

    Raises
    ------
    UsageError : a field that is unknown or out of range; one sentence with its name and value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    criterion: Annotated[str, BeforeValidator(_parse_criterion)] = "magnitude"
    criterion_options: dict[str, Any] = Field(default_factory=dict)
    calibration: Annotated[Calibration | None, BeforeValidator(_parse_calibration)] = None
    metric: Literal["auto", "plain", "diagonal", "gram"] = "auto"
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    dead_columns: DeadColumns = "keep"
    layer_sparsity: Annotated[Owl | None, BeforeValidator(_parse_layer_sparsity)] = None
    overrides: tuple[Override, ...] = ()
    skip_layers: tuple[Annotated[int, Field(strict=True)], ...] = ()
    pattern: Annotated[Pattern, PlainValidator(parse_pattern)] = Unstructured(0.5)
    refiner: str | AbstractRefiner = "tlr"
    rank: Annotated[int | str, PlainValidator(parse_rank)] = DEFAULT_RANK
    n_iter: Annotated[int, Field(ge=1, strict=True)] | None = None
    solver: str | None = None
    refiner_options: dict[str, Any] = Field(default_factory=dict)
    match_blocks: Annotated[Matching | None, BeforeValidator(_parse_matching)] = None
    include: Globs = ()
    exclude: Globs = ()
    dtype: Annotated[StorageName | None, BeforeValidator(_parse_dtype)] = None
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as err:
            raise recipe_error(err, type(self)) from None

    @model_validator(mode="before")
    @classmethod
    def _spread_refiner(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Turn a refiner object into its name and fields, so that there is one form of every recipe."""
        data = dict(data)
        _spread_criterion(data)
        refiner = data.get("refiner", "tlr")
        if isinstance(refiner, str):
            kind = lookup(REFINERS, refiner, "refiner")
            default = next((f.default for f in dataclasses.fields(kind) if f.name == "rank"), dataclasses.MISSING)  # type: ignore[arg-type]
            if default is not dataclasses.MISSING:
                data.setdefault("rank", default)
        elif isinstance(refiner, AbstractRefiner):
            values = {f.name: getattr(refiner, f.name) for f in dataclasses.fields(refiner)}  # type: ignore[arg-type]
            for name in ("rank", "n_iter", "solver"):
                if name in values:
                    data[name] = value if (value := data.get(name)) is not None else values.pop(name)
                    values.pop(name, None)
            data["refiner_options"] = values | data.get("refiner_options", {})
            if REFINERS.get(refiner.name) is type(refiner):
                data["refiner"] = refiner.name
        return data

    @model_validator(mode="after")
    def _check_criterion(self) -> Self:
        _check_options("criterion", CRITERIA[self.criterion], self.criterion_options, set())
        self._criterion_object(self.criterion)
        if self.calibration is None:
            data = "calibration data: a FILE, c4, wikitext2, self or random-tokens"
            for criterion in self._criteria():
                if CRITERIA[criterion].needs != "weights":
                    raise UsageError(f"criterion {criterion!r} weighs the inputs, so it needs {data}.")
            if self.metric in ("diagonal", "gram"):
                raise UsageError(f"metric {self.metric!r} weighs the inputs, so it needs {data}.")
            if self.layer_sparsity is not None:
                raise UsageError(f"layer_sparsity 'owl' weighs the inputs, so it needs {data}.")
            if "plain" not in self._refiner_class().metrics:
                raise UsageError(f"refiner {self._refiner_class().name!r} weighs the inputs, so it needs {data}.")
            if self.match_blocks is not None:
                raise UsageError(f"match_blocks compares outputs of blocks, so it needs {data}.")
        elif self.match_blocks is not None and self.calibration.propagate == "dense":
            raise UsageError(
                "match_blocks tunes a block on what the compressed blocks before it give, and propagate 'dense' shows "
                "it something else. Take propagate 'sequential'."
            )
        elif self.match_blocks is not None and self.calibration.n_sequences < 2:
            raise UsageError(
                f"match_blocks tunes on some windows and holds out others, got {self.calibration.n_sequences} in all. "
                "Raise --n-sequences to 2 at least."
            )
        if self.layer_sparsity is not None and not isinstance(self.pattern, Adjustable):
            raise UsageError(f"layer_sparsity 'owl' needs a pattern with a sparsity of its own, got {self.pattern}.")
        if self.metric not in ("auto", *self._refiner_class().metrics):
            known = ", ".join(self._refiner_class().metrics)
            raise UsageError(f"refiner {self._refiner_class().name!r} has no metric {self.metric!r}. It has: {known}.")
        return self

    @model_validator(mode="after")
    def _check_refiner(self) -> Self:
        if misplaced := {"rank", "n_iter", "solver"} & set(self.refiner_options):
            raise UsageError(f"{min(misplaced)!r} is a field of the recipe itself, not one of refiner_options.")
        kind = self._refiner_class()
        _check_options("refiner", kind, self._refiner_fields(), {"rank"})
        self.refiner_for(1, 1)
        for override in self.overrides:
            if kind is PruneOnly and override.rank not in (None, 0, "0%"):
                raise UsageError(
                    f"refiner {kind.name!r} has no low-rank part, got rank {override.rank!r} for {override.match!r}. "
                    "Leave rank out."
                )
        return self

    @property
    def metric_kind(self) -> Literal["plain", "diagonal", "gram"]:
        """The metric that "auto" stands for here."""
        if self.metric != "auto":
            return self.metric
        if self.calibration is None:
            return "plain"
        return self._refiner_class().calibrated_metric

    @property
    def moves_mask(self) -> bool:
        """Whether the refiner chooses the masks, whatever those of the criterion are."""
        return self._refiner_class().moves_mask

    @property
    def needs(self) -> Needs:
        """What calibration has to gather for criteria and metric together."""
        by_metric: dict[str, Needs] = {"plain": "weights", "diagonal": "second_moment", "gram": "gram"}
        wanted = [by_metric[self.metric_kind], *(CRITERIA[criterion].needs for criterion in self._criteria())]
        return max(wanted, key=("weights", "second_moment", "gram").index)

    def _criteria(self) -> list[str]:
        return [self.criterion, *(override.criterion for override in self.overrides if override.criterion is not None)]

    def criterion_for(self, name: str) -> AbstractCriterion:
        """The criterion of the tensor `name`; one that damps a Gram matrix has the recipe's damping if it has none."""
        return self._criterion_object(self._setting(name, "criterion"))

    def _criterion_object(self, criterion: str) -> AbstractCriterion:
        kind = CRITERIA[criterion]
        options = self.criterion_options if criterion == self.criterion else {}
        if "damping" in {f.name for f in dataclasses.fields(kind)}:  # type: ignore[arg-type]
            options = {"damping": self.damping} | options
        return kind(**options)

    def pattern_for(self, name: str, sparsity: float | None = None) -> Pattern:
        """The pattern of the tensor `name`; `sparsity` is what `layer_sparsity` chose for it, if anything."""
        pattern = self.pattern
        if sparsity is not None and isinstance(pattern, Adjustable):
            pattern = dataclasses.replace(pattern, sparsity=sparsity)
        for override in self._matching(name):
            if override.pattern is not None:
                pattern = override.pattern
            if override.sparsity is not None:
                if not isinstance(pattern, Adjustable):
                    raise UsageError(f"override {override.match!r} sets a sparsity but the pattern is {pattern}.")
                pattern = dataclasses.replace(pattern, sparsity=override.sparsity)
        return pattern

    def rank_for(self, name: str) -> int | str:
        """The rank of the tensor `name`, as it was written."""
        rank: int | str = self._setting(name, "rank")
        return rank

    def _setting(self, name: str, field: str) -> Any:
        """A field for the tensor `name`: that of the last override that has it, else the recipe's."""
        found = (getattr(override, field) for override in reversed(self._matching(name)))
        return next((value for value in found if value is not None), getattr(self, field))

    def _matching(self, name: str) -> list[Override]:
        exact, globs = _by_match(_Same(self.overrides))
        places = {*exact.get(name, ()), *(place for place, match in globs if fnmatchcase(name, match))}
        return [self.overrides[place] for place in sorted(places)]

    def _refiner_class(self) -> type[AbstractRefiner]:
        return REFINERS[self.refiner] if isinstance(self.refiner, str) else type(self.refiner)

    def _refiner_fields(self) -> dict[str, Any]:
        named = {"n_iter": self.n_iter, "solver": self.solver}
        return self.refiner_options | {name: value for name, value in named.items() if value is not None}

    def refiner_for(self, d_out: int, d_in: int, name: str = "") -> AbstractRefiner:
        """The refiner for a (d_out, d_in) matrix, its rank resolved (`refiners.check_rank` says whether it fits)."""
        kind = self._refiner_class()
        rank = resolve_rank(self.rank_for(name), d_out, d_in)
        if kind is PruneOnly:
            if self.rank not in (0, DEFAULT_RANK):
                raise UsageError(f"refiner {kind.name!r} has no low-rank part, got rank {self.rank!r}. Leave rank out.")
            rank = 0
        return kind(rank=rank, **self._refiner_fields())  # type: ignore[call-arg]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; ``Recipe(**recipe.to_dict()) == recipe`` for every registered refiner."""
        return {
            "criterion": self.criterion,
            "criterion_options": dict(self.criterion_options),
            "calibration": None if self.calibration is None else self.calibration.model_dump(),
            "metric": self.metric,
            "damping": self.damping,
            "dead_columns": self.dead_columns,
            "layer_sparsity": None if self.layer_sparsity is None else self.layer_sparsity.model_dump(),
            "overrides": [override.to_dict() for override in self.overrides],
            "skip_layers": list(self.skip_layers),
            "pattern": pattern_to_dict(self.pattern),
            "refiner": self.refiner if isinstance(self.refiner, str) else self.refiner.name,
            "rank": self.rank,
            "n_iter": self.n_iter,
            "solver": self.solver,
            "refiner_options": dict(self.refiner_options),
            "match_blocks": None if self.match_blocks is None else self.match_blocks.model_dump(),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "dtype": self.dtype,
            "seed": self.seed,
        }

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a recipe from a YAML or JSON file (JSON if its name ends in .json).

        Raises
        ------
        UsageError : the file is missing, is not valid YAML or JSON, is no mapping, or holds a bad, unknown or repeated
            field; one sentence with file, line and field.
        """
        from mendlm.recipe_files import read_recipe

        return read_recipe(path, cls)


def _spread_criterion(data: dict[str, Any]) -> None:
    """Turn a criterion object into its name and fields, and give a pattern without a scope the criterion's own."""
    criterion = data.get("criterion", "magnitude")
    if isinstance(criterion, AbstractCriterion):
        values = {f.name: getattr(criterion, f.name) for f in dataclasses.fields(criterion)}  # type: ignore[arg-type]
        data["criterion"] = criterion = criterion.name
        data["criterion_options"] = values | data.get("criterion_options", {})
    if isinstance(criterion, str) and criterion in CRITERIA:
        scope = CRITERIA[criterion].default_scope
        pattern = data.get("pattern", {"sparsity": 0.5})
        if isinstance(pattern, Mapping) and set(pattern) == {"sparsity"}:
            pattern = {**pattern, "scope": scope}
        data["pattern"] = pattern


def _check_options(kind: str, cls: Any, options: Mapping[str, Any], hidden: set[str]) -> None:
    """Raise `UsageError` unless `options` are fields of the dataclass `cls` with values of their types."""
    known = {f.name for f in dataclasses.fields(cls)} - hidden
    hints = get_type_hints(cls)
    for name, value in options.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" It has: {', '.join(sorted(known)) or 'none'}."
            raise UsageError(f"{kind} {cls.name!r} has no field {name!r} (got {value!r}).{hint}")
        _check_value(f"{name} of {kind} {cls.name!r}", value, hints.get(name))


def _check_value(what: str, value: object, hint: Any) -> None:
    """Raise `UsageError` if `value` is not of the simple type `hint`; other types are the refiner's own business."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UsageError(f"{what} must be one of {', '.join(map(repr, get_args(hint)))}, got {value!r}.")
    elif hint is int and type(value) is not int:
        raise UsageError(f"{what} must be a whole number, got {value!r}.")
    elif hint is float and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UsageError(f"{what} must be a number, got {value!r}.")
    elif hint is bool and not isinstance(value, bool):
        raise UsageError(f"{what} must be true or false, got {value!r}.")
