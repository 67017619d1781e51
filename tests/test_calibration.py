"""The block walk: statistics equal to those of the whole model, compressed blocks passed on, resumable, flat memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mendlm
from conftest import STEADY_HEAP, TinyLlama
from faulting import bytes_of
from mendlm import NM, TLR, Recipe, Unstructured
from mendlm.calibration.activations import Activations
from mendlm.calibration.blocks import BlockModel
from mendlm.calibration.statistics import InputAccumulator, InputGatherer
from mendlm.calibration.walk import CalibrationText, Walk
from mendlm.checkpoints.reader import open_checkpoint
from mendlm.config import Calibration
from mendlm.errors import CheckpointError, MendError, NonFiniteError, UsageError
from mendlm.inputs import InputStats, treat_dead_columns
from mendlm.pipeline import BlockStarted, Event, TensorDone, TensorStarted, compress
from mendlm.report.records import read_manifest, read_records
from tiny import tiny_model

EPS32 = torch.finfo(torch.float32).eps
CPU = torch.device("cpu")
PROJECTIONS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


def token_ids(n: int = 5, seqlen: int = 24) -> Tensor:
    return torch.randint(0, 256, (n, seqlen), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text(" ".join("".join(chr(97 + c) for c in rng.integers(0, 26, 5)) for _ in range(400)))
    return path


def calibration(text: Path, **more: Any) -> Calibration:
    fields = {"source": str(text), "n_sequences": 5, "seqlen": 24, "windows": "leading", "batch_size": 2} | more
    return Calibration(**fields)


@pytest.mark.parametrize("d_in", [7, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_accumulator_is_the_mean_of_products(d_in: int, dtype: torch.dtype) -> None:
    X = torch.randn(60, d_in, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = {gram: InputAccumulator(d_in, gram=gram, device=CPU) for gram in (True, False)}
    for part in X.reshape(4, 15, d_in).split([1, 3]):
        for accumulator in sums.values():
            accumulator.add(part)
    wide = X.double().numpy()
    expected = wide.T @ wide / 60
    eps = torch.finfo(torch.float64).eps if dtype == torch.float64 else EPS32
    bound = 60 * eps * np.abs(wide).max() ** 2
    full, diagonal = sums[True].result(), sums[False].result()
    assert full.n_tokens == diagonal.n_tokens == 60
    assert full.gram is not None
    np.testing.assert_allclose(full.gram.numpy(), expected, rtol=0, atol=bound)
    assert torch.equal(full.gram, full.gram.T)
    assert diagonal.gram is None
    for stats in (full, diagonal):
        np.testing.assert_allclose(stats.second_moment.numpy(), np.diag(expected), rtol=0, atol=bound)
        assert stats.mean is not None
        assert stats.mean_abs is not None
        assert stats.mean.dtype == stats.mean_abs.dtype == torch.float64
        bound_of_means = 60 * eps * np.abs(wide).max()
        np.testing.assert_allclose(stats.mean.numpy(), wide.mean(axis=0), rtol=0, atol=bound_of_means)
        np.testing.assert_allclose(stats.mean_abs.numpy(), np.abs(wide).mean(axis=0), rtol=0, atol=bound_of_means)


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_are_refused(gram: bool, value: float) -> None:
    accumulator = InputAccumulator(3, gram=gram, device=CPU)
    accumulator.add(torch.tensor([[1.0, value, 2.0]]))
    accumulator.add(torch.ones(2, 3))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        accumulator.result()


def test_layers_called_with_one_tensor_share_statistics() -> None:
    layers = {name: nn.Linear(4, 4) for name in ("a", "b", "c", "d")}
    gatherer = InputGatherer(layers, dict.fromkeys(layers, 4), gram=True, device=CPU)
    with gatherer.watching(), torch.no_grad():
        for seed in range(2):
            X = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
            layers["a"](X)
            layers["c"](X.clone())
            layers["b"](X)
            gatherer.batch_ends()
    stats = gatherer.results()
    assert stats["a"] is stats["b"]
    assert stats["a"] is not stats["c"]
    assert torch.equal(stats["a"].second_moment, stats["c"].second_moment)
    assert stats["a"].n_tokens == 6
    assert stats["d"].n_tokens == 0  # never called
    assert bool(stats["d"].dead.all())


def whole_model_grams(folder: Path, ids: Tensor, replace: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Gram matrices of every projection's inputs by hooks on the whole model, float64."""
    model = mendlm.load(folder, dtype=torch.float32)
    rows: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def take(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows.setdefault(name, []).append(args[0].double().reshape(-1, args[0].shape[-1]))

        return take

    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            if replace is not None and name in replace:
                module.weight.data.copy_(replace[name])
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model(ids)
    found = {}
    for name, parts in rows.items():
        X = torch.cat(parts)
        found[name] = X.T @ X / X.shape[0]
    return found


def test_the_walk_sees_what_the_whole_model_sees(tiny_llama: Path) -> None:
    ids = token_ids()
    model = BlockModel(open_checkpoint(tiny_llama), CPU, torch.float32)
    walk = Walk(model, CalibrationText(ids, batch_size=2), lambda index, phase: None)
    expected = whole_model_grams(tiny_llama, ids)
    for index in range(model.n_blocks):
        with model.loaded(index) as block:
            modules = {p: (p, block.get_submodule(p).in_features) for p in PROJECTIONS}
            stats = walk.gather(index, block, modules, gram=True, advance=True)
        for path in PROJECTIONS:
            want = expected[f"{index}.{path}"]
            gram = stats[path].gram
            assert gram is not None
            torch.testing.assert_close(gram, want, rtol=0, atol=1e3 * EPS32 * float(want.abs().max()))
    assert all(parameter.is_meta for block in model._blocks for parameter in block.parameters())


def test_the_dense_stream_is_that_of_the_original_model(tiny_llama: Path) -> None:
    """It follows the model's own hidden states, whatever becomes of the blocks in the other stream."""
    ids = token_ids()
    model = BlockModel(open_checkpoint(tiny_llama), CPU, torch.float32)
    text = CalibrationText(ids, batch_size=2)
    walk = Walk(model, text, lambda index, phase: None, dense_stream=True)
    with torch.no_grad():
        whole = mendlm.load(tiny_llama, dtype=torch.float32)
        hidden = whole(ids, output_hidden_states=True).hidden_states
        last: list[Tensor] = []
        whole.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
        whole(ids)
    expected = [hidden[1], last[0]]  # transformers' own last one is after the norm
    for index in range(model.n_blocks):
        with model.loaded(index) as block:
            walk.propagate_dense(index, block)
            block.mlp.down_proj.weight.data.zero_()
            walk.propagate(index, block)
        assert walk.dense_states is not None
        states = torch.cat(list(walk.dense_states.batches()))
        bound = 1e3 * EPS32 * float(expected[index].abs().max())
        torch.testing.assert_close(states, expected[index], rtol=0, atol=bound)
        assert not torch.allclose(torch.cat(list(walk.states.batches())), expected[index])
    with model.loaded(0) as block, pytest.raises(UsageError, match="dense_stream=True"):
        Walk(model, text, lambda index, phase: None).propagate_dense(0, block)


def test_each_block_is_calibrated_on_the_compressed_blocks_before_it(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """The second block's Wanda masks are those of a model whose first block was replaced by its compressed form."""
    found = {}
    for how in ("sequential", "dense"):
        text = calibration(text_file, propagate=how)
        recipe = Recipe(criterion="wanda", refiner="none", pattern=NM(2, 4), calibration=text)
        compress(tiny_llama, tmp_path / how, recipe)
        found[how] = mendlm.load(tmp_path / how).model.layers.state_dict()
    dense = mendlm.load(tiny_llama).model.layers.state_dict()
    ids = text_ids(tiny_llama, text_file)[: 5 * 24].reshape(5, 24)
    first = {f"0.{p}": found["sequential"][f"0.{p}.weight"] for p in PROJECTIONS}
    grams = {
        "sequential": whole_model_grams(tiny_llama, ids, first),
        "dense": whole_model_grams(tiny_llama, ids),
    }
    for how, by_name in grams.items():
        for path in PROJECTIONS:
            W = dense[f"1.{path}.weight"]
            scores = (W.abs() * by_name[f"1.{path}"].diagonal().sqrt().float()).reshape(-1, 4)
            kept = (found[how][f"1.{path}.weight"] != 0).reshape(-1, 4)
            least_kept = torch.where(kept, scores, torch.inf).min(dim=1).values
            most_pruned = torch.where(kept, -torch.inf, scores).max(dim=1).values
            assert bool(kept.sum(dim=1).eq(2).all())
            # Rounding of the statistics may swap two scores that are equal to rounding.
            assert bool((least_kept >= most_pruned * (1 - 1e3 * EPS32)).all()), (how, path)
    assert any(
        not torch.equal(found["sequential"][f"1.{p}.weight"], found["dense"][f"1.{p}.weight"]) for p in PROJECTIONS
    )


def test_a_criterion_by_tensor_name(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Dense propagation: what a criterion chooses for a tensor does not depend on the others."""
    masks = {}
    overrides = {"mixed": [{"match": "*.mlp.*", "criterion": "wanda"}], "wanda": [], "sparsegpt": []}
    for name, items in overrides.items():
        criterion = "wanda" if name == "wanda" else "sparsegpt"
        recipe = Recipe(
            criterion=criterion,
            refiner="none",
            pattern=NM(2, 4),
            calibration=calibration(text_file, propagate="dense"),
            overrides=items,
        )
        compress(tiny_llama, tmp_path / name, recipe)
        masks[name] = mendlm.load(tmp_path / name).model.layers.state_dict()
    for path in PROJECTIONS:
        expected = "wanda" if path.startswith("mlp.") else "sparsegpt"
        assert torch.equal(masks["mixed"][f"1.{path}.weight"], masks[expected][f"1.{path}.weight"])
        assert not torch.equal(masks["wanda"][f"1.{path}.weight"], masks["sparsegpt"][f"1.{path}.weight"])
    criteria = {r.name: r.criterion for r in read_records(tmp_path / "mixed")}
    assert all(criterion == ("wanda" if ".mlp." in name else "sparsegpt") for name, criterion in criteria.items())


def text_ids(model: Path, text: Path) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: Tensor = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids


RECIPES = {
    "wanda, tlr": {"criterion": "wanda", "refiner": TLR(rank=4, n_iter=3), "metric": "plain"},
    "magnitude, tlr in the Gram metric": {"refiner": TLR(rank=4, n_iter=3), "metric": "gram"},
    "sparsegpt, dense": {"criterion": "sparsegpt", "refiner": "none"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_stopped_anywhere_gives_the_same_bytes(
    name: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    propagate = "dense" if name.endswith("dense") else "sequential"
    recipe = Recipe(**RECIPES[name], pattern=NM(2, 4), calibration=calibration(text_file, propagate=propagate))
    whole = tmp_path / "whole"
    compress(tiny_llama, whole, recipe)
    for stop_after in (1, 4, 7, 8, 13):
        out = tmp_path / f"stopped-{stop_after}"

        def stop(event: Event, at: int = stop_after) -> None:
            if isinstance(event, TensorDone) and event.index == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress(tiny_llama, out, recipe, on_event=stop)
        result = compress(tiny_llama, out, recipe, resume=True)
        assert result.resumed == stop_after
        assert bytes_of(out) == bytes_of(whole), stop_after


def test_activations_in_a_file_give_the_same_bytes(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe(**RECIPES["wanda, tlr"], calibration=calibration(text_file))
    (tmp_path / "activations").mkdir()
    compress(tiny_llama, tmp_path / "memory", recipe)
    compress(tiny_llama, tmp_path / "file", recipe, activation_dir=tmp_path / "activations")
    assert bytes_of(tmp_path / "memory") == bytes_of(tmp_path / "file")
    assert list((tmp_path / "activations").iterdir()) == []
    with pytest.raises(UsageError, match="not a folder"):
        compress(tiny_llama, tmp_path / "no", recipe, activation_dir=tmp_path / "missing")
    assert not (tmp_path / "no").exists()


def test_the_buffer_keeps_what_is_written() -> None:
    states = Activations(5, 3, 2, torch.float32, 2, None)
    for number, batch in enumerate(states.batches()):
        batch.fill_(number)
    assert [float(b.mean()) for b in states.batches()] == [0, 1, 2]
    assert [b.shape[0] for b in states.batches()] == [2, 2, 1]
    assert states.n_bytes == 5 * 3 * 2 * 4


def test_what_a_calibrated_run_tells_and_records(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    recipe = Recipe(refiner=TLR(rank=4, n_iter=3), calibration=calibration(text_file))
    compress(tiny_llama, tmp_path / "out", recipe, on_event=events.append)
    phases = [(e.index, e.n_blocks, e.phase) for e in events if isinstance(e, BlockStarted)]
    assert phases == [(1, 2, "gather"), (1, 2, "propagate"), (2, 2, "gather")]
    manifest = read_manifest(tmp_path / "out")
    assert manifest.recipe["calibration"]["n_sequences"] == 5
    assert manifest.calibration is not None
    assert manifest.calibration["seqlen"] == 24
    assert len(manifest.calibration["token_ids_sha256"]) == 64
    for record in read_records(tmp_path / "out"):
        assert record.metric == "gram"
        assert record.damping == 0.01
        assert record.n_tokens == 5 * 24
        assert record.n_dead == 0
        assert record.rel_output_error is not None
        assert 0 < record.rel_output_error < record.rel_error  # what the text excites is kept better than the rest


def test_a_complete_folder_of_another_text_is_another_run(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(before := text_file.read_text())
    recipe = Recipe(criterion="wanda", refiner="none", calibration=calibration(text))
    first = compress(tiny_llama, tmp_path / "out", recipe)
    text.write_text(before[::-1])
    with pytest.raises(UsageError, match=r"is complete but another run wrote it: token_ids_sha256 was '\w{64}', now"):
        compress(tiny_llama, tmp_path / "out", recipe, resume=True)
    text.write_text(before)
    assert compress(tiny_llama, tmp_path / "out", recipe, resume=True).records == first.records


def test_the_damping_of_a_criterion_is_recorded_too(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """One window of 24 tokens for 64 inputs: without damping no factor exists."""
    text = calibration(text_file, n_sequences=1)
    recipe = Recipe(criterion="sparsegpt", refiner="none", damping=0.0, calibration=text)
    result = compress(tiny_llama, tmp_path / "out", recipe)
    assert {record.metric for record in result.records} == {"plain"}
    assert all(record.damping is not None and 0 < record.damping <= 1 for record in result.records)


def test_text_that_nobody_looks_at_is_named(
    tiny_llama: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free = Recipe(refiner="none")
    given = Recipe(refiner="none", calibration=calibration(text_file))
    compress(tiny_llama, tmp_path / "free", free)
    compress(tiny_llama, tmp_path / "given", given)
    assert "nothing in this recipe looks at the calibration text" in caplog.text
    weights = "model.safetensors"
    assert (tmp_path / "free" / weights).read_bytes() == (tmp_path / "given" / weights).read_bytes()


def test_outliers_decide_the_sparsity_of_a_block(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        criterion="wanda",
        pattern=Unstructured(0.6, "row"),
        refiner="none",
        layer_sparsity="owl",
        calibration=calibration(text_file),
    )
    events: list[Event] = []
    result = compress(tiny_llama, tmp_path / "out", recipe, on_event=events.append)
    assert [e.phase for e in events if isinstance(e, BlockStarted)][:2] == ["survey", "survey"]
    by_block = {i: {r.sparsity for r in result.records if f"layers.{i}." in r.name} for i in (0, 1)}
    for sparsities in by_block.values():
        assert max(sparsities) - min(sparsities) < 0.02  # rounding to whole entries of a row
        assert all(0.5 < s < 0.7 for s in sparsities)
    kept = sum(r.n_kept for r in result.records) / sum(r.shape[0] * r.shape[1] for r in result.records)
    assert kept == pytest.approx(0.4, abs=0.01)
    assert by_block[0] != by_block[1]


@pytest.fixture
def dead_llama(make_tiny_llama: TinyLlama) -> Path:
    """A model whose first norm silences three inputs of block 0's attention."""
    from safetensors.torch import load_file, save_file

    folder = make_tiny_llama(seed=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][[1, 5, 9]] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("metric", ["plain", "gram"])
def test_dead_columns(criterion: str, metric: str, dead_llama: Path, text_file: Path, tmp_path: Path) -> None:
    how = {"criterion": criterion, "metric": metric, "refiner": TLR(rank=4, n_iter=3), "pattern": Unstructured(0.5)}
    if criterion == "magnitude" and metric == "plain":
        pytest.skip("this looks at no inputs")
    text = calibration(text_file)
    with pytest.raises(UsageError, match=r"3 of 64 inputs were zero .*columns 1, 5, 9.*--dead-columns.*_proj"):
        compress(dead_llama, tmp_path / "error", Recipe(**how, calibration=text, dead_columns="error"))
    assert not (tmp_path / "error").exists()
    for policy in ("keep", "drop"):
        result = compress(dead_llama, tmp_path / policy, Recipe(**how, calibration=text, dead_columns=policy))
        record = next(r for r in result.records if r.name.endswith("0.self_attn.q_proj.weight"))
        assert record.n_dead == 3
        weight = mendlm.load(tmp_path / policy, runtime="factored").model.layers[0].self_attn.q_proj.weight
        assert bool(weight[:, [1, 5, 9]].any()) is (policy == "keep")


def test_revived_statistics_treat_a_dead_input_as_the_weakest() -> None:
    X = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 4.0]], dtype=torch.float64)
    stats = InputStats(2, (X**2).mean(0), X.T @ X / 2, X.mean(0), X.abs().mean(0))
    assert stats.dead.tolist() == [False, True, False]
    revived = stats.revived()
    assert revived.second_moment.tolist() == [5.0, 5.0, 10.0]
    assert revived.gram is not None
    assert revived.gram.tolist() == [[5.0, 0.0, 7.0], [0.0, 5.0, 0.0], [7.0, 0.0, 10.0]]
    assert revived.mean is not None
    assert revived.mean_abs is not None
    assert revived.mean.tolist() == [2.0, 0.0, 3.0]
    assert revived.mean_abs.tolist() == [2.0, 2.0, 3.0]
    assert stats.revived() is revived  # computed once
    unknown = InputStats(2, stats.second_moment, stats.gram).revived()
    assert unknown.mean is unknown.mean_abs is None
    W = torch.ones(2, 3)
    assert treat_dead_columns(W, stats, "drop")[0].tolist() == [[1, 0, 1], [1, 0, 1]]
    assert treat_dead_columns(W, stats, "keep")[0] is W


