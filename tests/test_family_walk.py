"""The block walk through every family: the inputs it sees are those that the whole model sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import mendlm
from mendlm import NM, TLR, Recipe, Unstructured
from mendlm.allocation import outlier_frac
from mendlm.calibration import prepare
from mendlm.calibration.blocks import BlockModel
from mendlm.calibration.walk import CalibrationText, Walk, modules_by_block
from mendlm.checkpoints.reader import open_checkpoint
from mendlm.config import Calibration
from mendlm.errors import UsageError
from mendlm.experts import SparseLowRankExperts, unfuse
from mendlm.inputs import InputStats
from mendlm.pipeline import compress
from mendlm.planning import make_plan
from mendlm.runtime import SparseLowRankLinear
from test_family_models import KINDS, MIXTURES, VOCAB, Kind, build

EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(kind: Kind) -> Path:
        if str(kind) not in made:
            made[str(kind)] = tmp_path_factory.mktemp(str(kind))
            build(kind).save_pretrained(made[str(kind)], save_original_format=not kind.stacked)
        return made[str(kind)]

    return get


def hooked_moments(folder: Path, ids: Tensor) -> dict[tuple[int, str], Tensor]:
    """(block, path) -> second moments of a projection's inputs, by hooks on the whole model, float64."""
    model = mendlm.load(folder, dtype=torch.float32)
    blocks = next(
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers
    )
    rows: dict[tuple[int, str], list[Tensor]] = {}
    for index, block in enumerate(blocks):
        for path, module in list(block.named_modules()):
            if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
                unfuse(block, [f"{path}.gate_up_proj", f"{path}.down_proj"])
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):

                def take(layer: nn.Module, args: tuple[Any, ...], key: tuple[int, str] = (index, path)) -> None:
                    rows.setdefault(key, []).append(args[0].double().reshape(-1, args[0].shape[-1]))

                module.register_forward_pre_hook(take)
    with torch.no_grad():
        for batch in ids.split(2):
            model(batch)
    return {key: torch.cat(parts).square().mean(dim=0) for key, parts in rows.items()}


def expected_of(moments: dict[tuple[int, str], Tensor], index: int, path: str) -> Tensor | None:
    """Where a checkpoint has separate gate and up projections, the whole model has them in one, with one input."""
    prefix, _, last = path.rpartition(".")
    fused = "down_proj" if last in ("w2", "down_proj") else "gate_up_proj"
    return moments.get((index, path), moments.get((index, f"{prefix}.{fused}")))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_walk_sees_what_the_whole_model_sees(saved: Any, kind: Kind) -> None:
    folder = saved(kind)
    ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint, Recipe(pattern=NM(2, 4), refiner="none"))
    model = BlockModel(checkpoint, torch.device("cpu"), torch.float32)
    by_block = modules_by_block(model, plan.compressed)
    assert {index: len(names) for index, names in by_block.items()} == {0: kind.n_matrices, 1: kind.n_matrices}
    expected = hooked_moments(folder, ids)
    walk = Walk(model, CalibrationText(ids, 2), lambda index, phase: None)
    reached = 0
    for index in range(model.n_blocks):
        with model.loaded(index) as block:
            stats: dict[str, InputStats] = walk.gather(index, block, by_block[index], gram=False, advance=True)
        for name, (path, d_in) in by_block[index].items():
            want = expected_of(expected, index, path)
            if want is None:
                assert stats[name].n_tokens == 0  # an expert that no token chose
                continue
            assert stats[name].second_moment.shape == (d_in,)
            bound = 1e4 * EPS32 * float(want.abs().max())
            torch.testing.assert_close(stats[name].second_moment, want, rtol=0, atol=bound)
            reached += 1
    assert reached >= kind.n_matrices


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_calibrated_compression_of_every_family(saved: Any, kind: Kind, tmp_path: Path) -> None:
    """Wanda by blocks through random tokens: what is loaded has its zeros, and its runtimes agree."""
    folder = saved(kind)
    calibration = Calibration(source="random-tokens", n_sequences=3, seqlen=12, propagate="sequential", batch_size=2)
    recipe = Recipe(criterion="wanda", pattern=NM(2, 4), refiner="none", calibration=calibration)
    result = compress(folder, tmp_path / "out", recipe)
    assert len(result.records) == 2 * kind.n_matrices
    loaded = mendlm.load(tmp_path / "out", runtime="factored")
    layers = [m for m in loaded.modules() if isinstance(m, SparseLowRankLinear)]
    assert len(layers) == len(result.records)
    assert any(isinstance(m, SparseLowRankExperts) for m in loaded.modules()) is any(
        "experts" in record.name for record in result.records
    )
    for layer in layers:
        assert bool((layer.weight.reshape(-1, 4) != 0).sum(dim=1).le(2).all())
    ids = torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = loaded(ids).logits
        merged = mendlm.load(tmp_path / "out")(ids).logits
    torch.testing.assert_close(logits, merged, rtol=0, atol=256 * EPS32 * float(merged.abs().max()))
    assert bool(logits.isfinite().all())


@pytest.fixture(scope="module")
def lazy_router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose first router sends every token to the same two of four experts."""
    model = build(next(kind for kind in MIXTURES if kind.model_type == "qwen3_moe"))
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()
    folder = tmp_path_factory.mktemp("lazy") / "model"
    model.save_pretrained(folder, save_original_format=True)
    return folder


RANDOM_TOKENS = Calibration(source="random-tokens", n_sequences=3, seqlen=12)


@pytest.mark.parametrize("metric", ["plain", "gram"])
def test_an_expert_that_no_token_reached_is_no_dead_input(lazy_router: Path, metric: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "criterion": "wanda",
        "metric": metric,
        "pattern": NM(2, 4),
        "refiner": TLR(rank=2, n_iter=3),
    }
    results = {
        policy: compress(lazy_router, tmp_path / policy, Recipe(**how, calibration=RANDOM_TOKENS, dead_columns=policy))
        for policy in ("keep", "drop")
    }
    unknown = [record for record in results["keep"].records if record.n_tokens == 0]
    assert len([record for record in unknown if ".layers.0." in record.name]) == 6
    dropped = {record.name: record for record in results["drop"].records}
    for record in unknown:
        assert dropped[record.name] == record
        assert 0 < record.rel_error < 1
    with pytest.raises(UsageError, match=r"no calibration token reached this expert.*experts\.\d\..*_proj"):
        compress(lazy_router, tmp_path / "no", Recipe(**how, calibration=RANDOM_TOKENS, dead_columns="error"))


def test_an_expert_that_no_token_reached_has_outliers_too(
    lazy_router: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments: list[Tensor] = []

    def noted(W: Tensor, second_moment: Tensor, threshold: float) -> float:
        moments.append(second_moment)
        return outlier_frac(W, second_moment, threshold)

    monkeypatch.setattr(prepare, "outlier_frac", noted)
    recipe = Recipe(pattern=Unstructured(0.5), refiner="none", calibration=RANDOM_TOKENS, layer_sparsity="owl")
    compress(lazy_router, tmp_path / "out", recipe)
    assert all(bool(moment.any()) for moment in moments)
