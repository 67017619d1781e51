"""verify: a sound folder passes, every kind of damage is found and named, and it says what it could not check."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fuzzing
import mendlm
from mendlm import NM, TLR, Recipe, Tiles, Unstructured
from mendlm.checkpoints.staging import partial_folder
from mendlm.cli import main
from mendlm.config import Calibration, Matching
from mendlm.errors import UsageError
from mendlm.pipeline import compress
from mendlm.verifying import CHECKS, Verification, verify
from test_family_models import KINDS, Kind, build

if TYPE_CHECKING:
    from conftest import TinyLlama

RECIPE = Recipe(refiner=TLR(rank=4, n_iter=2), pattern=NM(2, 4))
TEXT = Calibration(source="random-tokens", n_sequences=4, seqlen=16)
LAYER = "model.layers.1.mlp.up_proj"  # (96, 64)


@pytest.fixture(scope="module")
def sound(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "out"
    compress(tiny_llama, out, RECIPE)
    return out


@pytest.fixture
def out(sound: Path, tmp_path: Path) -> Path:
    """A compressed folder to break."""
    return shutil.copytree(sound, tmp_path / "out")


@pytest.fixture(scope="module")
def sharded(make_tiny_llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sharded model in float32, and what compress made of it in bfloat16."""
    model = make_tiny_llama(max_shard_size="40KB")
    out = tmp_path_factory.mktemp("sharded") / "out"
    compress(model, out, Recipe(refiner=TLR(rank=3, n_iter=2), pattern=Unstructured(0.5, "row"), dtype="bfloat16"))
    return model, out


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    parsed = json.loads(path.read_text())
    change(parsed)
    path.write_text(json.dumps(parsed))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def rehash(folder: Path) -> None:
    """Make the hashes of mendlm.json fit again, as someone who wants to hide a change would."""

    def fit(manifest: dict[str, Any]) -> None:
        for name, entry in manifest["outputs"].items():
            data = (folder / name).read_bytes()
            entry.update(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    edit(folder / "mendlm.json", fit)


def found(result: Verification) -> set[tuple[str, str]]:
    return {(finding.check, finding.place) for finding in result.findings}


# ---------------------------------------------------------------------------------------------- sound folders


def test_a_sound_folder_passes(sound: Path, tiny_llama: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    result = verify(sound, tiny_llama, progress=lambda *step: seen.append(step))
    assert result.findings == ()
    assert result.ok
    assert result.skipped == ()
    n_outputs = len(json.loads((sound / "mendlm.json").read_text())["outputs"])
    assert result.checked["hash"] == n_outputs
    assert {check: result.checked[check] for check in ("mask", "pattern", "finite", "error", "copy")} == {
        "mask": 14, "pattern": 14, "finite": 14, "error": 14, "copy": 6
    }  # fmt: skip
    assert result.checked.keys() == CHECKS.keys()
    assert result.manifest_sha256 == hashlib.sha256((sound / "mendlm.json").read_bytes()).hexdigest()
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    json.dumps(result.to_dict())


def test_sharded_converted_and_row_by_row(sharded: tuple[Path, Path]) -> None:
    model, out = sharded
    result = verify(out, model)
    assert result.findings == ()
    assert result.checked["copy"] == 6


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(refiner="none", pattern=Unstructured(1.0)),
        Recipe(refiner="none", pattern=Unstructured(0.0), dtype="float16"),
        Recipe(refiner=TLR(rank=2, n_iter=1), pattern=Tiles(0.5, 16, 16)),
        Recipe(refiner="accelerated-tlr", rank=2, n_iter=3, dtype="bfloat16"),
        Recipe(refiner="zero-shot-svd", rank=2),
        Recipe(refiner="oats", rank=2, n_iter=2),
        Recipe(refiner="pcp", rank=2, n_iter=2),
        Recipe(refiner=TLR(rank=2, n_iter=1), overrides=({"match": "*.0.*", "pattern": "2:4", "rank": 1},)),
        Recipe(criterion="sparsegpt", refiner=TLR(rank=2, n_iter=1), metric="gram", calibration=TEXT, pattern=NM(2, 4)),
        Recipe(refiner="joint-admm", rank=2, n_iter=2, calibration=TEXT, match_blocks=Matching(n_steps=4)),
        Recipe(criterion="wanda", refiner="none", layer_sparsity="owl", calibration=TEXT),
    ],
    ids=lambda recipe: f"{recipe.refiner}-{recipe.pattern}",
)
def test_other_recipes_pass(tiny_llama: Path, tmp_path: Path, recipe: Recipe) -> None:
    compress(tiny_llama, tmp_path / "out", recipe)
    assert verify(tmp_path / "out", tiny_llama).findings == ()


