"""Perplexity as the field measures it: non-overlapping windows, mean NLL per predicted token, exp of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mendlm._inference import dtype_of, inference_dtype, open_model, vocab_size
from mendlm.errors import NonFiniteError, UsageError
from mendlm.evaluation._logits import device_of, eval_mode, logits_reader, text_config, token_nll
from mendlm.evaluation.intervals import block_lengths, block_means, exp, exp_interval, mean_interval, plain
from mendlm.evaluation.text import Source, dataset_source, load_tokenizer, text_source, tokenize
from mendlm.paths import local_path

DEFAULT_SEQLEN = 2048
LOGITS_BYTES = 64 * 2**20  # size of one float32 chunk of logits when `logits_chunk` is not given

Progress = Callable[[int, int, float], None]
"""Called after each window with (windows done, windows in all, perplexity so far)."""


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and everything that says which number it is.

    Attributes
    ----------
    ppl : exp(nll). ``inf`` where that overflows.
    nll : mean negative log-likelihood in nats per predicted token.
    n_tokens : predicted tokens, n_windows * (seqlen - 1).
    n_windows, seqlen : windows used and their length in tokens.
    seconds : wall time of the windows, without loading and tokenising.
    tokens_per_second : n_tokens / seconds.
    protocol : plain values (JSON) that say how the number came about.
    nll_ci95, ppl_ci95 : 95 % confidence interval of `nll`, over texts like this one, and exp of it; None where the text
        is too short for one (`mendlm.evaluation.intervals`).
    window_nll : mean NLL of each window, in order.
    block_nll : mean NLL of each block of tokens, the units of the interval; what `paired_difference` pairs.
    """

    ppl: float
    nll: float
    n_tokens: int
    n_windows: int
    seqlen: int
    seconds: float
    tokens_per_second: float
    protocol: dict[str, Any] = field(default_factory=dict)
    nll_ci95: tuple[float, float] | None = None
    ppl_ci95: tuple[float, float] | None = None
    window_nll: list[float] = field(default_factory=list)
    block_nll: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON, which has no infinity: an infinite `ppl` becomes None."""
        return {key: plain(value) for key, value in asdict(self).items()}


def perplexity(
    model: Any,
    token_ids: Tensor | Sequence[int],
    *,
    seqlen: int | None = DEFAULT_SEQLEN,
    n_windows: int | None = None,
    logits_chunk: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a causal language model on one stream of tokens.

    The stream is cut into non-overlapping windows of exactly `seqlen` tokens; the remainder is dropped. In each window
    the model predicts tokens 2 to seqlen from those before them in the same window. The NLL of all predictions, in
    nats, is averaged; `ppl` is exp of it. No token is added anywhere.

    Parameters
    ----------
    model : a transformers causal LM, dense or compressed, on any device. Evaluated in eval mode, put back as it was.
    token_ids : (n,) or (1, n) integer tensor, or a list of int.
    seqlen : int >= 2, at most the model's `max_position_embeddings`. None: the smaller of 2048 and that.
    n_windows : int >= 1, use only the first so many windows. None: all.
    logits_chunk : int >= 1, positions whose logits exist at a time. None: as many as fit 64 MiB in float32. It does not
        change the result beyond rounding.
    progress : called after each window with (done, total, perplexity so far).

    Returns
    -------
    PerplexityResult

    Raises
    ------
    UsageError : fewer tokens than asked for, `seqlen` or `n_windows` out of range, a token id outside the vocabulary.
    NonFiniteError : the NLL of a window is NaN or infinite; the message names the window.

    Notes
    -----
    One window at a time: memory is that of one forward of `seqlen` tokens without its logits, plus one chunk of them.
    Logits come from the output embedding, on chunks of the base model's last hidden state, then scaled and soft-capped
    as the config states. That this is what the model's own forward gives is checked on the first tokens; where it is
    not, the model's own forward is used, with a whole window of logits (seqlen, vocab) in memory.
    `protocol["logits"]` says which. Logits are read in float32, the sum is kept in float64.
    """
    seqlen = checked_seqlen(model, seqlen)
    vocab = vocab_size(model)
    stream = checked_ids(token_ids, vocab)
    windows = cut(stream, seqlen, n_windows)
    chunk = checked_chunk(logits_chunk, 4 * vocab)
    values: list[Tensor] = []
    with torch.inference_mode(), eval_mode(model):
        start = time.perf_counter()
        logits_of, how = logits_reader(model, windows[0])
        for index, ids in enumerate(windows):
            values.append(token_nll(logits_of(ids), ids, chunk))
            check_finite("the NLL", values[-1], index, seqlen)
            if progress is not None:
                progress(index + 1, len(windows), exp(float(torch.stack(values).mean())))
        seconds = time.perf_counter() - start
    return summarized(torch.stack(values), seconds, protocol_of(model, stream, windows, how))


