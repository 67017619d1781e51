"""The points of a sweep: a recipe file with a section ``sweep``, multiplied out and validated before anything runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mendlm.config import Recipe
from mendlm.errors import UsageError
from mendlm.recipe_errors import FieldPath, RecipeError, recipe_error
from mendlm.recipe_files import Lines, load_recipe, located_error, put_over, read_fields
from mendlm.refiners import PruneOnly
from mendlm.sweeping.records import DENSE

SECTION = "sweep"
PRESET = "preset"  # not a field of a recipe: what the fields are put over
_SHORT = {"sparsity": "pattern.sparsity", "scope": "pattern.scope", "tile": "pattern.tile"}
# What a mapping field that was written short stands for.
_WHOLE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "calibration": lambda source: {"source": source},
    "pattern": lambda pattern: {},
    "match_blocks": lambda n_steps: {"n_steps": n_steps} if n_steps else {},
    "layer_sparsity": lambda name: {},
}
_NESTED = (*_WHOLE, "criterion_options", "refiner_options")
_OF_LOW_RANK = ("rank", "n_iter", "solver", "refiner_options")  # nothing to refiner none

Fields = dict[str, Any]
Check = Callable[[Recipe], None]


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


class SweepSettings(BaseModel):
    """The section ``sweep`` of a file: which recipes, and what they are evaluated on.

    Parameters
    ----------
    axes : name -> values. A list holds values of the recipe field of that name (``calibration.n_sequences`` for one in
        another, ``sparsity`` for that of the pattern, ``preset`` for built-in recipes and files); a mapping holds
        labels, each with the fields that it stands for. Points are all combinations, the first axis slowest.
    points : more points, each as its fields, with a ``name`` if it is to have one.
    exclude : axis -> value or list of values; combinations that match all of an entry are left out.
    impossible : "skip" combinations that are no valid recipe, or do not fit the model, or "refuse" to start. A value
        that is impossible in every combination, or an impossible one of `points`, is always refused.
    text, dataset : what to evaluate on, one of them.
    n_windows, seqlen : as in `mendlm.perplexity`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    axes: dict[str, Annotated[list[Any], Field(min_length=1)] | Annotated[dict[str, Fields], Field(min_length=1)]] = (
        Field(default_factory=dict)
    )
    points: list[Fields] = Field(default_factory=list)
    exclude: list[Fields] = Field(default_factory=list)
    impossible: Literal["skip", "refuse"] = "skip"
    text: Annotated[str | None, BeforeValidator(_as_text)] = None
    dataset: str | None = None
    n_windows: Annotated[int, Field(ge=1, strict=True)] | None = None
    seqlen: Annotated[int, Field(ge=2, strict=True)] | None = None


class _SweepFile(BaseModel):
    """For validation alone: it gives errors the path that they have in the file."""

    model_config = ConfigDict(extra="forbid")

    sweep: SweepSettings


