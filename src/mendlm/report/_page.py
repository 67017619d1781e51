"""The page: everything known about the runs as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import mendlm
from mendlm import plotting
from mendlm.cli._console import format_bytes, format_float, format_percent, format_seconds, format_shape, safe
from mendlm.errors import MissingDependencyError
from mendlm.evaluation.printed import Evaluation
from mendlm.report import _figures as figures
from mendlm.report._figures import Figure, Point
from mendlm.report._runs import Run
from mendlm.report._tensors import TensorDetail
from mendlm.report.records import TensorRecord
from mendlm.sweeping import SweepRecord

MAX_ROWS = 3000  # of the tables of weights, all runs together: 6 MB hold about 10,000


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and the value it sorts by: exactly that of the records."""

    text: str
    value: Any = ""


BLANK = Cell("–")


def _known(value: Any, format_: Callable[[Any], str]) -> Cell:
    """A cell of a value, if there is one."""
    return BLANK if value is None else Cell(safe(format_(value)), _exact(value))


@dataclass(frozen=True)
class Column:
    """The head of a column; `key` names the field of the record."""

    title: str
    key: str
    is_number: bool = True


@dataclass(frozen=True)
class Content:
    """All that a page shows.

    Attributes
    ----------
    runs : in the order given.
    details : label of the run -> its weights in detail.
    sweeps : records of sweeps.
    others : perplexities of models that are none of the runs.
    dense : the original where it is known, as points to compare with.
    """

    runs: tuple[Run, ...]
    details: Mapping[str, Sequence[TensorDetail]]
    sweeps: tuple[SweepRecord, ...] = ()
    others: tuple[Evaluation, ...] = ()
    dense: tuple[Point, ...] = ()

    def pareto(self) -> Figure | None:
        """Quality against bytes, where there are several models to compare."""
        if len(self.runs) + len(self.sweeps) < 2:
            return None
        return figures.pareto(figures.points_of(self.runs, self.sweeps, self.dense))


def render(content: Content) -> tuple[str, dict[str, Figure]]:
    """The HTML of a page, and its figures by their names.

    Raises
    ------
    MissingDependencyError : Altair, vl-convert or Jinja is not installed.
    """
    drawn: dict[str, Figure] = {}
    pareto = content.pareto()
    if pareto is not None:
        drawn["pareto"] = pareto
    n_rows = MAX_ROWS // max(len(content.runs), 1)
    shown = [_run(i, run, content, drawn, n_rows) for i, run in enumerate(content.runs)]
    library, script = _library(), _file("page.js")
    title = "mendlm report"
    if len(content.runs) == 1:
        title = safe(content.runs[0].label)
    html: str = _template().render(
        title=title,
        subtitle=_subtitle(content),
        policy=_policy(library, script),
        style=_style(),
        library=library,
        script=script,
        charts=_json({"config": plotting.theme(_variables()), "charts": {key: f.spec for key, f in drawn.items()}}),
        compared=_compared(content, pareto),
        runs=shown,
        version=mendlm.__version__,
    )
    return html, drawn


def _subtitle(content: Content) -> str:
    if not content.runs:
        return f"{len(content.sweeps)} points of a sweep"
    totals = [run.manifest.totals for run in content.runs]
    if len(totals) > 1:
        return f"{len(totals)} compressed models, W ≈ S + B @ A"
    recipe = content.runs[0].manifest.recipe
    return (
        f"{totals[0].n_compressed} of {totals[0].n_tensors} tensors stored as W ≈ S + B @ A: "
        f"criterion {recipe['criterion']}, refiner {recipe['refiner']}"
    )


def _run(i: int, run: Run, content: Content, drawn: dict[str, Figure], n_rows: int) -> dict[str, Any]:
    name = f"run{i}"
    heat_maps, by_layer, matching = figures.heat_maps(run), figures.error_by_layer(run), figures.matching(run)
    drawn |= {f"{name}-{chart.name}-chart": chart for chart in heat_maps}
    if by_layer is not None:
        drawn[f"{name}-by-layer"] = by_layer
    if matching is not None:
        drawn[f"{name}-matching"] = matching
    tensors = []
    for j, detail in enumerate(content.details.get(run.label, ())):
        tensor = _tensor(f"{name}-tensor{j}", detail)
        drawn |= {f"{tensor['id']}-{chart.name}": chart for chart in tensor["figures"]}
        tensors.append(tensor)
    records = sorted(run.manifest.records, key=lambda record: -record.rel_error)[:n_rows]
    kept = {record.name for record in records}
    columns = _columns(run.manifest.records)
    n_all = len(run.manifest.records)
    few = "" if len(kept) == n_all else f"the {len(kept):,} with the largest relative error of "
    caption = f"{few}{n_all:,} compressed weights; the exact figures are in mendlm.json. Column heads sort."
    return {
        "id": name,
        "label": safe(run.label),
        "cards": _cards(run, content.others),
        "heat_maps": heat_maps,
        "by_layer": by_layer,
        "tensors": tensors,
        "tensors_note": _tensors_note(content.details.get(run.label, ())),
        "matching": matching,
        "calibration": _calibration(run),
        "columns": columns,
        "rows": [_row(record, columns) for record in run.manifest.records if record.name in kept],
        "caption": caption[0].upper() + caption[1:],
        "recipe": _yaml(run.manifest.recipe),
        "versions": _versions(run),
        "files": _files(run),
    }


