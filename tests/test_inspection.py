"""`mendlm.inspection` on hand-made folders: what headers say, and spectra against NumPy in float64."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mendlm.checkpoints.staging import partial_folder
from mendlm.errors import CheckpointError, MendError, NonFiniteError, UsageError
from mendlm.inspection import energy_frac, inspect, tensor_spectrum
from mendlm.packing import pack_mask, unpack_mask

NAME = "model.layers.0.mlp.up_proj.weight"
PLAIN = "model.layers.0.mlp.down_proj.weight"  # compressed with rank 0
EPS = torch.finfo(torch.float32).eps


def packed_parts(generator: torch.Generator, *, rank: int = 3, d_out: int = 13, d_in: int = 20) -> dict[str, Tensor]:
    mask = torch.rand(d_out, d_in, generator=generator) < 0.4
    return {
        "weight_values": torch.randn(int(mask.sum()), generator=generator),
        "weight_bitmask": pack_mask(mask),
        "lora_A": torch.randn(rank, d_in, generator=generator),
        "lora_B": torch.randn(d_out, rank, generator=generator),
    }


def write_packed(folder: Path, parts: dict[str, Tensor], plain: dict[str, Tensor]) -> Path:
    """A packed folder of two compressed weights and one that is copied, with the guard, without mendlm.json."""
    folder.mkdir(exist_ok=True)
    modules = {PLAIN.removesuffix(".weight"): plain, NAME.removesuffix(".weight"): parts}
    tensors = {f"{module}.{part}": tensor for module, named in modules.items() for part, tensor in named.items()}
    guard = {PLAIN: torch.zeros(0)}
    norm = {"model.norm.weight": torch.ones(20)}
    save_file({**tensors, **guard, **norm}, folder / "model.safetensors")
    quantization = {"quant_method": "mendlm", "version": 1, "layout": "packed", "guard": PLAIN, "modules": {}}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    return folder


@pytest.fixture
def parts(generator: torch.Generator) -> dict[str, Tensor]:
    return packed_parts(generator)


@pytest.fixture
def packed(tmp_path: Path, parts: dict[str, Tensor], generator: torch.Generator) -> Path:
    return write_packed(tmp_path / "packed", parts, packed_parts(generator, rank=0))


def write_dense(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_dense_rows_come_from_headers(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (10, 2, 1)]
    tensors = {name: torch.zeros(6, 4, dtype=torch.bfloat16) for name in names}
    found = inspect(write_dense(tmp_path / "dense", tensors | {"model.norm.weight": torch.zeros(4)}))
    assert found.layout == "dense"
    assert found.model_type == "llama"
    assert found.recipe is None
    assert [row.name for row in found.tensors] == [*reversed(names), "model.norm.weight"]
    first = found.tensors[0]
    assert (first.shape, first.dtype, first.action) == ((6, 4), "bfloat16", "copy")
    assert (first.n_kept, first.sparsity, first.rank, first.rel_error, first.energy_frac) == (None,) * 5
    assert first.dense_bytes == first.stored_bytes == 48
    assert (found.totals.n_tensors, found.totals.n_compressed) == (4, 0)
    assert found.totals.dense_bytes == found.totals.stored_bytes == 3 * 48 + 16
    assert found.totals.dense_params == 3 * 24 + 4


def test_packed_rows_count_what_is_stored(packed: Path, parts: dict[str, Tensor]) -> None:
    found = inspect(packed)
    rows = {row.name: row for row in found.tensors}
    assert set(rows) == {NAME, PLAIN, "model.norm.weight"}  # neither parts nor the guard
    row = rows[NAME]
    n_kept = parts["weight_values"].numel()
    assert (row.shape, row.dtype, row.action, row.rank) == ((13, 20), "float32", "compress", 3)
    assert row.n_kept == n_kept
    assert row.sparsity == 1 - n_kept / 260
    assert row.dense_bytes == 4 * 260
    assert row.stored_bytes == 4 * n_kept + 13 * 3 + 4 * 3 * (13 + 20)
    assert row.rel_error is None
    assert rows[PLAIN].rank == 0
    assert found.layout == "packed"
    assert found.totals.n_compressed == 2
    assert found.totals.stored_bytes == sum(r.stored_bytes for r in found.tensors)
    assert found.totals.stored_params == n_kept + 3 * 33 + rows[PLAIN].n_kept + 20


def test_inspection_is_json(packed: Path) -> None:
    parsed = json.loads(json.dumps(inspect(packed).to_dict()))
    assert parsed["layout"] == "packed"
    assert parsed["totals"]["ratio"] == pytest.approx(
        parsed["totals"]["stored_bytes"] / parsed["totals"]["dense_bytes"]
    )
    assert {row["name"] for row in parsed["tensors"]} == {NAME, PLAIN, "model.norm.weight"}


def test_no_weight_is_read(tmp_path: Path) -> None:
    """A file of 64 GB, all hole: reading any of it would take minutes."""
    n_bytes = 64 * 10**9
    entry = {"dtype": "BF16", "shape": [n_bytes // 2000, 1000], "data_offsets": [0, n_bytes]}
    header = json.dumps({NAME: entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    try:
        with path.open("r+b") as file:
            file.truncate(8 + len(header) + n_bytes)
    except OSError:
        pytest.skip("this file system has no sparse files")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert inspect(tmp_path).totals.dense_bytes == n_bytes


def reference(parts: dict[str, Tensor]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """S and B @ A in float64."""
    A, B = parts["lora_A"].double().numpy(), parts["lora_B"].double().numpy()
    S = np.zeros((B.shape[0], A.shape[1]))
    S[unpack_mask(parts["weight_bitmask"], A.shape[1]).numpy()] = parts["weight_values"].double().numpy()
    return S, B @ A


def check_sigma(got: Tensor | None, want: np.ndarray[Any, Any]) -> None:
    assert got is not None
    expected = torch.from_numpy(np.linalg.svd(want, compute_uv=False))[: len(got)]
    # LAPACK's singular values are off by a small multiple of eps * sigma_1; 32 covers the products before it.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=32 * EPS * float(expected[0]))


def test_packed_spectrum_matches_numpy(packed: Path, parts: dict[str, Tensor]) -> None:
    S, L = reference(parts)
    found = tensor_spectrum(packed, NAME)
    check_sigma(found.sigma, S + L)
    check_sigma(found.sigma_sparse, S)
    check_sigma(found.sigma_low_rank, L)
    assert len(found.sigma) == 13
    assert found.sigma_low_rank is not None
    assert len(found.sigma_low_rank) == found.rank == 3
    assert found.n_kept == parts["weight_values"].numel()


def test_rank_above_the_smaller_side(tmp_path: Path, generator: torch.Generator) -> None:
    parts = packed_parts(generator, rank=13)
    found = tensor_spectrum(write_packed(tmp_path, parts, packed_parts(generator, rank=0)), NAME)
    check_sigma(found.sigma_low_rank, reference(parts)[1])


def test_rank_zero_has_no_low_rank_spectrum(packed: Path) -> None:
    found = tensor_spectrum(packed, PLAIN)
    assert found.rank == 0
    assert found.sigma_low_rank is not None
    assert found.sigma_low_rank.numel() == 0
    assert found.sigma_sparse is not None
    torch.testing.assert_close(found.sigma, found.sigma_sparse, rtol=0, atol=0)
    json.dumps(found.to_dict())


def test_dense_spectrum_counts_nonzeros(tmp_path: Path, generator: torch.Generator) -> None:
    W = torch.randn(7, 5, generator=generator).to(torch.bfloat16)
    W[:, 0] = 0
    found = tensor_spectrum(write_dense(tmp_path, {NAME: W}), NAME.removesuffix(".weight"))
    check_sigma(found.sigma, W.double().numpy())
    assert (found.layout, found.dtype, found.rank) == ("dense", "bfloat16", None)
    assert found.n_kept == 28
    assert found.sparsity == pytest.approx(0.2)
    document = found.to_dict()
    assert len(document["sigma"]) == len(document["energy_frac"]) == 5
    assert "sigma_low_rank" not in document


def test_energy_frac() -> None:
    torch.testing.assert_close(energy_frac(torch.tensor([3.0, 4.0]).flip(0)), torch.tensor([0.64, 1.0]).double())
    assert energy_frac(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert energy_frac(torch.zeros(0)).tolist() == []


def test_unknown_tensor_names_the_nearest(packed: Path) -> None:
    with pytest.raises(
        UsageError, match=r"unknown tensor 'model.layers.0.mlp.upproj'. Did you mean '.*up_proj.weight'"
    ):
        tensor_spectrum(packed, "model.layers.0.mlp.upproj")


def test_guard_and_parts_are_no_weights(packed: Path) -> None:
    with pytest.raises(UsageError, match="unknown tensor"):
        tensor_spectrum(packed, NAME.replace("weight", "lora_A"))


def test_a_vector_has_no_spectrum(packed: Path) -> None:
    with pytest.raises(UsageError, match=r"'model.norm.weight' has shape \(20,\), and only a matrix"):
        tensor_spectrum(packed, "model.norm")


def test_nan_is_named(tmp_path: Path) -> None:
    folder = write_dense(tmp_path, {NAME: torch.full((3, 3), float("nan"))})
    with pytest.raises(NonFiniteError, match=f"'{NAME}' holds NaN"):
        tensor_spectrum(folder, NAME)


def test_missing_part(tmp_path: Path, parts: dict[str, Tensor], generator: torch.Generator) -> None:
    del parts["lora_B"]
    folder = write_packed(tmp_path, parts, packed_parts(generator, rank=0))
    with pytest.raises(CheckpointError, match=f"'{NAME}' lacks its lora_B"):
        inspect(folder)


def test_parts_of_different_shapes(tmp_path: Path, parts: dict[str, Tensor], generator: torch.Generator) -> None:
    parts["lora_B"] = torch.zeros(12, 3)
    folder = write_packed(tmp_path, parts, packed_parts(generator, rank=0))
    with pytest.raises(CheckpointError, match="do not fit together"):
        inspect(folder)


def test_damaged_bitmask_is_located(tmp_path: Path, parts: dict[str, Tensor], generator: torch.Generator) -> None:
    parts["weight_values"] = parts["weight_values"][:-1].clone()
    folder = write_packed(tmp_path, parts, packed_parts(generator, rank=0))
    with pytest.raises(CheckpointError, match=rf"bitmask marks .* \[{NAME} in model.safetensors\]"):
        tensor_spectrum(folder, NAME)


def test_damaged_records(packed: Path) -> None:
    (packed / "mendlm.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        inspect(packed)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("layout", "braided", "layout 'braided'"), ("version", 2, "format version 2; this mendlm reads version 1")],
)
def test_another_format(packed: Path, key: str, value: object, message: str) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"][key] = value
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(MendError, match=message):
        inspect(packed)


def test_index_that_leaves_the_folder(packed: Path) -> None:
    (packed / "model.safetensors").unlink()
    (packed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        inspect(packed)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot open the folder"):
        inspect(tmp_path / "nowhere")


def test_unfinished_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (partial_folder(out) / "out").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"unfinished run\. Finish it first.*--resume"):
        inspect(out)


def test_the_recipe_of_tiles_and_of_a_calibrated_run_in_one_line() -> None:
    from mendlm.cli.inspect import _recipe_line
    from mendlm.config import Calibration, Recipe

    tiles = _recipe_line(Recipe(pattern={"sparsity": 0.5, "tile": "8x4"}).to_dict())
    assert "8" in tiles
    assert "damping" not in tiles
    text = Calibration(source="c4", n_sequences=16, seqlen=1024)
    line = _recipe_line(Recipe(criterion="wanda", calibration=text).to_dict())
    assert "criterion wanda" in line
    assert "calibration c4 (16 × 1024, sequential)" in line
    assert "pattern 0.5 row" in line