@pytest.mark.parametrize(
    "kind", [KINDS[-1], *(kind for kind in KINDS if kind.model_type in ("gpt2", "mixtral"))], ids=str
)
def test_experts_and_transposed_weights_pass(kind: Kind, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    build(kind).save_pretrained(dense, save_original_format=not kind.stacked)
    compress(dense, tmp_path / "out", Recipe(refiner=TLR(rank=2, n_iter=1), pattern=NM(2, 4)))
    assert verify(tmp_path / "out", dense).findings == ()


# ---------------------------------------------------------------------------------------------- damaged files


def test_every_flipped_bit_of_every_file_is_found(out: Path) -> None:
    rng = random.Random(0)
    listed = json.loads((out / "mendlm.json").read_text())["outputs"]
    for name in listed:
        path = out / name
        whole = path.read_bytes()
        places = [0, 7, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(2))]
        for place in places:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            assert ("hash", name) in found(verify(out)), (name, place)
        path.write_bytes(whole[:-1])
        assert ("hash", name) in found(verify(out))
        path.unlink()
        assert ("hash", name) in found(verify(out))
        path.write_bytes(whole)
    assert verify(out).ok


def test_a_truncated_shard_and_a_lying_header_are_named(out: Path) -> None:
    path = out / "model.safetensors"
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-100], "100 bytes shorter than its header says"),
        (whole[:4], "only 4 bytes"),
        (b"", "is empty"),
        (b"\xff" * 8 + whole[8:], "announce a header of"),
        (whole[:8] + b"[" + whole[9:], "is not valid JSON"),
    ):
        path.write_bytes(damaged)
        result = verify(out)
        problems = [f.problem for f in result.findings if f.check == "structure" and f.place == path.name]
        assert len(problems) == 1, damaged[:9]
        assert message in problems[0]


def test_files_that_do_not_belong(out: Path, tmp_path: Path) -> None:
    (out / "README.md").write_text("mine")
    result = verify(out)
    assert result.ok
    assert "1 files that are not mendlm's were not looked at, e.g. 'README.md'" in result.skipped[0]
    (out / "pytorch_model.bin").write_bytes(b"x")
    assert found(verify(out)) == {("hash", "pytorch_model.bin")}
    (out / "pytorch_model.bin").unlink()
    (out / "config.json").rename(tmp_path / "config.json")
    (out / "config.json").symlink_to(tmp_path / "config.json")
    result = verify(out)
    assert ("hash", "config.json") in found(result)
    assert any("is a link that leads out" in finding.problem for finding in result.findings)


# ---------------------------------------------------------------------------------------------- damage that hides


def nan_in(tensors: dict[str, Tensor], part: str) -> None:
    tensors[f"{LAYER}.{part}"].view(-1)[3] = float("nan")


def other_group(tensors: dict[str, Tensor]) -> None:
    bitmask = tensors[f"{LAYER}.weight_bitmask"]
    bitmask[0, 0], bitmask[0, 1] = 0b01110011, 0b00110001  # 2 + 3, 2 + 1 of 4


def flip_mask_bit(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight_bitmask"][5, 2] ^= 1


def drop_value(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight_values"] = tensors[f"{LAYER}.weight_values"][1:].clone()


@pytest.mark.parametrize(("change", "where"), [
    (lambda t: nan_in(t, "weight_values"), ("finite", f"{LAYER}.weight_values")),
    (lambda t: nan_in(t, "lora_A"), ("finite", f"{LAYER}.lora_A")),
    (lambda t: nan_in(t, "lora_B"), ("finite", f"{LAYER}.lora_B")),
    (flip_mask_bit, ("mask", f"{LAYER}.weight")),
    (other_group, ("pattern", f"{LAYER}.weight")),
    (drop_value, ("mask", f"{LAYER}.weight")),
    (lambda t: t[f"{LAYER}.weight_values"].mul_(2), ("error", f"{LAYER}.weight")),
    (lambda t: t[f"{LAYER}.lora_B"].mul_(-1), ("error", f"{LAYER}.weight")),
    (lambda t: t["model.norm.weight"][:1].add_(1), ("copy", "model.norm.weight")),
    (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}), ("copy", "model.norm.weight")),
    (lambda t: t.pop("model.norm.weight"), ("structure", "mendlm.json")),
    (lambda t: t.pop("model.norm.weight"), ("copy", "model.norm.weight")),
    (lambda t: t.update({"stray": torch.ones(2)}), ("copy", "stray")),
    (lambda t: t.update({"stray.lora_A": torch.ones(2)}), ("structure", "stray.lora_A")),
    (lambda t: t.pop(f"{LAYER}.lora_A"), ("structure", f"{LAYER}.weight")),
    (lambda t: t.pop(f"{LAYER}.weight_values"), ("structure", f"{LAYER}.weight")),
    (lambda t: t.update({f"{LAYER}.lora_A": torch.ones(5, 64)}), ("structure", f"{LAYER}.weight")),
    (lambda t: t.update({f"{LAYER}.lora_A": torch.ones(5, 64), f"{LAYER}.lora_B": torch.ones(96, 5)}),
     ("structure", "config.json")),
    (lambda t: t.update({f"{LAYER}.weight_bitmask": t[f"{LAYER}.weight_bitmask"].short()}),
     ("structure", f"{LAYER}.weight")),
    (lambda t: t.pop("model.layers.0.mlp.down_proj.weight"), ("structure", "config.json")),
])  # fmt: skip
def test_damage_under_hashes_that_fit(
    out: Path, tiny_llama: Path, change: Callable[[dict[str, Tensor]], Any], where: tuple[str, str]
) -> None:
    change_tensors(out, change)
    rehash(out)
    result = verify(out, tiny_llama)
    assert where in found(result)
    assert "hash" not in {finding.check for finding in result.findings}


