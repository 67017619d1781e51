"""The table of a sweep: perplexity against stored bytes, smallest first, the points that none beats marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mendlm.sweeping.records import DENSE, SweepRecord, frontier

if TYPE_CHECKING:
    from mendlm.sweeping._sweep import SweepResult

HEADS = ("", "point", "ppl", "× dense", "MB", "of dense", "seconds", "peak MB")


def rows_of(records: Sequence[SweepRecord]) -> list[list[str]]:
    """A row for each record that is done, by bytes, then by perplexity; "*" marks the frontier."""
    best = {record.key for record in frontier(records)}
    dense = next((record.ppl for record in records if record.name == DENSE), None)
    done = [record for record in records if record.ppl is not None]
    return [
        [
            "*" if record.key in best else "",
            record.name,
            f"{record.ppl:.2f}",
            f"{record.ppl / dense:.2f}" if dense and record.ppl else "",
            f"{(record.stored_bytes or 0) / 1e6:.2f}",
            f"{100 * (record.ratio or 0):.1f} %",
            f"{record.seconds or 0:.1f}",
            f"{(record.peak_memory_bytes or 0) / 1e6:.0f}",
        ]
        for record in sorted(done, key=lambda r: (r.stored_bytes or 0, r.ppl or 0))
    ]


def markdown(result: SweepResult, model: str) -> str:
    """`sweep.md`: what was measured, the table, and what failed, was skipped or is left."""
    done = [record for record in result.records if record.status == "done"]
    lines = [f"# Sweep of {_cell(model)}", ""]
    if done:
        facts = done[0].evaluation
        devices = ", ".join(dict.fromkeys(str(record.device) for record in done))
        versions = dict.fromkeys(f"mendlm {r.versions['mendlm']}, torch {r.versions['torch']}" for r in done)
        lines += [
            f"Perplexity on {_cell(str(facts['text']))}, {facts['n_windows']} windows of {facts['seqlen']} tokens, in "
            f"{facts['dtype']} on {devices}; {'; '.join(versions)}. `*`: no other point is better in both bytes and "
            "perplexity.",
            "",
            _line(HEADS),
            _line(["---"] * 2 + ["---:"] * (len(HEADS) - 2)),
            *(_line(row) for row in rows_of(result.records)),
        ]
    for title, rows in (
        ("Failed", [(record.name, record.error or "") for record in result.failed]),
        ("Skipped: impossible", [(skip.name, skip.reason) for skip in result.skipped]),
        ("Left", [(name, "") for name in result.left]),
    ):
        if rows:
            lines += ["", f"## {title}", ""]
            lines += [f"- {_cell(name)}{': ' if text else ''}{_cell(text)}" for name, text in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text that stays in its cell, and is no markup but ``*``, which stands for itself where a word does not follow."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
