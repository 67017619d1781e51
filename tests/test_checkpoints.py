"""Files on disk: headers byte for byte, every way in which a file can be damaged, journal, staging."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from mendlm.checkpoints.finish import hash_files, to_json
from mendlm.checkpoints.folder import Part, open_folder
from mendlm.checkpoints.header import encode_header, read_header, tensor_bytes
from mendlm.checkpoints.journal import Entry, Journal
from mendlm.checkpoints.plan import copied, natural_key
from mendlm.checkpoints.reader import Shard, as_bytes, inside, read_chunks, read_json_object, read_tensor
from mendlm.checkpoints.staging import check_target, open_staging, partial_folder
from mendlm.checkpoints.writer import ShardLayout, ShardWriter, copy_file, storage_errors, write_file
from mendlm.errors import CheckpointError, StorageError, UsageError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


def open_shard(path: Path) -> Shard:
    return Shard(path.name, path, read_header(path), path.stat().st_size, path.stat().st_mtime_ns)


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# ---------------------------------------------------------------------------------------------- headers


def test_header_is_byte_for_byte_that_of_safetensors() -> None:
    tensors = {
        "b": torch.ones(3, 2),
        "a": torch.ones(1, dtype=torch.bfloat16),
        'ä"\\': torch.ones(2, dtype=torch.uint8),
        "z": torch.zeros(2, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.0),
    }
    names = {dtype: name for name, dtype in DTYPES.items()}
    listed = [(name, names[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    header, infos = encode_header(listed, {"format": "pt"})
    assert header == save(tensors, {"format": "pt"})[: len(header)]
    assert infos[0].name == "z"  # the widest dtype first


shapes = st.lists(st.integers(0, 4), max_size=3)
files = st.dictionaries(st.text(min_size=1, max_size=6), st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6)


@given(files)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_we_write_safetensors_reads_and_back(tmp_path: Path, content: dict[str, tuple[str, list[int]]]) -> None:
    content.pop("__metadata__", None)
    tensors = {
        name: torch.arange(torch.Size(shape).numel()).to(DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape) in content.items()
    }
    layout = ShardLayout("x.safetensors", [(n, d, tuple(s)) for n, (d, s) in content.items()], {})
    (tmp_path / layout.name).unlink(missing_ok=True)
    with ShardWriter(tmp_path, layout) as writer:
        assert not writer.allocate()
        sums = {name: writer.write(name, [as_bytes(t)] if t.numel() else []) for name, t in tensors.items()}
        assert {name: writer.checksum([name]) for name in tensors} == sums
        assert writer.allocate()  # all there: a second run may trust it
    shard = open_shard(tmp_path / layout.name)
    with safe_open(shard.path, "pt") as file:
        assert sorted(file.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            torch.testing.assert_close(file.get_tensor(name), tensor, rtol=0, atol=0)
            info = shard.header.by_name[name]
            assert b"".join(bytes(c) for c in read_chunks(shard, info, 3)) == (
                bytes(as_bytes(tensor)) if tensor.numel() else b""
            )
            if tensor.is_floating_point():
                torch.testing.assert_close(read_tensor(shard, info), tensor, rtol=0, atol=0)


def test_narrow_dtypes_are_counted_in_bits() -> None:
    assert tensor_bytes("F4", (3, 2)) == 3
    assert tensor_bytes("F8_E4M3", (3,)) == 3
    assert tensor_bytes("F32", ()) == 4


def test_two_tensors_of_one_name() -> None:
    with pytest.raises(CheckpointError, match="two tensors would be stored under the name 'a'"):
        encode_header([("a", "U8", (1,)), ("a", "F32", (1,))], {})


DAMAGED: list[tuple[object, bytes, str]] = [
    (b"[1]", b"", "its header is not a JSON object"),
    (b'{"a":', b"", "its header is not valid JSON"),
    (b"[" * 100_000, b"", "its header is not valid JSON"),
    (b'{"a\xff":1}', b"", "its header is not valid JSON"),
    (b'{"a":1,"a":1}', b"", "the key 'a' occurs twice"),
    ({"__metadata__": {"a": 1}}, b"", "__metadata__ does not map strings to strings"),
    ({"a": {"dtype": "F32"}}, b"", "entry of 'a' does not consist of dtype, shape and data_offsets"),
    ({"a": entry("F31", [1], 0, 4)}, bytes(4), "'a' has unknown dtype 'F31'"),
    ({"a": entry("F32", [-1], 0, 4)}, bytes(4), r"'a' has shape \[-1\]"),
    ({"a": entry("F32", [True], 0, 4)}, bytes(4), r"'a' has shape \[True\]"),
    ({"a": entry("F32", [1.0], 0, 4)}, bytes(4), r"'a' has shape \[1\.0\]"),
    ({"a": entry("F32", [1], 4, 0)}, bytes(4), r"'a' has data_offsets \[4, 0\]"),
    ({"a": entry("F32", [2], 0, 4)}, bytes(4), r"'a' of dtype F32 and shape \[2\] needs 8 bytes"),
    ({"a": entry("F4", [1], 0, 1)}, bytes(1), "needs 0.5 bytes"),
    ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, bytes(3), "'b' starts at byte 2 and leaves a hole"),
    ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, bytes(3), "'b' starts at byte 1 and overlaps"),
    ({"a": entry("U8", [2], 1, 3)}, bytes(3), "'a' starts at byte 1 and leaves a hole of 1 bytes"),
    ({"a": entry("F32", [2**62, 2**62], 0, 4)}, bytes(4), r"'a' has shape \[\d+, \d+\], which no file can hold"),
    ({"a": entry("F32", [2**62, 2**62, 0], 0, 0)}, b"", "which no file can hold"),
    ({"a": entry("F32", [2**62] * 64, 0, 4)}, bytes(4), "which no file can hold"),
    ({"a": entry("F32", [1] * 65, 0, 4)}, bytes(4), "'a' has 65 dimensions, the limit is 64"),
    ({"a" * 1025: entry("F32", [1], 0, 4)}, bytes(4), r"the name 'aaa.*\.\.\..*a' of a tensor has 1025 characters"),
    (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"0", "of a tensor has half of a surrogate pair"),
    (b'{"__metadata__":{"a":"\\udfff"}}', b"", "__metadata__ holds half of a surrogate pair"),
    (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"0", r"'a' has shape \[nan\]"),
    (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', b"0", "is not valid JSON"),
    ({"a": entry("U8", [2], 0, 2)}, bytes(5), r"it is 3 bytes longer than its header says"),
    ({"a": entry("U8", [9], 0, 9)}, bytes(5), r"'x\.safetensors' is 4 bytes shorter than its header says"),
]


@pytest.mark.parametrize(("header", "data", "message"), DAMAGED)
def test_damaged_header(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "'x.safetensors'" in str(caught.value)


def test_every_truncation_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        message = "is empty" if size == 0 else f"only {size} bytes" if size < 8 else "bytes shorter than its header"
        with pytest.raises(CheckpointError, match=message):
            read_header(path)


def test_messages_stay_short_whatever_a_file_says(tmp_path: Path) -> None:
    for header in ({"a": entry("F" * 10**6, [1], 0, 4)}, {"a": entry("F32", [-1] * 10**5, 0, 4)}, {"b" * 10**6: 1}):
        with pytest.raises(CheckpointError) as caught:
            read_header(raw_file(tmp_path / "x.safetensors", header, bytes(4)))
        assert len(str(caught.value)) < 500


def test_absurd_header_length_lfs_pointer_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 16)
    with pytest.raises(
        CheckpointError, match="announce a header of 18446744073709551615 bytes, the limit is 100000000"
    ):
        read_header(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        read_header(path)
    with pytest.raises(CheckpointError, match=r"cannot read 'y\.safetensors': No such file"):
        read_header(tmp_path / "y.safetensors")


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b"])
def test_only_plain_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a plain file name"):
        inside(tmp_path, name)


def test_links_out_of_the_folder_except_in_a_hub_cache(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "123"
    folder = tmp_path / "snapshots" / "rev"
    elsewhere = tmp_path / "elsewhere"
    folder.mkdir(parents=True)
    blob.parent.mkdir()
    elsewhere.mkdir()
    blob.write_text("x")
    (folder / "ok").symlink_to("../../blobs/123")
    (folder / "bad").symlink_to(elsewhere)
    (elsewhere / "bad").symlink_to(blob)
    assert inside(folder, "ok") == folder / "ok"
    for place in (folder, elsewhere):
        with pytest.raises(CheckpointError, match=r"'bad' is a link that leads out of the checkpoint's folder"):
            inside(place, "bad")


@pytest.mark.parametrize("n_columns", [9, 2 * 8 * 2**20 + 5])  # the second in several pieces
def test_bitmask_of_any_size_is_read_whole(tmp_path: Path, n_columns: int) -> None:
    bitmask = torch.arange(n_columns).to(torch.uint8).reshape(1, -1)
    save_file({"a": bitmask}, tmp_path / "x.safetensors")
    shard = open_shard(tmp_path / "x.safetensors")
    assert torch.equal(Part(shard, shard.header.by_name["a"]).read(), bitmask)


def test_other_dtypes_are_not_taken_for_a_bitmask(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int64)}, tmp_path / "x.safetensors")
    shard = open_shard(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="'a' has dtype I64, and only floating weights and bitmasks are read"):
        Part(shard, shard.header.by_name["a"]).read()


def packed_folder(folder: Path, **changes: tuple[str, tuple[int, ...]]) -> Path:
    """A folder whose one compressed weight has these dtypes and shapes; no bytes are behind them on the disk."""
    parts = {
        "weight_values": ("F32", (4,)),
        "weight_bitmask": ("U8", (2, 1)),
        "lora_A": ("F32", (1, 8)),
        "lora_B": ("F32", (2, 1)),
    } | changes
    layout = ShardLayout("model.safetensors", [(f"x.{name}", *what) for name, what in parts.items()], {})
    folder.mkdir()
    with (folder / layout.name).open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.size_bytes)
    quantization = {"quant_method": "mendlm", "version": 1, "layout": "packed", "guard": ["no", "name"]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


@pytest.mark.parametrize(("changes", "message"), [
    ({"weight_values": ("F32", (17,))}, r"has values of shape \(17,\), a matrix of 2 x 8 keeps at most 16"),
    ({"weight_values": ("F32", (2, 2))}, r"has values of shape \(2, 2\)"),
    ({"weight_bitmask": ("U8", (2, 2))}, r"the parts of 'x\.weight' do not fit together: bitmask \(2, 2\)"),
    ({"weight_bitmask": ("U8", (2**33, 1))}, r"do not fit together"),
    ({"lora_A": ("F32", (1, 2**33))}, r"do not fit together"),
    ({"lora_B": ("F32", (2, 2))}, r"do not fit together"),
    ({"weight_bitmask": ("I64", (2, 1))}, r"have dtypes F32, I64, F32, F32; values, lora_A and lora_B must share"),
    ({"weight_values": ("I32", (4,))}, r"have dtypes I32, U8, F32, F32"),
    ({"lora_A": ("F16", (1, 8))}, r"have dtypes F32, U8, F16, F32"),
])  # fmt: skip
def test_packed_weight_whose_headers_lie(
    tmp_path: Path, changes: dict[str, tuple[str, tuple[int, ...]]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_folder(packed_folder(tmp_path / "x", **changes))
    assert open_folder(packed_folder(tmp_path / "sound")).packed["x.weight"].shape == (2, 8)


def test_config_that_is_no_file_or_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"'config\.json' is not a file"):  # and it does not wait for a writer
        read_json_object(tmp_path / "config.json")
    monkeypatch.setattr("mendlm.checkpoints.reader.MAX_JSON_BYTES", 10)
    (tmp_path / "x.json").write_text('{"a": 12345}')
    with pytest.raises(CheckpointError, match=r"'x\.json' is longer than 10 bytes, the limit"):
        read_json_object(tmp_path / "x.json")


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(8)}, path)
    shard = open_shard(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"'x\.safetensors' became shorter while it was read"):
        read_tensor(shard, shard.header.by_name["a"])
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read 'x\.safetensors'"):
        list(read_chunks(shard, shard.header.by_name["a"]))


# ---------------------------------------------------------------------------------------------- writing


def test_writer_refuses_another_size_than_planned(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, ShardLayout("x", [("a", "U8", (4,))], {})) as writer:
        writer.allocate()
        with pytest.raises(StorageError, match="'a' has more than the 4 bytes planned"):
            writer.write("a", [memoryview(bytes(5))])
        with pytest.raises(StorageError, match="'a' has 1 bytes fewer than the 4 planned"):
            writer.write("a", [memoryview(bytes(3))])


def test_storage_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*nowhere.*: No such file or directory"):
        write_file(tmp_path / "nowhere" / "x", b"")
    with pytest.raises(StorageError, match=r"no space left for '/x' .*Free some space"), storage_errors(Path("/x")):
        raise OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match="cannot read 'missing'"):
        copy_file(tmp_path / "missing", tmp_path / "x")


def test_json_keeps_what_utf8_cannot_hold() -> None:
    value = {"a": "\ud800", "ä": "\U0001f600"}
    assert json.loads(to_json(value)) == value
    assert "ä".encode() in to_json(value)


def test_links_in_the_place_of_output_files_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(StorageError, match=r"link' is a link, which is not followed"):
        write_file(tmp_path / "link", b"")
    with (
        pytest.raises(StorageError, match="is a link, which is not followed"),
        ShardWriter(tmp_path, ShardLayout("link", [("a", "U8", (1,))], {})),
    ):
        pass
    with pytest.raises(StorageError, match="is a link, which is not followed"):
        Journal.create(tmp_path / "link", RUN)
    for planted in ("", "out"):
        root = partial_folder(tmp_path / "out")
        if planted:
            root.mkdir()
        (root / planted).symlink_to(tmp_path)
        with pytest.raises(StorageError, match="is a link, which is not followed"):
            open_staging(tmp_path / "out", RUN, resume=True, overwrite=False)
        (root / planted).unlink()
    assert precious.read_text() == "x"


def test_written_data_reaches_the_disk_from_time_to_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    layout = ShardLayout("x", [("a", "U8", (1,)), ("b", "U8", (1,))], {})
    with ShardWriter(tmp_path, layout) as writer:
        writer.allocate()
        writer.write("a", [memoryview(b"1")])
        assert synced == []
        monkeypatch.setattr("mendlm.checkpoints.writer.SYNC_SECONDS", 0.0)
        writer.write("b", [memoryview(b"1")])
        assert len(synced) == 1


def test_conversion_is_planned_for_floating_tensors_only() -> None:
    assert copied("a", "x", (2, 3), "F32", "bfloat16").layout() == [("a", "BF16", (2, 3))]
    assert copied("a", "x", (2, 3), "I64", "bfloat16").layout() == [("a", "I64", (2, 3))]
    assert copied("a", "x", (4,), "F8_E4M3", "float16").layout() == [("a", "F8_E4M3", (4,))]


def test_natural_order() -> None:
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "a", "10", "9"]
    assert sorted(names, key=natural_key) == ["9", "10", "a", "layers.2.a", "layers.2.b", "layers.10.a"]


# ---------------------------------------------------------------------------------------------- journal, staging

RUN = {"recipe": {"rank": 4, "seed": 0}, "inputs": {"config.json": {"size_bytes": 3}}, "torch_version": "2"}


def test_journal_survives_a_cut_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, RUN)
    for i in range(3):
        journal.add(Entry(f"t{i}", i, {"rank": i}, 0.5))
    journal.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        again = Journal.reopen(path)
        n_lines = sum(end <= size for end in ends)
        if n_lines == 0:
            assert again is None
            continue
        assert again is not None
        assert list(again.entries) == [f"t{i}" for i in range(n_lines - 1)]
        assert again.fingerprint == RUN
        again.add(Entry("late", 9, None, 0.0))
        again.close()
        final = Journal.reopen(path)
        assert final is not None
        assert list(final.entries) == [*again.entries, "late"]
        final.close()


def test_journal_loses_a_damaged_line_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, RUN)
    for i in range(3):
        journal.add(Entry(f"t{i}", i, {"rel_error": 0.25}, 0.5))
    journal.close()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for damaged in (
        lines[2].replace(b"0.25", b"0.75"),  # valid JSON still
        bytes(len(lines[2]) - 1) + b"\n",  # a page that a power failure lost
        b"\n",
        lines[2].replace(b"t1", b"\xff1"),
    ):
        path.write_bytes(b"".join([*lines[:2], damaged, *lines[3:]]))
        again = Journal.reopen(path)
        assert again is not None
        assert list(again.entries) == ["t0", "t2"]
        again.close()


def test_journal_line_that_does_not_fit_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.create(tmp_path / "journal.jsonl", RUN)
    write = os.write

    def full(fd: int, data: memoryview) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match="no space left"):
            journal.add(Entry("lost", 1, None, 0.0))
    journal.add(Entry("kept", 1, None, 0.0))
    journal.close()
    again = Journal.reopen(tmp_path / "journal.jsonl")
    assert again is not None
    assert list(again.entries) == ["kept"]
    again.close()


@pytest.mark.parametrize("version", ["1", "99"])
def test_work_of_another_version_is_not_thrown_away(tmp_path: Path, version: str) -> None:
    target = tmp_path / "out"
    staging = open_staging(target, RUN, resume=False, overwrite=False)
    staging.release()
    journal = partial_folder(target) / "journal.jsonl"
    journal.write_text(json.dumps({"format": f"mendlm-journal-{version}", "fingerprint": RUN}) + "\n")
    (partial_folder(target) / "out" / "work").touch()
    with pytest.raises(UsageError, match=rf"by another version of mendlm: its journal is 'mendlm-journal-{version}'"):
        open_staging(target, RUN, resume=True, overwrite=False)
    assert (partial_folder(target) / "out" / "work").exists()


@pytest.mark.parametrize("text", ["", "junk\n", "[1]\n", '{"format":"other","fingerprint":{}}\n'])
def test_what_is_no_journal(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    assert Journal.reopen(path) is None


def test_staging_refuses_a_second_run_and_another_run(tmp_path: Path) -> None:
    target = tmp_path / "out"
    first = open_staging(target, RUN, resume=False, overwrite=False)
    for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with pytest.raises(StorageError, match="another run is writing to the same OUT"):
            open_staging(target, RUN, **options)
    first.release()
    with pytest.raises(UsageError, match=r"a previous run into 'out' stopped half-way.*--resume.*--overwrite"):
        open_staging(target, RUN, resume=False, overwrite=False)
    other = {
        **RUN,
        "recipe": {"rank": 8, "seed": 0},
        "inputs": {"config.json": {"size_bytes": 4}},
        "torch_version": "3",
    }
    message = r"another one: input 'config\.json' changed; rank was 4, now 8; torch_version was '2', now '3'"
    with pytest.raises(UsageError, match=message):
        open_staging(target, other, resume=True, overwrite=False)
    open_staging(target, RUN, resume=True, overwrite=False).discard()
    assert list(tmp_path.iterdir()) == []


def test_discard_removes_the_parents_that_were_made(tmp_path: Path) -> None:
    staging = open_staging(tmp_path / "a" / "b" / "out", RUN, resume=False, overwrite=False)
    assert partial_folder(tmp_path / "a" / "b" / "out").is_dir()
    staging.discard()
    assert list(tmp_path.iterdir()) == []


def test_publish_replaces_only_what_it_was_told_to(tmp_path: Path) -> None:
    target = tmp_path / "out"
    staging = open_staging(target, RUN, resume=False, overwrite=False)
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(StorageError, match=r"cannot write .*out"):
        staging.publish()
    assert (target / "precious").exists()
    staging.release()
    staging = open_staging(target, RUN, resume=False, overwrite=True)
    (staging.files / "new").write_text("y")
    staging.publish()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_check_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (tmp_path / "file").touch()
    link = tmp_path / "link"
    link.symlink_to(model)
    for out in (model, model / "out", link, link / "out"):
        with pytest.raises(UsageError, match="is MODEL or lies inside it"):
            check_target(out, model)
    with pytest.raises(UsageError, match="holds MODEL"):
        check_target(tmp_path / "models", model)
    with pytest.raises(UsageError, match="is a file"):
        check_target(tmp_path / "file", model)
    for name in ("x" * 300, "x" * 250, "x" * 300 + "/out"):  # of the second the folder beside it has too long a name
        with pytest.raises(
            UsageError, match=r"x' cannot be made: File name too long|out' cannot be made: File name too"
        ):
            check_target(tmp_path / name, model)
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    with pytest.raises(UsageError, match="holds the current folder"):
        check_target("..", model)
    assert check_target("out", model) == tmp_path / "work" / "here" / "out"


@pytest.mark.parametrize("n_threads", [1, 3])
def test_files_are_hashed_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    names = [f"{i}.bin" for i in range(7)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes([i]) * (i * 100_000))
    found = hash_files(tmp_path, names)
    assert list(found) == names
    for name, entry in found.items():
        data = (tmp_path / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    (tmp_path / names[3]).unlink()
    with pytest.raises(CheckpointError, match=r"3\.bin"):
        hash_files(tmp_path, names)
