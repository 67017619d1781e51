"""Text to evaluate and calibrate on, as rows from a file, a named data set or the bundled book; and as token ids."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import socket
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from mendlm._quiet import quiet_transformers
from mendlm.errors import CheckpointError, MendError, MissingDependencyError, UsageError
from mendlm.names import lookup
from mendlm.paths import local_path

R = TypeVar("R", bound=Sequence[str])

FIELD = "text"  # the column of a parquet file and the key of a jsonl row that hold the text
SEPARATOR = "\n\n"  # between rows
PROBE_SECONDS = 3.0  # how long to wait for the hub before saying that there is no network


class DatasetSource(NamedTuple):
    """Where the `datasets` library finds a named set."""

    repos: tuple[str, ...]  # tried in this order: the canonical name, then the name before namespaces
    config: str | None
    split: str
    field: str
    file: str | None = None  # the one file of the repository that makes up the split


DATASETS = {"wikitext2": DatasetSource(("Salesforce/wikitext", "wikitext"), "wikitext-2-raw-v1", "test", "text")}


def read_text(path: str | Path) -> list[str]:
    """Rows of text from a file, by its suffix.

    Parameters
    ----------
    path : a UTF-8 file. ``.txt``, ``.raw``: the whole content, unchanged (line ends too), is one row. ``.jsonl``: one
        object a line, its field ``text`` a row. ``.parquet``: column ``text``, needs pyarrow. The first three may be
        gzipped (``.txt.gz`` …).

    Returns
    -------
    list of str, at least one row, at least one of them with something else than blanks. Empty rows are kept: they are
    part of the protocol (`join_rows`).

    Raises
    ------
    UsageError : no such file, unknown suffix, empty, not UTF-8, damaged, or no ``text`` in it.
    MissingDependencyError : a parquet file without pyarrow.

    Notes
    -----
    The whole file is held in memory, about once for text and twice for parquet.
    """
    path = local_path(path)
    if not path.exists():
        raise UsageError(f"no such file: {str(path)!r}. Give the path of a .txt, .jsonl or .parquet file.")
    if path.is_dir():
        raise UsageError(f"{str(path)!r} is a folder. Give one .txt, .jsonl or .parquet file in it.")
    suffixes = [s.lower() for s in path.suffixes]
    gzipped = suffixes[-1:] == [".gz"]
    kind = "".join(suffixes[-2:-1] if gzipped else suffixes[-1:])
    if kind not in _READERS or (gzipped and kind == ".parquet"):
        raise UsageError(
            f"cannot tell what {path.name!r} is from its suffix. Known: .txt, .raw, .jsonl (each also with .gz), "
            ".parquet. Rename a plain text file to .txt."
        )
    try:
        rows = _READERS[kind](path, gzipped)
    except OSError as err:
        raise UsageError(f"cannot read {str(path)!r}: {err}. Check the file and its permissions.") from err
    return _with_content(rows, repr(str(path)))


def join_rows(rows: Sequence[str]) -> str:
    r"""Join rows with one blank line, ``"\n\n".join(rows)``: what papers on compression tokenise.

    Rows of WikiText end in a newline of their own and its blank lines are empty rows; nothing is stripped.
    """
    return SEPARATOR.join(rows)


def bundled_text() -> Path:
    """Path of the book that ships with mendlm: Alice's Adventures in Wonderland (1865, public domain), 148 kB.

    About 39,000 tokens for a vocabulary of 49,000: 19 windows of 2048. For demonstrations, not for comparisons.
    """
    return Path(str(resources.files("mendlm") / "data" / "alice.txt"))


@dataclass(frozen=True)
class Source:
    """A text to evaluate on.

    Attributes
    ----------
    name : what reports call it.
    joined : all of it (`join_rows`).
    n_rows : rows that it was joined of.
    """

    name: str
    joined: str
    n_rows: int

    def protocol(self) -> dict[str, Any]:
        """What a result says of its text, as plain values."""
        return {
            "text": self.name,
            "text_sha256": hashlib.sha256(self.joined.encode()).hexdigest(),
            "n_rows": self.n_rows,
            "rows_joined_with": SEPARATOR,
        }


def text_source(path: str | Path | None) -> Source:
    """The text of a file (`read_text`, with what that raises), or of the bundled book where there is none."""
    rows = read_text(bundled_text() if path is None else path)
    return Source("bundled alice.txt" if path is None else Path(path).name, join_rows(rows), len(rows))


def dataset_source(name: str) -> Source:
    """The text of a named set (`load_dataset_rows`, with what that raises)."""
    rows = load_dataset_rows(name)
    return Source(f"dataset {name}", join_rows(rows), len(rows))


def load_dataset_rows(name: str) -> list[str]:
    """Rows of a named evaluation set, through the `datasets` library and its cache.

    Parameters
    ----------
    name : a key of `DATASETS`; "wikitext2" is the raw test split, 4,358 rows.

    Returns
    -------
    list of str, the rows in the data set's order, empty ones included.

    Raises
    ------
    UsageError : unknown name.
    MissingDependencyError : `datasets` is not installed (``pip install 'mendlm[datasets]'``).
    MendError : the set is not in the cache and the hub cannot be reached, found within seconds; or the hub refused.
    """
    source = lookup(DATASETS, name, "dataset")
    instead = "--text FILE with a local copy (.txt, .jsonl or .parquet)"
    return list(open_dataset(name, source, option="--dataset", instead=instead))


def open_dataset(name: str, source: DatasetSource, *, option: str, instead: str) -> Sequence[str]:
    """Rows of a data set, through the `datasets` library and its cache.

    Parameters
    ----------
    name : what the caller calls the set, for messages.
    source : where it is.
    option : the flag that asked for it, for messages.
    instead : what to use where it cannot be had, for messages.

    Returns
    -------
    sequence of str, the rows in the data set's order, empty ones included. From datasets 4 on a row is read when it is
    asked for; before, the rows are a list.

    Raises
    ------
    MissingDependencyError : `datasets` is not installed (``pip install 'mendlm[datasets]'``).
    MendError : the set is not in the cache and the hub cannot be reached, found within seconds; or the hub refused.
    """
    try:
        import datasets
    except ImportError as err:
        raise MissingDependencyError(
            f"{option} {name} needs the datasets library: pip install 'mendlm[datasets]'. Without it, use {instead}."
        ) from err
    offline = not hub_reachable()
    failure: Exception | None = None
    where: dict[str, Any] = {"split": source.split}
    if source.file is not None:
        where["data_files"] = {source.split: source.file}
    for repo in source.repos:
        args = (repo,) if source.config is None else (repo, source.config)
        try:
            with quiet_datasets(datasets, offline):
                rows: Sequence[str] = datasets.load_dataset(*args, **where)[source.field]
            return _with_content(rows, f"data set {name!r}")
        except _dataset_errors(datasets) as err:
            failure = err
    reason = (
        "there is no network (or HF_HUB_OFFLINE is set) and it is not in the cache"
        if offline
        else f"{type(failure).__name__}: {failure}"
    )
    place = ", ".join(part for part in (source.repos[0], source.config or source.file, source.split) if part)
    raise MendError(
        f"cannot load data set {name!r} ({place}): {reason}. "
        f"Use {instead}, or run once with a network to fill the cache."
    ) from failure


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a checkpoint folder. Nothing is downloaded, no code in it is run.

    Raises
    ------
    CheckpointError : there is none, or transformers cannot read it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    advice = "Copy the tokenizer's files (tokenizer.json, tokenizer_config.json) of the original model into the folder."
    try:
        with quiet_transformers():
            path = str(local_path(folder))
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, StrictDataclassError) as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0].rstrip(" .:")
        raise CheckpointError(f"cannot load a tokenizer from {str(folder)!r}: {reason}. {advice}") from err
    # For some families transformers makes one of the special tokens alone when there are no files.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise CheckpointError(f"cannot load a tokenizer from {str(folder)!r}: there is no vocabulary in it. {advice}")
    return tokenizer


def tokenize(tokenizer: Any, text: str, *, special_tokens: bool = False) -> list[int]:
    """Token ids of `text` as one piece; `special_tokens` adds what the tokenizer adds by itself (a BOS, say)."""
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)
    ids: list[int] = encoded["input_ids"]
    return ids


def _with_content(rows: R, where: str) -> R:
    if not any(row.strip() for row in rows):
        raise UsageError(f"{where} holds no text ({len(rows)} rows, all empty). Give a file with text in it.")
    return rows


def _dataset_errors(datasets: Any) -> tuple[type[Exception], ...]:
    """What `datasets` and its hub client raise."""
    own = getattr(getattr(datasets, "exceptions", None), "DatasetsError", OSError)
    return (OSError, ValueError, RuntimeError, KeyError, own)


def _decoded(path: Path, gzipped: bool) -> str:
    data = path.read_bytes()
    if gzipped:
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as err:
            raise UsageError(f"{str(path)!r} is not a whole gzip file: {err}. Fetch it again.") from err
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise UsageError(
            f"{str(path)!r} is not UTF-8 text: byte {data[err.start]:#04x} at offset {err.start} cannot be decoded. "
            "Convert it first, e.g. with iconv -t utf-8."
        ) from err


def _read_txt(path: Path, gzipped: bool) -> list[str]:
    return [_decoded(path, gzipped)]


def _read_jsonl(path: Path, gzipped: bool) -> list[str]:
    rows = []
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(_decoded(path, gzipped).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as err:
            raise UsageError(
                f"line {number} of {str(path)!r} is not JSON: {err}. One object a line is needed."
            ) from err
        if not isinstance(row, dict) or not isinstance(row.get(FIELD), str):
            has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise UsageError(
                f"line {number} of {str(path)!r} has no string field {FIELD!r}; it has: {has or 'nothing'}. "
                f"Name the field with the text {FIELD!r}."
            )
        try:
            row[FIELD].encode()
        except UnicodeEncodeError as err:
            raise UsageError(
                f"line {number} of {str(path)!r} holds half of a surrogate pair, which is no character, at character "
                f"{err.start} of its text. Leave that line out, or replace it."
            ) from err
        rows.append(row[FIELD])
    return rows


def _read_parquet(path: Path, gzipped: bool) -> list[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as err:
        raise MissingDependencyError(f"reading {path.name!r} needs pyarrow: pip install pyarrow.") from err
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if FIELD not in columns:
                raise UsageError(
                    f"{str(path)!r} has no column {FIELD!r}; its columns are: {', '.join(columns) or 'none'}. "
                    f"Name the column with the text {FIELD!r}."
                )
            values: list[Any] = file.read(columns=[FIELD])[FIELD].to_pylist()
    except UnicodeDecodeError as err:
        raise UsageError(f"column {FIELD!r} of {str(path)!r} is not UTF-8 text: {err}. Convert it first.") from err
    except pa.ArrowInvalid as err:
        raise UsageError(f"{str(path)!r} is not a whole parquet file: {err}. Fetch it again.") from err
    bad = next((i for i, v in enumerate(values) if not isinstance(v, str)), None)
    if bad is not None:
        raise UsageError(
            f"row {bad} of column {FIELD!r} in {str(path)!r} is {values[bad]!r}, not a string. Drop such rows first."
        )
    return values


_READERS: dict[str, Callable[[Path, bool], list[str]]] = {
    ".txt": _read_txt,
    ".raw": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def hub_reachable() -> bool:
    """Whether the hub answers, decided in `PROBE_SECONDS`: its client retries for minutes instead."""
    if any(os.environ.get(v, "").upper() in {"1", "ON", "YES", "TRUE"} for v in _OFFLINE_VARIABLES):
        return False
    if urllib.request.getproxies():
        return True  # only the proxy knows; let the library try
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False


_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


@contextlib.contextmanager
def quiet_datasets(datasets: Any, offline: bool) -> Iterator[None]:
    """No progress bars from `datasets`, which looks in its cache alone if `offline`; it is put back afterwards."""
    import huggingface_hub.constants as hub

    before = (datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    if offline:
        datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before
        if not bars:
            datasets.enable_progress_bars()
