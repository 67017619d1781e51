"""Checkpoints at URLs: the same bytes as on the disk, and an interrupted upload that does not look whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mendlm
from conftest import TinyLlama
from mendlm import Recipe
from mendlm.checkpoints import remote
from mendlm.errors import CheckpointError, StorageError, UsageError
from mendlm.pipeline import plan
from mendlm.report.records import read_records

upath = pytest.importorskip("upath")
RECIPE = Recipe(rank=2, n_iter=2)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store in memory; what is made for it goes to `tmp_path`."""
    monkeypatch.setenv("MENDLM_STAGING", str(tmp_path / "staging"))
    fs = upath.UPath("memory://").fs
    fs.store.clear()
    yield "memory://bucket"
    fs.store.clear()


def files(folder: Any) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "mendlm.run.json"}


def upload(folder: Path, url: str) -> str:
    target = upath.UPath(url)
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return url


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_the_same_bytes_as_on_the_disk(
    bucket: str, make_tiny_llama: TinyLlama, tmp_path: Path, max_shard_size: str
) -> None:
    model = make_tiny_llama(max_shard_size=max_shard_size)
    mendlm.compress(model, tmp_path / "out", RECIPE)
    result = mendlm.compress(upload(model, f"{bucket}/model"), f"{bucket}/out", RECIPE)
    assert str(result.out) == f"{bucket}/out"
    assert files(result.out) == files(tmp_path / "out")
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_complete_url_is_not_made_again(bucket: str, tiny_llama: Path) -> None:
    first = mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE)
    with pytest.raises(UsageError, match=r"memory://bucket/out' exists and is not empty"):
        mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE)
    again = mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE, resume=True)
    assert again.resumed == len(first.records)
    assert again.records == first.records
    with pytest.raises(UsageError, match="another run wrote it"):
        mendlm.compress(tiny_llama, f"{bucket}/out", Recipe(rank=2, n_iter=2, seed=1), resume=True)
    other = mendlm.compress(tiny_llama, f"{bucket}/out", Recipe(rank=1, n_iter=2), overwrite=True)
    assert read_records(other.out) == other.records


@pytest.mark.parametrize("n_sent", [0, 1, 3])
def test_resume_sends_the_rest(
    bucket: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_sent: int
) -> None:
    fs = upath.UPath(bucket).fs
    put, sent = fs.put_file, []

    def failing(source: str, target: str) -> None:
        if len(sent) == n_sent:
            raise TimeoutError("the store does not answer")
        sent.append(target)
        put(source, target)

    monkeypatch.setattr(fs, "put_file", failing)
    with pytest.raises(StorageError, match=r"memory://bucket/out'.*does not answer.*--resume"):
        mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE)
    assert not (upath.UPath(f"{bucket}/out") / "mendlm.json").exists()
    monkeypatch.setattr(fs, "put_file", lambda source, target: (sent.append(target), put(source, target)))
    with pytest.raises(UsageError, match="--resume"):
        mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE)
    result = mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE, resume=True)
    assert len(sent) == len(set(sent)), "a file was sent twice"
    assert sent[-1].endswith("mendlm.json")
    mendlm.compress(tiny_llama, tmp_path / "out", RECIPE)
    assert files(result.out) == files(tmp_path / "out")


def break_off(bucket: str, model: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, **how: bool) -> None:
    """A run into the bucket's `out` whose sending ends after one file."""
    fs = upath.UPath(bucket).fs
    put, n_sent = fs.put_file, 0

    def failing(source: str, target: str) -> None:
        nonlocal n_sent
        n_sent += 1
        if n_sent > 1:
            raise TimeoutError("the store does not answer")
        put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "put_file", failing)
        with pytest.raises(StorageError, match="does not answer"):
            mendlm.compress(model, f"{bucket}/out", recipe, **how)


@pytest.mark.parametrize("overwritten", [False, True])
def test_overwrite_after_a_broken_upload_sends_all_of_the_new_run(
    bucket: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwritten: bool
) -> None:
    break_off(bucket, tiny_llama, RECIPE, monkeypatch)
    other = Recipe(rank=2, n_iter=3)  # files of the same names and sizes
    if overwritten:
        break_off(bucket, tiny_llama, other, monkeypatch, overwrite=True)
        result = mendlm.compress(tiny_llama, f"{bucket}/out", other, resume=True)
    else:
        result = mendlm.compress(tiny_llama, f"{bucket}/out", other, overwrite=True)
    mendlm.compress(tiny_llama, tmp_path / "out", other)
    assert files(result.out) == files(tmp_path / "out")
    assert list((tmp_path / "staging").iterdir()) == []


def test_resume_does_not_remove_what_others_put_there(
    bucket: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(event: object) -> None:
        if isinstance(event, mendlm.pipeline.TensorDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE, on_event=interrupt)
    place = upath.UPath(f"{bucket}/out")
    place.mkdir(parents=True, exist_ok=True)
    (place / "theirs").write_bytes(b"x")
    with pytest.raises(UsageError, match="exists and is not empty"):
        mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE, resume=True)
    assert (place / "theirs").read_bytes() == b"x"