def _cards(run: Run, others: Sequence[Evaluation]) -> list[dict[str, Any]]:
    totals, worst = run.manifest.totals, run.worst
    seconds, peak, low, high = run.number("seconds"), run.number("peak_memory_bytes"), *run.ranks
    cards = [
        _card(
            *("Stored bytes", "stored_bytes", totals.stored_bytes, format_bytes(totals.stored_bytes)),
            f"{format_percent(totals.ratio)} of {format_bytes(totals.dense_bytes)}",
        ),
        *(_perplexity(evaluation, others) for evaluation in run.evaluations[:2]),
        _card(
            *("Relative error", "rel_error", run.rel_error, format_float(run.rel_error, 3)),
            "root mean square of all weights"
            + (
                f"; worst {format_float(worst.rel_error, 3)}, {safe(worst.name.removesuffix('.weight'))}"
                if worst
                else ""
            ),
        ),
        _card(
            *("Sparsity and rank", "sparsity", run.sparsity, format_percent(run.sparsity)),
            f"of S, with rank {low}" if low == high else f"of S, with ranks {low} to {high}",
        ),
        _card(
            *("Time", "seconds", seconds, "not known" if seconds is None else format_seconds(seconds)),
            _where(run),
        ),
        _card(
            *("Peak memory", "peak_memory_bytes", peak, "not known" if peak is None else format_bytes(int(peak))),
            "resident, of the whole run",
        ),
    ]
    if not run.evaluations:
        note = "give what 'mendlm eval --json' printed with --eval, or a text with --text"
        cards.insert(1, _card("Perplexity", "ppl", None, "not measured", note))
    return cards


def _card(name: str, key: str, value: float | None, text: str, note: str) -> dict[str, Any]:
    return {"name": name, "key": key, "value": None if value is None else _exact(value), "text": text, "note": note}


def _perplexity(evaluation: Evaluation, others: Sequence[Evaluation]) -> dict[str, Any]:
    same = [other for other in others if other.protocol == evaluation.protocol]
    beside = "".join(f"; {safe(Path(other.model).name)} {_ppl(other.ppl)}" for other in same)
    return _card("Perplexity", "ppl", evaluation.ppl, _ppl(evaluation.ppl), f"{safe(evaluation.what)}{beside}")


def _ppl(value: float | None) -> str:
    return "infinite" if value is None else f"{value:,.2f}"


def _where(run: Run) -> str:
    device, threads = run.facts.get("device"), run.number("n_threads")
    shown = [] if device is None else [safe(device)]
    if threads is not None and device == "cpu":
        shown.append(f"{threads:.0f} thread{'s' if threads != 1 else ''}")
    resumed = run.number("resumed")
    if resumed:
        shown.append(f"without {resumed:.0f} tensors of an earlier run")
    return ", ".join(shown) or "no mendlm.run.json"


def _tensor(name: str, detail: TensorDetail) -> dict[str, Any]:
    record = detail.record
    facts = [
        ("shape", format_shape(record.shape)),
        ("kept", f"{record.n_kept:,} ({format_percent(1 - record.sparsity)})"),
        ("rank", str(record.rank)),
        ("relative error", format_float(record.rel_error)),
        *([("output error", format_float(record.rel_output_error))] if record.rel_output_error is not None else []),
        ("iterations", f"{record.n_iter}, {safe(record.status)}"),
        ("stored", f"{format_bytes(record.stored_bytes)} of {format_bytes(record.dense_bytes)}"),
    ]
    spectra = (
        "Spectrum: W − S⁰ is what pruning alone leaves, S⁰ = mask ⊙ W; W − S is what is left with the refined S, which "
        "moves it into the leading singular values, where B @ A takes it up."
        if detail.compared
        else "Spectrum: of what is stored. With --original it is that of W − S before and after."
    )
    convergence = f"Convergence: {detail.trace_note}" if detail.trace_note else ""
    return {
        "id": name,
        "name": safe(record.name),
        "facts": facts,
        "figures": figures.tensor_figures(detail),
        "note": f"{spectra} {convergence}".strip(),
    }


