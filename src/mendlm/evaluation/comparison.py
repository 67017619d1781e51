"""Two models on one text: KL divergence, top-1 agreement, and whether their perplexities differ by more than noise."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mendlm._inference import vocab_size
from mendlm.errors import UsageError
from mendlm.evaluation._logits import TokenComparison, eval_mode, logits_reader, token_comparison
from mendlm.evaluation.intervals import block_lengths, block_means, exp, exp_interval, mean_interval, plain
from mendlm.evaluation.perplexity import (
    DEFAULT_SEQLEN,
    PerplexityResult,
    Progress,
    check_finite,
    checked_chunk,
    checked_ids,
    checked_seqlen,
    cut,
    protocol_of,
    summarized,
)

HELD = 4  # a chunk in float32 of each model, the float64 copies that KL needs: so many times the bytes of one


@dataclass(frozen=True)
class PairedDifference:
    """By how much the mean NLL of a model exceeds that of a baseline on the same tokens.

    Attributes
    ----------
    baseline : what the baseline is called; None if it has no name.
    nll : mean NLL of the model minus that of the baseline, nats per token; below 0, the model is better.
    nll_ci95 : 95 % confidence interval of it from the differences of each block of tokens; None where the text is too
        short for one.
    ppl_ratio, ppl_ratio_ci95 : exp of both: perplexity of the model over that of the baseline.
    n_blocks : blocks of tokens that were paired.
    within_noise : whether the interval holds 0: another text like this one may show the opposite. None without one.
    """

    baseline: str | None
    nll: float
    nll_ci95: tuple[float, float] | None
    ppl_ratio: float
    ppl_ratio_ci95: tuple[float, float] | None
    n_blocks: int
    within_noise: bool | None

    def to_dict(self) -> dict[str, Any]:
        """The difference as plain values for JSON."""
        return {key: plain(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Comparison:
    """A model and its reference on one text, token by token.

    Attributes
    ----------
    model, reference : their perplexities; `seconds` of both is the wall time of the whole comparison.
    difference : of the mean NLL, model minus reference, paired.
    kl, kl_ci95 : mean over predicted tokens of KL(reference || model) in nats, and its 95 % confidence interval (None
        where the text is too short).
    kl_p99 : what KL does not exceed at 99 % of the tokens, by nearest rank.
    top1_agreement, top1_ci95 : share of tokens for which both models hold the same token the likeliest; its interval.
    """

    model: PerplexityResult
    reference: PerplexityResult
    difference: PairedDifference
    kl: float
    kl_ci95: tuple[float, float] | None
    kl_p99: float
    top1_agreement: float
    top1_ci95: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: those of `model`, and under "difference" and "reference" the rest."""
        return self.model.to_dict() | {
            "difference": self.difference.to_dict(),
            "reference": {
                "kl": self.kl,
                "kl_ci95": plain(self.kl_ci95),
                "kl_p99": self.kl_p99,
                "top1_agreement": self.top1_agreement,
                "top1_ci95": plain(self.top1_ci95),
                "perplexity": self.reference.to_dict(),
            },
        }


