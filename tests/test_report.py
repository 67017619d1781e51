"""The report: every figure on the page against mendlm.json and an oracle, what goes in, and what is refused."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mendlm
from mendlm import NM, Recipe, Unstructured
from mendlm.cli import main
from mendlm.errors import CheckpointError, NonFiniteError, UsageError
from mendlm.evaluation.printed import read_evaluations
from mendlm.families import place_of, short_names
from mendlm.report import ReportResult
from mendlm.report._figures import Point, pareto
from mendlm.report._report import report
from mendlm.report._tensors import PRUNED, REFINED, TAIL, Details, Original, choose
from mendlm.report.records import read_manifest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

QUERY = "model.layers.1.self_attn.q_proj.weight"
HOSTILE = "model.layers.1.</script><script>alert(1)</script>.weight"


@pytest.fixture(scope="module")
def fifty(tiny_llama: Path) -> Path:
    out = tiny_llama.parent / "report-fifty"
    mendlm.compress(tiny_llama, out, Recipe(pattern=Unstructured(0.5), rank=4, n_iter=12))
    return out


@pytest.fixture(scope="module")
def two_four(tiny_llama: Path) -> Path:
    """Calibrated and matched."""
    text = tiny_llama.parent / "report-text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    calibration = {"source": str(text), "n_sequences": 4, "seqlen": 32}
    out = tiny_llama.parent / "report-two-four"
    recipe = Recipe(pattern=NM(2, 4), rank=2, n_iter=4, criterion="wanda", calibration=calibration, match_blocks=2)
    mendlm.compress(tiny_llama, out, recipe)
    return out


@pytest.fixture(scope="module")
def page(fifty: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(fifty, path, original=tiny_llama)
    return path


class _Page(HTMLParser):
    """Elements as (tag, attributes, text up to the next tag), and what is in scripts by their id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.elements[-1][2].append(data)

    def find(self, tag: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attrs, "".join(text))
            for name, attrs, text in self.elements
            if name == tag and all(attrs.get(key.replace("_", "-")) == value for key, value in wanted.items())
        ]


def parsed(path: Path) -> _Page:
    return _Page(path.read_text(encoding="utf-8"))


