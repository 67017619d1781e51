"""The report in a real browser: it draws, switches, sorts, works by keyboard, and asks no network for anything."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mendlm
from mendlm import NM, Recipe, Unstructured
from mendlm.report._report import report
from mendlm.report.records import read_manifest
from test_report import HOSTILE, hostile

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found = None
    if found is None:
        reason = f"there is no playwright, or none of {', '.join(NAMES)}"
        if os.environ.get("MENDLM_REQUIRE_BROWSER") == "1":
            pytest.fail(f"MENDLM_REQUIRE_BROWSER is set, and {reason}")
        pytest.skip(reason)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def folders(tiny_llama: Path) -> list[Path]:
    """Two runs; the first has a weight whose name is a script."""
    made = tiny_llama.parent / "browser-made"
    mendlm.compress(tiny_llama, made, Recipe(pattern=Unstructured(0.5), rank=4, n_iter=6))
    two_four = tiny_llama.parent / "browser-two-four"
    mendlm.compress(tiny_llama, two_four, Recipe(pattern=NM(2, 4), rank=2, n_iter=3))
    return [hostile(made, tiny_llama.parent / "browser-fifty"), two_four]


@pytest.fixture(scope="module")
def path(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("browser") / "report.html"
    report(folders, file)
    return file


class _Open:
    """The page in a fresh profile, and all that went wrong in it."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1180, "height": 900}} | options))
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.messages.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]", timeout=120_000)


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[_Open]:
    one = _Open(browser, path)
    yield one
    assert one.messages == []
    assert one.requests == [path.as_uri()]
    one.context.close()


def marks(page: Any, chart: str, kind: str = "path") -> int:
    count: int = page.locator(
        f'[data-chart="{chart}"] svg .mark-{kind} path, [data-chart="{chart}"] svg .mark-{kind} line'
    ).count()
    return count


def line(page: Any, chart: str) -> str:
    """The path of the first line of a chart."""
    drawn: str = page.locator(f'[data-chart="{chart}"] svg .mark-line path').first.get_attribute("d")
    return drawn


def test_everything_that_is_shown_is_drawn(opened: _Open) -> None:
    page = opened.page
    for chart in ("pareto", "run0-heat-rel-error-chart", "run0-by-layer", "run0-tensor0-spectrum", "run0-tensor0-mask"):
        assert page.locator(f'[data-chart="{chart}"]').get_attribute("data-drawn") == "yes", chart
    assert marks(page, "run0-heat-rel-error-chart", "rect") >= 14
    assert marks(page, "run0-tensor0-mask", "rect") > 500
    assert marks(page, "run0-tensor0-spectrum", "line") == 3
    milliseconds = page.evaluate("performance.getEntriesByName('drawn')[0].startTime")
    print(f"drawn {milliseconds:.0f} ms after the navigation began")  # noqa: T201 - a figure for the log
    folder = ROOT / "work" / "report-screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / "light.png", full_page=True)


def test_a_weight_from_the_menu_changes_the_spectrum(opened: _Open) -> None:
    page = opened.page
    before = line(page, "run0-tensor0-spectrum")
    page.get_by_label("Weight", exact=True).first.select_option(label="model.layers.1.mlp.gate_proj.weight")
    page.wait_for_selector('[data-chart="run0-tensor1-spectrum"][data-drawn]')
    assert not page.locator("#run0-tensor0").is_visible()
    assert line(page, "run0-tensor1-spectrum") != before
    assert "model.layers.1.mlp.gate_proj" in page.locator("#run0-tensor1-spectrum-words").inner_text()
    assert page.locator("#status").inner_text() == "Showing model.layers.1.mlp.gate_proj.weight."


def test_the_heat_map_switches(opened: _Open) -> None:
    page = opened.page
    page.get_by_label("Heat map of").first.select_option(label="rank")
    page.wait_for_selector('[data-chart="run0-heat-rank-chart"][data-drawn]')
    assert page.locator("#run0-heat-rank").is_visible()
    assert not page.locator("#run0-heat-rel-error").is_visible()


