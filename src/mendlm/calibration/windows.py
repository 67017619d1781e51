"""Token windows for calibration: cut out of text, written by the model itself, or random."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mendlm.calibration.sampling import sample_windows
from mendlm.checkpoints.reader import Checkpoint, read_json_object
from mendlm.errors import CheckpointError, UsageError
from mendlm.evaluation.text import DatasetSource, join_rows, load_tokenizer, open_dataset, read_text, tokenize
from mendlm.names import lookup
from mendlm.paths import local_path

if TYPE_CHECKING:
    from mendlm.config import Calibration

logger = logging.getLogger(__name__)

DEFAULT_SEQLEN = 2048
WHOLE_TEXT = 2**24  # characters tokenised at once for random windows: about 20 s and 3 GB; longer texts go in pieces
LEADING_TEXT = 2**21  # characters that leading windows try first
MARGIN = 1024  # tokens between the last one used and the end of the text it was tokenised with

# The splits and the shard that the Wanda code calibrates on (github.com/locuslab/wanda, lib/data.py).
DATASETS = {
    "c4": DatasetSource(("allenai/c4",), None, "train", "text", "en/c4-train.00000-of-01024.json.gz"),
    "wikitext2": DatasetSource(("Salesforce/wikitext", "wikitext"), "wikitext-2-raw-v1", "train", "text"),
}
SOURCES = (*DATASETS, "self", "random-tokens")

_POSITIONS = ("max_position_embeddings", "n_positions")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and where they come from.

    Attributes
    ----------
    ids : (n_sequences, seqlen) int64 on the CPU.
    source : the data set's name, the file's name, "self" or "random-tokens"; says so where rows had to be joined.
    sha256 : of `ids` in row-major order, 8 bytes each, little-endian.
    seqlen : tokens of a window.
    warnings : what came out otherwise than asked for; each was logged as a warning.
    """

    ids: Tensor
    source: str
    sha256: str
    seqlen: int
    warnings: tuple[str, ...] = ()


def max_positions(config: Mapping[str, Any]) -> int | None:
    """The longest sequence the model of a ``config.json`` has positions for; None if it states none.

    ``max_position_embeddings`` or ``n_positions`` (GPT-2), of the nested ``text_config`` first.
    """
    return _stated(config, _POSITIONS)