def compare(
    model: Any,
    reference: Any,
    token_ids: Tensor | Sequence[int],
    *,
    seqlen: int | None = DEFAULT_SEQLEN,
    n_windows: int | None = None,
    logits_chunk: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a causal language model with a reference, its dense original say, on one stream of tokens.

    The windows are those of `perplexity`. At each of their predicted tokens both models' distributions over the
    vocabulary are compared: KL(reference || model) = sum over tokens of p_reference * ln(p_reference / p_model).

    Parameters
    ----------
    model, reference : transformers causal LMs with one vocabulary, each on any device. Put back as they were.
    token_ids, n_windows, logits_chunk, progress : as in `perplexity`; progress is told the model's perplexity.
    seqlen : as in `perplexity`; within the positions of both. None: the smaller of 2048 and those.

    Returns
    -------
    Comparison

    Raises
    ------
    UsageError : what `perplexity` refuses, for either model; vocabularies of different sizes.
    NonFiniteError : the NLL or the KL of a window is NaN or infinite; the message names the window.

    Notes
    -----
    One window at a time, its logits a few positions at a time as in `perplexity`: memory is that of both models, of one
    forward of `seqlen` tokens of each, and of one chunk. What is kept of a token is four float64 numbers. NLLs are
    computed as in `perplexity`, in float32; KL in float64 from each model's logits as they are.
    """
    lengths = [checked_seqlen(one, seqlen) for one in (model, reference)]
    vocab = min(vocab_size(model), vocab_size(reference))
    stream = checked_ids(token_ids, vocab)
    windows = cut(stream, min(lengths), n_windows)
    chunk = checked_chunk(logits_chunk, HELD * 4 * vocab)
    rows: list[TokenComparison] = []
    with torch.inference_mode(), eval_mode(model), eval_mode(reference):
        start = time.perf_counter()
        logits_of, how = logits_reader(model, windows[0])
        reference_of, reference_how = logits_reader(reference, windows[0])
        for index, ids in enumerate(windows):
            row = token_comparison(logits_of(ids), reference_of(ids), ids, chunk)
            check_finite("the NLL", row.nll, index, windows.shape[1])
            check_finite("the reference's NLL", row.reference_nll, index, windows.shape[1])
            check_finite("the KL divergence from the reference", row.kl, index, windows.shape[1])
            rows.append(row)
            if progress is not None:
                progress(index + 1, len(windows), exp(float(torch.stack([r.nll for r in rows]).mean())))
        seconds = time.perf_counter() - start
    nll, reference_nll, kl, agrees = (torch.stack(part) for part in zip(*rows, strict=True))
    ours = summarized(nll, seconds, protocol_of(model, stream, windows, how))
    theirs = summarized(reference_nll, seconds, protocol_of(reference, stream, windows, reference_how))
    return Comparison(
        model=ours,
        reference=theirs,
        difference=paired_difference(ours, theirs),
        kl=float(kl.mean()),
        kl_ci95=_interval(kl, 0.0, math.inf),
        kl_p99=float(kl.flatten().kthvalue(math.ceil(0.99 * kl.numel())).values),
        top1_agreement=float(agrees.mean()),
        top1_ci95=_interval(agrees, 0.0, 1.0),
    )


def paired_difference(
    result: PerplexityResult | Mapping[str, Any], baseline: PerplexityResult | Mapping[str, Any]
) -> PairedDifference:
    """By how much one perplexity differs from another on the same tokens, and whether that is noise.

    Texts are easy or hard for all models alike, so that most of the spread of each perplexity is common to both and
    cancels in the difference of each block.

    Parameters
    ----------
    result, baseline : what `perplexity` returned, or what ``mendlm eval --json`` printed, parsed. Of the same tokens
        in the same windows.

    Returns
    -------
    PairedDifference

    Raises
    ------
    UsageError : the two read different tokens or windows, or one lacks what pairing needs.
    """
    ours, theirs = (_as_result(one) for one in (result, baseline))
    for what, a, b in (
        ("seqlen", ours.seqlen, theirs.seqlen),
        ("n_windows", ours.n_windows, theirs.n_windows),
        ("tokens (token_ids_sha256)", *(one.protocol.get("token_ids_sha256") for one in (ours, theirs))),
    ):
        if a is None or a != b:
            raise UsageError(
                f"the two perplexities differ in {what}: {a!r} and {b!r}. Only numbers from the same tokens in the "
                "same windows can be paired: evaluate both on one text with one tokenizer, seqlen and n_windows."
            )
    lengths = block_lengths(ours.n_windows, ours.seqlen - 1)
    for one in (ours, theirs):
        if len(one.block_nll) != len(lengths):
            raise UsageError(
                f"a perplexity over {one.n_windows} windows of {one.seqlen} tokens has {len(lengths)} blocks, this one "
                f"holds block_nll of {len(one.block_nll)}. Another version of mendlm wrote it: evaluate again."
            )
    differences = [a - b for a, b in zip(ours.block_nll, theirs.block_nll, strict=True)]
    nll, interval = ours.nll - theirs.nll, mean_interval(differences, lengths)
    name = theirs.protocol.get("model")
    return PairedDifference(
        baseline=None if name is None else str(name),
        nll=nll,
        nll_ci95=interval,
        ppl_ratio=exp(nll),
        ppl_ratio_ci95=exp_interval(interval),
        n_blocks=len(lengths),
        within_noise=None if interval is None else interval[0] <= 0.0 <= interval[1],
    )


def _interval(values: Tensor, least: float, most: float) -> tuple[float, float] | None:
    """Of the mean of `values` (n_windows, seqlen - 1), which lie between `least` and `most`."""
    found = mean_interval(block_means(values), block_lengths(*values.shape))
    return None if found is None else (max(found[0], least), min(found[1], most))


def _as_result(one: PerplexityResult | Mapping[str, Any]) -> PerplexityResult:
    if isinstance(one, PerplexityResult):
        return one
    try:
        return PerplexityResult(
            ppl=exp(one["nll"]),
            nll=one["nll"],
            n_tokens=one["n_tokens"],
            n_windows=one["n_windows"],
            seqlen=one["seqlen"],
            seconds=one["seconds"],
            tokens_per_second=one["tokens_per_second"],
            protocol=one["protocol"],
            block_nll=one["block_nll"],
        )
    except (KeyError, TypeError) as err:
        raise UsageError(
            f"this is no result of 'mendlm eval --json' that can be paired ({err!r}). Evaluate again; of a list, give "
            "one of its objects."
        ) from err