def check_finite(what: str, values: Tensor, index: int, seqlen: int) -> None:
    """Refuse `values` (seqlen - 1,) of window `index` if one is NaN or infinite.

    Raises
    ------
    NonFiniteError : with the window and its tokens.
    """
    total = float(values.sum())
    if not math.isfinite(total):
        raise NonFiniteError(
            f"{what} of window {index} (tokens {index * seqlen} to {(index + 1) * seqlen - 1}) is {total}: the "
            "model's logits hold NaN or infinity there. Try --dtype float32, or check its weights."
        )


def summarized(values: Tensor, seconds: float, protocol: dict[str, Any]) -> PerplexityResult:
    """The result for NLLs `values` (n_windows, seqlen - 1), float64."""
    n_windows, n_predicted = values.shape
    blocks = block_means(values)
    interval = mean_interval(blocks, block_lengths(n_windows, n_predicted))
    nll, n_tokens = float(values.mean()), values.numel()
    return PerplexityResult(
        ppl=exp(nll),
        nll=nll,
        n_tokens=n_tokens,
        n_windows=n_windows,
        seqlen=n_predicted + 1,
        seconds=seconds,
        tokens_per_second=n_tokens / seconds,
        protocol=protocol,
        nll_ci95=interval,
        ppl_ci95=exp_interval(interval),
        window_nll=values.mean(1).tolist(),
        block_nll=blocks,
    )


