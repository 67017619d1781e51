"""`~` is the home folder wherever a path is given: shells leave it in `--output=~/x`, and Python always does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import mendlm
from mendlm import NM, TLR, Recipe
from mendlm.checkpoints.staging import check_target
from mendlm.cli import main
from mendlm.errors import MendError, UsageError
from mendlm.paths import local_path

RECIPE = Recipe(pattern=NM(2, 4), refiner=TLR(rank=2, n_iter=3))


@pytest.fixture
def home(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a dense model; the current folder is another one and must stay empty."""
    home, current = tmp_path / "home", tmp_path / "current"
    current.mkdir()
    shutil.copytree(tiny_llama, home / "model")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(current)
    return home


def test_local_path(home: Path) -> None:
    assert local_path("~/a/b") == local_path(Path("~/a/b")) == home / "a" / "b"
    assert local_path("~") == home
    assert local_path("a/~/b") == Path("a/~/b")
    assert local_path("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")


def test_folders_that_are_written_and_read(home: Path) -> None:
    result = mendlm.compress("~/model", "~/out", RECIPE)
    assert result.out == home / "out"
    with pytest.raises(UsageError, match="not empty"):
        mendlm.compress("~/model", "~/out", RECIPE)
    assert mendlm.verify("~/out", original="~/model").ok
    assert main(["inspect", "~/out", "--tensor", "model.layers.0.mlp.up_proj"]) == 0
    exported = mendlm.export("~/out", "~/deep/dest", "peft")
    assert exported.path == home / "deep" / "dest"
    adapter = json.loads((home / "deep" / "dest" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(home / "deep" / "dest" / "base")
    assert check_target("~/sweep", home / "model") == home / "sweep"
    with pytest.raises(UsageError, match="holds MODEL"):
        check_target("~", home / "model")
    assert not list(Path.cwd().iterdir())


def test_files_that_are_written_and_read(home: Path) -> None:
    (home / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    assert main(["eval", "~/model", "--text", "~/text.txt", "--seqlen", "16", "--n-windows", "1"]) == 0
    more = ["--rank-step", "8", "--n-iter", "2", "--curves", "~/curves.json", "--output", "~/budget.yaml"]
    assert main(["plan", "~/model", "--target-rank-bytes", "0.1", *more, "--plot", "~/budget.svg"]) == 0
    assert main(["compress", "~/model", "~/out", "--recipe", "~/budget.yaml"]) == 0
    page = mendlm.report("~/out", "~/page.html", original="~/model", figures="~/figures")
    assert page.path == home / "page.html"
    names = {path.name for path in home.glob("[!.]*")}  # not .cache
    assert names == {"model", "text.txt", "curves.json", "budget.yaml", "budget.svg", "out", "page.html", "figures"}
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "read",
    [
        lambda: mendlm.import_gguf("~/none", "~/dest"),
        lambda: mendlm.export("~/none", "~/dest"),
        lambda: mendlm.verify("~/none"),
    ],
)
def test_messages_name_the_whole_path(home: Path, read: Callable[[], object]) -> None:
    with pytest.raises(MendError, match=str(home / "none")):
        read()
    assert not list(Path.cwd().iterdir())