def test_the_table_sorts_with_the_exact_values(opened: _Open, folders: list[Path]) -> None:
    page = opened.page
    errors = sorted(record.rel_error for record in read_manifest(folders[0]).records)
    column = page.locator("#run0-weights thead th", has_text="rel. error")

    def shown() -> list[float]:
        return [
            float(v)
            for v in page.locator("#run0-weights td[data-key=rel_error]").evaluate_all(
                "c => c.map(x => x.dataset.value)"
            )
        ]

    column.get_by_role("button").click()
    assert column.get_attribute("aria-sort") == "descending"
    assert shown() == errors[::-1]
    column.get_by_role("button").press("Enter")  # by keyboard, the other way round
    assert column.get_attribute("aria-sort") == "ascending"
    assert shown() == errors
    assert page.locator("#run0-weights th[aria-sort]").count() == 1
    page.get_by_label("Filter by name").first.fill("layers.0 down")
    assert page.locator("#run0-weights tbody tr:visible").count() == 1


def test_the_runs_switch(opened: _Open) -> None:
    page = opened.page
    page.get_by_label("Run in detail").select_option(label="browser-two-four")
    page.wait_for_selector('[data-chart="run1-tensor0-spectrum"][data-drawn]')
    assert not page.locator("#run0").is_visible()
    assert page.locator("#run1").is_visible()


def test_a_name_with_html_in_it_is_text(opened: _Open) -> None:
    page = opened.page
    page.get_by_label("Weight", exact=True).first.select_option(label=HOSTILE)
    assert HOSTILE in page.locator("#run0-weights tbody").inner_text()
    assert page.locator("script").count() == 3


def test_dark_colours(opened: _Open) -> None:
    page = opened.page
    paper = "getComputedStyle(document.body).backgroundColor"
    words = "getComputedStyle(document.querySelector('[data-chart=run0-by-layer] .role-axis-title text')).fill"
    light = page.evaluate(paper), page.evaluate(words)
    assert light == ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
    page.get_by_role("button", name="Dark colours").click()
    assert (page.evaluate(paper), page.evaluate(words)) == ("rgb(20, 24, 29)", "rgb(232, 235, 238)")
    assert page.get_by_role("button", name="Dark colours").get_attribute("aria-pressed") == "true"
    page.screenshot(path=ROOT / "work" / "report-screenshots" / "dark.png", full_page=True)
    page.emulate_media(media="print")  # paper is white
    assert (page.evaluate(paper), page.evaluate(words)) == light


def test_colours_have_contrast() -> None:
    from mendlm.plotting import DARK, LIGHT, SERIES

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colours in (LIGHT, DARK):
        paper = luminance(colours["paper"])
        for name, least in {"ink": 4.5, "quiet": 4.5, **dict.fromkeys(SERIES, 3.0)}.items():
            high, low = sorted((paper, luminance(colours[name])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= least, (name, colours[name])


def test_by_keyboard_and_for_screen_readers(opened: _Open) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    seen = []
    for _ in range(40):
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert {"run", "run0-quantity", "run0-tensor", "run0-filter"} <= set(seen)
    page.locator("#run0-quantity").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#run0-heat-rank:visible")
    # Every menu and field has a label, every table a caption, every chart a title and words.
    assert page.evaluate("[...document.querySelectorAll('select,input')].every(e => e.labels.length === 1)")
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.caption && t.caption.textContent)")
    named = """[...document.querySelectorAll('[role=img]')].every(e => ['aria-labelledby', 'aria-describedby'].every(
        a => document.getElementById(e.getAttribute(a)).textContent.length > 3))"""
    assert page.evaluate(named)
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    # vega numbers the gradients of its legends by itself
    own = [name for name in ids if not re.match(r"(gradient|clip)", name)]
    assert len(own) == len(set(own))


def test_a_narrow_window(browser: Any, path: Path) -> None:
    one = _Open(browser, path, viewport={"width": 390, "height": 800}, color_scheme="dark")
    assert one.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert one.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    one.page.screenshot(path=ROOT / "work" / "report-screenshots" / "narrow.png", full_page=True)
    assert one.messages == []
    one.context.close()