def charts(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(parsed(path).find("script", id="charts")[0][1])["charts"]
    return found


def rows_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    data = spec["data"] if "data" in spec else spec["layer"][0]["data"]
    values: list[dict[str, Any]] = data["values"]
    return values


def test_the_table_holds_the_values_of_the_records(page: Path, fifty: Path) -> None:
    records = json.loads((fifty / "mendlm.json").read_text())["records"]
    names = [attrs["data-value"] for attrs, _ in parsed(page).find("th", scope="row") if "data-value" in attrs]
    assert names == [record["name"] for record in records]
    for key in ("n_kept", "sparsity", "rank", "rel_error", "n_iter", "dense_bytes", "stored_bytes"):
        shown = [json.loads(attrs["data-value"] or "") for attrs, _ in parsed(page).find("td", data_key=key)]
        assert shown == [record[key] for record in records], key


def test_the_headline_is_that_of_the_run(page: Path, fifty: Path) -> None:
    manifest, facts = (json.loads((fifty / name).read_text()) for name in ("mendlm.json", "mendlm.run.json"))
    cards = {attrs["data-key"]: float(attrs["value"] or "") for attrs, _ in parsed(page).find("data")}
    errors = np.array([record["rel_error"] for record in manifest["records"]])
    assert cards["stored_bytes"] == manifest["totals"]["stored_bytes"]
    assert cards["seconds"] == facts["seconds"]
    assert cards["peak_memory_bytes"] == facts["peak_memory_bytes"]
    assert cards["rel_error"] == pytest.approx(np.sqrt((errors**2).mean()))
    assert cards["sparsity"] == pytest.approx(0.5)


def test_recipe_versions_and_hashes_are_shown(page: Path, fifty: Path) -> None:
    manifest = json.loads((fifty / "mendlm.json").read_text())
    text = page.read_text()
    assert yaml.safe_load(parsed(page).find("pre")[0][1]) == manifest["recipe"]
    for file in [*manifest["inputs"].values(), *manifest["outputs"].values()]:
        assert f"<code>{file['sha256']}</code>" in text
    for version in manifest["versions"].values():
        assert f"<dd>{version}</dd>" in text


def test_heat_maps_hold_the_records(page: Path, fifty: Path) -> None:
    records = {record.name: record for record in read_manifest(fifty).records}
    for key, field in (("rel-error", "rel_error"), ("rank", "rank"), ("sparsity", "sparsity")):
        cells = rows_of(charts(page)[f"run0-heat-{key}-chart"])
        assert len(cells) == len(records)
        for cell in cells:
            name = next(n for n in records if f".{cell['layer']}." in n and f".{cell['projection']}." in n)
            assert cell["value"] == pytest.approx(getattr(records[name], field), rel=1e-4)


def test_every_chart_is_valid_and_has_words(page: Path) -> None:
    import altair as alt

    found, elements = charts(page), parsed(page)
    assert len(found) == 4 + 3 * 7
    assert all(attrs["data-chart"] in found for attrs, _ in elements.find("div", role="img"))
    for name, spec in found.items():
        words = elements.find("figcaption", id=f"{name}-words")[0][1]
        assert re.search(r"\d", words), name
        if "tensor" not in name or "tensor0" in name:
            assert rows_of(spec), name
            del rows_of(spec)[2:]  # the schema is slow on long lists
            (alt.LayerChart if "layer" in spec else alt.Chart).from_dict(spec)


def test_spectra_are_those_of_W_minus_S(fifty: Path, tiny_llama: Path) -> None:
    from mendlm.report._runs import read_runs

    run = read_runs([fifty])[0]
    record = next(r for r in run.manifest.records if r.name == QUERY)
    detail = Details(run, Original(tiny_llama)).of(record)
    stored = load_file(fifty / "model.safetensors")
    stem = QUERY.removesuffix("weight")
    W = load_file(tiny_llama / "model.safetensors")[QUERY].double().numpy()
    bits = stored[f"{stem}weight_bitmask"].numpy()
    mask = np.unpackbits(bits, axis=1, bitorder="little")[:, : W.shape[1]].astype(bool)
    S = np.zeros_like(W)
    S[mask] = stored[f"{stem}weight_values"].double().numpy()
    for part, M in ((PRUNED, W * ~mask), (REFINED, W - S)):
        sigma = np.linalg.svd(M, compute_uv=False)
        assert [i for i, _ in detail.spectra[part]] == list(range(1, len(sigma) + 1))
        np.testing.assert_allclose([s for _, s in detail.spectra[part]], sigma, rtol=1e-4, atol=1e-5)
        assert detail.energy[part] == pytest.approx((sigma[:4] ** 2).sum() / (sigma**2).sum(), rel=1e-4)
    assert detail.tile == ["".join("01"[int(bit)] for bit in row) for row in mask[:64, :64]]


def test_the_trace_is_that_of_the_run(fifty: Path, tiny_llama: Path) -> None:
    """‖L − L_k‖ starts where a zero-shot SVD ends and falls to what Algorithm 1 leaves, by a float64 oracle."""
    from mendlm.report._runs import read_runs

    run = read_runs([fifty])[0]
    record = next(r for r in run.manifest.records if r.name == QUERY)
    detail = Details(run, Original(tiny_llama)).of(record)
    tails = [value for _, norm, value in detail.trace if norm == TAIL]
    objectives = [value for _, norm, value in detail.trace if norm != TAIL]
    W = load_file(tiny_llama / "model.safetensors")[QUERY].double().numpy()
    mask = mendlm.select_mask(torch.from_numpy(W).float(), "magnitude", Unstructured(0.5)).numpy()
    S, expected = W * mask, []
    for t in range(13):
        U, sigma, Vh = np.linalg.svd(W - S, full_matrices=False)
        expected.append(np.sqrt((sigma[4:] ** 2).sum()))
        r = 1 + (4 - 1) * t // 11
        S = mask * (W - (U[:, :r] * sigma[:r]) @ Vh[:r])
    # The subspace solver's triplets are approximate: the norms agree to a few percent, the first to less.
    assert tails[0] == pytest.approx(expected[0], rel=0.02)
    np.testing.assert_allclose(tails, expected, rtol=0.03)
    assert len(objectives) == record.n_iter
    assert "Recomputed from the original" in detail.trace_note
    assert record.objective == pytest.approx(objectives[-1], rel=0.02)


def test_without_the_original_it_says_so(fifty: Path, tmp_path: Path) -> None:
    report(fifty, tmp_path / "r.html", tensors=[QUERY])
    text, found = (tmp_path / "r.html").read_text(), charts(tmp_path / "r.html")
    assert "Spectrum: of what is stored. With --original it is that of W − S before and after." in text
    assert "run0-tensor0-convergence" not in found
    parts = {row["part"] for row in rows_of(found["run0-tensor0-spectrum"])}
    assert parts == {"S + B @ A, what is stored", "S", "B @ A"}


def test_a_calibrated_run(two_four: Path, tiny_llama: Path, tmp_path: Path) -> None:
    report(two_four, tmp_path / "r.html", original=tiny_llama, tensors=[QUERY.removesuffix(".weight")])
    text, found = (tmp_path / "r.html").read_text(), charts(tmp_path / "r.html")
    manifest = json.loads((two_four / "mendlm.json").read_text())
    assert "the trace depends on activations that were not kept" in text
    assert manifest["calibration"]["token_ids_sha256"] in text
    values = {(r["block"], r["when"]): r["value"] for r in rows_of(found["run0-matching"])}
    for block in manifest["matching"]:
        assert values[block["block"], "before"] == pytest.approx(block["loss_before"], rel=1e-4)
        assert values[block["block"], "after"] == pytest.approx(block["loss_after"], rel=1e-4)
    shown = [
        json.loads(a["data-value"] or "")
        for a, _ in parsed(tmp_path / "r.html").find("td", data_key="rel_output_error")
    ]
    assert shown == [record["rel_output_error"] for record in manifest["records"]]


def test_several_runs_and_their_perplexities(
    fifty: Path, two_four: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny_llama.parent / "report-text.txt"
    files = []
    for folder in (fifty, tiny_llama):
        assert main(["eval", str(folder), "--text", str(text), "--n-windows", "2", "--json"]) == 0
        files.append(tmp_path / f"{folder.name}.json")
        files[-1].write_text(capsys.readouterr().out)
    out = tmp_path / "r.html"
    result = report([fifty, two_four], out, original=tiny_llama, evaluations=files, tensors=[QUERY])
    assert result.runs == ("report-fifty", "report-two-four")
    ppl = json.loads(files[0].read_text())["ppl"]
    cards = [float(attrs["value"] or "") for attrs, _ in parsed(out).find("data", data_key="ppl")]
    assert cards == [ppl]
    # One run has no perplexity: the plot compares what all have.
    assert charts(out)["pareto"]["layer"][0]["encoding"]["y"]["title"] == "relative error"

    measured = report(
        [fifty, two_four], out, original=tiny_llama, text=text, n_windows=2, tensors=[QUERY], overwrite=True
    )
    assert measured.n_bytes == out.stat().st_size
    spec = charts(out)["pareto"]
    assert spec["layer"][0]["encoding"]["y"]["title"] == "perplexity"
    points = {row["label"]: row for row in spec["data"]["values"]}
    assert set(points) == {"report-fifty", "report-two-four", tiny_llama.name}
    assert points["report-fifty"]["value"] == pytest.approx(ppl, rel=1e-4)
    assert points["report-fifty"]["mb"] == pytest.approx(read_manifest(fifty).totals.stored_bytes / 1e6, rel=1e-4)


def test_perplexities_of_different_texts_are_not_compared(fifty: Path, tiny_llama: Path, tmp_path: Path) -> None:
    other = shutil.copytree(fifty, tmp_path / "other")

    def printed(name: str, folder: Path, ppl: float, sha256: str) -> Path:
        protocol = {"model": str(folder), "text": "/x/test.txt", "text_sha256": sha256, "dtype": "float32"}
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"ppl": ppl, "n_windows": 2, "seqlen": 64, "protocol": protocol}))
        return file

    files = [
        printed("dense-b", tiny_llama, 30.0, "b"),
        printed("dense-a", tiny_llama, 10.0, "a"),
        printed("fifty-a", fifty, 20.0, "a"),
        printed("other-b", other, 40.0, "b"),
    ]
    out = tmp_path / "r.html"
    report([fifty, other], out, original=tiny_llama, evaluations=files, tensors=[QUERY])
    notes = [text for _, text in parsed(out).find("dd") if "test.txt" in text]
    assert [(f"{tiny_llama.name} 10.00" in note, f"{tiny_llama.name} 30.00" in note) for note in notes] == [
        (True, False),
        (False, True),
    ]
    assert charts(out)["pareto"]["layer"][0]["encoding"]["y"]["title"] == "relative error"

    files.append(printed("other-a", other, 25.0, "a"))  # now both have this one, though it is not the first of `other`
    report([fifty, other], out, original=tiny_llama, evaluations=files, tensors=[QUERY], overwrite=True)
    points = {row["label"]: row["value"] for row in charts(out)["pareto"]["data"]["values"]}
    assert points == {fifty.name: 20.0, "other": 25.0, tiny_llama.name: 10.0}