def test_what_others_put_there_during_the_run_stays(bucket: str, tiny_llama: Path, tmp_path: Path) -> None:
    place = upath.UPath(f"{bucket}/out")

    def others(event: object) -> None:
        place.mkdir(parents=True, exist_ok=True)
        (place / "mendlm.json").write_bytes(b"theirs")

    with pytest.raises(StorageError, match=r"was empty when the run began and now holds 'mendlm\.json'.*--resume"):
        mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE, on_event=others)
    assert files(place) == {"mendlm.json": b"theirs"}
    with pytest.raises(UsageError, match="exists and is not empty"):
        mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE, resume=True)
    (place / "mendlm.json").unlink()
    result = mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE, resume=True)
    assert result.resumed == len(result.records), "the work was done again"
    mendlm.compress(tiny_llama, tmp_path / "out", RECIPE)
    assert files(result.out) == files(tmp_path / "out")


def test_an_overwrite_that_failed_allows_nothing_later(bucket: str, tiny_llama: Path) -> None:
    place = upath.UPath(f"{bucket}/out")

    def others(event: object) -> None:
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_bytes(b"theirs")

    others(None)
    with pytest.raises(UsageError, match="rank must be in"):
        mendlm.compress(tiny_llama, f"{bucket}/out", Recipe(rank=9999), overwrite=True)
    (place / "config.json").unlink()
    with pytest.raises(StorageError, match="now holds 'config"):
        mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE, on_event=others)
    assert files(place) == {"config.json": b"theirs"}


def test_resume_sends_what_the_store_lost(
    bucket: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = upath.UPath(bucket).fs
    put = fs.put_file
    with monkeypatch.context() as patch:
        patch.setattr(fs, "put_file", lambda source, target: "safetensors" in target or put(source, target))
        with pytest.raises(StorageError, match=r"'model\.safetensors' at .* is not what was sent.*--resume"):
            mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE)
    sent: list[str] = []
    monkeypatch.setattr(fs, "put_file", lambda source, target: (sent.append(target), put(source, target)))
    result = mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE, resume=True)
    assert [target.rpartition("/")[2] for target in sent] == ["model.safetensors", "mendlm.json"]
    mendlm.compress(tiny_llama, tmp_path / "out", RECIPE)
    assert files(result.out) == files(tmp_path / "out")
    assert list((tmp_path / "staging").iterdir()) == []


def test_overwrite_keeps_what_is_no_checkpoint(bucket: str, tiny_llama: Path) -> None:
    place = upath.UPath(f"{bucket}/out")
    place.mkdir(parents=True, exist_ok=True)
    (place / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"memory://bucket/out' holds no config\.json.* but 'photo\.jpg'"):
        mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE, overwrite=True)
    assert (place / "photo.jpg").read_bytes() == b"x"


def test_overwrite_first_removes_what_says_complete(bucket: str, tiny_llama: Path) -> None:
    mendlm.compress(tiny_llama, f"{bucket}/out", RECIPE)
    folder = remote.RemoteFolder(f"{bucket}/out")
    names = []
    unlink = type(folder.path).unlink
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(folder.path), "unlink", lambda path: (names.append(path.name), unlink(path)))
        folder.clear()
    assert names[:2] == ["mendlm.json", "config.json"]
    assert folder.sizes() == {}


def test_bad_places(bucket: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no protocol that fsspec knows.*nosuch"):
        plan("nosuch://bucket/model", RECIPE)
    with pytest.raises((UsageError, CheckpointError), match="memory://bucket/none"):
        plan(f"{bucket}/none", RECIPE)
    calibrated = Recipe(criterion="wanda", rank=0, calibration="random-tokens")
    with pytest.raises(UsageError, match="Download it"):
        mendlm.compress(upload(tiny_llama, f"{bucket}/model"), tmp_path / "out", calibrated)
    (upath.UPath(bucket) / "file").write_bytes(b"x")
    with pytest.raises(UsageError, match="is a file"):
        mendlm.compress(tiny_llama, f"{bucket}/file", RECIPE)


def test_a_url_of_this_machine_is_a_folder(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    before = files(model)
    for place, out in (
        (model, f"file://{model}"),
        (f"file://{model}", model),
        (f"local://{model}", f"file://{model}/"),
    ):
        with pytest.raises(UsageError, match="is MODEL or lies inside it"):
            mendlm.compress(place, out, RECIPE, overwrite=True)
    with pytest.raises(UsageError, match="holds MODEL"):
        mendlm.compress(model, f"file://{tmp_path}", RECIPE, overwrite=True)
    assert files(model) == before
    result = mendlm.compress(f"file://{model}", f"file://{tmp_path}/out", RECIPE)
    assert result.out == tmp_path / "out"
    assert mendlm.verify(f"file://{tmp_path}/out", original=f"file://{model}").ok


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("model", "is MODEL or lies inside it"),
        ("model/", "is MODEL or lies inside it"),
        ("x/../model", "is MODEL or lies inside it"),
        ("model/out", "is MODEL or lies inside it"),
        (".", "holds MODEL"),
    ],
)
def test_out_and_model_overlap(bucket: str, tiny_llama: Path, out: str, message: str) -> None:
    model = upath.UPath(upload(tiny_llama, f"{bucket}/model"))
    with pytest.raises(UsageError, match=message):
        mendlm.compress(str(model), f"{bucket}/{out}", RECIPE, overwrite=True)
    assert files(model) == files(tiny_llama)


@pytest.mark.parametrize("place", ["s3://bucket/model", "gs://b/m", "memory://x"])
def test_urls(place: str) -> None:
    assert remote.is_url(place)
    assert not remote.is_url(place.replace("://", ":/"))
    assert not remote.is_url(Path("/models") / place)


@pytest.mark.parametrize("place", ["file:///models/m", "local:///models/m", "file:/models/m", Path("file:///models/m")])
def test_file_urls(place: str | Path) -> None:
    assert not remote.is_url(place)
    assert remote.open_place(place) == Path("/models/m")
