"""The pages: links lead somewhere, and the examples that stand alone run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import mendlm
from mendlm import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


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
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


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