def test_a_perplexity_of_a_name_that_two_runs_have_is_of_neither(fifty: Path, tmp_path: Path) -> None:
    outs = [shutil.copytree(fifty, tmp_path / name / "out") for name in ("a", "b")]
    for file, model in (("moved.json", "/elsewhere/out"), ("here.json", str(outs[0]))):
        row = {"ppl": 5.5, "n_windows": 2, "seqlen": 64}
        protocol = {"model": model, "text": "t.txt", "dtype": "float32"}
        (tmp_path / file).write_text(json.dumps(row | {"protocol": protocol}))
    for file, cards in (("moved.json", []), ("here.json", [5.5])):
        out = tmp_path / "r.html"
        report(outs, out, evaluations=[tmp_path / file], tensors=[QUERY], overwrite=True)
        values = [attrs["value"] for attrs, _ in parsed(out).find("data", data_key="ppl")]
        assert [float(value) for value in values if value] == cards
        assert "5.50" in out.read_text(encoding="utf-8")  # it stands beside the runs, if not with one


def test_the_frontier() -> None:
    points = [
        Point(name, "tlr", size, ppl, None) for name, size, ppl in (("a", 10, 9.0), ("b", 20, 9.5), ("c", 30, 5.0))
    ]
    found = pareto(points)
    assert found is not None
    assert {row["label"]: row["best"] for row in found.spec["data"]["values"]} == {"a": True, "b": False, "c": True}
    assert pareto(points[:1]) is None
    equal = pareto([*points, Point("d", "tlr", 30, 5.0, None)])
    assert equal is not None
    assert {row["label"] for row in equal.spec["data"]["values"] if row["best"]} == {"a", "c", "d"}


