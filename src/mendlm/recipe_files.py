"""Recipes as files: YAML and JSON in which every error has its line and field, and the built-in recipes."""

from __future__ import annotations

import io
import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mendlm.config import Recipe
from mendlm.errors import UsageError
from mendlm.names import lookup
from mendlm.paths import local_path
from mendlm.recipe_errors import FieldPath, RecipeError, field_name
from mendlm.refiners import PruneOnly

R = TypeVar("R", bound=Recipe)
Lines = dict[FieldPath, int]

PRESETS = ("fast", "balanced", "best")  # built-in recipes that the command line offers by themselves

MAX_RECIPE_BYTES = 2**20  # YAML is parsed at about 10 kB in a second and nesting costs more

_FOLDER = Path(__file__).parent / "recipes"
_TAG = "tag:yaml.org,2002:"
_SUFFIXES = (".yaml", ".yml", ".json")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of a file, or the built-in one of that name; a file wins.

    Raises
    ------
    UsageError : neither a file nor a built-in name, or a bad file.
    """
    # Not Path.is_file: a pipe such as /dev/stdin is a file to us; and os.path copes with names no system allows.
    file = local_path(name_or_path)
    if os.path.exists(file) and not os.path.isdir(file):
        return Recipe.from_file(file)
    name, table = str(name_or_path), builtin_recipes()
    if name in table:
        return Recipe.from_file(table[name])
    near = get_close_matches(name.removesuffix(Path(name).suffix) if name.endswith(_SUFFIXES) else name, table, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"no recipe {name!r}: neither a file nor built in.{hint} Built in: {', '.join(table)}.")


def preset(name: str) -> str:
    """The built-in recipe that is the preset `name`.

    Raises
    ------
    UsageError : no preset has that name.
    """
    return lookup(dict(zip(PRESETS, PRESETS, strict=True)), name, "preset")


def put_over(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The `fields` of a resolved recipe with those that were `given` put over them.

    One that changes the refiner takes the old refiner's own settings (n_iter, solver, options) with it, and to or from
    one without a low-rank part the ranks; one that changes the criterion takes its options and its scope. A criterion
    or a rank holds for every tensor: those of overrides go.
    """
    kept = dict(fields)
    if given.get("criterion", kept["criterion"]) != kept["criterion"]:
        kept["criterion_options"] = {}
        if "scope" in kept["pattern"]:
            kept["pattern"] = {"sparsity": kept["pattern"]["sparsity"]}
        kept = without_overrides(kept, "criterion")
    if "rank" in given:
        kept = without_overrides(kept, "rank")
    if given.get("refiner", kept["refiner"]) != kept["refiner"]:
        dropped = {"n_iter", "solver", "refiner_options"}
        if PruneOnly.name in (given["refiner"], kept["refiner"]):
            dropped.add("rank")
            kept = without_overrides(kept, "rank")
        if kept["metric"] != "auto" and kept["refiner"] == PruneOnly.name:
            dropped.add("metric")
        kept = {name: value for name, value in kept.items() if name not in dropped}
    return {**kept, **given}