def test_a_tensor_outside_the_blocks_cannot_be_calibrated(
    make_tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe(criterion="wanda", include=("lm_head.weight",), calibration=calibration(text_file))
    with pytest.raises(UsageError, match=r"'lm_head.weight' is in no block.*--exclude"):
        compress(make_tiny_llama(tied=False), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_missing_norm_is_named(make_tiny_llama: TinyLlama, text_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_tiny_llama(seed=5)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    recipe = Recipe(criterion="wanda", calibration=calibration(text_file))
    with pytest.raises(CheckpointError, match=r"no tensor for layers\.1\.input_layernorm\.weight"):
        compress(folder, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 3}, r"asks for 3 blocks, and its files hold no tensor of block 2"),
        (
            {"intermediate_size": 80},
            r"layers\.0\.mlp\..* in model\.safetensors has shape .*96.*, and the model of config\.json has .*80",
        ),
        (
            {"vocab_size": 100},
            r"embed_tokens\.weight' in model\.safetensors has shape .*, and the model of config\.json has \(100, 64\)",
        ),
        ({"hidden_size": "64"}, r"cannot build model_type 'llama'.*Field 'hidden_size' expected int"),
    ],
)
def test_a_config_of_another_model_is_refused_before_the_walk(
    changes: dict[str, object], sentence: str, make_tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    folder = make_tiny_llama(seed=6)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    events: list[object] = []
    recipe = Recipe(criterion="wanda", calibration=calibration(text_file))
    with pytest.raises(MendError, match=sentence):
        compress(folder, tmp_path / "out", recipe, on_event=events.append)
    assert not events
    assert not (tmp_path / "out").exists()


def test_an_architecture_without_blocks_is_refused(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "strange"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nobody-knows"}))
    recipe = Recipe(criterion="wanda", include=("*q_proj.weight",), calibration=calibration(text_file))
    with pytest.raises(UsageError, match=r"'nobody-knows'.*without --calibration"):
        compress(folder, tmp_path / "out", recipe)


PEAK = """
import sys, mendlm
from mendlm import Recipe
from mendlm.config import Calibration
recipe = Recipe(criterion="sparsegpt", refiner="none",
    calibration=Calibration(source="random-tokens", n_sequences=4, seqlen=64))
mendlm.compress(sys.argv[1], sys.argv[2], recipe)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    peaks = {}
    for n in (8, 32):
        model, out = tmp_path / f"model-{n}", tmp_path / f"out-{n}"
        sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 6}
        tiny_model("LlamaForCausalLM", num_hidden_layers=n, dtype=torch.bfloat16, **sizes).save_pretrained(model)
        subprocess.run([sys.executable, "-c", PEAK, model, out], check=True, env=os.environ | STEADY_HEAP)
        peaks[n] = json.loads((out / "mendlm.run.json").read_text())["peak_memory_bytes"]
    assert peaks[32] < 1.1 * peaks[8], peaks


@pytest.mark.parametrize("work", ["compress", "plan"])
def test_statistics_go_with_the_last_weight_that_needs_them(
    work: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """What is derived of them, several times their size, with them: a mixture of experts has hundreds in a block."""
    how = Recipe(
        criterion="sparsegpt", pattern=NM(2, 4), refiner=TLR(rank=4, n_iter=2), calibration=calibration(text_file)
    )
    alive: dict[str, int] = {}

    def count(event: Any) -> None:
        if isinstance(event, TensorStarted):
            alive[event.name] = sum(type(thing) is InputStats for thing in gc.get_objects())

    gc.collect()
    if work == "compress":
        compress(tiny_llama, tmp_path / "out", how, on_event=count)
    else:
        mendlm.plan_budget(tiny_llama, how, target_rank_bytes=0.1, on_event=count)
    before = min(alive.values()) - 1  # of other tests
    layers = [[n - before for name, n in alive.items() if f".layers.{layer}." in name] for layer in (0, 1)]
    assert layers == [[4, 3, 3, 2, 2, 1, 1]] * 2  # down, gate and up, o, and q, k, v


def test_trimming_is_harmless_where_it_is_not_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    from mendlm import _memory

    _memory.trim()
    _memory._malloc_trim.cache_clear()
    monkeypatch.setattr(_memory.ctypes, "CDLL", lambda name: object())
    try:
        _memory.trim()  # a C library without it
        assert _memory._malloc_trim()(0) is None
    finally:
        _memory._malloc_trim.cache_clear()