@dataclass(frozen=True)
class Point:
    """One recipe of a sweep, by its name and by the values that it has of the axes."""

    name: str
    values: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Skipped:
    """A combination that is impossible, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Grid:
    """The points of a sweep, those that coincide once, and the combinations that are none."""

    settings: SweepSettings
    points: tuple[Point, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Choice:
    """One value of an axis, or the fields of a point: where it is in the file, what it is called, what it sets."""

    axis: str
    place: FieldPath
    value: Any
    fields: Fields


_Combination = tuple[_Choice, ...]


def read_grid(source: str | Path | Mapping[str, Any], check: Check) -> Grid:
    """The points that a file, or the same as a mapping, asks for; each is a valid recipe that passes `check`.

    Parameters
    ----------
    source : a YAML or JSON file: the fields of a recipe, which all points share, and the section ``sweep``.
    check : raises `UsageError` if a recipe does not fit the model.

    Raises
    ------
    UsageError : a bad file, an unknown axis, a value that fits nowhere, an impossible point; with file, line and field.
    """
    if isinstance(source, Mapping):
        return _Expansion(dict(source), "", {(): 1}).grid(check)
    fields, lines = read_fields(source)
    return _Expansion(fields, Path(source).name, lines).grid(check)


class _Expansion:
    """Multiplies a file out; knows where everything in it is."""

    def __init__(self, fields: Fields, file: str, lines: Lines) -> None:
        self._base = {name: value for name, value in fields.items() if name != SECTION}
        self._file, self._lines = file, lines
        if SECTION not in fields:
            raise self._error(f"there is no section {SECTION!r}: axes, points and what to evaluate on.", ())
        try:
            self._settings = _SweepFile(sweep=fields[SECTION]).sweep
        except ValidationError as err:
            wrong = recipe_error(err, _SweepFile)
            raise self._error(str(wrong), wrong.field) from None

    def grid(self, check: Check) -> Grid:
        """All points, validated."""
        self._check_exclusions()
        axes = [self._axis(name, values) for name, values in self._settings.axes.items()]
        combinations = [c for c in itertools.product(*axes) if not self._excluded(c)] if axes else []
        explicit = [(self._explicit(i, fields),) for i, fields in enumerate(self._settings.points)]
        if not axes and not explicit:
            raise self._error("the sweep has neither axes nor points.", (SECTION,))
        found: dict[str, Point] = {}
        wrong: list[tuple[_Combination, UsageError]] = []
        for combination in [*combinations, *explicit]:
            try:
                point = self._point(combination)
                check(point.recipe)
            except UsageError as err:
                if self._settings.impossible == "refuse" or combination in explicit:
                    raise self._blamed(combination, err) from None
                wrong.append((combination, err))
            else:
                found.setdefault(json.dumps(point.recipe.to_dict(), sort_keys=True), point)
        self._refuse_useless(combinations, wrong)
        skipped = tuple(Skipped(_name(_values(c)), str(err)) for c, err in wrong)
        return Grid(self._settings, tuple(_with_own_names(found.values())), skipped)

    def _error(self, sentence: str, field: FieldPath) -> UsageError:
        return located_error(sentence, self._file, self._lines, field) if self._file else RecipeError(sentence, field)

    def _axis(self, name: str, values: Sequence[Any] | Mapping[str, Fields]) -> list[_Choice]:
        """The choices of one axis."""
        place: FieldPath = (SECTION, "axes", name)
        if isinstance(values, Mapping):
            for label, fields in values.items():
                self._check_names(fields, (*place, label))
            return [_Choice(name, (*place, label), label, fields) for label, fields in values.items()]
        self._check_names([name], place[:-1])
        for i, value in enumerate(values):
            if value in values[:i]:
                raise self._error(f"value {_label(value)} of axis {name!r} is given twice.", (*place, i))
        return [_Choice(name, (*place, i), value, {name: value}) for i, value in enumerate(values)]

    def _explicit(self, index: int, fields: Fields) -> _Choice:
        place: FieldPath = (SECTION, "points", index)
        values = {name: value for name, value in fields.items() if name != "name"}
        self._check_names(values, place)
        return _Choice("", place, fields.get("name"), values)

    def _check_names(self, names: Iterator[str] | Sequence[str] | Mapping[str, Any], place: FieldPath) -> None:
        known = [PRESET, *_SHORT, *Recipe.model_fields]
        for name in names:
            first, dot, _ = name.partition(".")
            if name not in known and not (dot and first in _NESTED):
                near = get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise self._error(
                    f"{name!r} is no field of a recipe.{hint} To vary several fields together, give the axis labels, "
                    "each with its fields.",
                    (*place, name),
                )

    def _check_exclusions(self) -> None:
        for i, entry in enumerate(self._settings.exclude):
            for axis, value in entry.items():
                place: FieldPath = (SECTION, "exclude", i, axis)
                if axis not in self._settings.axes:
                    sentence = f"{axis!r} is no axis of the sweep. Axes: {', '.join(self._settings.axes)}."
                    raise self._error(sentence, place)
                if strange := [one for one in _listed(value) if one not in self._settings.axes[axis]]:
                    raise self._error(f"axis {axis!r} has no value {_label(strange[0])}.", place)

    def _excluded(self, combination: _Combination) -> bool:
        values = _values(combination)
        return any(
            all(values[axis] in _listed(value) for axis, value in entry.items()) for entry in self._settings.exclude
        )

    def _point(self, combination: _Combination) -> Point:
        """The point of a combination.

        Raises
        ------
        UsageError : it is no valid recipe.
        """
        given = dict(self._base)
        for choice in combination:
            given |= choice.fields
        preset, dotted = given.pop(PRESET, None), {}
        for name in list(given):
            if "." in (whole := _SHORT.get(name, name)):
                dotted[whole] = given.pop(name)
        fields = given if preset is None else put_over(load_recipe(str(preset)).to_dict(), given)
        for name, value in dotted.items():
            _set(fields, name, value)
        values = _values(combination)
        if fields.get("refiner") == PruneOnly.name:
            fields = {name: value for name, value in fields.items() if name not in _OF_LOW_RANK}
            values = {name: value for name, value in values.items() if name.partition(".")[0] not in _OF_LOW_RANK}
        return Point(_name(values, combination), values, Recipe(**fields))

    def _blamed(self, combination: _Combination, err: UsageError) -> UsageError:
        """The error with the place of what is at fault, as far as it is known, and the point."""
        field = err.field if isinstance(err, RecipeError) else ()
        place: FieldPath = ()
        if field and field[0] in self._base:
            place = field
        for choice in combination:
            if field and any(_SHORT.get(name, name).partition(".")[0] == field[0] for name in choice.fields):
                place = choice.place
        if not place and not combination[0].axis:
            place = combination[0].place
        return self._error(f"{err} Point: {_name(_values(combination), combination)}.", place)

    def _refuse_useless(
        self, all_of_them: Sequence[_Combination], wrong: Sequence[tuple[_Combination, UsageError]]
    ) -> None:
        """Raise the error of a value that is wrong in every combination."""
        if not wrong:
            return
        if len(wrong) == len(all_of_them):
            raise self._blamed(*wrong[0])
        failed = {_places(combination): err for combination, err in wrong}
        for choice in {choice.place: choice for combination in all_of_them for choice in combination}.values():
            errors = [failed.get(_places(c)) for c in all_of_them if choice.place in _places(c)]
            if errors[0] is not None and None not in errors:
                raise self._error(f"{errors[0]} It is so in every combination with this value.", choice.place)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _places(combination: _Combination) -> tuple[FieldPath, ...]:
    return tuple(choice.place for choice in combination)


def _set(fields: Fields, path: str, value: Any) -> None:
    """Set ``field.inner`` in the mapping `field`, which may be missing or written short."""
    name, _, inner = path.partition(".")
    whole = fields.get(name, {"sparsity": 0.5} if name == "pattern" else None)
    whole = dict(whole) if isinstance(whole, Mapping) else _WHOLE.get(name, lambda _: {})(whole)
    if name == "pattern":
        if inner == "sparsity" and "n" in whole:
            whole = {}
        whole.pop({"scope": "tile", "tile": "scope"}.get(inner, ""), None)
    fields[name] = whole | {inner: value}


def _values(combination: _Combination) -> Fields:
    """Axis -> value; the fields of an explicit point."""
    if combination and not combination[0].axis:
        return dict(combination[0].fields)
    return {choice.axis: choice.value for choice in combination}


def _name(values: Mapping[str, Any], combination: _Combination = ()) -> str:
    """What the point is called: by the name it was given, or by its values."""
    if combination and not combination[0].axis and combination[0].value is not None:
        return str(combination[0].value)
    return " ".join(f"{axis}={_label(value)}" for axis, value in values.items()) or "base"


def _label(value: Any) -> str:
    """A value in a word: ``{sparsity: 0.5}`` is "sparsity:0.5"."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}:{_label(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return "+".join(map(_label, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _with_own_names(points: Any) -> Iterator[Point]:
    """The points, those of a name that is taken with a number behind it."""
    taken = {DENSE}
    for point in points:
        name, number = point.name, 2
        while name in taken:
            name, number = f"{point.name} ({number})", number + 1
        taken.add(name)
        yield Point(name, point.values, point.recipe)