def without_overrides(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The `fields` of a recipe whose overrides leave the fields of these names alone."""
    overrides = [{k: v for k, v in override.items() if k not in names} for override in fields["overrides"]]
    return {**fields, "overrides": [override for override in overrides if len(override) > 1]}


def builtin_recipes() -> dict[str, Path]:
    """Names of the recipes that come with mendlm, sorted, and their files."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def recipe_headline(path: Path) -> str:
    """What a recipe file says it is: the first line of its leading comment, or "" if it has none."""
    first = path.read_text(encoding="utf-8-sig").lstrip().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def recipe_text(recipe: Recipe, headline: str = "") -> str:
    """A recipe as YAML that reads back as the same one: a field a line, an override a line, defaults left out.

    Parameters
    ----------
    recipe : with a registered refiner.
    headline : becomes the leading comment.

    Raises
    ------
    UsageError : the recipe cannot be said in a file: its refiner is an object of a class that is not registered.
    """
    fields, default = recipe.to_dict(), Recipe().to_dict()
    always = ("criterion", "pattern", "refiner", "rank")  # their defaults depend on one another
    lines = [f"# {line}" for line in headline.splitlines()]
    overrides = fields.pop("overrides")
    lines += [_flow({name: value})[1:-1] for name, value in fields.items() if name in always or value != default[name]]
    if overrides:
        lines += ["overrides:", *(f"  - {_flow(override)}" for override in overrides)]
    text = "\n".join(lines) + "\n"
    try:
        same = Recipe(**_parse_yaml(text, "recipe.yaml")[0]) == recipe
    except UsageError:
        same = False
    if not same:
        raise UsageError(f"the recipe cannot be written to a file: refiner {fields['refiner']!r} is not registered.")
    return text


def _flow(value: Mapping[str, Any]) -> str:
    """A mapping on one line of YAML."""
    plain = json.loads(json.dumps(value))  # YAML has no word for a number of NumPy
    dumped: str = yaml.safe_dump(plain, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True)
    return dumped.strip()


def read_fields(path: str | Path) -> tuple[dict[str, Any], Lines]:
    """The fields of a YAML or JSON file (JSON if its name ends in .json) as they are written, and their lines.

    Raises
    ------
    UsageError : the file is missing, is not valid YAML or JSON, is no mapping, or holds a repeated field.
    """
    path = local_path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_RECIPE_BYTES + 1)
        if len(raw) > MAX_RECIPE_BYTES:
            raise UsageError(f"recipe {str(path)!r} is longer than {MAX_RECIPE_BYTES} bytes, the limit.")
        text = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig").read()
    except OSError as err:
        raise UsageError(f"cannot read recipe {str(path)!r}: {err.strerror}.") from err
    except UnicodeDecodeError as err:
        raise UsageError(f"cannot read recipe {str(path)!r}: it is not text in UTF-8.") from err
    parse = _parse_json if path.suffix.lower() == ".json" else _parse_yaml
    fields, lines = parse(text, path.name)
    if not isinstance(fields, dict):
        sentence = f"recipe {path.name!r} must be a mapping of fields, e.g. 'rank: 5%', got {reprlib.repr(fields)}."
        raise _error(sentence, path.name, lines[()])
    return fields, lines


def located_error(sentence: str, file: str, lines: Lines, field: FieldPath = ()) -> RecipeError:
    """The error with its place in `file`: the line of the `field`, or of what it is missing from."""
    known = next(field[:n] for n in range(len(field), -1, -1) if field[:n] in lines)
    return _error(sentence, file, lines[known] if known else None, field=field)


def read_recipe(path: str | Path, kind: type[R]) -> R:
    """Read a recipe of class `kind` from a YAML or JSON file (JSON if its name ends in .json).

    Raises
    ------
    UsageError : the file is missing, is not valid YAML or JSON, is no mapping, or holds a bad, unknown or repeated
        field. One sentence with the file, the line and the field or column.
    """
    fields, lines = read_fields(path)
    try:
        return kind(**fields)
    except UsageError as err:
        field = err.field if isinstance(err, RecipeError) else ()
        field = _inside(fields, field, str(err)) if field else _blame(kind, fields, str(err))
        raise located_error(str(err), Path(path).name, lines, field) from None


def _inside(fields: Any, path: FieldPath, sentence: str) -> FieldPath:
    """The `path`, or that of the entry in it that `sentence` begins with, for fields such as ``pattern``."""
    try:
        for part in path:
            fields = fields[part]
    except (KeyError, IndexError, TypeError):  # a field that is missing, or whose parent was written short
        return path
    named = sentence.partition(" ")[0]
    return (*path, named) if isinstance(fields, Mapping) and named in fields else path


def _blame(kind: type[Recipe], fields: Mapping[str, Any], sentence: str) -> FieldPath:
    """The field at fault where fields are wrong only together, so that validation names none.

    It is one without which that `sentence` would not have come, preferably one without which all is well, then one
    inside of another, then the one that the sentence mentions last: "refiner 'none' has no low-rank part, got rank 4".
    """

    def without(path: FieldPath) -> str:
        """What is wrong without the field; "" if nothing is."""
        name, *rest = path
        value = {key: value for key, value in fields[str(name)].items() if key != rest[0]} if rest else None
        try:
            kind(**{key: fields[key] for key in fields if key != name}, **({str(name): value} if rest else {}))
        except UsageError as err:
            return str(err)
        return ""

    def mentioned(path: FieldPath) -> int:
        return max((m.start() for m in re.finditer(rf"\b{re.escape(str(path[-1]))}\b", sentence)), default=-1)

    options = [name for name in fields if name.endswith("_options") and isinstance(fields[name], dict)]
    paths: list[FieldPath] = [(name,) for name in fields] + [(name, key) for name in options for key in fields[name]]
    suspects = {path: wrong for path in paths if (wrong := without(path)) != sentence}
    return max(suspects, key=lambda path: (not suspects[path], len(path), mentioned(path)), default=())


def _error(
    sentence: str, file: str, line: int | None = None, *, column: int | None = None, field: FieldPath = ()
) -> RecipeError:
    """The error with the place in `file` at its end; `line` and `column` count from 1."""
    place = {"line": line, "column": column, "field": field_name(field) or None}
    where = ", ".join([file, *(f"{key} {at}" for key, at in place.items() if at is not None)])
    return RecipeError(f"{sentence} [{where}]", field)


