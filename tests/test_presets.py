"""Presets: what each stands for, and that each compresses a model that opens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mendlm
from mendlm.cli.compress import Zeros, one_source, resolve_recipe
from mendlm.errors import UsageError
from mendlm.patterns import NM
from mendlm.recipe_files import PRESETS, builtin_recipes
from mendlm.report.records import read_manifest
from tiny import tiny_model

TEXT = {"source": "random-tokens", "n_sequences": 4, "seqlen": 64}


def test_every_preset_is_a_built_in_recipe() -> None:
    assert set(PRESETS) <= set(builtin_recipes())
    assert one_source(None, None) is None
    assert one_source("tlr-50", None) == "tlr-50"
    assert one_source(None, "best") == "best"


def test_a_preset_that_is_none_and_one_beside_a_recipe_are_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown preset 'bst'\. Did you mean 'best'\?"):
        one_source(None, "bst")
    with pytest.raises(UsageError, match="--preset fast does not go with --recipe tlr-50"):
        one_source("tlr-50", "fast")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_compresses_a_model_that_opens(name: str, tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "dense")
    text = {} if name == "fast" else TEXT
    recipe = resolve_recipe(one_source(None, name), {"rank": "4"}, Zeros(pattern="2:4"), text)
    assert recipe.pattern == NM(2, 4)
    result = mendlm.compress(tmp_path / "dense", tmp_path / "out", recipe)
    assert {record.rank for record in result.records} == {4}
    matching = read_manifest(tmp_path / "out").to_dict().get("matching")
    assert bool(matching) == (name == "best")
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.isfinite(mendlm.load(tmp_path / "out")(ids).logits).all()
