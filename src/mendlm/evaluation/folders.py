"""Models in folders on texts: perplexities, each paired with a baseline or compared with a reference model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mendlm._inference import inference_dtype, open_model, runtimes_of
from mendlm.errors import MendError, UsageError, located
from mendlm.evaluation.comparison import Comparison, PairedDifference, compare, paired_difference
from mendlm.evaluation.perplexity import DEFAULT_SEQLEN, PerplexityResult, cut, perplexity, with_source
from mendlm.evaluation.text import Source, dataset_source, load_tokenizer, text_source, tokenize


@dataclass(frozen=True)
class TextEvaluation:
    """One model on one text.

    Attributes
    ----------
    result : its perplexity.
    difference : from the reference, or else from the first of several models; None for that one, and where the two did
        not read the same tokens.
    comparison : with the reference; None without one.
    """

    result: PerplexityResult
    difference: PairedDifference | None = None
    comparison: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: those of `result`, then "difference" and "reference" where there are such."""
        if self.comparison is not None:
            return self.comparison.to_dict()
        return self.result.to_dict() | ({} if self.difference is None else {"difference": self.difference.to_dict()})


class Step(NamedTuple):
    """Where `evaluate_each` is: after `done` of `total` windows of a model on a text, and `share` of all the work."""

    model: str
    text: str
    done: int
    total: int
    ppl: float
    share: float


def evaluate_each(
    models: Sequence[str | Path],
    *,
    texts: Sequence[str | Path] = (),
    datasets: Sequence[str] = (),
    reference: str | Path | None = None,
    seqlen: int | None = None,
    n_windows: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    runtime: str | None = None,
    progress: Callable[[Step], None] | None = None,
) -> list[TextEvaluation]:
    """Evaluate each model on each text, against a reference if one is given.

    Texts are read and tokenised, each with every model's own tokenizer, before the first model is loaded.

    Parameters
    ----------
    models : folders, dense or compressed; at least one.
    texts, datasets : files and names of sets as in `mendlm.evaluation.perplexity.evaluate`; at least one in all.
    reference : folder of the model that the others are compared with (`compare`). Its tokenizer must give the same
        tokens as theirs.
    seqlen, n_windows, device, dtype : as in `evaluate`, for every model and text.
    runtime : how compressed folders compute, of which there must be one.
    progress : called after each window.

    Returns
    -------
    list of TextEvaluation, text by text, the models in the order given.

    Raises
    ------
    UsageError, CheckpointError, NonFiniteError, MissingDependencyError, MendError : as `evaluate` and `compare`; a
        reference with other tokens. Where several models or texts are evaluated, the message says which it was.

    Notes
    -----
    In memory at a time: the reference and one model. The reference reads each text once for each model: to keep its
    logits would take gigabytes.
    """
    if not models:
        raise UsageError("no model to evaluate. Give the folder of at least one.")
    inference_dtype(dtype, device)
    folders = [*models, *([] if reference is None else [reference])]
    runtimes = runtimes_of(folders, runtime)
    sources = _named_apart(texts, datasets)
    many = len(models) * len(sources) > 1

    def opened(index: int) -> Any:
        return open_model(folders[index], device=device, dtype=dtype, runtime=runtimes[index])

    tokenizers = [load_tokenizer(folder) for folder in folders]
    streams = [[torch.tensor(tokenize(t, source.joined)) for source in sources] for t in tokenizers]
    _check_streams(folders, sources, streams, seqlen, n_windows, reference is not None)
    work = [[_n_windows(ids, seqlen, n_windows) for ids in streams[index]] for index in range(len(models))]
    whole, before = sum(map(sum, work)), 0
    baseline = None if reference is None else opened(len(models))
    found: list[list[TextEvaluation]] = [[] for _ in sources]
    for index, (folder, tokenizer) in enumerate(zip(models, tokenizers, strict=False)):
        model = opened(index)
        for j, source in enumerate(sources):
            tell = partial(_tell, progress, str(folder), source.name, before / whole, work[index][j] / whole)
            options: dict[str, Any] = dict(seqlen=seqlen, n_windows=n_windows, progress=tell)
            with _saying(f"{folder} on {source.name}" if many else None):
                if baseline is None:
                    result = with_source(perplexity(model, streams[index][j], **options), folder, tokenizer, source)
                    found[j].append(TextEvaluation(result, _from_first(result, found[j])))
                else:
                    pair = compare(model, baseline, streams[index][j], **options)
                    ours = with_source(pair.model, folder, tokenizer, source)
                    theirs = with_source(pair.reference, folders[-1], tokenizers[-1], source)
                    named = replace(pair.difference, baseline=str(reference))
                    pair = replace(pair, model=ours, reference=theirs, difference=named)
                    found[j].append(TextEvaluation(ours, named, pair))
            before += work[index][j]
        del model  # before the next one comes
    return [evaluation for of_text in found for evaluation in of_text]


def _named_apart(texts: Sequence[str | Path], datasets: Sequence[str]) -> list[Source]:
    """The texts; files of one name are called by their paths."""
    sources = [*map(text_source, texts), *map(dataset_source, datasets)]
    if not sources:
        raise UsageError("no text to evaluate on. Give a file or the name of a data set.")
    names = [source.name for source in sources]
    paths = [str(path) for path in texts] + names[len(texts) :]
    return [
        replace(source, name=path) if names.count(source.name) > 1 else source
        for source, path in zip(sources, paths, strict=True)
    ]


def _check_streams(
    folders: Sequence[str | Path],
    sources: Sequence[Source],
    streams: Sequence[Sequence[Tensor]],
    seqlen: int | None,
    n_windows: int | None,
    with_reference: bool,
) -> None:
    """Refuse texts too short, as far as is known before a model is open, and a reference with other tokens."""
    for folder, of_model in zip(folders, streams, strict=True):
        for j, (source, ids) in enumerate(zip(sources, of_model, strict=True)):
            if seqlen is not None and seqlen >= 2:
                with _saying(source.name if len(sources) > 1 else None):
                    cut(ids, seqlen, n_windows)
            if with_reference and not torch.equal(ids, streams[-1][j]):
                raise UsageError(
                    f"the tokenizers of {str(folder)!r} and of the reference {str(folders[-1])!r} cut {source.name!r} "
                    "into different tokens, so nothing can be compared token by token. Leave out --reference, or give "
                    "one of the same tokenizer."
                )


def _tell(
    progress: Callable[[Step], None] | None,
    model: str,
    text: str,
    before: float,
    weight: float,
    done: int,
    total: int,
    ppl: float,
) -> None:
    if progress is not None:
        progress(Step(model, text, done, total, ppl, before + weight * done / total))


def _n_windows(ids: Tensor, seqlen: int | None, n_windows: int | None) -> int:
    """About how many windows a stream gives, at least 1; the model's positions may make it more."""
    available = ids.numel() // (seqlen or DEFAULT_SEQLEN)
    return max(1, available if n_windows is None else min(available, n_windows))


def _from_first(result: PerplexityResult, before: Sequence[TextEvaluation]) -> PairedDifference | None:
    if not before:
        return None
    first = before[0].result
    same = ((one.seqlen, one.n_windows, one.protocol["token_ids_sha256"]) for one in (result, first))
    return paired_difference(result, first) if len(set(same)) == 1 else None


@contextlib.contextmanager
def _saying(where: str | None) -> Iterator[None]:
    """Errors of the work inside say `where` it was, unless that is None."""
    try:
        yield
    except MendError as err:
        if where is None:
            raise
        raise located(err, where) from err
