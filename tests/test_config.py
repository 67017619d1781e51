"""Recipes: one form, validated when made, the same after a round trip."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import mendlm
from mendlm import NM, TLR, Recipe, Unstructured
from mendlm.errors import UsageError
from mendlm.refiners import REFINERS, PruneOnly, ZeroShotSVD


def test_defaults() -> None:
    recipe = Recipe()
    assert recipe.pattern == Unstructured(0.5)
    assert recipe.refiner_for(576, 1536) == TLR(rank=28)
    assert (recipe.criterion, recipe.include, recipe.dtype, recipe.seed) == ("magnitude", (), None, 0)


@pytest.mark.parametrize(
    ("written", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ({"n": 1, "m": 8}, NM(1, 8)),
        ({"sparsity": 0.25, "scope": "row"}, Unstructured(0.25, "row")),
        ({"sparsity": 1}, Unstructured(1.0)),
        ({"sparsity": np.float32(0.5), "scope": "row"}, Unstructured(0.5, "row")),
        (NM(2, 4), NM(2, 4)),
    ],
)
def test_pattern_forms(written: object, pattern: object) -> None:
    assert Recipe(pattern=written).pattern == pattern


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pattern": "2:4", "rank": 16, "n_iter": 7, "solver": "exact", "seed": 3},
        {"pattern": {"sparsity": 0.6, "scope": "row"}, "rank": "2.5%", "refiner": "zero-shot-svd"},
        {"refiner": "none", "include": ["*.q_proj.weight"], "exclude": "*.0.*", "dtype": "bfloat16"},
        {"dtype": torch.float16, "criterion": "random"},
    ],
)
def test_round_trip_through_json(fields: dict[str, Any]) -> None:
    recipe = Recipe(**fields)
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("name", sorted(REFINERS))
def test_refiner_object_round_trips_through_its_fields(name: str) -> None:
    refiner = REFINERS[name](rank=0 if name == "none" else 5)  # type: ignore[call-arg]
    recipe = Recipe(refiner=refiner, calibration=None if "plain" in refiner.metrics else "c4")
    assert recipe.refiner_for(64, 96) == refiner
    again = Recipe(**json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.refiner_for(64, 96) == refiner


def test_explicit_fields_win_over_those_of_the_object() -> None:
    recipe = Recipe(refiner=TLR(rank=4, n_iter=9), rank="50%", n_iter=3)
    assert recipe.refiner_for(64, 32) == TLR(rank=16, n_iter=3)


def test_the_objects_fields_count_where_none_are_given() -> None:
    assert Recipe(refiner=TLR(rank=4, n_iter=9, solver="exact")).refiner_for(64, 64) == TLR(4, 9, "exact")
    assert Recipe(refiner=ZeroShotSVD(rank=4)).rank == 4
    assert Recipe(refiner=PruneOnly()) == Recipe(refiner="none")


def test_a_refiner_of_ones_own() -> None:
    @dataclass(frozen=True)
    class Mine(PruneOnly):
        name: ClassVar[str] = "mine"
        strength: float = 0.5

    recipe = Recipe(refiner=Mine(strength=2.0))
    assert recipe.refiner_for(8, 8) == Mine(rank=0, strength=2.0)
    assert recipe.to_dict()["refiner"] == "mine"
    assert recipe.to_dict()["refiner_options"] == {"strength": 2.0}
    with pytest.raises(UsageError, match=r"unknown refiner 'mine'"):
        Recipe(**recipe.to_dict())  # names of code in a file are not imported


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": {"sparsity": 1.5}}, r"sparsity must be in \[0, 1\], got 1\.5"),
        ({"pattern": {"sparsity": -0.1}}, r"sparsity must be in \[0, 1\], got -0\.1"),
        ({"pattern": {"sparsity": float("nan")}}, r"sparsity must be in \[0, 1\], got nan"),
        ({"pattern": {"sparsity": "half"}}, r"sparsity must be a number in \[0, 1\], got 'half'"),
        ({"pattern": {"sparsity": 0.5, "scope": "col"}}, r"scope must be 'tensor' or 'row', got 'col'"),
        ({"pattern": "4:2"}, r"needs 0 <= n < m, got 4:2"),
        ({"pattern": "2-4"}, r"pattern must be 'n:m' such as '2:4'.* got '2-4'"),
        ({"rank": -3}, r"rank must be a whole number >= 0.* got -3"),
        ({"rank": "120%"}, r"rank must be .* got '120%'"),
        ({"criterion": "magnitud"}, r"unknown criterion 'magnitud'\. Did you mean 'magnitude'\?"),
        ({"refiner": "trl"}, r"unknown refiner 'trl'\. Did you mean 'tlr'\?"),
        ({"refiner": 3}, r"refiner: .*got 3"),
        ({"refiner": "none", "rank": 4}, r"'none' has no low-rank part, got rank 4"),
        (
            {"refiner": "none", "overrides": [{"match": "*q_proj*", "rank": 4}]},
            r"'none' has no low-rank part, got rank 4 for '\*q_proj\*'",
        ),
        ({"n_iter": 0}, r"n_iter: .*greater than or equal to 1, got 0"),
        ({"n_iter": "7"}, r"n_iter: .*integer, got '7'"),
        ({"solver": "exat"}, r"solver of refiner 'tlr' must be one of .*'exact', got 'exat'"),
        ({"refiner": "zero-shot-svd", "n_iter": 3}, r"refiner 'zero-shot-svd' has no field 'n_iter'"),
        ({"refiner_options": {"solvr": 1}}, r"no field 'solvr' .*Did you mean 'solver'\?"),
        ({"refiner_options": {"rank": 1}}, r"'rank' is a field of the recipe itself"),
        ({"rnk": 4}, r"unknown recipe field 'rnk'\. Did you mean 'rank'\?"),
        ({"sparsity": 0.5}, r"'sparsity' belongs into 'pattern'"),
        ({"dtype": "int8"}, r"dtype: .*'float32', got 'int8'"),
        ({"seed": -1}, r"seed: .*got -1"),
        ({"include": [3]}, r"include: .*string, got 3"),
    ],
)
def test_bad_field_is_one_sentence_with_name_and_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Recipe(**fields)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().rank = 3


@pytest.mark.parametrize("name", ["r.yaml", "r.json"])
def test_from_file(tmp_path: Path, name: str) -> None:
    recipe = Recipe(pattern="2:4", rank="10%", n_iter=5, include=("*.mlp.*",), dtype="bfloat16")
    path = tmp_path / name
    path.write_text(json.dumps(recipe.to_dict()))
    assert Recipe.from_file(path) == recipe


def test_yaml_reads_numbers_as_people_do(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    # YAML 1.1 takes 2:4 for the sexagesimal number 124 and 010 for 8.
    path.write_text("pattern: 2:4\nrank: 5%\nrefiner: tlr\nn_iter: 10\nexclude: '*.0.*'\n")
    assert Recipe.from_file(path) == Recipe(pattern=NM(2, 4), rank="5%", n_iter=10, exclude=("*.0.*",))
    path.write_text("pattern: {sparsity: 5e-1, scope: row}\n")
    assert Recipe.from_file(path).pattern == Unstructured(0.5, "row")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: [", r"'recipe\.yaml' is not valid YAML"),
        ("- rank", r"'recipe\.yaml' must be a mapping of fields"),
        ("", r"'recipe\.yaml' must be a mapping of fields.* got None"),
        ("rank: -1", r"rank must be .* got -1\. \[recipe\.yaml, line 1, field rank\]"),
        ("x: !!python/object/apply:os.system [ls]", r"not valid YAML: could not determine a constructor"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        Recipe.from_file(path)


def test_missing_and_broken_json_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read recipe .*nowhere\.yaml"):
        Recipe.from_file(tmp_path / "nowhere.yaml")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(UsageError, match=r"'r\.json' is not valid JSON"):
        Recipe.from_file(tmp_path / "r.json")


def test_recipe_is_public() -> None:
    assert mendlm.Recipe is Recipe
