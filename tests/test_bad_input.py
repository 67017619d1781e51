"""Bad input: each case gets one clear sentence that names value, place and remedy, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import mendlm
from mendlm import NM, Recipe, Unstructured
from mendlm.checkpoints.staging import partial_folder
from mendlm.errors import CheckpointError, MendError, NonFiniteError, StorageError, UsageError
from mendlm.pipeline import Event, TensorDone, compress, plan
from mendlm.report.records import read_manifest, read_records

if TYPE_CHECKING:
    from conftest import TinyLlama

QUICK = Recipe(refiner="none")


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A single-file checkpoint to break."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def sharded(make_tiny_llama: TinyLlama, tmp_path: Path) -> Path:
    """A sharded checkpoint to break."""
    return shutil.copytree(make_tiny_llama(max_shard_size="40KB"), tmp_path / "model")


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder, with size and time."""
    paths = [*folder.rglob("*")]
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in paths}


def refused(
    model: str | Path, tmp_path: Path, error: type[MendError], message: str, recipe: Recipe = QUICK, **options: Any
) -> str:
    """Compress must fail with this error, in one sentence or two, and change nothing on disk."""
    before = tree(tmp_path)
    with pytest.raises(error, match=message) as caught:
        compress(model, tmp_path / "parent" / "out", recipe, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    parsed = json.loads(path.read_text())
    change(parsed)
    path.write_text(json.dumps(parsed))


def set_weight(folder: Path, name: str, value: float) -> str:
    """Put one value into one tensor; the name of its shard."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][-1, -1] = value
            save_file(tensors, path, {"format": "pt"})
            return path.name
    raise KeyError(name)


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weight(sharded: Path, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    shard = set_weight(sharded, name, value)
    message = rf"W of shape \(96, 64\) holds NaN or infinity\..* \[{re.escape(name)} in {re.escape(shard)}\]$"
    refused(sharded, tmp_path, NonFiniteError, message)


def test_non_finite_weight_with_every_criterion_and_pattern(model: Path, tmp_path: Path) -> None:
    set_weight(model, "model.layers.0.mlp.down_proj.weight", float("nan"))
    for criterion in ("magnitude", "random"):
        for pattern in (Unstructured(0.5), NM(2, 4)):
            recipe = Recipe(criterion=criterion, pattern=pattern, rank=2, n_iter=2)
            refused(model, tmp_path, NonFiniteError, r"down_proj\.weight in model\.safetensors", recipe)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
def test_weight_that_overflows_the_storage_dtype(model: Path, tmp_path: Path, name: str) -> None:
    set_weight(model, name, 1e6)
    recipe = Recipe(refiner="none", dtype="float16", pattern=Unstructured(0.0))
    message = rf"overflow.*Store in bfloat16 or float32.*\[{re.escape(name)} in model\.safetensors\]"
    refused(model, tmp_path, NonFiniteError, message, recipe)


def test_excluding_the_bad_tensor_helps(model: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    set_weight(model, name, float("nan"))
    result = compress(model, tmp_path / "out", Recipe(refiner="none", exclude=(name,)))
    assert result.totals.n_compressed == 13


# ---------------------------------------------------------------------------------------------- recipe against shapes


def test_rank_too_large(model: Path, tmp_path: Path) -> None:
    message = (
        r"rank must be in \[0, 32\] for W of shape \(32, 64\), got 33\. Lower the rank.* "
        r"\[model\.layers\.0\.self_attn\.k_proj\.weight in model\.safetensors\]"
    )
    refused(model, tmp_path, UsageError, message, Recipe(rank=33))
    with pytest.raises(UsageError, match=message):
        plan(model, Recipe(rank=33))


@pytest.mark.parametrize(("fields", "message"), [
    ({"rank": -1}, r"rank must be a whole number >= 0.* got -1"),
    ({"pattern": {"sparsity": 1.01}}, r"sparsity must be in \[0, 1\], got 1\.01"),
    ({"pattern": {"sparsity": -0.01}}, r"sparsity must be in \[0, 1\], got -0\.01"),
])  # fmt: skip
def test_values_no_tensor_can_have(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**fields)


def test_pattern_that_does_not_divide(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.ones(64, 98)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = (
        r"pattern 2:4 needs d_in divisible by 4, got W of shape \(64, 98\)\. Exclude this tensor.* "
        r"\[model\.layers\.1\.mlp\.down_proj\.weight in model\.safetensors\]"
    )
    refused(model, tmp_path, UsageError, message, Recipe(pattern=NM(2, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, r"device 'cuda:99' is not available: torch .* finds \d+ CUDA devices"),
        ({"device": "tpu"}, r"unknown device 'tpu'\. Use 'cpu', 'cuda'"),
        ({"device": "meta"}, r"device 'meta' is not supported"),
        ({"executor": "slurm"}, r"unknown executor 'slurm'\. Available: local, ray"),
        ({"overwrite": True, "resume": True}, r"pass one of them"),
    ],
)
def test_options(tiny_llama: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    refused(tiny_llama, tmp_path, UsageError, message, **options)


def test_a_device_as_torch_has_it_and_a_recipe_that_is_none(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, tmp_path / "done", QUICK, device=torch.device("cpu"))
    refused(tiny_llama, tmp_path, UsageError, r"device 'meta' is not supported", device=torch.device("meta"))
    for wrong in ("tlr-50", {"rank": 3}):
        with pytest.raises(UsageError, match=r"recipe must be a Recipe, got .* Use Recipe\(\.\.\.\)"):
            plan(tiny_llama, wrong)  # type: ignore[arg-type]


def test_globs(tiny_llama: Path, tmp_path: Path) -> None:
    refused(
        tiny_llama, tmp_path, UsageError, r"--include '\*\.qproj\.\*' matches no tensor", Recipe(include=("*.qproj.*",))
    )
    refused(tiny_llama, tmp_path, UsageError, r"--exclude 'lm_head\*' matches no tensor", Recipe(exclude=("lm_head*",)))


# ---------------------------------------------------------------------------------------------- the folder


def test_no_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "model.gguf").touch()
    refused("org/name", tmp_path, UsageError, r"'org/name' is not a folder.*'hf download org/name --local-dir FOLDER'")
    refused("file", tmp_path, UsageError, r"'file' is a file\. Give the folder")
    refused("model.gguf", tmp_path, UsageError, r"is a GGUF file.*mendlm import")


def test_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    refused(folder, tmp_path, UsageError, r"is not a checkpoint: it holds neither model\.safetensors nor")
    (folder / "weights.gguf").touch()
    refused(folder, tmp_path, UsageError, r"'weights\.gguf' is a GGUF file")
    (folder / "consolidated.safetensors").touch()
    refused(folder, tmp_path, CheckpointError, r"holds 'consolidated\.safetensors' but neither")


def test_no_config(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    refused(model, tmp_path, CheckpointError, r"has weights but no config\.json")
    with pytest.raises(CheckpointError, match=r"has weights but no config\.json"):
        mendlm.load(model)


def test_an_empty_path(tmp_path: Path) -> None:
    refused("", tmp_path, UsageError, r"a path is empty. Give '\.' for the current folder")
    for work in (mendlm.load, mendlm.verify):
        with pytest.raises(UsageError, match="a path is empty"):
            work("")


def test_weights_of_a_dtype_that_is_not_compressed(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, model / "model.safetensors")
    message = rf"'{name}' has dtype F8_E4M3, and mendlm compresses F64, F32, F16, BF16\. .* --exclude '{name}'"
    refused(model, tmp_path, UsageError, message)
    out = tmp_path / "out"
    compress(model, out, QUICK.model_copy(update={"exclude": (name,)}))
    assert load_file(out / "model.safetensors")[name].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "must hold a JSON object, got list")])
def test_broken_config(model: Path, tmp_path: Path, text: str, message: str) -> None:
    (model / "config.json").write_text(text)
    refused(model, tmp_path, CheckpointError, rf"'config\.json' {message}")


@pytest.mark.parametrize("model_type", ["lama", "mamba", None, 3])
def test_unknown_architecture(model: Path, tmp_path: Path, model_type: object) -> None:
    edit(model / "config.json", lambda c: c.update(model_type=model_type))
    shown = repr(model_type if isinstance(model_type, str) else None)
    refused(model, tmp_path, UsageError, rf"unknown architecture: model_type {shown} .*Known: .*llama.*--include")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_only(model: Path, tmp_path: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    message = rf"pickles only, e\.g\. '{re.escape(name)}'\. Loading a pickle can run any code.*save_pretrained"
    refused(model, tmp_path, UsageError, message)


def test_compressed_or_quantized_already(model: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "once", QUICK)
    refused(tmp_path / "once", tmp_path, UsageError, r"was already compressed by mendlm\. Compress the dense model")
    edit(model / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
    refused(model, tmp_path, UsageError, r"is quantized \(quant_method 'gptq'\)")


# ---------------------------------------------------------------------------------------------- files


def test_empty_and_truncated_weights(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    message = (
        rf"'model\.safetensors' is 1000 bytes shorter than its header says \({len(whole) - 1000} of {len(whole)}\)"
    )
    refused(
        model, tmp_path, CheckpointError, message + r"\. The download is probably incomplete: fetch that file again"
    )
    path.write_bytes(whole[:100])
    refused(model, tmp_path, CheckpointError, r"'model\.safetensors' is \d+ bytes shorter than its header says")
    path.write_bytes(b"")
    refused(model, tmp_path, CheckpointError, r"'model\.safetensors' is empty")
    path.write_bytes(b"<html>")
    refused(model, tmp_path, CheckpointError, r"'model\.safetensors' is not a sound safetensors file: .* only 6 bytes")


def test_index_names_a_missing_shard(sharded: Path, tmp_path: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    message = rf"names the shard '{re.escape(shard.name)}', which is missing.*fetch that shard again"
    refused(sharded, tmp_path, CheckpointError, message)


def test_index_and_shards_disagree(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    whole = index.read_text()
    last = json.loads(whole)["weight_map"]["model.norm.weight"]
    edit(index, lambda i: i["weight_map"].update({"lm_head.weight": last}))
    refused(sharded, tmp_path, CheckpointError, rf"lists 'lm_head\.weight' in '{last}', which holds no such tensor")
    index.write_text(whole)
    edit(index, lambda i: i["weight_map"].pop("model.norm.weight"))
    refused(sharded, tmp_path, CheckpointError, rf"'{last}' holds 'model\.norm\.weight', which .* does not list there")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\model.safetensors", "..", ".", ""]
)
def test_index_that_leaves_the_folder(sharded: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(min(sharded.glob("*.safetensors")), tmp_path / "model.safetensors")
    index = sharded / "model.safetensors.index.json"
    edit(index, lambda i: i["weight_map"].update({"model.embed_tokens.weight": name}))
    message = rf"puts 'model\.embed_tokens\.weight' into {re.escape(repr(name))}, which is not a plain file name"
    refused(sharded, tmp_path, CheckpointError, message)


def rename_a_shard(folder: Path, name: str) -> str:
    """Give a shard with a projection another name, in the index too; the old one."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    old = str(index["weight_map"]["model.layers.0.mlp.up_proj.weight"])
    (folder / name).unlink(missing_ok=True)
    (folder / old).rename(folder / name)

    def change(index: dict[str, Any]) -> None:
        index["weight_map"] = {key: name if value == old else value for key, value in index["weight_map"].items()}

    edit(folder / "model.safetensors.index.json", change)
    return old


def test_shards_with_names_of_any_kind_are_not_copied_over_the_result(sharded: Path, tmp_path: Path) -> None:
    compress(sharded, tmp_path / "plain", Recipe(rank=2))
    old = rename_a_shard(sharded, "weights.dat")
    compress(sharded, tmp_path / "out", Recipe(rank=2))
    assert (tmp_path / "out" / "weights.dat").read_bytes() == (tmp_path / "plain" / old).read_bytes()


@pytest.mark.parametrize("name", ["mendlm.json", "mendlm.run.json", "adapter_config.json"])
def test_shards_with_names_of_other_files(sharded: Path, tmp_path: Path, name: str) -> None:
    rename_a_shard(sharded, name)
    refused(sharded, tmp_path, CheckpointError, rf"into '{name}', which is the name of another file\. Give the shard")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}])
