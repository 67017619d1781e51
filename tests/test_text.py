"""Reading evaluation text: rows unchanged, refusals that say what to do, and the book that ships."""

from __future__ import annotations

import gzip
import hashlib
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mendlm.calibration.windows import DATASETS as CALIBRATION_DATASETS
from mendlm.errors import CheckpointError, MendError, MissingDependencyError, UsageError
from mendlm.evaluation import text
from mendlm.evaluation.text import (
    DATASETS,
    DatasetSource,
    bundled_text,
    join_rows,
    load_dataset_rows,
    load_tokenizer,
    open_dataset,
    read_text,
    tokenize,
)

ROWS = ["", " = Title = \n", "", "caf\u00e9 \u2028 one paragraph\r\n", ""]


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path, compression="zstd")
    return path


def jsonl(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.txt", "wiki.test.raw", "A.TXT", "a.txt.gz"])
def test_plain_text_is_one_unchanged_row(tmp_path: Path, name: str) -> None:
    content = "\ufeffone\r\ntwo\n\n\x0cthr\u00e9e \u2028 four"
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_text(tmp_path / name) == [content]
    assert read_text(str(tmp_path / name)) == [content]


@pytest.mark.parametrize("gzipped", [False, True])
def test_jsonl_rows_in_order_blank_lines_skipped_empty_rows_kept(tmp_path: Path, gzipped: bool) -> None:
    lines = [json.dumps({"text": row, "id": i}, ensure_ascii=False) for i, row in enumerate(ROWS)]
    data = ("\r\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]) + "\n").encode()
    path = tmp_path / ("rows.jsonl.gz" if gzipped else "rows.jsonl")
    path.write_bytes(gzip.compress(data) if gzipped else data)
    assert read_text(path) == ROWS


def test_parquet_rows_in_order_empty_rows_kept(tmp_path: Path) -> None:
    assert read_text(parquet(tmp_path / "rows.parquet", {"id": range(5), "text": ROWS})) == ROWS


def test_joined_with_one_blank_line_and_nothing_stripped() -> None:
    assert join_rows(["a\n", "", " b"]) == "a\n\n\n\n\n b"
    assert join_rows(["whole file\n"]) == "whole file\n"


def test_wikitext_is_the_text_that_papers_use(wikitext: Path) -> None:
    rows = read_text(wikitext)
    assert len(rows) == 4358
    original = "".join(row or " \n" for row in rows)  # the original file has a blank before each lone newline
    assert len(original.encode()) == 1_290_590


WRONG: list[tuple[Callable[[Path], Path], str]] = [
    (lambda d: d / "absent.txt", r"no such file: '.*absent.txt'"),
    (lambda d: d, r"is a folder. Give one .txt, .jsonl or .parquet file"),
    (lambda d: jsonl(d / "a.docx", "x"), r"cannot tell what 'a.docx' is from its suffix. Known: .txt"),
    (lambda d: jsonl(d / "README", "x"), r"cannot tell what 'README' is"),
    (lambda d: jsonl(d / "a.gz", "x"), r"cannot tell what 'a.gz' is"),
    (lambda d: jsonl(d / "empty.txt"), r"empty.txt' holds no text \(1 rows, all empty\)"),
    (lambda d: jsonl(d / "blank.txt", " ", "\t"), r"blank.txt' holds no text"),
    (lambda d: jsonl(d / "empty.jsonl"), r"empty.jsonl' holds no text \(0 rows"),
    (lambda d: parquet(d / "none.parquet", {"text": pa.array([], pa.string())}), r"holds no text \(0 rows"),
    (
        lambda d: jsonl(d / "a.jsonl", '{"text": "x"}', "{text}"),
        r"line 2 of '.*a.jsonl' is not JSON: .* One object a line",
    ),
    (lambda d: jsonl(d / "b.jsonl", '{"q": 1, "answer": "x"}'), r"line 1 .* no string field 'text'; it has: q, answer"),
    (lambda d: jsonl(d / "c.jsonl", '{"text": 3}'), r"line 1 .* no string field 'text'; it has: text"),
    (
        lambda d: jsonl(d / "s.jsonl", '{"text": "x"}', '{"text": "a \\ud800"}'),
        r"line 2 of .* half of a surrogate pair",
    ),
    (lambda d: jsonl(d / "d.jsonl", "[]"), r"line 1 .* no string field 'text'; it has: list"),
    (lambda d: parquet(d / "q.parquet", {"q": ["x"], "a": ["y"]}), r"has no column 'text'; its columns are: q, a\."),
    (lambda d: parquet(d / "n.parquet", {"text": ["x", None]}), r"row 1 of column 'text' in .* is None, not a string"),
    (lambda d: jsonl(d / "not.parquet", "x" * 50), r"not.parquet' is not a whole parquet file"),
    (lambda d: jsonl(d / "not.txt.gz", "plain"), r"not.txt.gz' is not a whole gzip file"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_files_that_hold_no_text_are_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_text(make(tmp_path))


def test_undecodable_bytes_are_located(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1") + b"!")
    with pytest.raises(UsageError, match=r"latin.txt' is not UTF-8 text: byte 0xe9 at offset 3 .*iconv"):
        read_text(tmp_path / "latin.txt")


def test_undecodable_parquet_is_refused(tmp_path: Path) -> None:
    buffers = [None, pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"\xff\xfe")]
    file = parquet(tmp_path / "bytes.parquet", {"text": pa.Array.from_buffers(pa.string(), 1, buffers)})
    with pytest.raises(UsageError, match=r"column 'text' of '.*bytes\.parquet' is not UTF-8 text"):
        read_text(file)


def test_truncated_gzip_and_parquet_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"some text " * 500)
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="not a whole gzip file"):
        read_text(tmp_path / "cut.txt.gz")
    cut = parquet(tmp_path / "cut.parquet", {"text": ROWS})
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(UsageError, match="not a whole parquet file"):
        read_text(cut)


def test_the_bundled_book_is_whole_and_as_documented() -> None:
    path = bundled_text()
    data = path.read_bytes()
    (book,) = read_text(path)
    assert book.count("CHAPTER ") == 12
    assert "Alice was beginning to get very tired of sitting by her sister" in book
    assert book.rstrip().endswith("THE END")
    assert data.isascii()
    assert b"\r" not in data
    for word in ("gutenberg", "copyright", "license", "trademark", "fulcrum"):
        assert word not in book.lower()
    documented = (path.parent / "README.md").read_text()
    assert hashlib.sha256(data).hexdigest() in documented
    assert f"{len(data):,}" in documented


def test_unknown_dataset_and_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"unknown dataset 'wikitext'. Did you mean 'wikitext2'\?"):
        load_dataset_rows("wikitext")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mendlm\[datasets\]'.*--text FILE"):
        load_dataset_rows("wikitext2")


class Library(SimpleNamespace):
    """Stands in for the optional `datasets` library, which the tests' environment does without."""

    def __init__(self, known: dict[str, list[str]]) -> None:
        super().__init__(config=SimpleNamespace(HF_HUB_OFFLINE=False), known=known, asked=[], bars=True)

    def are_progress_bars_disabled(self) -> bool:
        return not self.bars

    def disable_progress_bars(self) -> None:
        self.bars = False

    def enable_progress_bars(self) -> None:
        self.bars = True

    def load_dataset(self, repo: str, *config: str, split: str, **where: Any) -> dict[str, list[str]]:
        self.asked.append((repo, *config, split, *where.values(), self.config.HF_HUB_OFFLINE, self.bars))
        if repo not in self.known:
            raise ConnectionError(f"Couldn't reach {repo!r} on the Hub (LocalEntryNotFoundError)")
        return {"text": self.known[repo]}


def test_dataset_rows_come_from_the_cache_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = Library({"wikitext": ROWS})
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert load_dataset_rows("wikitext2") == ROWS
    place = ("wikitext-2-raw-v1", "test", True, False)
    assert library.asked == [("Salesforce/wikitext", *place), ("wikitext", *place)]
    assert (library.config.HF_HUB_OFFLINE, library.bars) == (False, True)  # put back


def test_one_file_of_a_repository_is_asked_for_without_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = Library({"org/set": ROWS})
    monkeypatch.setitem(sys.modules, "datasets", library)
    source = DatasetSource(("org/set",), None, "train", "text", "en/first.json.gz")
    assert open_dataset("set", source, option="--flag", instead="FILE") is ROWS  # lazy rows stay lazy
    assert library.asked == [("org/set", "train", {"train": "en/first.json.gz"}, True, False)]


def test_errors_of_the_library_itself_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class DatasetsError(Exception):
        pass

    def load_dataset(*args: str, **where: Any) -> None:
        raise DatasetsError("ExpectedMoreSplits: {'validation'}")

    library = Library({})
    library.exceptions, library.load_dataset = SimpleNamespace(DatasetsError=DatasetsError), load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(text, "hub_reachable", lambda: True)
    source = DatasetSource(("org/set",), "config", "train", "text")
    message = r"'set' \(org/set, config, train\): DatasetsError: ExpectedMoreSplits.*Use FILE, or run once"
    with pytest.raises(MendError, match=message):
        open_dataset("set", source, option="--flag", instead="FILE")


def test_tokenizers_are_loaded_whole_or_not_at_all(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    assert tokenizer.decode(tokenize(tokenizer, "the hat")) == "the hat"
    assert len(tokenize(tokenizer, "x" * 5000)) == 5000  # beyond the model's positions, without a warning
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match=r"there is no vocabulary in it\. Copy the tokenizer's files"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(CheckpointError, match=r"cannot load a tokenizer from '.*[^.]\. Copy the tokenizer's files"):
        load_tokenizer(tmp_path)


def test_no_network_and_no_cache_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "datasets", Library({}))
    with pytest.raises(MendError, match=r"'wikitext2' \(Salesforce/wikitext, .*no network .*Use --text FILE") as caught:
        load_dataset_rows("wikitext2")
    assert caught.value.exit_code == 1


def test_the_hub_is_probed_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert text.hub_reachable()
        monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
        assert not text.hub_reachable()
        monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    assert not text.hub_reachable()  # nobody listens there any more
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://127.0.0.1:1"})
    assert text.hub_reachable()  # only the proxy can tell


@pytest.mark.parametrize(("name", "source"), [*DATASETS.items(), *CALIBRATION_DATASETS.items()])
def test_the_real_library_fails_fast_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, source: DatasetSource
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(MendError, match=rf"cannot load data set '{name}' .* there is no network .* Use FILE"):
        open_dataset(name, source, option="--flag", instead="FILE")