def calibration_windows(
    checkpoint_folder: Path,
    calibration: Calibration,
    *,
    seed: int,
    max_positions: int | None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Windows:
    """The token windows that a model is calibrated on.

    Parameters
    ----------
    checkpoint_folder : the model, for its tokenizer and its vocabulary. Its weights are read for source "self" only.
    calibration : source, number, length and kind of windows.

        - ``windows="random"`` as in the Wanda code, ``lib/data.py``: a text of several documents (c4, jsonl, parquet)
          is drawn from until a document has more than `seqlen` tokens, and the window starts at a random token of it;
          a single text is tokenised whole and windows start anywhere in it. Documents are joined with a blank line
          where those that are long enough do not hold half of the windows without overlap; wikitext2 always, with
          single spaces as in that code. Tokenised with the special tokens that the tokenizer adds by itself, again as
          there: the same seed and tokenizer give that code's windows.
        - ``windows="leading"``: the rows joined with a blank line, tokenised once without special tokens, cut from
          the start into windows that do not overlap. These are the ids that `mendlm.evaluation.perplexity` reads.

    seed : of everything random, >= 0. No global generator is touched.
    max_positions : longest sequence of the model (`max_positions`); None for no limit.
    device : where source "self" runs the model; None is the CPU.
    progress : called with (tokens sampled, tokens in all) while source "self" is at work.

    Returns
    -------
    Windows

    Raises
    ------
    UsageError : unknown source or no such file, no tokenizer, text too short, a tokenizer that is not the model's.
    MissingDependencyError, MendError : a data set that cannot be had.
    NonFiniteError : the model's own logits are not finite ("self").

    Notes
    -----
    Memory and time do not depend on the size of the model, "self" apart. Documents are tokenised when they are drawn;
    a single text of more than `WHOLE_TEXT` characters is treated as documents of equal size, of which only those drawn
    are tokenised. Leading windows of a long text are found from a part of it, taken only if a part twice as long gives
    the same ids.
    """
    checkpoint_folder = Path(checkpoint_folder)
    seqlen, warnings = _resolve_seqlen(calibration.seqlen, max_positions)
    shape = (calibration.n_sequences, seqlen)
    vocab = _stated(read_json_object(checkpoint_folder / "config.json"), ("vocab_size",))
    source = calibration.source
    if source == "random-tokens":
        ids = _random_tokens(vocab, shape, seed)
    elif source == "self":
        dtype = None if calibration.dtype is None else getattr(torch, calibration.dtype)
        ids = sample_windows(checkpoint_folder, *shape, seed=seed, device=device, dtype=dtype, progress=progress)
    else:
        ids, source, more = _text_windows(checkpoint_folder, calibration, seqlen, seed)
        _check_vocabulary(ids, vocab)
        warnings += more
    for warning in warnings:
        logger.warning("%s", warning)
    digest = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
    return Windows(ids, source, digest, seqlen, tuple(warnings))


def windows_of(checkpoint: Checkpoint, calibration: Calibration, seed: int, device: torch.device) -> Windows:
    """`calibration_windows` for an open checkpoint; errors as there."""
    return calibration_windows(
        checkpoint.folder, calibration, seed=seed, max_positions=max_positions(checkpoint.config), device=device
    )


def _stated(config: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """The first positive int under one of `keys`, in the nested text config if there is one, else in `config`."""
    for level in (config.get("text_config"), config):
        for key in keys:
            value = level.get(key) if isinstance(level, Mapping) else None
            if type(value) is int and value > 0:
                return value
    return None


def _resolve_seqlen(seqlen: int | None, longest: int | None) -> tuple[int, list[str]]:
    if seqlen is None:
        return min(DEFAULT_SEQLEN, longest or DEFAULT_SEQLEN), []
    if longest is None or seqlen <= longest:
        return seqlen, []
    return longest, [
        f"seqlen {seqlen} is longer than the {longest} positions of the model: calibrating on windows of {longest}."
    ]


def _random_tokens(vocab: int | None, shape: tuple[int, int], seed: int) -> Tensor:
    if vocab is None:
        raise UsageError(
            "config.json states no vocab_size, so random tokens cannot be drawn. Calibrate on a FILE or self instead."
        )
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def _text_windows(folder: Path, calibration: Calibration, seqlen: int, seed: int) -> tuple[Tensor, str, list[str]]:
    """Windows of a text, what they come from, and warnings."""
    source, n_windows = calibration.source, calibration.n_sequences
    check_source(source)
    tokenizer = _tokenizer(folder)  # before the text, which may be a download
    rows = _rows(source)
    name = source if source in DATASETS else Path(source).name
    if calibration.windows == "leading":
        return _leading_windows(rows, n_windows, seqlen, lambda text: tokenize(tokenizer, text)), name, []

    def encode(text: str) -> list[int]:
        return tokenize(tokenizer, text, special_tokens=True)

    rng = random.Random(seed)
    if source == "wikitext2":
        ids, warnings = _windows_of_text(" ".join(rows), n_windows, seqlen, rng, encode)
        return ids, name, warnings
    drawn = _windows_of_documents(rows, n_windows, seqlen, rng, encode) if len(rows) > 1 else None
    if drawn is not None:
        return drawn, name, []
    ids, warnings = _windows_of_text(join_rows(rows), n_windows, seqlen, rng, encode)
    return ids, name if len(rows) == 1 else f"{name}, rows joined", warnings


def check_source(source: str) -> None:
    """Refuse a source that is neither a name nor an existing path, before anything is loaded.

    Raises
    ------
    UsageError : it is neither.
    """
    if source in DATASETS or local_path(source).exists():
        return
    try:
        lookup(dict.fromkeys(SOURCES), source, "calibration source")
    except UsageError as err:
        raise UsageError(
            f"{err} Or give the path of a .txt, .jsonl or .parquet file; there is no file {source!r}."
        ) from None


def _tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(folder)
    except CheckpointError as err:
        raise UsageError(
            f"{err} Without a tokenizer, --calibration random-tokens or self still work: they need none."
        ) from err


def _rows(source: str) -> Sequence[str]:
    if source in DATASETS:
        instead = "--calibration FILE with a local text (.txt, .jsonl or .parquet), self or random-tokens"
        return open_dataset(source, DATASETS[source], option="--calibration", instead=instead)
    return read_text(source)


def _windows_of_documents(
    documents: Sequence[str], n_windows: int, seqlen: int, rng: random.Random, encode: Encode
) -> Tensor | None:
    """Draw documents until enough had more than `seqlen` tokens, one window from each.

    None if none has, or so few that they hold less than half of the windows apart from one another.
    """
    if not any(_may_fill(document, seqlen) for document in documents):
        return None
    too_short: set[int] = set()
    long_enough: dict[int, Tensor] = {}  # a file may have few documents, each drawn many times
    windows: list[Tensor] = []
    while len(windows) < n_windows:
        if len(too_short) == len(documents):
            return None
        # Every draw is made, known document or not: the stream of random numbers is that of the Wanda code.
        index = rng.randint(0, len(documents) - 1)
        if index in too_short:
            continue
        if index not in long_enough:
            document = documents[index]
            ids = encode(document) if _may_fill(document, seqlen) else []
            if len(ids) <= seqlen:
                too_short.add(index)
                continue
            long_enough[index] = torch.tensor(ids, dtype=torch.int32)
        windows.append(_window(long_enough[index], seqlen, rng))
    # 128 windows of a file with two long paragraphs would be the same thousand tokens again and again. The half leaves
    # room for documents that a large set draws twice by chance.
    n_separate = sum(len(ids) // seqlen for ids in long_enough.values())
    return torch.stack(windows).long() if 2 * n_separate >= n_windows else None


def _may_fill(document: str, seqlen: int) -> bool:
    """Whether a document can have more than `seqlen` tokens: no token is less than a byte, but for special ones."""
    return len(document) + 8 > seqlen or len(document.encode(errors="replace")) + 8 > seqlen


def _windows_of_text(
    text: str, n_windows: int, seqlen: int, rng: random.Random, encode: Encode
) -> tuple[Tensor, list[str]]:
    """Windows that start at random tokens of one text, and warnings."""
    if len(text) > WHOLE_TEXT:
        size = max(32 * seqlen, 2**16)
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        drawn = _windows_of_documents(pieces, n_windows, seqlen, rng, encode)
        if drawn is not None:
            return drawn, []
    ids = torch.tensor(encode(text), dtype=torch.int64)
    n_separate = _check_length(len(ids), seqlen)
    warnings = []
    if n_separate < n_windows:
        warnings.append(
            f"the calibration text has {len(ids)} tokens, no more than {n_separate} separate windows of {seqlen}: "
            f"the {n_windows} random ones overlap. A lower n_sequences takes less time for nearly the same statistics."
        )
    return torch.stack([_window(ids, seqlen, rng) for _ in range(n_windows)]), warnings


def _window(ids: Tensor, seqlen: int, rng: random.Random) -> Tensor:
    # The last possible start is left out, as in the Wanda code, unless it is the only one.
    start = rng.randint(0, max(0, len(ids) - seqlen - 1))
    return ids[start : start + seqlen]


def _leading_windows(rows: Sequence[str], n_windows: int, seqlen: int, encode: Encode) -> Tensor:
    ids = _leading_ids(rows, n_windows * seqlen, encode)
    available = _check_length(len(ids), seqlen)
    if available < n_windows:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens, that is {available} leading windows of {seqlen}, fewer than "
            f"the {n_windows} asked for. Lower --n-sequences to {available} or less, or give more text."
        )
    return torch.tensor(ids[: n_windows * seqlen], dtype=torch.int64).view(n_windows, seqlen)


def _leading_ids(rows: Sequence[str], n_ids: int, encode: Encode) -> list[int]:
    """The first `n_ids` ids of all rows joined; all ids if the text is short.

    No tokenizer looks thousands of tokens ahead, but no interface promises it. So a part of the text counts only if one
    twice as long, cut elsewhere, gives the same ids; otherwise the parts grow until they are the whole.
    """
    n_chars = max(LEADING_TEXT, 8 * n_ids)
    before: list[int] = []
    while True:
        text, whole = _beginning(rows, n_chars)
        ids = encode(text)
        if whole:
            return ids
        if len(before) >= n_ids + MARGIN and before[:n_ids] == ids[:n_ids]:
            return ids[:n_ids]
        before, n_chars = ids, 2 * n_chars


def _beginning(rows: Sequence[str], n_chars: int) -> tuple[str, bool]:
    """The first `n_chars` characters of the rows joined, and whether that is all of them."""
    parts, length = [], 0
    for row in rows:
        parts.append(row)
        length += len(row) + 2
        if length > n_chars + 2:
            return join_rows(parts)[:n_chars], False
    return join_rows(parts), True


def _check_length(n_tokens: int, seqlen: int) -> int:
    """How many separate windows there are, at least one."""
    if n_tokens < seqlen:
        raise UsageError(
            f"the calibration text is too short: it has {n_tokens} tokens and one window needs {seqlen}. "
            "Give more text, or lower --seqlen."
        )
    return n_tokens // seqlen


def _check_vocabulary(ids: Tensor, vocab: int | None) -> None:
    largest = int(ids.max())
    if vocab is not None and largest >= vocab:
        raise UsageError(
            f"token id {largest} is not in the model's vocabulary of {vocab}. The tokenizer belongs to another model."
        )
