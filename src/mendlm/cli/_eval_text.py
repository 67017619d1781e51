"""`mendlm eval` on text: its progress, the facts of one perplexity, the table of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mendlm.cli._console import (
    Column,
    format_float,
    format_percent,
    format_seconds,
    json_only,
    print_facts,
    print_json,
    print_table,
)
from mendlm.cli._progress import counted, progress_view

if TYPE_CHECKING:
    from mendlm.evaluation.comparison import PairedDifference
    from mendlm.evaluation.folders import Step, TextEvaluation
    from mendlm.evaluation.perplexity import PerplexityResult


def run_text(
    models: Sequence[str],
    *,
    texts: Sequence[Path],
    datasets: Sequence[str],
    reference: str | None,
    seqlen: int | None,
    n_windows: int | None,
    device: str | None,
    dtype: str | None,
    runtime: str | None,
    as_json: bool,
) -> None:
    """Evaluate and print, as `mendlm.evaluation.folders.evaluate_each`; one object or a list of them in JSON."""
    several = len(models) * (len(texts) + len(datasets)) > 1
    with json_only(as_json) as stream:
        from mendlm.devices import resolve_device
        from mendlm.evaluation.folders import evaluate_each

        where = None if device is None else resolve_device(device)
        with progress_view(stream, "eval") as view:

            def on_window(step: Step) -> None:
                what = f"{step.model} on {step.text}: " if several else ""
                count = counted(step.done, step.total)
                view.advanced(step.share, 1.0, f"{what}{count} ppl so far {step.ppl:.4f}")

            evaluations = evaluate_each(
                models,
                texts=texts,
                datasets=datasets,
                reference=reference,
                seqlen=seqlen,
                n_windows=n_windows,
                device=where,
                dtype=dtype,
                runtime=runtime,
                progress=on_window,
            )
    if as_json:
        documents = [evaluation.to_dict() for evaluation in evaluations]
        print_json(documents if several else documents[0])
    elif several or reference is not None:
        _show_table(evaluations)
    else:
        _show_facts(evaluations[0].result)


def _show_facts(result: PerplexityResult) -> None:
    protocol = result.protocol
    interval = "none: the text is too short for one"
    if result.ppl_ci95 is not None:
        interval = (
            f"{_interval(result.ppl_ci95, '.4f')}, from {len(result.block_nll)} blocks of {_block_tokens(result)}"
        )
    facts = [
        ("model", str(protocol["model"])),
        ("text", f"{protocol['text']} ({protocol['n_rows']:,} rows, joined with {protocol['rows_joined_with']!r})"),
        (
            "windows",
            f"{result.n_windows} of {protocol['n_windows_given']}, {result.seqlen} tokens each: {protocol['windows']}",
        ),
        ("predicted", f"{result.n_tokens:,} tokens: {protocol['predicted']}"),
        ("mean", f"{result.nll:.6f}, {protocol['mean']}"),
        ("speed", f"{result.tokens_per_second:,.0f} tokens/s, {format_seconds(result.seconds)}"),
        ("run on", f"{protocol['device']} in {protocol['dtype']}"),
        ("ppl", f"{result.ppl:.4f}"),
        ("95 %", interval),
    ]
    print_facts(facts)


def _show_table(evaluations: Sequence[TextEvaluation]) -> None:
    """A row for each model on each text, the reference's before those that were compared with it."""
    compared = evaluations[0].comparison is not None
    paired = any(evaluation.difference is not None for evaluation in evaluations)
    columns = [Column("model", False), Column("text", False), Column("windows"), Column("ppl"), Column("95 %", False)]
    if paired:
        columns += [Column("Δ nll"), Column("95 %", False), Column("verdict", False)]
    if compared:
        columns += [Column("KL"), Column("KL p99"), Column("top-1")]
    rows: list[list[str]] = []
    shown: set[str] = set()
    for evaluation in evaluations:
        text, comparison = evaluation.result.protocol["text"], evaluation.comparison
        if comparison is not None and text not in shown:
            rows.append(_cells(comparison.reference))
        shown.add(text)
        cells = _cells(evaluation.result)
        if evaluation.difference is not None:
            difference = evaluation.difference
            cells += [f"{difference.nll:+.4f}", _interval(difference.nll_ci95, "+.4f"), _verdict(difference)]
        if comparison is not None:
            kl = [format_float(comparison.kl), format_float(comparison.kl_p99)]
            cells += [*kl, format_percent(comparison.top1_agreement)]
        rows.append(cells)
    print_table(columns, [row + [""] * (len(columns) - len(row)) for row in rows])
    print_facts(_legend(evaluations, compared, paired))


def _cells(result: PerplexityResult) -> list[str]:
    protocol = result.protocol
    windows = f"{result.n_windows} × {result.seqlen}"
    return [protocol["model"], protocol["text"], windows, f"{result.ppl:.4f}", _interval(result.ppl_ci95, ".2f")]


def _legend(evaluations: Sequence[TextEvaluation], compared: bool, paired: bool) -> list[tuple[str, str]]:
    result = evaluations[0].result
    facts = [("run on", f"{result.protocol['device']} in {result.protocol['dtype']}")]
    facts.append(("95 %", f"confidence intervals, from blocks of {_block_tokens(result)} in the first row"))
    if paired:
        named = next(e.difference.baseline for e in evaluations if e.difference is not None)
        facts.append(("Δ nll", f"mean NLL less that of {named} on the same tokens, nats per token, paired by block"))
    if compared:
        facts.append(("KL", "KL(reference ‖ model), nats per token: mean and 99th percentile"))
        facts.append(("top-1", "tokens for which both models hold the same token the likeliest"))
    return facts


def _verdict(difference: PairedDifference) -> str:
    if difference.within_noise is None:
        return ""
    if difference.within_noise:
        return "within noise"
    return "worse" if difference.nll > 0 else "better"


def _interval(interval: tuple[float, float] | None, form: str) -> str:
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _block_tokens(result: PerplexityResult) -> str:
    return f"{round(result.n_tokens / len(result.block_nll)):,} tokens"
