"""The pages: links lead somewhere, the site builds and loads nothing from elsewhere, examples that stand alone run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import mendlm
from mendlm import Recipe
from mendlm.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Made from the code when the site is built.
GENERATED = {ROOT / "docs" / "reference" / "cli.md", ROOT / "docs" / "reference" / "python.md"}


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        if linked in GENERATED:
            continue
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


class Links(HTMLParser):
    """Where a built page leads, what it loads, and what can be linked to in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.page, self.links, self.loaded, self.ids = page, set[str](), set[str](), set[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.ids |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loaded.add(given["src"])
        elif tag == "link" and given.get("rel") != "canonical" and "href" in given:
            self.loaded.add(given["href"])


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    # Not --quiet: mkdocs then does not count warnings, and --strict lets everything pass.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.slow
def test_the_built_site_has_no_dead_link_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 20
    dead = []
    for page, found in pages.items():
        assert not {url for url in found.loaded if urlsplit(url).netloc}, page
        for url in found.links | found.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                dead.append(f"{page.name}: {url}")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in pages[target].ids:
                dead.append(f"{page.name}: {url}")
    assert not [link for link in dead if "__" not in link]  # "__…" are the theme's own switches


@pytest.mark.slow
def test_the_site_documents_every_public_name_and_every_command(site: Path) -> None:
    from mendlm.cli._app import build_command

    names = Links(site / "reference" / "python.html").ids
    assert {f"mendlm.{name}" for name in mendlm.__all__} <= names
    assert set(build_command().commands) <= Links(site / "reference" / "cli.html").ids
    assert "<math" in (site / "refiners.html").read_text(encoding="utf-8")
    every = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))
    assert "arithmatex" not in every
    formulas = re.findall(r"<math.*?</math>", every, flags=re.DOTALL)
    assert not [formula for formula in formulas if re.search(r">(&<|&amp;|\\)", formula)]


@pytest.mark.slow
@pytest.mark.parametrize("link", ["missing.md", "index.md#missing"])
def test_a_dead_link_fails_the_build(tmp_path: Path, link: str) -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n[somewhere]({link})\n")
    kept = {key: settings[key] for key in ("site_name", "strict", "validation")}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(kept))
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode != 0
    assert "missing" in built.stdout + built.stderr


def test_the_refiner_example_runs() -> None:
    names: dict[str, object] = {}
    exec(python_blocks(ROOT / "docs" / "refiners.md")[0], names)
    out = names["out"]
    assert isinstance(out, mendlm.Refinement)
    assert out.A.shape == (16, 384)


def test_the_format_example_reads_a_folder(tiny_llama: Path, tmp_path: Path) -> None:
    mendlm.compress(tiny_llama, tmp_path / "out", Recipe(rank=4, n_iter=5))
    names: dict[str, object] = {}
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(python_blocks(ROOT / "docs" / "format.md")[0], names)
    finally:
        os.chdir(here)
    weight = mendlm.load(tmp_path / "out").get_submodule("model.layers.0.mlp.up_proj").weight
    assert abs(names["W"] - weight.detach().numpy()).max() < 1e-6  # type: ignore[operator]


def paper_commands() -> list[list[str]]:
    """The runs that docs/paper.md asks someone with LLaMA-7B and a GPU for."""
    lines = (ROOT / "docs" / "paper.md").read_text().splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mendlm compress ")]


@pytest.mark.parametrize("command", paper_commands(), ids=lambda command: command[2])
def test_commands_of_the_paper_are_understood(
    command: list[str], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = [{"LLaMA-7B": str(tiny_llama), "cuda": "cpu", "128": "4"}.get(word, word) for word in command]
    here[2] = str(tmp_path / here[2])
    assert main([*here, "--dry-run"]) == 0
    assert "14 of 20 to compress" in capsys.readouterr().out