class _Loader(yaml.SafeLoader):
    """Safe YAML whose numbers are those of YAML 1.2: in 1.1, ``2:4`` is the integer 124 and ``1e-4`` a string.

    Dates and merge keys are plain text too.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (declared by yaml)
        first: [(tag, regexp) for tag, regexp in rules if tag in (f"{_TAG}null", f"{_TAG}bool")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_DIGITS = list("-+.0123456789")
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), _DIGITS)
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"),
    _DIGITS,
)


def _parse_json(text: str, file: str) -> tuple[Any, Lines]:
    """Values and lines of a JSON text."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as err:
        sentence = f"recipe {file!r} is not valid JSON: {_lowered(err.msg)}."
        raise _error(sentence, file, err.lineno, column=err.colno) from None
    except (ValueError, RecursionError) as err:
        raise _error(f"recipe {file!r} is not valid JSON: {_lowered(str(err))}.", file) from None
    try:
        # JSON is YAML but for tabs, which valid JSON has between its tokens only; the values above are the ones to
        # use, for the two differ in how they write characters beyond 16 bits.
        root = yaml.compose(text.replace("\t", " "), _Loader)
    except (yaml.YAMLError, RecursionError):
        return values, {(): 1}
    return values, _Walk(file).over(root)[1]


def _parse_yaml(text: str, file: str) -> tuple[Any, Lines]:
    """Values and lines of a YAML text."""
    try:
        return _Walk(file).over(yaml.compose(text, _Loader))
    except yaml.MarkedYAMLError as err:
        said = ", ".join(" ".join(part.split()) for part in (err.context, err.problem) if part)
        hint = ""
        if "'\\t'" in said:
            hint = " Indent with spaces, not tabs."
        elif "alias" in said:
            hint = " A value that begins with * needs quotes."
        mark = err.problem_mark or err.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
        raise _error(f"recipe {file!r} is not valid YAML: {said}.{hint}", file, line, column=column) from None
    except yaml.reader.ReaderError as err:
        before = text[: err.position]
        line, column = before.count("\n") + 1, err.position - before.rfind("\n")
        sentence = f"recipe {file!r} is not valid YAML: character {chr(int(err.character))!r} is not allowed."
        raise _error(sentence, file, line, column=column) from None
    except RecursionError:
        raise _error(f"recipe {file!r} is not valid YAML: it is nested too deeply.", file) from None


class _Walk:
    """Turns a tree of YAML nodes into values, noting the line of every field."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._loader = _Loader("")  # only for what it makes of single scalars
        self._lines: Lines = {}
        self._seen: set[int] = set()

    def over(self, root: yaml.Node | None) -> tuple[Any, Lines]:
        """Values under `root`, and lines."""
        if root is None:
            return None, {(): 1}
        return self._value(root, ()), self._lines

    def _error(self, sentence: str, node: yaml.Node, field: FieldPath) -> RecipeError:
        return _error(sentence, self._file, node.start_mark.line + 1, field=field)

    def _value(self, node: yaml.Node, field: FieldPath) -> Any:
        self._lines.setdefault(field, node.start_mark.line + 1)
        if id(node) in self._seen:
            raise _error(
                "recipes have no YAML aliases: write the value out, or put text that begins with * in quotes.",
                self._file,
                self._lines[field],
                field=field,
            )
        self._seen.add(id(node))
        plain = "map" if isinstance(node, yaml.MappingNode) else "seq" if isinstance(node, yaml.SequenceNode) else None
        if node.tag != f"{_TAG}{plain}" if plain else not node.tag.startswith(_TAG):
            sentence = f"could not determine a constructor for the tag {node.tag!r}"
            raise self._error(f"recipe {self._file!r} is not valid YAML: {sentence}.", node, field)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, field)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*field, i)) for i, item in enumerate(node.value)]
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError):
            kind = node.tag.removeprefix(_TAG)
            raise self._error(f"{reprlib.repr(node.value)} cannot be read as {kind!r}.", node, field) from None

    def _mapping(self, node: yaml.MappingNode, field: FieldPath) -> dict[str, Any]:
        values = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a collection"
                raise self._error(f"the name of a field must be a word, got {shown}.", key, field)
            here = (*field, key.value)
            if here in self._lines:
                sentence = f"field {key.value!r} is given twice, first in line {self._lines[here]}. Keep one of them."
                raise self._error(sentence, key, here)
            self._lines[here] = key.start_mark.line + 1
            values[key.value] = self._value(value, here)
        return values


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