def test_padding_bits_and_rows(make_tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model = make_tiny_llama()
    tensors = load_file(model / "model.safetensors")
    tensors[f"{LAYER}.weight"] = torch.randn(96, 61)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    compress(model, tmp_path / "out", Recipe(refiner="none", pattern=Unstructured(0.5, "row")))
    assert verify(tmp_path / "out", model).ok

    def set_padding(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight_bitmask"][0, -1] |= 128

    def move_entry(tensors: dict[str, Tensor]) -> None:
        bitmask = tensors[f"{LAYER}.weight_bitmask"]
        bitmask[0, 0] = bitmask[0, 0] | 0xFF
        kept = int(bitmask[0].sum())  # the row has more entries now; the next one gets fewer
        assert kept
        rows = [sum(int(byte).bit_count() for byte in row.tolist()) for row in bitmask[:2]]
        surplus = rows[0] + rows[1] - 2 * rows[1]
        for column in range(8):
            for bit in range(8):
                if surplus and int(bitmask[1, column]) & 1 << bit and column < 7:
                    bitmask[1, column] ^= 1 << bit
                    surplus -= 1

    for change, check in ((set_padding, "mask"), (move_entry, "pattern")):
        copy = shutil.copytree(tmp_path / "out", tmp_path / check)
        change_tensors(copy, change)
        rehash(copy)
        assert (check, f"{LAYER}.weight") in found(verify(copy))


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["quantization_config"].update(version=2), "version is 2, not 1"),
    (lambda c: c["quantization_config"].update(layout="x"), "layout is 'x', not 'packed'"),
    (lambda c: c["quantization_config"].update(guard=["x"]), "there is no empty tensor ['x']"),
    (lambda c: c["quantization_config"].update(modules=None), "it says None of"),
    (lambda c: c["quantization_config"]["modules"][LAYER].update(rank=9), "'rank': 9"),
    (lambda c: c.pop("quantization_config"), "it has no quantization_config"),
])  # fmt: skip
def test_config_that_does_not_fit(out: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(out / "config.json", change)
    rehash(out)
    result = verify(out)
    assert {finding.place for finding in result.findings} == {"config.json"}
    assert any(message in finding.problem for finding in result.findings)


def record(manifest: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in manifest["records"] if row["name"] == f"{LAYER}.weight")


@pytest.mark.parametrize(("change", "where"), [
    (lambda m: record(m).update(rel_error=0.1), ("error", f"{LAYER}.weight")),
    (lambda m: record(m).update(objective=0.1), ("error", f"{LAYER}.weight")),
    (lambda m: record(m).update(n_kept=1), ("structure", f"{LAYER}.weight")),
    (lambda m: record(m).update(rank=1), ("structure", f"{LAYER}.weight")),
    (lambda m: record(m).update(stored_bytes=1), ("structure", f"{LAYER}.weight")),
    (lambda m: m["records"].remove(record(m)), ("structure", f"{LAYER}.weight")),
    (lambda m: m["totals"].update(n_tensors=1), ("structure", "mendlm.json")),
    (lambda m: m["inputs"]["config.json"].update(sha256="0"), ("input", "config.json")),
    (lambda m: m["recipe"].update(pattern={"n": 1, "m": 4}), ("pattern", f"{LAYER}.weight")),
    (lambda m: record(m).update(rel_error="much"), ("structure", "mendlm.json")),
    (lambda m: m["records"].append(record(m)), ("structure", "mendlm.json")),
    (lambda m: m.update(outputs=[]), ("structure", "mendlm.json")),
    (lambda m: m["outputs"].update({"../x": {"sha256": "0", "size_bytes": 1}}), ("hash", "../x")),
    (lambda m: m.pop("totals"), ("structure", "mendlm.json")),
])  # fmt: skip
def test_records_that_do_not_fit(
    out: Path, tiny_llama: Path, change: Callable[[dict[str, Any]], Any], where: tuple[str, str]
) -> None:
    edit(out / "mendlm.json", change)
    assert where in found(verify(out, tiny_llama))


def test_any_records_are_read_or_refused(sound: Path, tmp_path: Path) -> None:
    valid = json.loads((sound / "mendlm.json").read_text())
    assert 0 < fuzzing.fuzz(fuzzing.manifest_in(tmp_path, valid), 500) < 500


def test_index_that_does_not_fit(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    out = shutil.copytree(sharded[1], tmp_path / "out")
    index = out / "model.safetensors.index.json"
    whole = index.read_text()
    changes: tuple[Callable[[dict[str, Any]], Any], ...] = (
        lambda i: i["weight_map"].pop("model.norm.weight"),
        lambda i: i["weight_map"].update({"model.norm.weight": "../x"}),
        lambda i: i.pop("weight_map"),
    )
    for change in changes:
        edit(index, change)
        rehash(out)
        assert ("structure", index.name) in found(verify(out))
        index.write_text(whole)
    first = min(out.glob("*.safetensors"))
    first.unlink()
    assert {("hash", first.name), ("structure", first.name)} <= found(verify(out))


# ---------------------------------------------------------------------------------------------- what cannot be checked


def test_another_original(out: Path, make_tiny_llama: TinyLlama, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify(out, make_tiny_llama(seed=1))
    assert found(result) == {("input", "model.safetensors")}
    assert "this is not the original of the folder" in result.skipped[0]
    assert main(["verify", str(out), "--original", str(make_tiny_llama(seed=1))]) == 1
    shown = capsys.readouterr()
    assert "is not the model that" in shown.err
    assert "damaged" not in shown.err + shown.out


def test_a_folder_without_records(out: Path, tiny_llama: Path) -> None:
    (out / "mendlm.json").unlink()
    result = verify(out, tiny_llama)
    assert result.ok
    assert len(result.skipped) == 2
    assert result.manifest_sha256 is None


def test_a_recipe_of_another_mendlm(out: Path) -> None:
    edit(out / "mendlm.json", lambda m: m["recipe"].update(novelty=1))
    result = verify(out)
    assert result.ok
    assert "patterns and errors were not checked" in result.skipped[0]


def test_a_recipe_that_does_not_fit_the_original_hides_no_damage(out: Path, tiny_llama: Path) -> None:
    edit(out / "mendlm.json", lambda m: m["recipe"].update(rank=9999))
    change_tensors(out, lambda tensors: tensors[f"{LAYER}.lora_A"].fill_(float("nan")))
    found = verify(out, tiny_llama)
    assert {finding.check for finding in found.findings} >= {"hash", "finite"}
    assert any("errors and copied tensors were not checked: the recipe" in sentence for sentence in found.skipped)


def test_an_export_that_was_compressed_again_is_no_export(out: Path, tmp_path: Path) -> None:
    mendlm.export(out, tmp_path / "dense", "dense")
    compress(tmp_path / "dense", tmp_path / "again", Recipe(refiner="none"))
    assert verify(tmp_path / "again", tmp_path / "dense").ok


def test_what_is_no_compressed_folder(tiny_llama: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not compressed by mendlm"):
        verify(tiny_llama)
    with pytest.raises(UsageError, match="cannot open the folder"):
        verify(tmp_path / "missing")
    (partial_folder(tmp_path / "half") / "out").mkdir(parents=True)
    with pytest.raises(UsageError, match="is an unfinished run"):
        verify(tmp_path / "half")
    mendlm.export(out, tmp_path / "dense", "dense")
    with pytest.raises(UsageError, match="is an export, and exports carry no hashes"):
        verify(tmp_path / "dense")
    with pytest.raises(UsageError, match="was already compressed by mendlm"):
        verify(out, out)


# ---------------------------------------------------------------------------------------------- command line


def test_the_command(out: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(out), "--original", str(tiny_llama)]) == 0
    assert "sound" in capsys.readouterr().out
    assert main(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["verify", str(tiny_llama)]) == 2
    capsys.readouterr()
    change_tensors(out, lambda t: t.update({"a\x1b[31mb": torch.ones(1)}))
    assert main(["verify", str(out)]) == 1
    captured = capsys.readouterr()
    assert "is damaged: " in captured.err
    assert "hash" in captured.out
    assert "\x1b" not in captured.out + captured.err
    assert main(["verify", str(out), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert {"check", "place", "problem"} == document["findings"][0].keys()
