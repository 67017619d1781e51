"""Calibration windows: the ids they hold, where they come from, and what is refused; text sampled from the model."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import random
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import mendlm
from mendlm import loading
from mendlm.calibration import windows as windows_module
from mendlm.calibration.sampling import SAMPLE_TOKENS, sample
from mendlm.calibration.windows import DATASETS, Windows, calibration_windows, max_positions
from mendlm.config import Calibration
from mendlm.errors import CheckpointError, MendError, MissingDependencyError, NonFiniteError, UsageError

BOS, EOS, VOCAB, POSITIONS = 256, 257, 258, 256


def prose(n_chars: int, seed: int = 0) -> str:
    """ASCII text of `n_chars` characters, thus tokens of the byte-level tokenizer, in which hardly anything repeats."""
    words = random.Random(seed).choices(range(10**6), k=n_chars // 4 + 1)
    return " ".join(map(str, words))[:n_chars]


def cut(folder: Path, source: object, *, seed: int = 0, positions: int | None = POSITIONS, **fields: Any) -> Windows:
    calibration = Calibration(source=str(source), **fields)
    return calibration_windows(folder, calibration, seed=seed, max_positions=positions, device="cpu")


def direct_ids(folder: Path, text: str, *, special: bool = False) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def byte_ids(folder: Path, rows: list[str]) -> list[list[int]]:
    """Ids of rows of ASCII, all at once: the tokenizer has one token for each character."""
    alphabet = sorted(set("".join(rows)))
    table = dict(zip(alphabet, direct_ids(folder, "".join(alphabet)), strict=True))
    return [[table[c] for c in row] for row in rows]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, list[str]], Path]:
    """Write rows to a file of the kind that its name says."""

    def written(name: str, rows: list[str]) -> Path:
        path = tmp_path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": rows}), path)
            return path
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows) if ".jsonl" in name else rows[0]
        path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
        return path

    return written


@pytest.fixture
def copy_of(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model without some files and with other values in its config."""

    def copied(*without: str, **config: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_llama, folder)
        for pattern in without:
            for file in folder.glob(pattern):
                file.unlink()
        values = json.loads((folder / "config.json").read_text()) | config
        kept = {name: value for name, value in values.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        return folder

    return copied


@pytest.fixture
def adds_bos(copy_of: Callable[..., Path]) -> Path:
    """The tiny model with a tokenizer that puts a BOS before every text by itself, as LLaMA's does."""
    from tokenizers import Tokenizer, processors

    folder = copy_of()
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    core.save(str(folder / "tokenizer.json"))
    assert direct_ids(folder, "a", special=True)[0] == BOS
    return folder


# Seeds, lengths, records


def test_windows_say_what_they_are(tiny_llama: Path, write: Callable[..., Path]) -> None:
    got = cut(tiny_llama, write("book.txt", [prose(5000)]), n_sequences=5, seqlen=16)
    assert got.ids.shape == (5, 16)
    assert got.ids.dtype == torch.int64
    assert got.ids.device.type == "cpu"
    assert (got.source, got.seqlen, got.warnings) == ("book.txt", 16, ())
    raw = b"".join(int(i).to_bytes(8, "little") for row in got.ids for i in row)
    assert got.sha256 == hashlib.sha256(raw).hexdigest()
    with pytest.raises(FrozenInstanceError):
        got.seqlen = 3  # type: ignore[misc]


@pytest.mark.parametrize("source", ["FILE", "random-tokens", "self"])
def test_the_seed_decides_and_global_generators_are_left_alone(
    tiny_llama: Path, write: Callable[..., Path], source: str
) -> None:
    if source == "FILE":
        source = str(write("book.txt", [prose(5000)]))
    random.seed(3)
    before = (random.getstate(), torch.get_rng_state())
    first, again, other = (cut(tiny_llama, source, n_sequences=3, seqlen=20, seed=s) for s in (5, 5, 6))
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256 != other.sha256
    assert not torch.equal(first.ids, other.ids)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("asked", "positions", "used"),
    [(None, 256, 256), (None, 8192, 2048), (None, None, 2048), (64, 256, 64), (256, 256, 256), (3000, None, 3000)],
)
def test_window_length(tiny_llama: Path, asked: int | None, positions: int | None, used: int) -> None:
    got = cut(tiny_llama, "random-tokens", n_sequences=1, seqlen=asked, positions=positions)
    assert (got.seqlen, got.ids.shape, got.warnings) == (used, (1, used), ())


