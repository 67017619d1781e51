"""`Recipe`: what to do with a model, validated when it is made, the same in Python, YAML, JSON and `mendlm.json`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from mendlm.budgets import parse_rank, resolve_rank
from mendlm.criteria import CRITERIA
from mendlm.errors import UsageError
from mendlm.names import lookup
from mendlm.patterns import NM, Pattern, Unstructured
from mendlm.refiners import REFINERS, AbstractRefiner, PruneOnly

DEFAULT_RANK = "5%"
StorageName = Literal["bfloat16", "float16", "float32"]


def parse_pattern(value: object) -> Pattern:
    """A pattern from an instance, ``"2:4"``, ``{"n": 2, "m": 4}`` or ``{"sparsity": 0.5, "scope": "row"}``.

    Raises
    ------
    UsageError : none of these, or values out of range.
    """
    if isinstance(value, Unstructured | NM):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", value)):
        return NM(int(match[1]), int(match[2]))
    if isinstance(value, Mapping):
        keys = set(value)
        if keys == {"n", "m"} and all(type(v) is int for v in value.values()):
            return NM(value["n"], value["m"])
        if "sparsity" in keys and keys <= {"sparsity", "scope"}:
            sparsity = value["sparsity"]
            if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
                raise UsageError(f"sparsity must be a number in [0, 1], got {sparsity!r}.")
            return Unstructured(float(sparsity), value.get("scope", "tensor"))
    raise UsageError(
        f"pattern must be 'n:m' such as '2:4', {{n: 2, m: 4}} or {{sparsity: 0.5, scope: tensor}}, got {value!r}."
    )


def _parse_criterion(value: object) -> object:
    if isinstance(value, str):
        lookup(CRITERIA, value, "criterion")
    return value


def _parse_globs(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _parse_dtype(value: object) -> object:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_parse_globs)]


class Recipe(BaseModel):
    """How to compress a model. Frozen; equal recipes do the same.

    Parameters
    ----------
    criterion : a name in `mendlm.criteria.CRITERIA`.
    pattern : `Unstructured` or `NM`; also ``"2:4"``, ``{"n": 2, "m": 4}``, ``{"sparsity": 0.5, "scope": "row"}``.
    refiner : a name in `mendlm.refiners.REFINERS`, or a refiner object, whose fields then become the fields below.
    rank : of L, an int or a percentage of min(d_out, d_in) such as ``"5%"`` (rounded down, at least 1). Default 5 %, or
        the rank of the refiner object.
    n_iter, solver : fields of the refiner; None means its default.
    refiner_options : the refiner's further fields.
    include, exclude : globs on tensor names. `include` replaces the family's choice, `exclude` takes away from it.
    dtype : storage dtype of every floating tensor, also of those that are only copied; None keeps what is there.
    seed : of everything random.

    Raises
    ------
    UsageError : a field that is unknown or out of range; one sentence with its name and value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    criterion: Annotated[str, BeforeValidator(_parse_criterion)] = "magnitude"
    pattern: Annotated[Pattern, PlainValidator(parse_pattern)] = Unstructured(0.5)
    refiner: str | AbstractRefiner = "tlr"
    rank: Annotated[int | str, PlainValidator(parse_rank)] = DEFAULT_RANK
    n_iter: Annotated[int, Field(ge=1, strict=True)] | None = None
    solver: str | None = None
    refiner_options: dict[str, Any] = Field(default_factory=dict)
    include: Globs = ()
    exclude: Globs = ()
    dtype: Annotated[StorageName | None, BeforeValidator(_parse_dtype)] = None
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as err:
            raise UsageError(_sentence(err)) from None

    @model_validator(mode="before")
    @classmethod
    def _spread_refiner(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Turn a refiner object into its name and fields, so that there is one form of every recipe."""
        data = dict(data)
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
    def _check_refiner(self) -> Self:
        kind = self._refiner_class()
        known = {f.name for f in dataclasses.fields(kind)} - {"rank"}  # type: ignore[arg-type]
        hints = get_type_hints(kind)
        if misplaced := {"rank", "n_iter", "solver"} & set(self.refiner_options):
            raise UsageError(f"{min(misplaced)!r} is a field of the recipe itself, not one of refiner_options.")
        for name, value in self._refiner_fields().items():
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" It has: {', '.join(sorted(known)) or 'none'}."
                raise UsageError(f"refiner {kind.name!r} has no field {name!r} (got {value!r}).{hint}")
            _check_value(f"{name} of refiner {kind.name!r}", value, hints.get(name))
        self.refiner_for(1, 1)
        return self

    def _refiner_class(self) -> type[AbstractRefiner]:
        return REFINERS[self.refiner] if isinstance(self.refiner, str) else type(self.refiner)

    def _refiner_fields(self) -> dict[str, Any]:
        named = {"n_iter": self.n_iter, "solver": self.solver}
        return self.refiner_options | {name: value for name, value in named.items() if value is not None}

    def refiner_for(self, d_out: int, d_in: int) -> AbstractRefiner:
        """The refiner for a (d_out, d_in) matrix, its rank resolved (`refiners.check_rank` says whether it fits)."""
        kind = self._refiner_class()
        rank = resolve_rank(self.rank, d_out, d_in)
        if kind is PruneOnly:
            if self.rank not in (0, DEFAULT_RANK):
                raise UsageError(f"refiner {kind.name!r} has no low-rank part, got rank {self.rank!r}. Leave rank out.")
            rank = 0
        return kind(rank=rank, **self._refiner_fields())  # type: ignore[call-arg]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; ``Recipe(**recipe.to_dict()) == recipe`` for every registered refiner."""
        pattern = self.pattern
        return {
            "criterion": self.criterion,
            "pattern": {"n": pattern.n, "m": pattern.m}
            if isinstance(pattern, NM)
            else {"sparsity": pattern.sparsity, "scope": pattern.scope},
            "refiner": self.refiner if isinstance(self.refiner, str) else self.refiner.name,
            "rank": self.rank,
            "n_iter": self.n_iter,
            "solver": self.solver,
            "refiner_options": dict(self.refiner_options),
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
        UsageError : the file is missing, is not valid YAML or JSON, is no mapping, or holds a bad field.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise UsageError(f"cannot read recipe {str(path)!r}: {err}.") from err
        fields = _parse_json(text, path) if path.suffix.lower() == ".json" else _parse_yaml(text, path)
        if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
            raise UsageError(f"recipe {path.name!r} must be a mapping of fields, e.g. 'rank: 5%', got {fields!r}.")
        try:
            return cls(**fields)
        except UsageError as err:
            raise UsageError(f"{err} [{path.name}]") from None


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


def _sentence(err: ValidationError) -> str:
    """The first problem pydantic found, as one sentence with field and value."""
    problem = err.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):
        return str(cause)
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        if field in ("sparsity", "scope", "n", "m"):
            return (
                f"{field!r} belongs into 'pattern': write pattern: {{sparsity: 0.5, scope: tensor}} or pattern: '2:4'."
            )
        near = get_close_matches(field, Recipe.model_fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown recipe field {field!r}.{hint} Fields: {', '.join(Recipe.model_fields)}."
    name = str(problem["loc"][0]) if problem["loc"] else "recipe"
    return f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}."


def _parse_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise UsageError(f"recipe {path.name!r} is not valid JSON: {err}.") from err


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe YAML whose numbers are those of YAML 1.2: in 1.1, ``2:4`` is the integer 124 and ``1e-4`` a string."""

    number = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in rules if tag not in number]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    digits = list("-+.0123456789")
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), digits)
    decimal = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(decimal), digits)
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as err:
        raise UsageError(f"recipe {path.name!r} is not valid YAML: {' '.join(str(err).split())}.") from err