def test_points_of_a_sweep(tmp_path: Path) -> None:
    from mendlm.sweeping import SweepRecord
    from mendlm.sweeping.records import line_of

    rows = [
        SweepRecord(
            name=f"rank={rank}",
            key=str(rank),
            values={"rank": rank},
            status="done",
            error=None,
            recipe=Recipe(rank=rank).to_dict(),
            recipe_sha256="0",
            inputs_sha256="0",
            evaluation={"text": "t.txt", "n_windows": 2, "seqlen": 64},
            ppl=20.0 - rank,
            dense_bytes=100_000,
            stored_bytes=50_000 + rank,
            mean_rel_error=0.2,
            seconds=1.0,
        )
        for rank in (1, 2)
    ]
    failed = SweepRecord("rank=9", "9", {"rank": 9}, "failed", "rank 9 is too much.", None, None, "0", {})
    file = tmp_path / "sweep.jsonl"
    file.write_bytes(b"".join(map(line_of, [*rows, failed])))
    result = report(tmp_path, tmp_path / "r.html")
    assert result.runs == ()
    points = {row["label"]: row["value"] for row in charts(tmp_path / "r.html")["pareto"]["data"]["values"]}
    assert points == {"rank=1": 19.0, "rank=2": 18.0}
    assert "rank 9 is too much." in (tmp_path / "r.html").read_text()


