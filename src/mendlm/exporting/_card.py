"""The model card of an exported folder: what it is, how it was made, how large it is, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mendlm.evaluation.printed import Evaluation
from mendlm.exporting._base import Source

if TYPE_CHECKING:
    from mendlm.exporting._export import ExportResult

CARD_FILE = "README.md"
ORIGINAL_CARD_FILE = "README.original.md"
_TAGS = ["mendlm", "sparse", "low-rank", "pruning"]


def model_card(
    source: Source, result: ExportResult, summary: str, loading: str, evaluations: Sequence[Evaluation]
) -> str:
    """Markdown with the YAML head that hubs read: the original card's, with our tags."""
    import yaml

    head = _original_head(source.folder / CARD_FILE)
    tags = head.get("tags")
    known = list(tags) if isinstance(tags, list) else []
    head["tags"] = [*known, *(tag for tag in _TAGS if tag not in known)]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {result.path.name or source.folder.name}",
        f"{source.config.get('model_type', 'A')} model compressed by mendlm as sparse + low-rank, "
        f"`W ≈ S + B @ A`, and exported as `{result.layout}`: {summary}.",
        _sizes(source, result),
        _perplexities(evaluations),
        f"## Loading\n\n{loading.rstrip()}",
        _recipe(source.manifest),
    ]
    if (source.folder / CARD_FILE).is_file():
        parts.append(f"The card of the model before compression is [{ORIGINAL_CARD_FILE}]({ORIGINAL_CARD_FILE}).")
    return "\n\n".join(part for part in parts if part) + "\n"


def _original_head(card: Path) -> dict[str, Any]:
    import yaml

    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    lines = text.split("\n")
    if lines[0].strip() != "---" or "---" not in (rest := [line.strip() for line in lines[1:]]):
        return {}
    try:
        parsed = yaml.safe_load("\n".join(lines[1 : 1 + rest.index("---")]))
    except yaml.YAMLError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _sizes(source: Source, result: ExportResult) -> str:
    kept = sum(layer.packed.n_kept for layer in source.layers)
    entries = sum(layer.shape[0] * layer.shape[1] for layer in source.layers)
    ranks = sorted({layer.packed.rank for layer in source.layers})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    rows = [
        ("the original", result.dense_bytes),
        ("compressed (packed)", result.packed_bytes),
        ("this folder", result.output_bytes),
    ]
    table = "\n".join(f"| {name} | {n / 1e6:,.1f} MB | {n / max(result.dense_bytes, 1):.3f} |" for name, n in rows)
    return (
        f"{result.n_layers} weights are compressed: sparsity {1 - kept / max(entries, 1):.3f}, rank {rank}. "
        f"Bytes of all tensors:\n\n| | bytes | of the original |\n| --- | --- | --- |\n{table}"
    )


def _perplexities(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return "Perplexity was not measured when this was exported."
    rows = "\n".join(
        f"| {e.model} | {e.text} | {e.n_windows} × {e.seqlen} tokens, {e.dtype} | {_ppl(e)} |" for e in evaluations
    )
    return f"| model | text | windows | perplexity |\n| --- | --- | --- | --- |\n{rows}"


def _ppl(evaluation: Evaluation) -> str:
    return "infinite" if evaluation.ppl is None else f"{evaluation.ppl:.3f}"


def _recipe(manifest: Mapping[str, Any]) -> str:
    import yaml

    if not manifest:
        return ""
    recipe = yaml.safe_dump(manifest["recipe"], sort_keys=False, allow_unicode=True).rstrip()
    return f"## Recipe\n\nmendlm {manifest['mendlm_version']}:\n\n```yaml\n{recipe}\n```"