def test_longer_than_the_positions_is_capped_and_said_once(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        got = cut(tiny_llama, "random-tokens", n_sequences=2, seqlen=300)
    assert got.seqlen == 256
    assert got.ids.shape == (2, 256)
    assert got.warnings == ("seqlen 300 is longer than the 256 positions of the model: calibrating on windows of 256.",)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == list(got.warnings)


def test_positions_from_a_config() -> None:
    assert max_positions({"max_position_embeddings": 4096}) == 4096
    assert max_positions({"n_positions": 1024, "n_ctx": 7}) == 1024
    assert max_positions({"max_position_embeddings": 10, "text_config": {"max_position_embeddings": 99}}) == 99
    assert max_positions({"max_position_embeddings": 10, "text_config": {"hidden_size": 4}}) == 10
    assert max_positions({"max_position_embeddings": -1, "text_config": None}) is None
    assert max_positions({}) is None


# Random tokens


def test_random_tokens_are_uniform_and_need_no_tokenizer(copy_of: Callable[..., Path]) -> None:
    folder = copy_of("tokenizer*", "*.safetensors")
    got = cut(folder, "random-tokens", n_sequences=400, seqlen=256)
    counts = torch.bincount(got.ids.flatten(), minlength=VOCAB).double()
    assert len(counts) == VOCAB
    expected = got.ids.numel() / VOCAB
    assert float((counts - expected).abs().max()) < 6 * expected**0.5  # six standard deviations


def test_random_tokens_of_a_nested_config(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(vocab_size=None, text_config={"vocab_size": 3})
    assert set(cut(folder, "random-tokens", n_sequences=4).ids.flatten().tolist()) == {0, 1, 2}


def test_random_tokens_without_a_vocabulary(copy_of: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"states no vocab_size.*FILE or self"):
        cut(copy_of(vocab_size=None), "random-tokens")


# Leading windows


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_leading_windows_are_the_start_of_the_tokenised_text(
    adds_bos: Path, write: Callable[..., Path], name: str
) -> None:
    rows = [prose(70, 1), "", prose(90, 2), "caf\u00e9 \u4e2d " + prose(40, 3)]
    rows = ["\n\n".join(rows)] if name.startswith(("a.txt", "a.raw")) else rows
    got = cut(adds_bos, write(name, rows), n_sequences=6, seqlen=32, windows="leading")
    ids = direct_ids(adds_bos, "\n\n".join(rows))
    assert got.ids.flatten().tolist() == ids[: 6 * 32]
    assert BOS not in got.ids
    assert got.source == name
    assert torch.equal(
        got.ids, cut(adds_bos, write(name, rows), n_sequences=6, seqlen=32, windows="leading", seed=9).ids
    )


def test_leading_windows_of_a_long_text_read_a_part_of_it(
    tiny_llama: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [prose(n, seed) for seed, n in enumerate([900, 3, 2500, 1, 400, 9000, 30000])]
    path = write("long.jsonl", rows)
    seen: list[int] = []

    def tokenize(tokenizer: Any, text: str, **options: Any) -> list[int]:
        seen.append(len(text))
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    monkeypatch.setattr(windows_module, "tokenize", tokenize)
    monkeypatch.setattr(windows_module, "LEADING_TEXT", 2500)
    got = cut(tiny_llama, path, n_sequences=4, seqlen=64, windows="leading")
    assert got.ids.flatten().tolist() == direct_ids(tiny_llama, "\n\n".join(rows))[:256]
    assert seen == [2500, 5000]


def test_a_part_of_the_text_is_not_trusted_when_a_longer_one_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_length(text: str) -> list[int]:
        return [len(text)] * len(text)

    monkeypatch.setattr(windows_module, "LEADING_TEXT", 2000)
    rows = [prose(9000)]
    assert windows_module._leading_ids(rows, 100, by_length) == by_length(rows[0])


# Random windows, against the procedure of the Wanda code written out


def drawn_from_documents(documents: list[list[int]], n: int, seqlen: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    out = []
    while len(out) < n:
        ids = documents[rng.randint(0, len(documents) - 1)]
        if len(ids) > seqlen:
            start = rng.randint(0, len(ids) - seqlen - 1)
            out.append(ids[start : start + seqlen])
    return out


def drawn_from_text(ids: list[int], n: int, seqlen: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    starts = [rng.randint(0, len(ids) - seqlen - 1) for _ in range(n)]
    return [ids[start : start + seqlen] for start in starts]


def find(ids: list[int], part: list[int]) -> int:
    """Where `part` first stands in `ids`, -1 if nowhere."""
    return "".join(map(chr, ids)).find("".join(map(chr, part)))


DOCUMENTS = [prose(n, seed) for seed, n in enumerate([10, 70, 24, 25, 500, 3, 23, 26, 12, 90, 24, 2])]


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz", "docs.parquet"])
@pytest.mark.parametrize("seed", [0, 7])
def test_windows_of_documents(adds_bos: Path, write: Callable[..., Path], name: str, seed: int) -> None:
    got = cut(adds_bos, write(name, DOCUMENTS), n_sequences=40, seqlen=25, seed=seed)
    documents = [direct_ids(adds_bos, document, special=True) for document in DOCUMENTS]
    assert got.ids.tolist() == drawn_from_documents(documents, 40, 25, seed)
    assert (got.source, got.warnings) == (name, ())
    assert got.ids[:, 1:].max() < BOS  # a BOS is nowhere but at the start of a document


def test_c4_is_drawn_from_lazily(adds_bos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [prose(60, i) if i % 9 == 0 else "short" for i in range(5000)]
    read: list[int] = []
    asked: list[Any] = []

    class Lazy(Sequence[str]):
        """Rows that note which of them are read."""

        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return rows[index]

        def __len__(self) -> int:
            return len(rows)

    def fake(name: str, source: Any, **messages: str) -> Sequence[str]:
        asked.append((name, source))
        return Lazy()

    monkeypatch.setattr(windows_module, "open_dataset", fake)
    got = cut(adds_bos, "c4", n_sequences=8, seqlen=30, seed=1)
    assert asked == [("c4", DATASETS["c4"])]
    assert len(read) < 300
    documents = [[BOS, *ids] for ids in byte_ids(adds_bos, rows)]
    assert got.ids.tolist() == drawn_from_documents(documents, 8, 30, 1)
    assert got.source == "c4"


def test_wikitext_is_joined_with_spaces_for_random_windows_and_blank_lines_for_leading_ones(
    adds_bos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["", " = Title = \n", prose(300), "", prose(500, 1)]
    monkeypatch.setattr(windows_module, "open_dataset", lambda *args, **messages: rows)
    got = cut(adds_bos, "wikitext2", n_sequences=9, seqlen=30, seed=4)
    assert got.ids.tolist() == drawn_from_text(direct_ids(adds_bos, " ".join(rows), special=True), 9, 30, 4)
    assert got.source == "wikitext2"
    leading = cut(adds_bos, "wikitext2", n_sequences=9, seqlen=30, windows="leading")
    assert leading.ids.flatten().tolist() == direct_ids(adds_bos, "\n\n".join(rows))[:270]


def test_windows_of_one_text(adds_bos: Path, write: Callable[..., Path]) -> None:
    text = prose(4000)
    got = cut(adds_bos, write("book.txt.gz", [text]), n_sequences=50, seqlen=40, seed=2)
    assert got.ids.tolist() == drawn_from_text(direct_ids(adds_bos, text, special=True), 50, 40, 2)
    assert len({tuple(row) for row in got.ids.tolist()}) > 40


@pytest.mark.parametrize("seqlen", [21, 102])  # rows of just that many tokens with their BOS, and far fewer
def test_documents_that_are_all_too_short_are_joined(adds_bos: Path, write: Callable[..., Path], seqlen: int) -> None:
    rows = [prose(20, seed) for seed in range(60)]
    got = cut(adds_bos, write("lines.parquet", rows), n_sequences=5, seqlen=seqlen)
    ids = direct_ids(adds_bos, "\n\n".join(rows), special=True)
    places = [find(ids, row) for row in got.ids.tolist()]
    assert min(places) >= 0
    assert len(set(places)) == 5
    assert got.source == "lines.parquet, rows joined"


@pytest.mark.parametrize(("n", "is_joined"), [(12, False), (13, True)])  # the long ones hold 6 windows in all
def test_a_few_long_documents_are_not_drawn_again_and_again(
    n: int, is_joined: bool, adds_bos: Path, write: Callable[..., Path]
) -> None:
    rows = [prose(20, seed) for seed in range(60)] + [prose(99, 60), prose(59, 61)]
    got = cut(adds_bos, write("lines.jsonl", rows), n_sequences=n, seqlen=24)
    if not is_joined:
        documents = [direct_ids(adds_bos, row, special=True) for row in rows]
        assert got.ids.tolist() == drawn_from_documents(documents, n, 24, 0)
        assert got.source == "lines.jsonl"
        return
    ids = direct_ids(adds_bos, "\n\n".join(rows), special=True)
    places = [find(ids, row) for row in got.ids.tolist()]
    assert min(places) >= 0
    assert len({place // 160 for place in places}) > 5  # from all over the text
    assert got.source == "lines.jsonl, rows joined"


def test_a_text_too_long_to_tokenise_at_once_is_drawn_from_in_pieces(
    tiny_llama: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows_module, "WHOLE_TEXT", 10_000)
    text = prose(400_000)
    got = cut(tiny_llama, write("huge.txt", [text]), n_sequences=30, seqlen=48)
    ids = direct_ids(tiny_llama, text)
    places = [find(ids, row) for row in got.ids.tolist()]
    assert min(places) >= 0
    assert len({place // 2**16 for place in places}) > 4  # from all over it
    assert (got.source, got.warnings) == ("huge.txt", ())


def test_overlapping_windows_are_pointed_out(
    tiny_llama: Path, write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        got = cut(tiny_llama, write("small.txt", [prose(100)]), n_sequences=4, seqlen=30)
    assert got.ids.shape == (4, 30)
    (warning,) = got.warnings
    assert warning.startswith(
        "the calibration text has 100 tokens, no more than 3 separate windows of 30: the 4 random"
    )
    assert warning in caplog.text


@pytest.mark.parametrize("kind", ["random", "leading"])
def test_a_text_of_just_one_window(tiny_llama: Path, write: Callable[..., Path], kind: str) -> None:
    text = prose(32)
    got = cut(tiny_llama, write("one.txt", [text]), n_sequences=1, seqlen=32, windows=kind)
    assert got.ids.tolist() == [direct_ids(tiny_llama, text)]
    assert got.warnings == ()


# Refusals


@pytest.mark.parametrize("kind", ["random", "leading"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_too_short_for_one_window(tiny_llama: Path, write: Callable[..., Path], kind: str, name: str) -> None:
    path = write(name, ["x" * 15] if name == "a.txt" else ["x" * 6, "y" * 7])
    with pytest.raises(UsageError, match=r"too short: it has 15 tokens and one window needs 16\. .*lower --seqlen"):
        cut(tiny_llama, path, n_sequences=1, seqlen=16, windows=kind)


def test_too_few_leading_windows_are_not_repeated(tiny_llama: Path, write: Callable[..., Path]) -> None:
    path = write("a.txt", [prose(100)])
    with pytest.raises(UsageError, match=r"100 tokens, that is 3 leading windows of 32, .*128 .*--n-sequences to 3"):
        cut(tiny_llama, path, seqlen=32, windows="leading")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("c4-en", r"unknown calibration source 'c4-en'\. Available: c4, random-tokens, self, wikitext2\. Or give"),
        ("random-token", r"Did you mean 'random-tokens'\? Available"),
        ("wikitext", r"Did you mean 'wikitext2'\?.*Or give the path of a \.txt.*there is no file 'wikitext'"),
        ("absent.jsonl", r"unknown calibration source 'absent.jsonl'.*there is no file 'absent.jsonl'"),
        ("Self", r"Did you mean 'self'\?"),
    ],
)
def test_unknown_sources(tmp_path: Path, copy_of: Callable[..., Path], source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cut(copy_of("tokenizer*"), source)


def test_what_no_reader_knows_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UsageError, match=r"cannot tell what 'a\.docx' is from its suffix"):
        cut(tiny_llama, tmp_path / "a.docx")
    with pytest.raises(UsageError, match="is a folder"):
        cut(tiny_llama, tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt"])
def test_no_tokenizer(copy_of: Callable[..., Path], write: Callable[..., Path], family: str) -> None:
    # For some families transformers silently makes a tokenizer that knows its special tokens alone.
    folder = copy_of("tokenizer*", model_type=family)
    with pytest.raises(UsageError, match=r"cannot load a tokenizer from .*Copy the tokenizer's files.*random-tokens"):
        cut(folder, write("book.txt", [prose(500)]), seqlen=16)


def test_a_tokenizer_of_another_model(copy_of: Callable[..., Path], write: Callable[..., Path]) -> None:
    folder = copy_of(vocab_size=60)
    with pytest.raises(UsageError, match=r"token id \d+ is not in the model's vocabulary of 60\. .*another model"):
        cut(folder, write("book.txt", ["z" * 500]), seqlen=16)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'config\.json' is missing"):
        cut(tmp_path, "random-tokens")


ALTERNATIVES = r"--calibration FILE with a local text .*, self or random-tokens"


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_data_sets_without_their_library(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = rf"--calibration {name} needs the datasets library: pip install 'mendlm\[datasets\]'.*use {ALTERNATIVES}"
    with pytest.raises(MissingDependencyError, match=message):
        cut(tiny_llama, name)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("c4", r"allenai/c4, en/c4-train.00000-of-01024.json.gz, train"),
        ("wikitext2", r"Salesforce/wikitext, wikitext-2-raw-v1, train"),
    ],
)
def test_data_sets_without_a_network_fail_at_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    def unreachable(repo: str, *config: str, **where: Any) -> None:
        raise ConnectionError(f"Couldn't reach {repo!r} on the Hub")

    library = SimpleNamespace(
        config=SimpleNamespace(HF_HUB_OFFLINE=False),
        are_progress_bars_disabled=lambda: True,
        disable_progress_bars=lambda: None,
        load_dataset=unreachable,
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.perf_counter()
    with pytest.raises(MendError, match=rf"'{name}' \({place}\): there is no network.*Use {ALTERNATIVES}") as caught:
        cut(tiny_llama, name)
    assert time.perf_counter() - start < 5
    assert not isinstance(caught.value, UsageError)


# Text that the model writes


def test_sampled_windows(tiny_llama: Path) -> None:
    got = cut(tiny_llama, "self", n_sequences=3, seqlen=50)
    assert got.ids.shape == (3, 50)
    assert got.ids.dtype == torch.int64
    assert (got.ids[:, 0] == BOS).all()
    assert int(got.ids.min()) >= 0
    assert int(got.ids.max()) < VOCAB
    assert len({tuple(row) for row in got.ids.tolist()}) == 3
    assert (got.source, got.warnings) == ("self", ())


def test_sampling_needs_no_tokenizer_and_reads_compressed_folders(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of("tokenizer*")
    mendlm.compress(folder, tmp_path / "out", mendlm.Recipe(rank=2, n_iter=2))
    dense, compressed = (cut(f, "self", n_sequences=2, seqlen=200) for f in (folder, tmp_path / "out"))
    assert compressed.ids.shape == (2, 200)
    assert not torch.equal(dense.ids, compressed.ids)  # another model writes something else


def test_long_windows_are_samples_in_a_row_and_go_on_after_eos(tiny_llama: Path) -> None:
    seqlen = 3 * SAMPLE_TOKENS - 5
    model = mendlm.load(tiny_llama)
    calls: list[tuple[int, int]] = []
    ids = sample(model, 5, seqlen, seed=0, batch_size=4, progress=lambda *done: calls.append(done))
    assert ids.shape == (5, seqlen)
    part = -(-seqlen // 3)
    assert (ids[:, ::part] == BOS).all()
    assert calls == [(n * part, 15 * part) for n in (4, 8, 12, 15)]
    rows, columns = (ids[:, :-1] == EOS).nonzero(as_tuple=True)
    assert len(rows) > 3
    following = ids[rows, columns + 1]
    assert len(set(following.tolist())) > 3  # text, not padding


def test_samples_follow_the_models_full_distribution(tiny_llama: Path) -> None:
    model = mendlm.load(tiny_llama)
    model.model.norm.weight.data *= 12  # logits of a random model are nearly equal
    n = 6000
    ids = sample(model, n, 2, seed=0, batch_size=n)
    with torch.no_grad():
        logits = model(torch.tensor([[BOS]])).logits[0, -1].double()
    observed = torch.bincount(ids[:, 1], minlength=VOCAB).double() / n

    def distance(p: Tensor) -> float:
        return float((p - observed).abs().sum() / 2)

    exact = logits.softmax(0)
    noise = float((exact * (1 - exact) / n).sqrt().sum() / 2)  # bounds the mean distance of n fair draws
    assert distance(exact) < 1.2 * noise
    cold, top = (
        (logits / 0.9).softmax(0),
        logits.masked_fill(logits < logits.topk(50).values[-1], -torch.inf).softmax(0),
    )
    assert min(distance(cold), distance(top)) > 1.5 * noise


def test_the_checkpoints_generation_settings_do_not_count(copy_of: Callable[..., Path], tiny_llama: Path) -> None:
    folder = copy_of()
    settings = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 9.0, "suppress_tokens": [5, 6]}
    settings |= {"eos_token_id": list(range(100)), "bos_token_id": BOS, "max_length": 7, "min_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert torch.equal(
        cut(folder, "self", n_sequences=2, seqlen=40).ids, cut(tiny_llama, "self", n_sequences=2, seqlen=40).ids
    )


@pytest.mark.parametrize(
    ("bos", "eos", "starts"),
    [(7, 9, {7}), (None, 9, {9}), (None, [11, 9], {11}), (VOCAB, 9, {9}), (None, None, None)],
)
def test_where_samples_start(tiny_llama: Path, bos: Any, eos: Any, starts: set[int] | None) -> None:
    model = mendlm.load(tiny_llama)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = bos, eos
    found = set(sample(model, 20, 2, seed=0)[:, 0].tolist())
    assert found == starts if starts else len(found) > 10
    assert model.generation_config.bos_token_id == bos


def test_sampling_puts_the_model_and_the_generators_back(tiny_llama: Path) -> None:
    model = mendlm.load(tiny_llama).train()
    settings, state = model.generation_config, torch.get_rng_state()
    sample(model, 2, 10, seed=0)
    assert model.training
    assert model.generation_config is settings
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="logits hold NaN or infinity, so it cannot write calibration text"):
        sample(model, 2, 10, seed=0)
    assert model.training
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), state)


def test_the_sampling_model_is_freed(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[Any]] = []
    dtypes: list[torch.dtype] = []
    real = loading.load

    def load(*args: Any, **options: Any) -> Any:
        model = real(*args, **options)
        models.append(weakref.ref(model))
        dtypes.append(model.dtype)
        return model

    monkeypatch.setattr(loading, "load", load)
    cut(tiny_llama, "self", n_sequences=1, seqlen=8)
    cut(tiny_llama, "self", n_sequences=1, seqlen=8, dtype="bfloat16")
    assert dtypes == [torch.float32, torch.bfloat16]
    assert [model() for model in models] == [None, None]