def test_names_from_files_are_inert(fifty: Path, tmp_path: Path) -> None:
    evil = hostile(fifty, tmp_path / "<b>evil</b>")
    report(evil, tmp_path / "r.html", tensors=[HOSTILE])
    text = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in text
    assert "<b>evil" not in text
    assert text.count("<script") == text.count("</script>") == 3
    assert any(attrs.get("data-value") == HOSTILE for attrs, _ in parsed(tmp_path / "r.html").find("th", scope="row"))


def hostile(folder: Path, target: Path) -> Path:
    """A copy of a compressed folder in which a weight has a name that is a script."""
    shutil.copytree(folder, target)
    old, new = QUERY.removesuffix("weight"), HOSTILE.removesuffix("weight")
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(target / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    manifest = (target / "mendlm.json").read_text().replace(QUERY, HOSTILE)
    (target / "mendlm.json").write_text(manifest)
    return target


def test_the_page_asks_for_nothing_and_is_reproducible(
    page: Path, fifty: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    report(fifty, tmp_path / "again.html", original=tiny_llama)
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
    policy = parsed(page).find("meta", http_equiv="Content-Security-Policy")[0][0]["content"] or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _, _ in parsed(page).elements}
    assert all("src" not in attrs for attrs, _ in parsed(page).find("script"))
    assert page.stat().st_size < 6e6


def test_figures(fifty: Path, tiny_llama: Path, tmp_path: Path) -> None:
    result = report(fifty, tmp_path / "r.html", original=tiny_llama, tensors=[QUERY], figures=tmp_path / "figures")
    names = {file.name for file in result.figures}
    stem = QUERY.removesuffix(".weight")
    wanted = ["heat-rel-error", "heat-rank", "heat-sparsity", "by-layer"]
    wanted += [f"{stem}-{kind}" for kind in ("spectrum", "convergence", "mask")]
    assert names == {f"{name}{ending}" for name in wanted for ending in (".svg", ".png")}
    for file in result.figures:
        head = file.read_bytes()[:4]
        assert head == (b"<svg" if file.suffix == ".svg" else b"\x89PNG")
    with pytest.raises(UsageError, match=r"exists\. Pass --overwrite, or choose another folder for figures"):
        report(fifty, tmp_path / "s.html", tensors=[QUERY], figures=tmp_path / "figures")
    assert not (tmp_path / "s.html").exists()


def test_another_original_is_refused(fifty: Path, make_tiny_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"the relative error is 1\.\d+, mendlm\.json says 0\.\d+: it is not the model"
    ):
        report(fifty, tmp_path / "r.html", original=make_tiny_llama(seed=1))
    with pytest.raises(UsageError, match=r"is not the model that .* was compressed from"):
        report(fifty, tmp_path / "r.html", original=make_tiny_llama(dtype=torch.bfloat16))
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--tensor", "model.layers.0.mlp.up_prj"], 2, "unknown compressed tensor 'model.layers.0.mlp.up_prj'"),
        (["--n-windows", "2"], 2, "--n-windows says how much of --text is measured"),
        (["--eval", "{out}/config.json"], 2, "holds no perplexity"),
        (["--eval", "/nowhere.json"], 2, "cannot read '/nowhere.json': No such file"),
        (["--original", "{out}"], 2, "was already compressed by mendlm"),
        (["-o", "/nowhere/r.html"], 2, "is in a folder that does not exist"),
        (["{out}"], 2, "is given twice"),
        (["{out}/.."], 2, "holds no mendlm.json"),
    ],
)
def test_wrong_use(
    more: list[str], code: int, message: str, fifty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r.html"
    given = [part.format(out=fifty) for part in more]
    assert main(["report", str(fifty), "-o", str(page), *given]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_damaged_folders(fifty: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(fifty, broken)
    manifest = json.loads((broken / "mendlm.json").read_text())
    manifest["records"][0]["name"] = "model.layers.0.mlp.absent.weight"
    (broken / "mendlm.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"lists 'model.layers.0.mlp.absent.weight', which the folder does not"):
        report(broken, tmp_path / "r.html", tensors=["model.layers.0.mlp.absent"])
    (broken / "mendlm.run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"mendlm\.run\.json' is not valid JSON"):
        report(broken, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("compared", [False, True])
def test_damaged_values(compared: bool, fifty: Path, tiny_llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(fifty, broken)
    stored = load_file(broken / "model.safetensors")
    stored[f"{QUERY}_values"][3] = torch.nan
    save_file(stored, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=re.escape(f"'{QUERY}' holds NaN or infinity")):
        report(broken, tmp_path / "r.html", original=tiny_llama if compared else None, tensors=[QUERY])
    assert not (tmp_path / "r.html").exists()


def test_the_command(fifty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "r.html"
    command = ["report", str(fifty), "-o", str(page), "--tensor", QUERY]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["n_bytes"] == page.stat().st_size
    assert document["tensors"] == {"report-fifty": [QUERY]}
    assert f"[1/2] {QUERY} of report-fifty" in printed.err
    assert main(command) == 2
    assert "exists. Pass --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert "1 weight" in capsys.readouterr().out


def test_which_weights_are_shown(fifty: Path) -> None:
    from mendlm.report._runs import read_runs

    run = read_runs([fifty])[0]
    chosen = choose(run, ())
    assert len(chosen) == 7
    assert all(name.startswith("model.layers.1.") for name in chosen)
    assert choose(run, [QUERY, QUERY.removesuffix(".weight")]) == (QUERY,)


def test_places() -> None:
    assert place_of("model.layers.3.mlp.experts.5.down_proj.weight") == (3, "mlp.experts.down_proj")
    assert place_of("transformer.h.0.attn.c_proj.weight") == (0, "attn.c_proj")
    assert place_of("lm_head.weight") == (None, "lm_head.weight")
    assert short_names(["attn.c_proj", "mlp.c_proj", "mlp.c_fc"]) == {
        "attn.c_proj": "attn.c_proj",
        "mlp.c_proj": "mlp.c_proj",
        "mlp.c_fc": "c_fc",
    }


def test_evaluations_in_lists(tmp_path: Path) -> None:
    row = {
        "ppl": None,
        "n_windows": 2,
        "seqlen": 8,
        "protocol": {"model": "/a/m", "text": "/b/t.txt", "dtype": "float32"},
    }
    reference = {"reference": {"kl": 0.5, "perplexity": row | {"ppl": 3.5}}}  # of a comparison
    (tmp_path / "e.json").write_text(json.dumps({"rows": [row | reference, row | {"ppl": 3.5}]}))
    found = read_evaluations([tmp_path / "e.json"])
    assert [(e.model, e.text, e.ppl) for e in found] == [("/a/m", "t.txt", None), ("/a/m", "t.txt", 3.5)]


def test_public_names() -> None:
    assert callable(mendlm.report)
    assert mendlm.ReportResult is ReportResult
    importlib.import_module("mendlm.report.records")  # puts the package under the name: it can be called as well
    assert callable(mendlm.report)
    with pytest.raises(UsageError, match="there is nothing to report on"):
        mendlm.report([])
