"""The pipeline on real tiny models: what is written, byte for byte, and that stopping it anywhere changes nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mendlm
from conftest import TinyLlama
from faulting import bytes_of
from mendlm import NM, TLR, Recipe, Unstructured
from mendlm.checkpoints.staging import has_partial, partial_folder
from mendlm.errors import NonFiniteError, StorageError, UsageError
from mendlm.execution.tensor import tensor_generator
from mendlm.packing import pack_mask, unpack
from mendlm.pipeline import CompressionResult, Event, TensorDone, TensorStarted, compress, plan
from mendlm.report.records import read_manifest, read_records

RECIPE = Recipe(refiner=TLR(rank=4, n_iter=2), pattern=NM(2, 4))
PARTS = ("weight_values", "weight_bitmask", "lora_A", "lora_B")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by safetensors itself."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        found |= load_file(path)
    return found


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed run."""
    out = tmp_path_factory.mktemp("reference") / "out"
    compress(tiny_llama, out, RECIPE)
    return out


# ---------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_what_the_core_gives(
    make_tiny_llama: TinyLlama, tmp_path: Path, dtype: torch.dtype, shards: str, tied: bool
) -> None:
    model = make_tiny_llama(dtype=dtype, tied=tied, max_shard_size=shards)
    recipe = Recipe(refiner=TLR(rank=3, n_iter=2), pattern=Unstructured(0.4, "row"), criterion="random", seed=7)
    result = compress(model, tmp_path / "out", recipe)
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    compressed = [record.name for record in result.records]
    assert sorted(compressed) == sorted(name for name in before if "_proj" in name)
    assert ("lm_head.weight" in before) is not tied
    for name in before.keys() - set(compressed):
        assert_same(after.pop(name), before[name])
    for record in result.records:
        W = before[record.name]
        generator = tensor_generator(7, record.name)
        mask = mendlm.select_mask(W, "random", recipe.pattern, generator=generator)
        expected = mendlm.refine(W, mask, TLR(rank=3, n_iter=2), generator=generator)
        values, bitmask, A, B = (after.pop(f"{record.name.removesuffix('.weight')}.{part}") for part in PARTS)
        assert_same(values, expected.S[mask])
        assert_same(bitmask, pack_mask(mask))
        assert_same(A, expected.A)
        assert_same(B, expected.B)
        assert values.dtype == A.dtype == B.dtype == dtype
        S = unpack(values, bitmask, W.shape[1]).float()
        error = float((W.float() - S - B.float() @ A.float()).norm() / W.float().norm())
        assert record.rel_error == pytest.approx(error, rel=1e-5)
        assert (record.n_kept, record.rank, record.n_iter) == (int(mask.sum()), 3, 2)
        assert record.stored_bytes == sum(t.nbytes for t in (values, bitmask, A, B))
    guard = min((record.shard, record.name) for record in result.records)[1]
    assert {name: tuple(t.shape) for name, t in after.items()} == {guard: (0,)}


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_folder(make_tiny_llama: TinyLlama, tmp_path: Path, shards: str) -> None:
    model, out = make_tiny_llama(max_shard_size=shards), tmp_path / "out"
    result = compress(model, str(out), RECIPE)
    assert result.out == out
    assert {p.name for p in out.iterdir()} == {p.name for p in model.iterdir()} | {"mendlm.json", "mendlm.run.json"}
    assert list(tmp_path.iterdir()) == [out]
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((model / "config.json").read_text())
    modules = {r.name.removesuffix(".weight"): {"n_kept": r.n_kept, "rank": r.rank} for r in result.records}
    assert quantization.pop("guard") in {f"{module}.weight" for module in modules}
    assert quantization == {"quant_method": "mendlm", "version": 1, "layout": "packed", "modules": modules}
    if shards == "40KB":
        index = json.loads((out / "model.safetensors.index.json").read_text())
        held = {name: p.name for p in out.glob("*.safetensors") for name in load_file(p)}
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
        old = json.loads((model / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_parameters"] == old["metadata"]["total_parameters"]


def test_manifest(reference: Path, tiny_llama: Path) -> None:
    manifest = read_manifest(reference)
    assert Recipe(**manifest.recipe) == RECIPE
    for folder, table in ((tiny_llama, manifest.inputs), (reference, manifest.outputs)):
        for name, entry in table.items():
            content = (folder / name).read_bytes()
            assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    assert set(manifest.outputs) == {p.name for p in reference.iterdir()} - {"mendlm.json", "mendlm.run.json"}
    assert manifest.totals == plan(tiny_llama, RECIPE).totals
    assert manifest.totals.stored_bytes == sum(t.nbytes for t in tensors_of(reference).values())
    assert manifest.totals.ratio == manifest.totals.stored_bytes / manifest.totals.dense_bytes
    assert read_records(reference) == manifest.records
    text = (reference / "mendlm.json").read_text()
    assert str(reference.parent) not in text
    assert str(tiny_llama) not in text
    run = json.loads((reference / "mendlm.run.json").read_text())
    assert run["tensor_seconds"].keys() == {record.name for record in manifest.records}
    assert run["peak_memory_bytes"] > 0


def test_rank_zero_leaves_empty_factors(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, tmp_path / "out", Recipe(refiner="none"))
    before, after = tensors_of(tiny_llama), tensors_of(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj"
    W, values = before[f"{name}.weight"], after[f"{name}.weight_values"]
    assert_same(after[f"{name}.lora_A"], W.new_zeros(0, 64))
    assert_same(after[f"{name}.lora_B"], W.new_zeros(96, 0))
    S = unpack(values, after[f"{name}.weight_bitmask"], 64)
    assert_same(S, torch.where(mendlm.select_mask(W, "magnitude", Unstructured(0.5)), W, 0))


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_or_everything_pruned(tiny_llama: Path, tmp_path: Path, sparsity: float) -> None:
    result = compress(tiny_llama, tmp_path / "out", Recipe(pattern=Unstructured(sparsity), rank=2, n_iter=2))
    kept = {record.n_kept / (record.shape[0] * record.shape[1]) for record in result.records}
    assert kept == {1.0 - sparsity}
    assert {len(t) for n, t in tensors_of(tmp_path / "out").items() if "k_proj.weight_values" in n} == {
        2048 * (1 - sparsity)
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_storage_dtype_converts_everything(tiny_llama: Path, tmp_path: Path, dtype: str) -> None:
    target = getattr(torch, dtype)
    compress(tiny_llama, tmp_path / "out", RECIPE.model_copy(update={"dtype": dtype}))
    before, after = tensors_of(tiny_llama), tensors_of(tmp_path / "out")
    assert {t.dtype for t in after.values() if t.is_floating_point()} == {target}
    assert_same(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"].to(target))
    W = before["model.layers.0.mlp.up_proj.weight"]
    mask = mendlm.select_mask(W, "magnitude", NM(2, 4))
    generator = tensor_generator(0, "model.layers.0.mlp.up_proj.weight")
    expected = mendlm.refine(W, mask, TLR(rank=4, n_iter=2), storage_dtype=target, generator=generator)
    assert_same(after["model.layers.0.mlp.up_proj.weight_values"], expected.S[mask])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    assert read_records(tmp_path / "out")[0].storage_dtype == dtype


def test_other_dtypes_are_copied_and_other_files_stay_out(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    extra = {
        "model.ids": torch.arange(5),
        "model.flags": torch.tensor([True, False]),
        "model.scale": torch.ones(3, 3).to(torch.float8_e4m3fn),
        "model.empty.weight": torch.zeros(0, 3),
        "model.wide": torch.ones(2, dtype=torch.float64),
    }
    save_file(tensors_of(tiny_llama) | extra, model / "model.safetensors", {"format": "pt"})
    for name in (
        "pytorch_model.bin",
        "x.gguf",
        "modeling.py",
        ".hidden",
        "other.safetensors",
        "optimizer.pt",
        "mendlm.json",
    ):
        (model / name).write_text("no")
    for name in ("chat_template.jinja", "LICENSE", "tokenizer.model", "README.md"):
        (model / name).write_text("yes")
    (model / "runs").mkdir()
    (model / "runs" / "log").touch()
    compress(model, tmp_path / "out", RECIPE)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in extra.items():
        assert after[name].dtype == tensor.dtype
        assert bytes(after[name].flatten().view(torch.uint8)) == bytes(tensor.flatten().view(torch.uint8))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    ours = {"mendlm.json", "mendlm.run.json", "chat_template.jinja", "LICENSE", "tokenizer.model", "README.md"}
    assert names == {p.name for p in tiny_llama.iterdir()} | ours
    assert read_manifest(tmp_path / "out").totals.n_tensors == len(tensors_of(tiny_llama)) + len(extra)


def test_file_modes_follow_the_umask(tiny_llama: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        compress(tiny_llama, tmp_path / "out", RECIPE)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o640}


# ---------------------------------------------------------------------------------------------- plan


def test_plan_is_what_is_written(tiny_llama: Path, reference: Path) -> None:
    planned = plan(tiny_llama, RECIPE)
    stored = tensors_of(reference)
    for tensor in planned.tensors:
        assert tensor.stored_bytes == sum(stored[part].nbytes for part in tensor.parts())
    q = next(t for t in planned.tensors if t.name == "model.layers.0.self_attn.k_proj.weight")
    assert (q.action, q.shape, q.n_kept, q.rank, q.dtype) == ("compress", (32, 64), 1024, 4, "float32")
    assert next(t.name for t in planned.tensors if t.action == "copy") == "model.embed_tokens.weight"
    assert planned.totals.n_compressed == len(planned.compressed) == 14
    json.dumps(planned.to_dict())


def test_include_and_exclude(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(refiner="none", include=("*.layers.1.*", "*q_proj.weight"), exclude=("*.mlp.*",))
    result = compress(tiny_llama, tmp_path / "out", recipe)
    names = [f"model.layers.1.self_attn.{p}_proj.weight" for p in "koqv"]
    assert [r.name for r in result.records] == ["model.layers.0.self_attn.q_proj.weight", *names]


def test_unknown_family_works_with_include(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    assert plan(model, Recipe(include=("*.up_proj.weight",))).totals.n_compressed == 2


# ---------------------------------------------------------------------------------------------- same bytes


def test_same_seed_same_bytes(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    compress(tiny_llama, tmp_path / "again", RECIPE)
    assert bytes_of(tmp_path / "again") == bytes_of(reference)


def test_seed_matters_and_order_does_not(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(refiner="none", criterion="random")
    compress(tiny_llama, tmp_path / "0", recipe)
    compress(tiny_llama, tmp_path / "1", recipe.model_copy(update={"seed": 1}))
    compress(tiny_llama, tmp_path / "few", recipe.model_copy(update={"include": ("*.1.mlp.up_proj.weight",)}))
    name = "model.layers.1.mlp.up_proj.weight_bitmask"
    first, other, few = (tensors_of(tmp_path / x)[name] for x in ("0", "1", "few"))
    assert_same(first, few)
    assert not torch.equal(first, other)


# ---------------------------------------------------------------------------------------------- events, logging


def test_events_and_log(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events: list[Event] = []
    with caplog.at_level(logging.INFO, logger="mendlm"):
        result = compress(tiny_llama, tmp_path / "out", RECIPE, on_event=events.append)
    started = [e for e in events if isinstance(e, TensorStarted)]
    done = [e for e in events if isinstance(e, TensorDone)]
    assert [e.name for e in started] == [e.record.name for e in done] == [r.name for r in result.records]
    assert [e.index for e in started] == [e.index for e in done] == list(range(1, 15))
    assert [e.done_bytes for e in started] == [0, *(e.done_bytes for e in done[:-1])]
    assert done[-1].done_bytes == done[-1].total_bytes == sum(r.dense_bytes for r in result.records)
    assert sum("rel_error" in record.getMessage() for record in caplog.records) == 14


# ---------------------------------------------------------------------------------------------- stop and resume


class Stop:
    """Raises after the n-th finished tensor."""

    def __init__(self, n: int, error: type[BaseException] = KeyboardInterrupt):
        self.n, self.error = n, error

    def __call__(self, event: Event) -> None:
        if isinstance(event, TensorDone) and event.index == self.n:
            raise self.error


def resumed(model: Path, out: Path, recipe: Recipe = RECIPE) -> tuple[CompressionResult, list[str]]:
    done: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, TensorDone):
            done.append(event.record.name)

    return compress(model, out, recipe, resume=True, on_event=note), done


def test_resume_after_every_tensor(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    names = [record.name for record in read_records(reference)]
    for n in range(1, len(names) + 1):
        out = tmp_path / str(n)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_llama, out, RECIPE, on_event=Stop(n))
        assert not out.exists()
        assert has_partial(out)
        result, done = resumed(tiny_llama, out)
        assert done == names[n:]
        assert result.resumed == n
        assert [record.name for record in result.records] == names
        assert bytes_of(out) == bytes_of(reference)
    assert {p.name for p in tmp_path.iterdir()} == {str(n) for n in range(1, len(names) + 1)}


def test_resume_of_a_sharded_checkpoint_stopped_again_and_again(make_tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model = make_tiny_llama(max_shard_size="40KB")
    compress(model, tmp_path / "whole", RECIPE)
    for n in (3, 7, 8, 14):
        with pytest.raises(KeyboardInterrupt):
            compress(model, tmp_path / "out", RECIPE, resume=True, on_event=Stop(n))
    resumed(model, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_stop_before_the_first_tensor_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, tmp_path / "new" / "out", RECIPE, on_event=stop)
    assert list(tmp_path.iterdir()) == []


def test_unexpected_error_keeps_the_work(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        compress(tiny_llama, tmp_path / "out", RECIPE, on_event=Stop(4, ZeroDivisionError))
    assert resumed(tiny_llama, tmp_path / "out")[0].resumed == 4


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from mendlm import TLR, NM, Recipe
from mendlm.checkpoints import writer
from mendlm.pipeline import compress

model, out, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
write, calls = writer.ShardWriter.write, 0

def killed_half_way(self, name, chunks, crc32=0):
    global calls
    calls += 1
    if calls == n:
        write_half(self, name, chunks)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, name, chunks, crc32)

def write_half(self, name, chunks):
    half = b"".join(bytes(c) for c in chunks)
    half = half[: len(half) // 2]
    os.pwrite(self._fd, half, len(self.layout.header) + self.layout.infos[name].start)

writer.ShardWriter.write = killed_half_way
compress(model, out, Recipe(refiner=TLR(rank=4, n_iter=2), pattern=NM(2, 4)), resume=True)
"""


def test_kill_in_the_middle_of_a_write(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    torch_threads = torch.get_num_threads()
    for n in (12, 9):  # the second kill strikes a run that had been resumed
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, tiny_llama, out, str(n)], capture_output=True, check=False
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert not out.exists()
    with pytest.raises(UsageError, match=r"a previous run into 'out' stopped half-way"):
        compress(tiny_llama, out, RECIPE)
    torch.set_num_threads(1)
    try:
        result, done = resumed(tiny_llama, out)
    finally:
        torch.set_num_threads(torch_threads)
    assert result.resumed == 14 - len(done) > 2
    assert bytes_of(out) == bytes_of(reference)


def stopped(model: Path, out: Path, n: int = 5) -> Path:
    with pytest.raises(KeyboardInterrupt):
        compress(model, out, RECIPE, on_event=Stop(n))
    return partial_folder(out)


@pytest.mark.parametrize("harm", ["data", "journal", "header", "file", "no journal"])
def test_resume_redoes_what_did_not_reach_the_disk(
    tiny_llama: Path, reference: Path, tmp_path: Path, harm: str
) -> None:
    out = tmp_path / "out"
    partial = stopped(tiny_llama, out)
    shard, journal = partial / "out" / "model.safetensors", partial / "journal.jsonl"
    records = read_records(reference)
    if harm == "data":  # a power failure lost a page of the third tensor
        with safe_open(reference / "model.safetensors", "pt") as file:
            values = bytes(file.get_tensor(records[2].name + "_values").view(torch.uint8).numpy().data)
        content = shard.read_bytes()
        shard.write_bytes(content.replace(values, bytes(len(values))))
        assert shard.read_bytes() != content
        redone = [records[2], *records[5:]]
    elif harm == "journal":
        journal.write_bytes(journal.read_bytes()[:-5])
        redone = list(records[4:])
    elif harm == "header":
        with shard.open("r+b") as file:
            file.write(b"\0")
        redone = list(records)
    elif harm == "file":
        shard.unlink()
        redone = list(records)
    else:
        journal.unlink()
        redone = list(records)
    result, done = resumed(tiny_llama, out)
    assert done == [record.name for record in redone]
    assert result.resumed == len(records) - len(redone)
    assert bytes_of(out) == bytes_of(reference)


def test_an_error_while_resuming_does_not_cost_the_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped(tiny_llama, out)

    def failing(*_: object) -> None:
        raise NonFiniteError("a value is NaN.")

    with monkeypatch.context() as patch:
        patch.setattr("mendlm.execution.tasks.compress_tensor", failing)
        with pytest.raises(NonFiniteError):
            compress(tiny_llama, out, RECIPE, resume=True)
    assert resumed(tiny_llama, out)[0].resumed == 5


def test_resume_says_what_differs(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    out = tmp_path / "out"
    partial = stopped(model, out)
    with pytest.raises(UsageError, match=r"is another one: rank was 4, now 5; seed was 0, now 1\. Use the same"):
        compress(model, out, RECIPE.model_copy(update={"rank": 5, "seed": 1}), resume=True)
    os.utime(model / "model.safetensors", ns=(1, 1))
    with pytest.raises(UsageError, match=r"input 'model\.safetensors' changed"):
        compress(model, out, RECIPE, resume=True)
    shutil.copystat(tiny_llama / "model.safetensors", model / "model.safetensors")
    monkeypatch.setattr(mendlm, "__version__", "9.9")
    with pytest.raises(UsageError, match=r"mendlm_version was '0\.1\.0', now '9\.9'"):
        compress(model, out, RECIPE, resume=True)
    assert partial.is_dir()  # none of these refusals cost the work
    monkeypatch.undo()
    assert resumed(model, out)[0].resumed == 5


def test_resume_without_anything_to_resume_just_starts(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        result, done = resumed(tiny_llama, tmp_path / name)
        assert (result.resumed, len(done)) == (0, 14)
        assert bytes_of(tmp_path / name) == bytes_of(reference)


def test_resume_of_a_complete_folder_returns_its_result(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = compress(tiny_llama, out, RECIPE)
    before = {p: p.stat() for p in out.iterdir()}
    again, done = resumed(tiny_llama, out)
    assert (again.records, again.totals, again.resumed, done) == (first.records, first.totals, 14, [])
    assert {p: p.stat() for p in out.iterdir()} == before
    with pytest.raises(UsageError, match=r"is complete but another run wrote it: rank was 4, now 5\. Pass --overwrite"):
        compress(tiny_llama, out, RECIPE.model_copy(update={"rank": 5}), resume=True)


def test_resume_of_a_complete_folder_looks_at_the_input(
    tiny_llama: Path, make_tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(tiny_llama, out, RECIPE)
    with pytest.raises(UsageError, match=r"another run wrote it: input 'model\.safetensors' changed"):
        compress(make_tiny_llama(seed=1), out, RECIPE, resume=True)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy, copy_function=shutil.copyfile)  # other times, same content
    assert compress(copy, out, RECIPE, resume=True).resumed == 14


def test_resume_cleans_up_after_a_kill_between_the_last_renames(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(tiny_llama, out, RECIPE)
    partial = partial_folder(out)
    partial.mkdir()
    (partial / "lock").touch()
    (tmp_path / ".out.mendlm-old").mkdir()
    assert resumed(tiny_llama, out)[0].resumed == 14
    assert list(tmp_path.iterdir()) == [out]


# ---------------------------------------------------------------------------------------------- overwrite


def test_overwrite_replaces_at_the_very_end(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")

    def look(event: Event) -> None:
        assert [p.name for p in out.iterdir()] == ["config.json"]
        assert (out / "config.json").read_text() == "{}"

    compress(tiny_llama, out, RECIPE, overwrite=True, on_event=look)
    assert bytes_of(out) == bytes_of(reference)
    assert list(tmp_path.iterdir()) == [out]


def test_overwrite_replaces_checkpoints_alone(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    message = r"out' holds no config\.json.* but 'thesis\.txt', .* will not be overwritten\. Remove it yourself"
    with pytest.raises(UsageError, match=message):
        compress(tiny_llama, out, RECIPE, overwrite=True)
    with pytest.raises(UsageError, match=message):
        mendlm.export(reference, out, overwrite=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.txt"]
    (out / "thesis.txt").unlink()
    compress(tiny_llama, out, RECIPE, overwrite=True)
    assert bytes_of(out) == bytes_of(reference)


def test_stopped_overwrite_keeps_the_old_folder_and_can_be_resumed(
    tiny_llama: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(tiny_llama, out, Recipe(refiner="none"))
    old = bytes_of(out)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, out, RECIPE, overwrite=True, on_event=Stop(6))
    assert bytes_of(out) == old
    assert resumed(tiny_llama, out)[0].resumed == 6
    assert bytes_of(out) == bytes_of(reference)
    assert list(tmp_path.iterdir()) == [out]


def test_overwrite_starts_anew(tiny_llama: Path, reference: Path, tmp_path: Path) -> None:
    stopped(tiny_llama, tmp_path / "out")
    result = compress(tiny_llama, tmp_path / "out", RECIPE, overwrite=True)
    assert result.resumed == 0
    assert bytes_of(tmp_path / "out") == bytes_of(reference)


def test_two_runs_into_one_folder(tiny_llama: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def intrude(event: Event) -> None:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(StorageError, match="another run is writing to the same OUT"):
                compress(tiny_llama, tmp_path / "out", RECIPE, **options)
            refused.append("")

    compress(
        tiny_llama, tmp_path / "out", Recipe(refiner="none", include=("*.0.mlp.up_proj.weight",)), on_event=intrude
    )
    assert len(refused) == 6


# ---------------------------------------------------------------------------------------------- memory

PEAK = """
import re, sys
import torch
torch.set_num_threads(1)
from mendlm import Recipe
from mendlm.pipeline import compress

compress(sys.argv[1], sys.argv[2], Recipe(rank=2, n_iter=2, dtype="bfloat16"))
# Not ru_maxrss: a child inherits the peak of the process that started it.
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    shape, peaks, sizes = (768, 512), [], []
    names = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    generator = torch.Generator().manual_seed(0)
    for n_blocks in (3, 10):
        model = tmp_path / f"model-{n_blocks}"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "llama"}')
        weights = {
            f"model.layers.{i}.{name}.weight": torch.randn(shape, generator=generator)
            for i in range(n_blocks)
            for name in names
        }
        # An embedding of many chunks, so that copying shows up too.
        weights["model.embed_tokens.weight"] = torch.ones(n_blocks * 2048, 512)
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        sizes.append(sum(t.nbytes for t in weights.values()))
        run = [sys.executable, "-c", PEAK, model, tmp_path / f"out-{n_blocks}"]
        peaks.append(int(subprocess.run(run, capture_output=True, check=True, text=True).stdout))
    tensor_bytes = 4 * shape[0] * shape[1]
    # The allocator alone makes equal runs differ by several MB.
    assert sizes[1] - sizes[0] > 90 * 2**20
    assert peaks[1] - peaks[0] < tensor_bytes + 10 * 2**20


def test_the_pipeline_needs_no_transformers() -> None:
    code = (
        "import sys, mendlm.pipeline, mendlm.config; print([m for m in ('transformers', 'typer') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert run.stdout.strip() == "[]"