def test_index_without_a_map(sharded: Path, tmp_path: Path, weight_map: object) -> None:
    edit(sharded / "model.safetensors.index.json", lambda i: i.update(weight_map=weight_map))
    refused(sharded, tmp_path, CheckpointError, r"'model\.safetensors\.index\.json' has no weight_map")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_link_that_leaves_the_folder(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    refused(
        model, tmp_path, CheckpointError, rf"'{re.escape(name)}' is a link that leads out of the checkpoint's folder"
    )


def test_links_of_a_hub_cache_are_followed(tiny_llama: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(tiny_llama.iterdir()):
        shutil.copy(path, tmp_path / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    compress(snapshot, tmp_path / "out", QUICK)
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


def test_input_that_changes_during_the_run(model: Path, tmp_path: Path) -> None:
    def touch(event: Event) -> None:
        os.utime(model / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match=r"a file of MODEL was changed while it was read"):
        compress(model, tmp_path / "out", QUICK, on_event=touch)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ---------------------------------------------------------------------------------------------- OUT


def test_out_is_not_empty(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "parent" / "out"
    out.mkdir(parents=True)
    (out / "precious").write_text("x")
    for how in ({}, {"resume": True}, {"overwrite": True}):
        refused(
            tiny_llama, tmp_path, UsageError, r"holds no config\.json.* but 'precious', so it is not a check", **how
        )
    (out / "config.json").write_text("{}")
    refused(tiny_llama, tmp_path, UsageError, r"^'.*/parent/out' exists and is not empty\. Pass --overwrite")
    refused(tiny_llama, tmp_path, UsageError, r"is not empty and holds no run to resume", resume=True)


def test_out_and_model_overlap(model: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for out, message in (
        (model, "is MODEL or lies inside it"),
        (model / "out", "is MODEL or lies inside it"),
        (tmp_path, "holds MODEL"),
    ):
        with pytest.raises(UsageError, match=message):
            compress(model, out, QUICK, overwrite=True)
    assert tree(tmp_path) == before


def test_out_is_a_file_or_below_one(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        compress(tiny_llama, tmp_path / "file", QUICK, overwrite=True)
    with pytest.raises(StorageError, match="cannot write"):
        compress(tiny_llama, tmp_path / "file" / "out", QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_resume_of_a_damaged_result(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(tiny_llama, out, QUICK)
    (out / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"'tokenizer\.json' in OUT .* is missing or damaged"):
        compress(tiny_llama, out, QUICK, resume=True)
    (out / "mendlm.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was not written by mendlm compress"):
        compress(tiny_llama, out, QUICK, resume=True)


# ---------------------------------------------------------------------------------------------- disk full


@pytest.fixture
def tiny_disk() -> Iterator[Path]:
    """A real file system of 128 KiB, where the tests may mount one."""
    folder = Path(tempfile.mkdtemp())
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=128k", "mendlm-test", str(folder)]
    mounted = mount is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        folder.rmdir()
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


def test_disk_too_small_is_seen_before_any_work(tiny_llama: Path, tiny_disk: Path) -> None:
    events: list[Event] = []
    with pytest.raises(StorageError, match=r"needs \d\.\d MB and its disk has 0\.\d MB free\. Free some space"):
        compress(tiny_llama, tiny_disk / "out", QUICK, on_event=events.append)
    assert events == []
    assert list(tiny_disk.iterdir()) == []


class Free(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


def test_disk_that_is_full_after_all(tiny_llama: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Quotas and other writers are not in the free space that the system reports.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Free(10**9, 0, 10**9))
    events: list[Event] = []
    with pytest.raises(StorageError, match=r"no space left for .*model\.safetensors' \(No space left on device\)"):
        compress(tiny_llama, tiny_disk / "out", QUICK, on_event=events.append)
    assert events == []
    assert list(tiny_disk.iterdir()) == []


def test_preallocation_fails(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    refused(tiny_llama, tmp_path, StorageError, r"no space left for .*Free some space, or write to another disk")


def test_disk_full_when_resuming_costs_no_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(event: Event) -> None:
        if isinstance(event, TensorDone) and event.index == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, out, QUICK, on_event=stop)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Free(10**9, 10**9, 0))
        with pytest.raises(StorageError, match=r"has 0\.0 MB free"):
            compress(tiny_llama, out, QUICK, resume=True)
    assert partial_folder(out).is_dir()
    assert compress(tiny_llama, out, QUICK, resume=True).resumed == 5


# ---------------------------------------------------------------------------------------------- records


def test_records_of_something_else(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no mendlm\.json: give a folder that mendlm compress wrote"):
        read_records(tiny_llama)
    for text, message in (
        ("{", "is not valid JSON"),
        ('{"format": "mendlm", "version": 1, "totals": NaN}', "is not valid JSON: it has NaN where a number must be"),
        ("[]", "was not written by mendlm compress"),
        ('{"format": "mendlm", "version": 2}', "has version 2, this mendlm reads version 1"),
        ('{"format": "mendlm", "version": 1}', "is incomplete"),
        ('{"format": "mendlm", "version": 1, "records": 3}', "is incomplete"),
    ):
        (tmp_path / "mendlm.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("place", "field", "value"),
    [
        ("records", "rel_error", "x"),
        ("records", "n_kept", 1.5),
        ("records", "energy_frac", []),
        ("records", "rank", True),
        ("records", "name", None),
        ("records", "shape", ["a", 2]),
        ("totals", "stored_bytes", "9"),
        ("matching", "loss_after", None),
    ],
)
def test_records_with_a_value_of_another_kind(
    tiny_llama: Path, tmp_path: Path, place: str, field: str, value: object
) -> None:
    compress(tiny_llama, tmp_path / "out", QUICK)
    manifest = tmp_path / "out" / "mendlm.json"
    parsed = json.loads(manifest.read_text())
    block = dict(block=0, status="kept", loss_before=1.0, loss_after=1, n_steps=1, best_step=0, vectors=[])
    parsed["matching"] = [block | dict(n_windows=1, n_held_out=1)]
    manifest.write_text(json.dumps(parsed))
    assert read_manifest(tmp_path / "out").matching[0].loss_after == 1
    rows = parsed[place]
    (rows if place == "totals" else rows[0])[field] = value
    manifest.write_text(json.dumps(parsed))
    with pytest.raises(CheckpointError, match=r"mendlm\.json' is incomplete or damaged"):
        read_manifest(tmp_path / "out")