def _tensors_note(details: Sequence[TensorDetail]) -> str:
    if not details:
        return ""
    return (
        f"{len(details)} weight{'s are' if len(details) != 1 else ' is'} shown in detail; --tensor NAME chooses others."
    )


def _calibration(run: Run) -> list[tuple[str, str]]:
    facts = [
        (str(key), safe(value)) for key, value in (run.manifest.calibration or {}).items() if value not in (None, [])
    ]
    blocks = run.manifest.matching
    if blocks:
        improved = sum(block.status == "improved" for block in blocks)
        facts.append(("matched blocks", f"{improved} of {len(blocks)} improved"))
        facts.append(("steps", ", ".join(map(str, sorted({block.n_steps for block in blocks})))))
        facts.append(("windows", f"{blocks[0].n_windows} to tune on, {blocks[0].n_held_out} held out"))
    return facts


_ALL_COLUMNS = (
    Column("weight", "name", False),
    Column("shape", "shape"),
    Column("kept", "n_kept"),
    Column("sparsity", "sparsity"),
    Column("rank", "rank"),
    Column("rel. error", "rel_error"),
    Column("output error", "rel_output_error"),
    Column("iterations", "n_iter"),
    Column("dense", "dense_bytes"),
    Column("stored", "stored_bytes"),
)
_FORMATS = {
    "n_kept": lambda value: f"{value:,}",
    "sparsity": format_percent,
    "rel_error": format_float,
    "rel_output_error": format_float,
    "dense_bytes": format_bytes,
    "stored_bytes": format_bytes,
}


def _columns(records: Sequence[TensorRecord]) -> list[Column]:
    calibrated = any(record.rel_output_error is not None for record in records)
    return [column for column in _ALL_COLUMNS if calibrated or column.key != "rel_output_error"]


def _row(record: TensorRecord, columns: Sequence[Column]) -> list[Cell]:
    cells = []
    for column in columns:
        value = getattr(record, column.key)
        if column.key == "shape":
            cells.append(Cell(format_shape(value), value[0] * value[1]))
        else:
            cells.append(_known(value, _FORMATS.get(column.key, str)))
    return cells


