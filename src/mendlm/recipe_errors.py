"""What pydantic finds wrong with a recipe, as one sentence that knows its field."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mendlm.errors import UsageError

FieldPath = tuple[str | int, ...]


class RecipeError(UsageError):
    """A recipe is wrong.

    Attributes
    ----------
    field : path of the field at fault, such as ("overrides", 1, "rank"); empty if fields are wrong only together.
    """

    def __init__(self, message: str, field: FieldPath = ()) -> None:
        super().__init__(message)
        self.field = field


def field_name(path: FieldPath) -> str:
    """A path as people write it: ``overrides[1].rank``; names that do not print are quoted and escaped."""
    names = (part if isinstance(part, int) or part.isprintable() else repr(part) for part in path)
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix(".")


def recipe_error(err: ValidationError, model: type[BaseModel]) -> RecipeError:
    """The first problem that pydantic found in a `model`, or an unknown field: it may be a missing one misspelt."""
    problems = err.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path, known = _locate(problem["loc"], model)
    return RecipeError(_sentence(problem, path, known), path)


def _sentence(problem: Mapping[str, Any], path: FieldPath, known: Collection[str]) -> str:
    """One sentence with field and value; `known` are the names that the last field of `path` could have had."""
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):  # raised by a validator of ours
        return str(cause)
    if problem["type"] == "extra_forbidden":
        return _unknown_field(path, known)
    named = path
    while named and isinstance(named[-1], int):  # the value says which item it is
        named = named[:-1]
    message = problem["msg"]
    return f"{field_name(named) or 'recipe'}: {message[0].lower()}{message[1:]}, got {problem['input']!r}."


def _unknown_field(path: FieldPath, known: Collection[str]) -> str:
    field = str(path[-1])
    if len(path) == 1 and field in ("sparsity", "scope", "n", "m"):
        return f"{field!r} belongs into 'pattern': write pattern: {{sparsity: 0.5, scope: tensor}} or pattern: '2:4'."
    near = get_close_matches(field, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    where = f" in {field_name(path[:-1])}" if len(path) > 1 else ""
    return f"unknown recipe field {field!r}{where}.{hint} Fields: {', '.join(known)}."


def _locate(loc: FieldPath, model: type[BaseModel]) -> tuple[FieldPath, Collection[str]]:
    """The part of `loc` that names fields and items, and the fields of the model that its last field is in.

    Pydantic's locations also name the members of a union, such as ("refiner", "str").
    """
    path: list[str | int] = []
    inner: type[BaseModel] | None = model
    known: Collection[str] = model.model_fields
    for part in loc:
        if isinstance(part, str):
            if inner is None:
                break
            fields = inner.model_fields
            known, inner = fields, _nested_model(fields[part].annotation) if part in fields else None
        path.append(part)
    return tuple(path), known


def _nested_model(annotation: object) -> type[BaseModel] | None:
    """The model in an annotation such as ``tuple[Override, ...]`` or ``Owl | None``."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((model for arg in get_args(annotation) if (model := _nested_model(arg))), None)
