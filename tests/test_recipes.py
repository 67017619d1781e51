"""Recipes as files: the place of every error, the built-in recipes, their page."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mendlm.budgets import resolve_rank
from mendlm.config import Calibration, Matching, Override, Owl, Recipe
from mendlm.criteria.simple import Magnitude
from mendlm.criteria.sparsegpt import SparseGPT
from mendlm.errors import UsageError
from mendlm.patterns import NM, Pattern, Unstructured
from mendlm.recipe_errors import RecipeError, field_name
from mendlm.recipe_files import builtin_recipes, load_recipe, recipe_headline, recipe_text
from mendlm.refiners import PCP

ROOT = Path(__file__).resolve().parents[1]
BUILT_IN = builtin_recipes()

# text, what the sentence says, the place at its end
YAML_ERRORS = {
    # values
    "rank": ("refiner: tlr\n\n# how much\nrank: 5x\n", "rank must be .*got '5x'", "line 4, field rank"),
    "negative rank": ("rank: -1", "rank must be a whole number >= 0.*got -1", "line 1, field rank"),
    "null": ("seed: 1\nrank:\n", "rank must be .*got None", "line 2, field rank"),
    "type": ("seed: '3'", "seed: .*integer, got '3'", "line 1, field seed"),
    "float for int": ("n_iter: 1.5", "n_iter: .*integer, got 1.5", "line 1, field n_iter"),
    "choice": ("dead_columns: dorp", "dead_columns: .*'drop'.*got 'dorp'", "line 1, field dead_columns"),
    "union": ("seed: 1\nrefiner: 3", "refiner: .*string, got 3", "line 2, field refiner"),
    "item": ("include:\n- a\n- 3\n", "include: .*string, got 3", r"line 3, field include\[1\]"),
    "flow item": ("skip_layers: [\n  1,\n  x]", "skip_layers: .*'x'", r"line 3, field skip_layers\[1\]"),
    "pattern": ("seed: 1\npattern: 4:2", "needs 0 <= n < m, got 4:2", "line 2, field pattern"),
    "in pattern": ("pattern:\n  scope: row\n  sparsity: 2", "sparsity must be", r"line 3, field pattern\.sparsity"),
    # nested fields
    "nested": (
        "calibration:\n  source: c4\n  n_sequences: 0\n",
        r"calibration\.n_sequences: .*greater than or equal to 1, got 0",
        r"line 3, field calibration\.n_sequences",
    ),
    "nested in a list": (
        "overrides:\n- match: a\n  rank: 3\n- match: b\n  rank: 5x\n",
        "rank must be .*got '5x'",
        r"line 5, field overrides\[1\]\.rank",
    ),
    "nested twice": (
        "overrides:\n- match: a\n  pattern:\n    sparsity: 2\n",
        "sparsity must be",
        r"line 4, field overrides\[0\]\.pattern\.sparsity",
    ),
    "nested model": (
        "calibration: c4\nlayer_sparsity:\n  spread: 3\n",
        r"layer_sparsity\.spread: .*less than 1, got 3",
        r"line 3, field layer_sparsity\.spread",
    ),
    "missing": ("overrides:\n- {match: a}\n- rank: 5\n", "field required", r"line 3, field overrides\[1\]\.match"),
    "no mapping": ("overrides:\n- a\n", "overrides: .*Override, got 'a'", r"line 2, field overrides\[0\]"),
    # unknown fields
    "unknown": ("seed: 1\nrnk: 4", r"unknown recipe field 'rnk'\. Did you mean 'rank'", "line 2, field rnk"),
    "unknown nested": (
        "calibration:\n  source: c4\n  n_sequence: 3\n",
        r"unknown recipe field 'n_sequence' in calibration\. Did you mean 'n_sequences'\? Fields: source,",
        r"line 3, field calibration\.n_sequence",
    ),
    "unknown in a list": (
        "overrides:\n- match: a\n  sparsty: 0.5\n",
        r"'sparsty' in overrides\[0\]\. Did you mean 'sparsity'",
        r"line 3, field overrides\[0\]\.sparsty",
    ),
    "misplaced": ("seed: 1\nsparsity: 0.5", "'sparsity' belongs into 'pattern'", "line 2, field sparsity"),
    "self": ("self: 3", "unknown recipe field 'self'", "line 1, field self"),
    "merge key": ("<<: {rank: 3}", "unknown recipe field '<<'", "line 1, field <<"),
    "control character": ('"a\\nb": 3', r"unknown recipe field 'a\\nb'", r"line 1, field 'a\\nb'"),
    # fields that are wrong together
    "name": ("seed: 1\nrefiner: trl", "unknown refiner 'trl'", "line 2, field refiner"),
    "option": ("refiner_options:\n  solvr: 1", "no field 'solvr'", r"line 2, field refiner_options\.solvr"),
    "option's value": (
        "refiner: zero-shot-svd\nrefiner_options:\n  refit: 3",
        "refit of refiner .*got 3",
        r"line 3, field refiner_options\.refit",
    ),
    "option out of range": (
        "refiner: accelerated-tlr\nrefiner_options: {\n  rtol: -1}",
        "rtol must be at least 0",
        r"line 3, field refiner_options\.rtol",
    ),
    "option of the recipe": (
        "refiner_options:\n  rank: 3",
        "'rank' is a field of the recipe",
        r"line 2, field refiner_options\.rank",
    ),
    "solver": ("solver: exat\nrefiner: accelerated-tlr", "solver .*got 'exat'", "line 1, field solver"),
    "field of another": ("refiner: zero-shot-svd\nn_iter: 3", "no field 'n_iter'", "line 2, field n_iter"),
    "no low-rank part": ("refiner: none\nrank: 4", "no low-rank part, got rank 4", "line 2, field rank"),
    "no data": ("rank: 4\nmetric: gram", "metric 'gram' weighs the inputs", "line 2, field metric"),
    "first of two": (
        "refiner_options: {x: 1}\ncriterion_options: {y: 1}",
        "'y'",
        r"line 2, field criterion_options\.y",
    ),
    # form
    "twice": ("rank: 3\nseed: 1\nrank: 3", "'rank' is given twice, first in line 1", "line 3, field rank"),
    "twice, nested": (
        "calibration:\n  source: c4\n  source: c4",
        "'source' is given twice, first in line 2",
        r"line 3, field calibration\.source",
    ),
    "list": ("# a list\n- rank", r"must be a mapping of fields.*got \['rank'\]", "line 2"),
    "text": ("rank:5%", "must be a mapping of fields.*got 'rank:5%'", "line 1"),
    "nothing": ("# nothing\n", "must be a mapping of fields.*got None", "line 1"),
    "number for a name": ("seed: 1\n5: 3", "the name of a field must be a word, got 5", "line 2"),
    "list for a name": ("? [a]\n: 3", "the name of a field must be a word, got a collection", "line 1"),
    "unclosed": ("rank: 3\ninclude: [a", "not valid YAML: while parsing a flow sequence", "line 2, column 12"),
    "two colons": ("rank: 3\nseed: 1: 2", "not valid YAML: mapping values are not allowed", "line 2, column 8"),
    "tab": ("rank: 3\ninclude:\n\t- a", "Indent with spaces, not tabs", "line 3, column 1"),
    "bare glob": ("seed: 1\nexclude: *.mlp.*", r"begins with \* needs quotes", "line 2, column 11"),
    "bare word glob": ("exclude: *mlp", r"undefined alias 'mlp'.*needs quotes", "line 1, column 10"),
    "alias": ("include: &a [x]\nexclude: *a", "recipes have no YAML aliases", "line 2, field exclude"),
    "endless alias": ("include: &a [*a]", "recipes have no YAML aliases", r"line 1, field include\[0\]"),
    "tag": (
        "seed: 1\nx: !!python/object/apply:os.system [ls]",
        "determine a constructor for the tag",
        "line 2, field x",
    ),
    "no int": ("seed: !!int x", "'x' cannot be read as 'int'", "line 1, field seed"),
    "two documents": ("rank: 3\n---\nrank: 4", "expected a single document", "line 2, column 1"),
    "bell": ("rank: 3\nseed: \x07", r"character '\\x07' is not allowed", "line 2, column 7"),
}
JSON_ERRORS = {
    "value": ('{\n "seed": 1,\n "rank": "5x"}', "rank must be .*got '5x'", "line 3, field rank"),
    "nested": (
        '{"calibration": {"source": "c4",\n\t"n_sequences": 0}}',
        r"calibration\.n_sequences: ",
        r"line 2, field calibration\.n_sequences",
    ),
    "twice": ('{"rank": 3,\n"rank": 4}', "'rank' is given twice, first in line 1", "line 2, field rank"),
    "unclosed": ('{"rank": 3', "not valid JSON: expecting ',' delimiter", "line 1, column 11"),
    "comma": (
        '{"rank": 3,\n}',
        "not valid JSON: expecting property name|illegal trailing comma",
        r"line \d, column \d+",
    ),
    "YAML": ("rank: 3", "not valid JSON: expecting value", "line 1, column 1"),
    "list": ("[1]", r"must be a mapping of fields.*got \[1\]", "line 1"),
    "empty": ("", "not valid JSON: expecting value", "line 1, column 1"),
}


def refused(tmp_path: Path, name: str, text: str) -> RecipeError:
    path = tmp_path / name
    path.write_bytes(text.encode())
    with pytest.raises(RecipeError) as caught:
        Recipe.from_file(path)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("case", YAML_ERRORS)
def test_errors_in_yaml_say_where(case: str, tmp_path: Path) -> None:
    text, sentence, place = YAML_ERRORS[case]
    said = str(refused(tmp_path, "r.yaml", text))
    assert re.search(rf"{sentence}.* \[r\.yaml, {place}\]$", said), said


@pytest.mark.parametrize("case", JSON_ERRORS)
def test_errors_in_json_say_where(case: str, tmp_path: Path) -> None:
    text, sentence, place = JSON_ERRORS[case]
    said = str(refused(tmp_path, "r.json", text))
    assert re.search(rf"({sentence}).* \[r\.json, {place}\]$", said), said


@pytest.mark.parametrize(
    ("name", "text"),
    [("r.yaml", "[" * 1500), ("r.json", "[" * 200_000), ("r.json", '{"seed": ' + "9" * 5000 + "}")],
    ids=["deep YAML", "deep JSON", "long number"],
)
def test_monsters_are_refused(tmp_path: Path, name: str, text: str) -> None:
    said = str(refused(tmp_path, name, text))
    assert re.search(r"is not valid (YAML|JSON): .* \[r\.(yaml|json)\]$", said)
    assert len(said) < 300


def test_an_error_in_python_knows_its_field() -> None:
    with pytest.raises(RecipeError, match=r"got '5x'\.$") as caught:
        Recipe(overrides=[{"match": "a"}, {"match": "b", "rank": "5x"}])
    assert caught.value.field == ("overrides", 1, "rank")
    assert field_name(caught.value.field) == "overrides[1].rank"
    with pytest.raises(RecipeError, match=r"'sorce' in calibration\. Did you mean 'source'\?") as caught:
        Recipe(calibration={"sorce": "c4"})
    assert caught.value.field[0] == "calibration"


def test_line_ends_of_any_system_and_a_byte_order_mark(tmp_path: Path) -> None:
    assert str(refused(tmp_path, "r.yaml", "\ufeffseed: 1\r\nrank: x\r\n")).endswith("line 2, field rank]")
    assert str(refused(tmp_path, "r.json", '\ufeff{"seed": 1,\r\n"rank": "x"}')).endswith("line 2, field rank]")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read recipe .*nowhere\.yaml': No such file or directory\.$"):
        Recipe.from_file(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match=r"cannot read recipe .*: Is a directory"):
        Recipe.from_file(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"rank: \xff\xfe")
    with pytest.raises(UsageError, match="it is not text in UTF-8"):
        Recipe.from_file(tmp_path / "x.yaml")


def test_a_file_of_any_length_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(UsageError, match=r"long\.yaml' is longer than 1048576 bytes, the limit"):
        Recipe.from_file(path)


def test_json_and_yaml_of_the_same_values_are_one_recipe(tmp_path: Path) -> None:
    values = {"pattern": {"n": 2, "m": 4}, "exclude": ["*.mlp.*"], "calibration": {"source": "𝄞/text\t.txt"}}
    for name in ("r.json", "r.yaml"):
        (tmp_path / name).write_text(
            json.dumps(values, ensure_ascii=name == "r.json", indent="\t" if name == "r.json" else 1)
        )
    assert Recipe.from_file(tmp_path / "r.json") == Recipe.from_file(tmp_path / "r.yaml") == Recipe(**values)


TOKENS = "source match c4 tlr 2:4 0.5 5% null x -1 << ? [ ] { } * *a ' \" # |".split()
PIECES = ["\n", "\n  ", "\n- ", ": ", "- ", ", ", "&a ", "!!set ", "\t", "\u2028", *TOKENS, *Recipe.model_fields]


@pytest.mark.parametrize("name", ["r.yaml", "r.json"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(text=st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_any_text_is_a_recipe_or_one_sentence(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    said = ""
    try:
        recipe = Recipe.from_file(path)
    except UsageError as err:
        said = str(err)
    if said:
        assert re.fullmatch(r".* \[r\.(yaml|json)(, line \d+, (column|field) .+|, line \d+)?\]", said)
    else:
        assert Recipe(**recipe.to_dict()) == recipe


# name -> criterion, pattern, metric, refiner, rank, n_iter, source of the calibration text
HALF, HALF_BY_TENSOR = Unstructured(0.5, "row"), Unstructured(0.5, "tensor")
SETTINGS: dict[str, tuple[str, Pattern, str, str, int | str, int | None, str | None]] = {
    "magnitude-50": ("magnitude", HALF, "plain", "none", 0, None, None),
    "tlr-50": ("magnitude", HALF, "plain", "tlr", 128, 50, None),
    "tlr-2-4": ("magnitude", NM(2, 4), "plain", "tlr", 128, 50, None),
    "tlr-4-8": ("magnitude", NM(4, 8), "plain", "tlr", 128, 50, None),
    "accelerated-tlr-50": ("magnitude", HALF, "plain", "accelerated-tlr", 128, 50, None),
    "zero-shot-svd-50": ("magnitude", HALF, "plain", "zero-shot-svd", 128, None, None),
    "pcp-50": ("magnitude", HALF, "plain", "pcp", 128, None, None),
    "wanda-50": ("wanda", HALF, "plain", "none", 0, None, "c4"),
    "wanda-2-4": ("wanda", NM(2, 4), "plain", "none", 0, None, "c4"),
    "wanda-4-8": ("wanda", NM(4, 8), "plain", "none", 0, None, "c4"),
    "wanda-tlr-50": ("wanda", HALF, "plain", "tlr", 128, 50, "c4"),
    "wanda-tlr-2-4": ("wanda", NM(2, 4), "plain", "tlr", 128, 50, "c4"),
    "wanda-tlr-4-8": ("wanda", NM(4, 8), "plain", "tlr", 128, 50, "c4"),
    "wanda-svd-50": ("wanda", HALF, "plain", "zero-shot-svd", 128, None, "c4"),
    "sparsegpt-50": ("sparsegpt", HALF_BY_TENSOR, "plain", "none", 0, None, "c4"),
    "sparsegpt-2-4": ("sparsegpt", NM(2, 4), "plain", "none", 0, None, "c4"),
    "sparsegpt-svd-2-4": ("sparsegpt", NM(2, 4), "plain", "zero-shot-svd", 128, None, "c4"),
    "ria-50": ("ria", HALF_BY_TENSOR, "plain", "none", 0, None, "c4"),
    "oats-50": ("wanda", Unstructured(0.625, "row"), "diagonal", "oats", "6.25%", 80, "c4"),
    "owl-wanda-70": ("wanda", Unstructured(0.7, "row"), "plain", "none", 0, None, "c4"),
    "self-calibrated-wanda-tlr-50": ("wanda", HALF, "plain", "tlr", 128, 50, "self"),
    "gram-tlr-50": ("wanda", HALF, "gram", "tlr", 128, 50, "c4"),
    "gram-tlr-2-4": ("wanda", NM(2, 4), "gram", "tlr", 128, 50, "c4"),
    "hassle-free-50": ("sparsegpt", HALF_BY_TENSOR, "gram", "hassle-free", 128, 80, "c4"),
    "hassle-free-2-4": ("sparsegpt", NM(2, 4), "gram", "hassle-free", 64, 80, "c4"),
    "eora-50": ("sparsegpt", HALF_BY_TENSOR, "gram", "eora", 128, None, "c4"),
    "eora-2-4": ("sparsegpt", NM(2, 4), "gram", "eora", 128, None, "c4"),
    "slim-lora-50": ("wanda", HALF, "diagonal", "slim-lora", "10%", None, "c4"),
    "slim-lora-2-4": ("wanda", NM(2, 4), "diagonal", "slim-lora", "10%", None, "c4"),
    "fast": ("magnitude", HALF_BY_TENSOR, "plain", "tlr", "5%", 50, None),
    "balanced": ("sparsegpt", HALF_BY_TENSOR, "gram", "accelerated-tlr", "5%", 20, "c4"),
    "best": ("magnitude", HALF_BY_TENSOR, "gram", "joint-admm", "5%", None, "c4"),
    "dsnot-50": ("dsnot", HALF, "plain", "none", 0, None, "c4"),
    "dsnot-2-4": ("dsnot", NM(2, 4), "plain", "none", 0, None, "c4"),
}


def test_every_built_in_recipe_is_listed_here() -> None:
    assert list(BUILT_IN) == sorted(SETTINGS)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_recipes_are_what_was_published(name: str) -> None:
    criterion, pattern, metric, refiner, rank, n_iter, source = SETTINGS[name]
    recipe = load_recipe(name)
    assert (recipe.criterion, recipe.pattern, recipe.metric_kind) == (criterion, pattern, metric)
    assert (recipe.refiner, recipe.rank, recipe.n_iter) == (refiner, rank, n_iter)
    assert (recipe.calibration.source if recipe.calibration else None) == source
    if source == "c4":
        assert recipe.calibration is not None
        assert (recipe.calibration.n_sequences, recipe.calibration.windows) == (128, "random")
    if refiner in ("zero-shot-svd", "slim-lora"):
        assert recipe.refiner_options == {"refit": False}
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_recipes_name_paper_and_result(name: str) -> None:
    text = BUILT_IN[name].read_text(encoding="utf-8")
    header = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert text.startswith("# ")
    assert header.startswith(recipe_headline(BUILT_IN[name]))
    assert re.search(r"\(20\d\d\), ", header)  # a paper
    assert re.search(r"Expect for .* perplexity \d+\.\d\d|No published figure|do not compare", header)
    assert max(map(len, text.splitlines())) <= 120


def test_owl_is_the_published_one() -> None:
    assert load_recipe("owl-wanda-70").layer_sparsity == Owl(threshold=5, spread=0.08)


@pytest.mark.parametrize(
    ("name", "d_out", "d_in"),
    [
        ("self_attn.q_proj", 4096, 4096),
        ("self_attn.k_proj", 1024, 4096),
        ("self_attn.v_proj", 1024, 4096),
        ("self_attn.o_proj", 4096, 4096),
        ("mlp.gate_proj", 14336, 4096),
        ("mlp.up_proj", 14336, 4096),
        ("mlp.down_proj", 4096, 14336),
    ],
)
def test_oats_has_the_ranks_of_its_rates(name: str, d_out: int, d_in: int) -> None:
    """Algorithm 2 of OATS on the shapes of Llama-3-8B: compression rate 0.5, rank ratio 0.25."""
    recipe = load_recipe("oats-50")
    rate, ratio = 0.5, 0.25
    assert isinstance(recipe.pattern, Unstructured)
    assert recipe.pattern.sparsity == 1 - (1 - ratio) * (1 - rate)
    rank = resolve_rank(recipe.rank_for(f"model.layers.3.{name}.weight"), d_out, d_in)
    assert rank == int(ratio * (1 - rate) * d_out * d_in / (d_out + d_in))


def test_numbers_of_numpy_are_written_as_any_other() -> None:
    recipe = Recipe(
        pattern=Unstructured(np.float64(0.5)), refiner=PCP(rank=np.int64(2), tol=np.float64(1e-3)), rank=np.int32(3)
    )
    assert Recipe(**yaml.safe_load(recipe_text(recipe))) == recipe
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_file_wins_over_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tlr-50") == Recipe.from_file(BUILT_IN["tlr-50"])
    assert load_recipe(BUILT_IN["tlr-50"]) == load_recipe("tlr-50")
    Path("tlr-2-4").mkdir()
    assert load_recipe("tlr-2-4").pattern == NM(2, 4)  # a folder is no file
    Path("tlr-50").write_text("rank: 3\n")
    assert load_recipe("tlr-50") == Recipe(rank=3)


def test_a_pipe_is_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("rank: 3\n",))
    writer.start()
    assert load_recipe(pipe) == Recipe(rank=3)
    writer.join()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("wanda-tlr-5", r" Did you mean 'wanda-tlr-50'\?"),
        ("recipes/oats-50.yml", r" Did you mean 'oats-50'\?"),
        ("tlr-50.json", r" Did you mean 'tlr-50'\?"),
        ("nothing like it", ""),
        ("x" * 5000, ""),
        ("a\0b", ""),
        (".", ""),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=rf"no recipe .*: neither a file nor built in\.{hint} Built in: accelerated-tlr-50,"
    ):
        load_recipe(name)


def test_the_folder_at_the_root_is_the_packages() -> None:
    folder = ROOT / "recipes"
    if not folder.exists():
        pytest.skip("only a checkout has it")
    assert os.readlink(folder) == "src/mendlm/recipes"
    assert {path.name for path in folder.iterdir()} == {path.name for path in BUILT_IN.values()}


# The page.


def test_a_criterion_by_tensor_name_is_a_criterion() -> None:
    text = {"source": "random-tokens"}
    mlp = [{"match": "*.mlp.*", "criterion": "sparsegpt"}]
    with pytest.raises(UsageError, match="criterion 'sparsegpt' weighs the inputs, so it needs calibration data"):
        Recipe(refiner="none", overrides=mlp)
    with pytest.raises(UsageError, match="unknown criterion 'wnada'"):
        Recipe(overrides=[{"match": "*", "criterion": "wnada"}])
    options = {"ties": "position"}
    recipe = Recipe(
        criterion_options=options, refiner="none", metric="plain", calibration=text, overrides=mlp, damping=0.5
    )
    assert recipe.needs == "gram"
    assert recipe.criterion_for("layers.0.q_proj.weight") == Magnitude(ties="position")
    assert recipe.criterion_for("layers.0.mlp.up_proj.weight") == SparseGPT(damping=0.5)
    back = [*mlp, {"match": "*.up_proj.*", "criterion": "magnitude"}, {"match": "*.up_proj.*", "rank": 2}]
    again = Recipe(criterion_options=options, calibration=text, overrides=back)
    assert again.criterion_for("layers.0.mlp.up_proj.weight") == Magnitude(ties="position")
    assert Recipe(**again.to_dict()) == again


def section(title: str) -> str:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    return re.split(rf"^##+ {re.escape(title)}$", page, flags=re.MULTILINE)[1].partition("\n#")[0]


def rows(title: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", section(title), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("Fields", Recipe),
        ("calibration", Calibration),
        ("overrides", Override),
        ("layer_sparsity", Owl),
        ("match_blocks", Matching),
    ],
)
def test_the_page_has_every_field_and_its_default(title: str, model: Any) -> None:
    assert rows(title) == list(model.model_fields)
    for name, field in model.model_fields.items():
        shown = re.search(rf"^\| `{name}` \| ([^|]*) \|", section(title), flags=re.MULTILINE)
        assert shown is not None
        if isinstance(field.default, str | float | int):
            default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert shown[1] == f"`{default}`"


def test_the_page_has_every_recipe_and_its_headline() -> None:
    listed = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", section("Built-in recipes"), flags=re.MULTILINE))
    assert listed == {name: recipe_headline(path) for name, path in BUILT_IN.items()}


def test_the_example_on_the_page_is_a_recipe(tmp_path: Path) -> None:
    examples = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert examples
    for text in examples:
        (tmp_path / "example.yaml").write_text(text)
        recipe = Recipe.from_file(tmp_path / "example.yaml")
        assert Recipe(**recipe.to_dict()) == recipe