def _exact(value: Any) -> str:
    """A value as JSON has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _compared(content: Content, pareto: Figure | None) -> dict[str, Any] | None:
    """The table of all models; None for one run alone."""
    if len(content.runs) + len(content.sweeps) + len(content.others) < 2:
        return None
    columns = [
        Column("model", "label", False),
        Column("stored", "stored_bytes"),
        Column("of dense", "ratio"),
        Column("sparsity", "sparsity"),
        Column("rank", "rank", False),
        Column("rel. error", "rel_error"),
        Column("perplexity", "ppl"),
        Column("of what", "text", False),
        Column("time", "seconds"),
        Column("peak memory", "peak_memory_bytes"),
    ]
    rows = [_run_row(run) for run in content.runs]
    rows += [_sweep_row(record) for record in content.sweeps]
    dense = {point.label: point.stored_bytes for point in content.dense}
    rows += [_other_row(evaluation, dense.get(Path(evaluation.model).name)) for evaluation in content.others]
    told = [i for i in range(len(columns)) if any(row[i].text not in ("", "–") for row in rows)]
    columns, rows = [columns[i] for i in told], [[row[i] for i in told] for row in rows]
    caption = "Models side by side; relative errors are root mean squares (of sweeps: means) over the weights."
    return {"columns": columns, "rows": rows, "caption": caption, "pareto": pareto}


def _run_row(run: Run) -> list[Cell]:
    totals, (low, high) = run.manifest.totals, run.ranks
    first = run.evaluations[0] if run.evaluations else None
    peak = run.number("peak_memory_bytes")
    return [
        Cell(safe(run.label), run.label),
        _known(totals.stored_bytes, format_bytes),
        _known(totals.ratio, format_percent),
        _known(run.sparsity, format_percent),
        Cell(str(low) if low == high else f"{low}–{high}", high),
        _known(run.rel_error, format_float),
        *_ppl_cells(first),
        _known(run.number("seconds"), format_seconds),
        _known(None if peak is None else int(peak), format_bytes),
    ]


def _ppl_cells(evaluation: Evaluation | None) -> list[Cell]:
    if evaluation is None:
        return [BLANK, Cell("")]
    value = "" if evaluation.ppl is None else _exact(evaluation.ppl)
    return [Cell(_ppl(evaluation.ppl), value), Cell(safe(evaluation.what), evaluation.what)]


def _sweep_row(record: SweepRecord) -> list[Cell]:
    name = Cell(safe(record.name), record.name)
    if record.status != "done":
        return [name, *[BLANK] * 5, Cell("failed"), Cell(safe(record.error or "")), BLANK, BLANK]
    asked = record.evaluation
    what = f"{asked.get('text', '')}, {asked.get('n_windows', '?')} × {asked.get('seqlen', '?')} tokens"
    return [
        name,
        _known(record.stored_bytes, format_bytes),
        _known(record.ratio, format_percent),
        BLANK,
        BLANK,
        _known(record.mean_rel_error, format_float),
        _known(record.ppl, "{:,.2f}".format),
        Cell(safe(what), what),
        _known(record.seconds or None, format_seconds),
        _known(record.peak_memory_bytes, format_bytes),
    ]


def _other_row(evaluation: Evaluation, dense_bytes: int | None) -> list[Cell]:
    name = Path(evaluation.model).name
    return [
        Cell(safe(name), name),
        _known(dense_bytes, format_bytes),
        _known(None if dense_bytes is None else 1, format_percent),
        *[BLANK] * 3,
        *_ppl_cells(evaluation),
        BLANK,
        BLANK,
    ]


def _yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).rstrip()


def _versions(run: Run) -> list[tuple[str, str]]:
    facts = [("mendlm", run.manifest.mendlm_version), *run.manifest.versions.items()]
    facts += [(key, run.facts[key]) for key in ("device", "n_threads", "started_at") if key in run.facts]
    return [(safe(name), safe(value)) for name, value in facts]


def _files(run: Run) -> list[dict[str, str]]:
    return [
        {
            "name": safe(name),
            "of": of,
            "size": f"{entry['size_bytes']:,}",
            "sha256": safe(entry["sha256"]),
        }
        for of, files in (("original", run.manifest.inputs), ("compressed", run.manifest.outputs))
        for name, entry in files.items()
    ]


def _variables() -> dict[str, str]:
    return {name: f"var(--{name})" for name in plotting.LIGHT}


def _style() -> Any:
    """The style sheet, with the colours of the charts as variables: light, dark by the system or by the button."""
    light, dark = (
        ";".join(f"--{name}:{value}" for name, value in colours.items()) for colours in (plotting.LIGHT, plotting.DARK)
    )
    variables = (
        f":root{{color-scheme:light;{light}}}"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}"
        f"@media print{{:root:root:root{{color-scheme:light;{light}}}}}"
    )
    return _safe_html(f"{variables}\n{_file('page.css')}")


def _json(value: Any) -> Any:
    r"""JSON that is inert inside of a script element: `<`, `>` and `&` as ``\u003c`` and so on."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _safe_html(text)


def _policy(*scripts: Any) -> str:
    """Nothing from anywhere, and no script but ours."""
    hashes = " ".join(f"'sha256-{_digest(str(script))}'" for script in scripts)
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {hashes}; {rest}"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _file(name: str) -> Any:
    return _safe_html((resources.files("mendlm.report") / "template" / name).read_text(encoding="utf-8"))


@cache
def _library() -> Any:
    """Vega, Vega-Lite and Vega-Embed as one script, kept in the user's cache: bundling takes some seconds."""
    convert = plotting.vl_convert()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mendlm"
    file = home / f"vega-{convert.__version__}-{convert.get_vega_version()}.js"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = file.read_text(encoding="utf-8")
        if text.endswith("\n"):  # written to its end
            return _safe_html(text)
    bundle = (
        convert.javascript_bundle().replace("\r\n", "\n").replace("</script", r"<\/script").replace("<!--", r"\x3c!--")
    )
    with contextlib.suppress(OSError):  # a cache is no need
        home.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        partial.write_text(f"{bundle}\n", encoding="utf-8")
        partial.replace(file)
    return _safe_html(f"{bundle}\n")


def _template() -> Any:
    jinja = _jinja()
    environment = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined)
    return environment.from_string(str(_file("page.html")))


def _safe_html(text: str) -> Any:
    """Text of our own that is not to be escaped."""
    return _jinja().utils.markupsafe.Markup(text)


def _jinja() -> Any:
    try:
        import jinja2
        import jinja2.utils
    except ImportError as err:
        raise MissingDependencyError("a report needs jinja2. Run: pip install 'mendlm[plot]'.") from err
    return jinja2