def evaluate(
    model: str | Path,
    *,
    text: str | Path | None = None,
    dataset: str | None = None,
    seqlen: int | None = None,
    n_windows: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    runtime: str | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of the model in a folder, dense or compressed, on a text.

    Rows are joined with one blank line and tokenised once, with no special tokens; the rest is `perplexity`.

    Parameters
    ----------
    model : folder of a dense transformers checkpoint, or one that mendlm wrote. Nothing is downloaded.
    text : file to evaluate on (`mendlm.evaluation.text.read_text`).
    dataset : name of a set (`mendlm.evaluation.text.DATASETS`). At most one of `text` and `dataset`; with neither, the
        book that ships with mendlm.
    seqlen, n_windows, progress : as in `perplexity`; `seqlen` None is the smaller of 2048 and the model's maximum.
    device : where to run; None is the loader's default.
    dtype : compute dtype, a `torch.dtype` or its name; None is float32 on a CPU, elsewhere the checkpoint's.
    runtime : how compressed layers compute; None is the loader's default. Dense models have no choice.

    Returns
    -------
    PerplexityResult, its `protocol` naming model, tokenizer and text (with the text's SHA-256).

    Raises
    ------
    UsageError : no such folder, both `text` and `dataset`, unknown dtype; and what `perplexity` and `read_text` raise.
    CheckpointError : the model or its tokenizer cannot be loaded.
    MissingDependencyError, MendError : the data set cannot be had.
    """
    if text is not None and dataset is not None:
        raise UsageError(f"got both --text {str(text)!r} and --dataset {dataset!r}. Give one of them.")
    if not local_path(model).is_dir():
        raise UsageError(f"{str(model)!r} is no folder. Download the model first and give the folder that holds it.")
    compute = inference_dtype(dtype, device)
    # The text before the model: a wrong path should not wait for a model to load.
    source = dataset_source(dataset) if dataset is not None else text_source(text)
    tokenizer = load_tokenizer(model)
    ids = tokenize(tokenizer, source.joined)
    loaded = open_model(model, device=device, dtype=compute, runtime=runtime)
    result = perplexity(loaded, ids, seqlen=seqlen, n_windows=n_windows, progress=progress)
    return with_source(result, model, tokenizer, source)


def with_source(result: PerplexityResult, model: str | Path, tokenizer: Any, source: Source) -> PerplexityResult:
    """`result` with a protocol that also names the model's folder, the tokenizer and the text."""
    about = {"model": str(model)} | source.protocol() | {"tokenizer": type(tokenizer).__name__}
    return replace(result, protocol=about | result.protocol)


def checked_seqlen(model: Any, seqlen: int | None) -> int:
    """`seqlen`, which the model's positions must allow; None is the shorter of `DEFAULT_SEQLEN` and those."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, longest or DEFAULT_SEQLEN)
    if seqlen < 2:
        raise UsageError(f"seqlen must be at least 2 (one token to read, one to predict), got {seqlen!r}.")
    if longest is not None and seqlen > longest:
        raise UsageError(
            f"seqlen {seqlen} is longer than the {longest} positions of the model (max_position_embeddings). "
            f"Use --seqlen {longest} or less."
        )
    return seqlen


def checked_chunk(logits_chunk: int | None, position_bytes: int) -> int:
    """Positions at a time: `logits_chunk`, or as many as fit `LOGITS_BYTES` where one takes `position_bytes`."""
    if logits_chunk is None:
        return max(1, LOGITS_BYTES // position_bytes)
    if logits_chunk < 1:
        raise UsageError(f"logits_chunk must be at least 1, got {logits_chunk!r}.")
    return logits_chunk


def checked_ids(token_ids: Tensor | Sequence[int], vocab: int) -> Tensor:
    """`token_ids` as a (n,) int64 tensor with every id in [0, vocab)."""
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as err:
        raise UsageError(f"token_ids must be integers, got a {type(token_ids).__name__} that is not: {err}.") from err
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise UsageError(
            f"token_ids must be of shape (n,) or (1, n), got {tuple(ids.shape)}. Join several texts into one stream."
        )
    if ids.numel() == 0:
        return ids.long()
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise UsageError(f"token_ids must be integers, got dtype {ids.dtype}.")
    ids = ids.long()
    for worst in (int(ids.max()), int(ids.min())):
        if not 0 <= worst < vocab:
            raise UsageError(
                f"token id {worst} is not in the model's vocabulary of {vocab}. The tokenizer belongs to another model."
            )
    return ids


def cut(stream: Tensor, seqlen: int, n_windows: int | None) -> Tensor:
    """(n_windows, seqlen) view of the first windows of `stream` (n,)."""
    available = stream.numel() // seqlen
    if available == 0:
        raise UsageError(
            f"the text has {stream.numel()} tokens, fewer than one window of {seqlen}. Give more text, or a smaller "
            "--seqlen (which measures something else)."
        )
    if n_windows is None:
        n_windows = available
    if not 1 <= n_windows <= available:
        raise UsageError(
            f"n_windows must be in [1, {available}] for {stream.numel()} tokens in windows of {seqlen}, got "
            f"{n_windows!r}. Leave it out to use all {available}."
        )
    return stream[: n_windows * seqlen].view(n_windows, seqlen)


def protocol_of(model: Any, stream: Tensor, windows: Tensor, logits: str) -> dict[str, Any]:
    """How a number over `windows` (n_windows, seqlen) of `stream` (n,) came about; `logits`: how those were read."""
    seqlen = windows.shape[1]
    return {
        "windows": "non-overlapping, of exactly seqlen tokens, from the start of the stream; the remainder is dropped",
        "predicted": "tokens 2 to seqlen of each window, from the tokens before them in the same window",
        "mean": "over all predicted tokens, in nats; ppl = exp(nll)",
        "special_tokens_added": False,
        "seqlen": seqlen,
        "n_tokens_given": stream.numel(),
        "n_windows_given": stream.numel() // seqlen,
        "token_ids_sha256": hashlib.sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest(),
        "dtype": dtype_of(model),
        "device": str(device_of(model)),
        "logits": logits,
    }
