"""The command line in real processes: what is printed where, exit codes, Ctrl-C and --resume."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import mendlm
from mendlm.checkpoints.staging import has_partial
from mendlm.cli import main
from mendlm.cli._app import build_command
from mendlm.cli._console import format_bytes, print_json
from mendlm.cli._errors import Session, run
from mendlm.cli._progress import _Lines
from mendlm.cli.compress import Zeros, resolve_recipe
from mendlm.config import Recipe
from mendlm.criteria import CRITERIA
from mendlm.errors import StorageError, UsageError
from mendlm.patterns import NM, Unstructured
from mendlm.refiners import REFINERS

LINE = re.compile(r"\[ *\d+/\d+\] (?P<name>\S+\.weight)  \d+×\d+  n_kept \d+  rank \d+  rel_error [\d.e-]+  .*")
N_PROJECTIONS = 14  # 2 layers of q, k, v, o, gate, up, down


def environment(**more: str) -> dict[str, str]:
    """This process's, without what changes colours, and with few threads."""
    unwanted = {"FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "MENDLM_TRACEBACK", "COLUMNS", "TERM"}
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"} | more


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "mendlm", *map(str, args)]


def mendlm_run(*args: object, **more: str) -> subprocess.CompletedProcess[str]:
    """`mendlm ARGS` in a process of its own, stdout and stderr being pipes."""
    return subprocess.run(
        command(*args), capture_output=True, text=True, encoding="utf-8", env=environment(**more), timeout=120
    )


def in_parallel(calls: Sequence[Sequence[object]]) -> list[subprocess.CompletedProcess[str]]:
    """Two at a time: most of the time of a call is the import of torch."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda args: mendlm_run(*args), calls))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file that has to be the same from run to run."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "mendlm.run.json"}


def write_checkpoint(folder: Path, **tensors: torch.Tensor) -> Path:
    """A folder with config and one safetensors file, its tensors in one LLaMA layer."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({f"model.layers.0.mlp.{n}.weight": t for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


class Journey(NamedTuple):
    """One model through every command."""

    out: Path
    compress: subprocess.CompletedProcess[str]
    dry_run: subprocess.CompletedProcess[str]
    inspect: subprocess.CompletedProcess[str]
    plain_inspect: subprocess.CompletedProcess[str]
    spectrum: subprocess.CompletedProcess[str]
    eval: subprocess.CompletedProcess[str]
    plain_eval: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def journey(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    folder = tmp_path_factory.mktemp("journey")
    out, text = folder / "out", folder / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 12)
    how = (tiny_llama, out, "--sparsity", "0.5", "--rank", "4", "--n-iter", "5", "--json")
    compress, dry_run = in_parallel([("compress", *how), ("compress", *how, "--dry-run")])
    windows = ("--text", text, "--seqlen", "64", "--n-windows", "2")
    rest = in_parallel(
        [
            ("inspect", out, "--json"),
            ("inspect", out),
            ("inspect", out, "--tensor", "model.layers.0.self_attn.q_proj"),
            ("eval", out, *windows, "--json"),
            ("eval", out, *windows),
        ]
    )
    return Journey(out, compress, dry_run, *rest)


def test_every_command_succeeds_without_escape_codes(journey: Journey) -> None:
    for result in journey[1:]:
        assert isinstance(result, subprocess.CompletedProcess)
        assert result.returncode == 0, result.stderr
        assert "\x1b" not in result.stdout + result.stderr


def test_compress_json_is_one_document(journey: Journey) -> None:
    document = json.loads(journey.compress.stdout)
    assert document["out"] == str(journey.out)
    assert document["resumed"] == 0
    assert len(document["records"]) == document["totals"]["n_compressed"] == N_PROJECTIONS
    manifest = json.loads((journey.out / "mendlm.json").read_text())
    assert document["records"] == manifest["records"]
    assert document["totals"] == manifest["totals"]


def test_progress_is_one_line_a_tensor(journey: Journey) -> None:
    lines = [LINE.fullmatch(line) for line in journey.compress.stderr.splitlines()]
    names = [match["name"] for match in lines if match]
    assert names == [record["name"] for record in json.loads(journey.compress.stdout)["records"]]
    assert len(names) == len(lines)
    assert "eta" in journey.compress.stderr


def test_who_chose_the_masks(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for refiner, is_said in (("oats", True), ("tlr", False)):
        how = [str(tiny_llama), str(tmp_path / refiner), "--refiner", refiner, "--rank", "4", "--n-iter", "2"]
        for more in (["--dry-run"], []):
            assert main(["compress", *how, *more]) == 0
            said = re.search("masks +chosen by refiner oats, not by criterion magnitude", capsys.readouterr().out)
            assert (said is not None) == is_said


def test_dry_run_tells_the_truth(journey: Journey) -> None:
    document = json.loads(journey.dry_run.stdout)
    real = json.loads(journey.compress.stdout)
    assert document["totals"] == real["totals"]
    assert document["recipe"]["rank"] == 4
    stored = {tensor["name"]: tensor["stored_bytes"] for tensor in document["tensors"]}
    assert all(stored[record["name"]] == record["stored_bytes"] for record in real["records"])


def test_inspect_json_agrees_with_the_records(journey: Journey) -> None:
    document = json.loads(journey.inspect.stdout)
    real = json.loads(journey.compress.stdout)
    assert document["totals"] == real["totals"]
    assert document["recipe"]["n_iter"] == 5
    rows = {row["name"]: row for row in document["tensors"] if row["action"] == "compress"}
    assert len(rows) == N_PROJECTIONS
    shared = ("shape", "n_kept", "sparsity", "rank", "rel_error", "energy_frac", "dense_bytes", "stored_bytes")
    for record in real["records"]:
        assert {key: rows[record["name"]][key] for key in shared} == {key: record[key] for key in shared}


def test_inspect_prints_an_aligned_table(journey: Journey) -> None:
    lines = journey.plain_inspect.stdout.splitlines()
    header, rows = lines[0], [line for line in lines if line.startswith("model.layers")]
    assert header.split() == "tensor shape dtype n_kept sparsity rank dense stored rel_error energy".split()
    assert len(rows) == N_PROJECTIONS + 4
    column = header.index("dtype")
    assert all(row[column:].startswith("float32") for row in rows)
    assert f"{N_PROJECTIONS} of them compressed" in journey.plain_inspect.stdout


def test_inspect_prints_a_spectrum(journey: Journey) -> None:
    assert "model.layers.0.self_attn.q_proj.weight" in journey.spectrum.stdout
    assert re.search(r"^sigma B @ A  +█", journey.spectrum.stdout, re.MULTILINE)
    assert re.search(r"^64 .* 100.0 %", journey.spectrum.stdout, re.MULTILINE)


def test_eval(journey: Journey) -> None:
    document = json.loads(journey.eval.stdout)
    assert (document["n_windows"], document["seqlen"], document["n_tokens"]) == (2, 64, 126)
    # A random model knows nothing: about the vocabulary's 258.
    assert 100 < document["ppl"] < 1000
    assert document["protocol"]["text"] == "text.txt"
    assert f"ppl        {document['ppl']:.4f}" in journey.plain_eval.stdout
    assert "tokens/s" in journey.plain_eval.stdout
    assert "2/2] ppl so far" in journey.plain_eval.stdout


@pytest.fixture(scope="module")
def broken(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs that must be refused."""
    root = tmp_path_factory.mktemp("broken")
    write_checkpoint(root / "narrow", up_proj=torch.ones(8, 6))
    write_checkpoint(root / "nan", up_proj=torch.full((8, 8), float("nan")))
    truncated = write_checkpoint(root / "truncated", up_proj=torch.ones(8, 8)) / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    (root / "pickled").mkdir()
    (root / "pickled" / "config.json").write_text('{"model_type": "llama"}')
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    (root / "filled").mkdir()
    (root / "filled" / "notes.txt").write_text("mine")
    (root / "taken").mkdir()
    (root / "taken" / "config.json").write_text("{}")
    (root / "recipe.yaml").write_text("criterion: magnitude\nrnak: 4\n")
    (root / "tiny").symlink_to(tiny_llama)
    return root


# arguments (a folder's name in `broken` stands for it), exit code, what the sentence says
FAILURES = {
    "no model": ("compress @nowhere @out", 2, "nowhere' is not a folder"),
    "out exists": ("compress @tiny @taken", 2, "exists and is not empty. Pass --overwrite"),
    "out is no checkpoint": ("compress @tiny @filled", 2, "but 'notes.txt', so it is not a checkpoint and will not be"),
    "empty device": ("compress @tiny @out --device=", 2, "unknown device ''"),
    "sparsity": ("compress @tiny @out --sparsity 1.5", 2, r"sparsity must be in \[0, 1\], got 1.5"),
    "criterion": ("compress @tiny @out --criterion magnitud", 2, "Did you mean 'magnitude'"),
    "rank": ("compress @tiny @out --rank 1000", 2, r"rank must be in \[0, \d+\].*got 1000.*\[model.layers"),
    "n:m": ("compress @narrow @out --pattern 2:4", 2, r"2:4 needs d_in divisible by 4.*\[model.layers"),
    "nan": ("compress @nan @out", 1, r"holds NaN or infinity.*\[model.layers.0.mlp.up_proj.weight in model"),
    "truncated": ("compress @truncated @out --json", 1, "'model.safetensors' is 20 bytes shorter"),
    "pickles": ("compress @pickled @out", 2, "pickles only, e.g. 'pytorch_model.bin'"),
    "tensor": ("inspect @tiny --tensor model.norn --json", 2, "Did you mean 'model.norm.weight'"),
    "gguf": ("import @recipe.yaml @out --json", 2, "recipe.yaml"),
}

# the same, but refused before any heavy import: no process of its own
WRONG_USE = {
    "recipe": (
        "compress @tiny @out --recipe @recipe.yaml",
        2,
        r"'rnak'\. Did you mean 'rank'.*\[recipe.yaml, line 2, field rnak\]",
    ),
    "two patterns": (
        "compress @tiny @out --sparsity 0.5 --pattern 2:4",
        2,
        "--sparsity 0.5 does not go with --pattern",
    ),
    "no text": ("eval @tiny", 2, "either --text FILE or --dataset NAME, neither was given"),
    "device": ("eval @tiny --text @recipe.yaml --device tpu", 2, "unknown device 'tpu'"),
    "option": ("inspect @tiny --tensr x", 2, r"No such option: --tensr.*Try: mendlm inspect --help"),
    "number": ("compress @tiny @out --n-iter many", 2, "Invalid value for '--n-iter'"),
}


def arguments(line: str, folder: Path) -> list[str]:
    return [re.sub("^@", f"{folder}/", word) for word in line.split()]


@pytest.fixture(scope="module")
def failed(broken: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    calls = [arguments(line, broken) for line, _, _ in FAILURES.values()]
    return dict(zip(FAILURES, in_parallel(calls), strict=True))


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_sentence(case: str, failed: dict[str, subprocess.CompletedProcess[str]]) -> None:
    _, code, sentence = FAILURES[case]
    result = failed[case]
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(sentence, result.stderr), result.stderr
    assert result.stdout == ""
    assert "\x1b" not in result.stderr


def test_failures_leave_nothing_behind(broken: Path, failed: dict[str, Any]) -> None:
    assert not (broken / "out").exists()
    assert not [path.name for path in broken.iterdir() if path.name.startswith(".")]
    assert [path.name for path in (broken / "filled").iterdir()] == ["notes.txt"]


def test_ctrl_c_then_resume_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    # Three tensors of about a second each: the first line comes when most of the work is still to do.
    how = ("--include", "model.layers.0.mlp.*", "--solver", "exact", "--n-iter", "400")
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    with subprocess.Popen(
        command("compress", tiny_llama, out, *how),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=60)
    assert LINE.match(first)
    assert process.returncode == 130, said
    assert said == ("interrupted. Run the same command with --resume to go on from the tensors done so far.\n")
    assert len(rest.splitlines()) < 2
    assert not out.exists()
    assert has_partial(out)
    whole, resumed = in_parallel(
        [("compress", tiny_llama, undisturbed, *how), ("compress", tiny_llama, out, *how, "--resume", "--json")]
    )
    assert whole.returncode == resumed.returncode == 0, whole.stderr + resumed.stderr
    assert json.loads(resumed.stdout)["resumed"] >= 1
    assert files_of(out) == files_of(undisturbed)
    assert not has_partial(out)


def test_a_bar_on_a_terminal(tiny_llama: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    more = {"TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40"}
    how = ("--include", "model.layers.0.*", "--n-iter", "2", "--rank", "2")
    args = command("compress", tiny_llama, tmp_path / "out", *how)
    with subprocess.Popen(args, stdout=theirs, stderr=theirs, stdin=theirs, env=environment(**more)) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other end was closed
            while chunk := os.read(ours, 4096):
                shown += chunk
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    assert "\x1b[" in text
    assert "eta" in text
    assert "model.layers.0." in text
    assert "7 of 20 compressed" in text
    assert re.search(r"\d%", text)
    assert "progress.percentage" not in text
    assert not LINE.search(text)


def test_a_closed_pipe_is_quiet(tiny_llama: Path) -> None:
    with subprocess.Popen(
        command("inspect", tiny_llama), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert said == b""


@pytest.mark.parametrize(
    ("redirection", "args", "code"), [(">&-", "inspect @tiny", 0), ("2>&-", "inspect @nowhere", 2)]
)
def test_a_closed_stream(broken: Path, redirection: str, args: str, code: int) -> None:
    shell = ["sh", "-c", f'"$@" {redirection}', "sh", *command(*arguments(args, broken))]
    result = subprocess.run(shell, capture_output=True, text=True, env=environment(), timeout=60)
    assert result.returncode == code, result.stderr
    assert result.stdout + result.stderr == ""


def test_a_full_disk_under_stdout(tiny_llama: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("w") as sink:
        args = command("inspect", tiny_llama, "--json")
        result = subprocess.run(args, stdout=sink, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60)
    assert result.returncode == 1
    assert result.stderr == "error: No space left on device.\n"


# The rest needs no process of its own.


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MENDLM_TRACEBACK", raising=False)


@pytest.mark.parametrize("case", WRONG_USE)
def test_wrong_use_is_one_sentence(case: str, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, code, sentence = WRONG_USE[case]
    assert main(arguments(line, broken)) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert re.search(sentence, shown.err), shown.err


@pytest.mark.parametrize("name", sorted(build_command().commands))
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr()
    assert "Examples" in shown.out
    assert f"mendlm {name} " in shown.out
    assert "--json" in shown.out
    assert shown.err == ""


def test_help_names_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["compress", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", shown) for name in CRITERIA)
    assert all(re.search(rf"\b{name}\b", shown) for name in REFINERS)


def test_calibrated_compression(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("It was the best of times, it was the worst of times. " * 12)
    how = ["--calibration", str(text), "--n-sequences", "4", "--seqlen", "32", "--windows", "leading"]
    more = ["--criterion", "wanda", "--sparsity", "0.5", "--rank", "4", "--n-iter", "3", "--skip-layers", "-1"]
    assert main(["compress", str(tiny_llama), str(out), *how, *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "block 1/2: gather"
    assert len([line for line in lines if LINE.match(line)]) == N_PROJECTIONS // 2
    assert main(["compress", str(tiny_llama), str(out), *how, *more, "--overwrite", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    recipe = json.loads((out / "mendlm.json").read_text())["recipe"]
    assert recipe["pattern"] == {"sparsity": 0.5, "scope": "row"}
    assert recipe["calibration"]["source"] == str(text)
    assert recipe["skip_layers"] == [-1]
    assert {record["metric"] for record in document["records"]} == {"gram"}
    assert {record["n_tokens"] for record in document["records"]} == {4 * 32}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--workers", "0"], "workers must be 1 or more, got 0"),
        (["--executor", "dask"], "unknown executor 'dask'"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--calibration", "nofile.txt"], "unknown calibration source 'nofile.txt'"),
        (["--overwrite", "--resume"], "overwrite starts anew and resume continues"),
        (
            ["--calibration", "self", "--criterion", "wanda", "--workers", "2"],
            "workers 2 is for work without calibration",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    flags: list[str], sentence: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(tiny_llama), str(tmp_path / "out"), "--dry-run", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_a_dry_run_looks_at_the_place_of_out(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for out, sentence in (
        (file, "is a file. Give the name of a folder"),
        (tiny_llama / "out", "is MODEL or lies inside it"),
        (tiny_llama.parent, "holds MODEL"),
        (tmp_path, "so it is not a checkpoint"),
    ):
        assert main(["compress", str(tiny_llama), str(out), "--dry-run"]) == 2
        assert sentence in capsys.readouterr().err
    shutil.copytree(tiny_llama, tmp_path / "out")
    assert main(["compress", str(tiny_llama), str(tmp_path / "out"), "--dry-run"]) == 0  # it may exist


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--criterion", "wanda"], "criterion 'wanda' weighs the inputs, so it needs calibration data"),
        (["--metric", "gram"], "metric 'gram' weighs the inputs"),
        (["--n-sequences", "3"], "n_sequences 3 is about calibration text, and there is none. Give --calibration"),
        (
            ["--layer-sparsity", "owl", "--calibration", "self", "--pattern", "2:4"],
            "'owl' needs a pattern with a spars",
        ),
        (["--damping", "0.5"], "damping 0.5 is about calibration, and there is none. Give --calibration"),
        (["--dead-columns", "drop"], "dead_columns 'drop' is about calibration, and there is none"),
        (["--activation-dir", "there"], "--activation-dir 'there' is for calibration, and there is none"),
        (["--layer-sparsity", "other"], "unknown layer_sparsity 'other'"),
        (["--tile", "16x16", "--scope", "row"], "--scope row does not go with --tile 16x16"),
        (["--tile", "16"], "tile"),
        (["--skip-layers", "a"], "--skip-layers must be whole numbers such as 0,1,-1, got 'a'"),
        (["--skip-layers", "7"], "skip_layers 7: the model has 2 layers"),
        (["--recipe", "wanda-5"], "Did you mean 'wanda-50'?"),
        (
            ["--calibration", "c3", "--criterion", "wanda"],
            "unknown calibration source 'c3'. Available: c4, random-tokens, self, wikitext2",
        ),
        (["--calibration", "self", "--metric", "gram", "--refiner", "oats"], "refiner 'oats' has no metric 'gram'"),
    ],
)
def test_wrong_use_of_calibration(
    flags: list[str], sentence: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(tiny_llama), str(tmp_path / "out"), *flags]) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes"]) == 0
    assert re.search(r"^wanda-tlr-2-4 +TLR on a Wanda", capsys.readouterr().out, re.MULTILINE)
    assert main(["recipes", "wanda-tlr-2-4"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert main(["recipes", "wanda-tlr-2-4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"wanda-tlr-2-4": Recipe.from_file(tmp_path / "mine.yaml").to_dict()}
    assert main(["recipes", "wanda-tlr"]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_flags_over_a_built_in_recipe() -> None:
    base = resolve_recipe("wanda-tlr-2-4", {}, Zeros(), {})
    assert base.calibration is not None
    mine = resolve_recipe("wanda-tlr-2-4", {"rank": "16"}, Zeros(), {"source": "train.txt", "seqlen": 1024})
    assert mine.calibration == base.calibration.model_copy(update={"source": "train.txt", "seqlen": 1024})
    assert (mine.rank, mine.criterion, mine.pattern) == (16, "wanda", NM(2, 4))
    other = resolve_recipe("wanda-50", {"criterion": "magnitude", "refiner": "tlr"}, Zeros(), {})
    assert other.pattern == Unstructured(0.5, "tensor")
    assert (other.rank, other.metric) == ("5%", "auto")
    tiles = resolve_recipe("wanda-50", {}, Zeros(tile="16x16"), {})
    assert str(tiles.pattern) == str(Recipe(pattern={"sparsity": 0.5, "tile": "16x16"}).pattern)


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert "Commands" in shown.out + shown.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mendlm {mendlm.__version__}\n"


def test_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from test_gguf import make_model, write_gguf

    file, dest = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), "llama"), tmp_path / "dest"
    assert main(["import", str(file), str(dest), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == str(dest)
    assert document["max_abs_difference"] == 0.0
    assert document["n_tensors"] == 2 * 9 + 2  # seven projections and two norms a layer, embedding and last norm
    assert main(["import", str(file), str(dest)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["import", str(file), str(dest), "--overwrite", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "every tensor equals the file's" in shown
    assert "storing in bfloat16" in shown
    assert main(["inspect", str(dest), "--json"]) == 0
    assert {row["dtype"] for row in json.loads(capsys.readouterr().out)["tensors"]} == {"bfloat16"}


def test_names_from_files_cannot_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "evil", **{"\x1b[31m[bold red]up\nrm -rf\u202e": torch.ones(4, 4)})
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert r"model.layers.0.mlp.\x1b[31m[bold red]up\nrm -rf\u202e.weight" in shown
    assert "\x1b" not in shown
    assert main(["inspect", str(tmp_path / "no\x1b[2Jwhere")]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert r"no\x1b[2Jwhere" in said


class Failing:
    """A command that ends in a given exception."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def main(self, **_: Any) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UsageError("rank is -1."), 2, "error: rank is -1.\n"),
        (StorageError("disk full."), 1, "error: disk full.\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/o/x"), 1, "error: No space left on device: '/o/x'.\n"),
        (KeyboardInterrupt(), 130, "interrupted. Pass --resume.\n"),
        (
            RuntimeError("boom\nline two"),
            1,
            "error: RuntimeError: boom. This is a bug in mendlm or a library; MENDLM_TRACEBACK=1 shows where.\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_exception_ends_in_a_sentence(
    error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Failing(error), [], Session(interrupt_hint="Pass --resume.")) == code
    assert capsys.readouterr().err == sentence


def test_traceback_by_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MENDLM_TRACEBACK", "1")
    assert run(Failing(RuntimeError("boom")), [], Session()) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("error: RuntimeError: boom.\n")


def test_traceback_by_flag(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for args in (["inspect", "--traceback", str(tmp_path)], ["--traceback", "inspect", str(tmp_path)]):
        assert main(args) == 2
        assert capsys.readouterr().err.startswith("Traceback")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_lines_in_a_pipe_tell_the_time_left() -> None:
    """An earlier run's share says nothing about the speed of this one."""
    stream, times = io.StringIO(), iter([100.0, 102.0, 104.0])
    view = _Lines(stream, clock=lambda: next(times))
    view.started("a", 50, 100)
    view.advanced(60, 100, "a")
    view.started("b\x1b", 60, 100)
    view.advanced(100, 100, "b\x1b")
    assert stream.getvalue().splitlines() == ["a  eta 8.0 s", r"b\x1b"]


@pytest.mark.parametrize(
    ("n_bytes", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_500, "1.00 MB")]
)
def test_bytes_for_people(n_bytes: int, shown: str) -> None:
    assert format_bytes(n_bytes) == shown


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"ppl": float("inf"), "rows": [{"x": float("nan")}, 1.5]})
    assert json.loads(capsys.readouterr().out) == {"ppl": None, "rows": [{"x": None}, 1.5]}


def test_flags_override_the_recipe_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("pattern: {sparsity: 0.7, scope: row}\nrank: 8\nn_iter: 9\nseed: 3\ninclude: '*up_proj*'\n")
    plain = resolve_recipe(file, {"rank": None}, Zeros())
    assert plain == Recipe.from_file(file)
    assert resolve_recipe(file, {"rank": "10%", "seed": 0}, Zeros()) == plain.model_copy(
        update={"rank": "10%", "seed": 0}
    )
    assert resolve_recipe(file, {}, Zeros(sparsity=0.6)).pattern == Unstructured(0.6, "row")
    assert resolve_recipe(file, {}, Zeros(scope="tensor")).pattern == Unstructured(0.7, "tensor")
    assert resolve_recipe(file, {}, Zeros(pattern="2:4")).pattern == NM(2, 4)
    assert resolve_recipe(None, {}, Zeros()) == Recipe()


def test_another_refiner_leaves_the_old_ones_settings(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("refiner: tlr\nrank: 8\nn_iter: 9\nsolver: exact\n")
    same = resolve_recipe(file, {"refiner": "tlr"}, Zeros())
    assert (same.n_iter, same.solver, same.rank) == (9, "exact", 8)
    other = resolve_recipe(file, {"refiner": "zero-shot-svd"}, Zeros())
    assert (other.n_iter, other.solver, other.rank) == (None, None, 8)
    assert resolve_recipe(file, {"refiner": "none"}, Zeros()).refiner_for(8, 8).rank == 0
    file.write_text("overrides:\n- {match: '*.mlp.*', rank: 3, sparsity: 0.4}\n- {match: '*.q_proj.*', rank: 3}\n")
    none = resolve_recipe(file, {"refiner": "none"}, Zeros())
    assert [override.to_dict() for override in none.overrides] == [{"match": "*.mlp.*", "sparsity": 0.4}]


def test_another_criterion_is_that_of_every_tensor(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "criterion: magnitude\noverrides:\n"
        "- {match: '*.mlp.*', criterion: random}\n- {match: '*.q_proj.*', criterion: random, rank: 3}\n"
    )
    assert resolve_recipe(file, {"criterion": "magnitude"}, Zeros()) == Recipe.from_file(file)
    other = resolve_recipe(file, {"criterion": "random"}, Zeros())
    assert [override.to_dict() for override in other.overrides] == [{"match": "*.q_proj.*", "rank": 3}]


def test_flags_that_exclude_each_other(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("pattern: '2:4'\n")
    with pytest.raises(UsageError, match=r"--scope row does not go with the recipe's n:m pattern\. Give --sparsity"):
        resolve_recipe(file, {}, Zeros(scope="row"))
    assert resolve_recipe(file, {}, Zeros(sparsity=0.25, scope="row")).pattern == Unstructured(0.25, "row")
    with pytest.raises(UsageError, match="--scope row does not go with --pattern 2:4"):
        resolve_recipe(None, {}, Zeros(scope="row", pattern="2:4"))


def test_every_flag_is_documented() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    names = "|".join(build_command().commands)
    shared, *sections = re.split(rf"^## (?=(?:{names})$)", text, flags=re.MULTILINE)
    pages = {section.split("\n")[0]: section for section in sections}
    for name, parsed in build_command().commands.items():
        flags = {flag for parameter in parsed.params for flag in parameter.opts if flag.startswith("--")}
        missing = {flag for flag in flags if f"`{flag}" not in pages[name] and f"`{flag}" not in shared}
        assert not missing - {"--help"}, name
        documented = set(re.findall(r"^\| `(--[a-z-]+)", pages[name], re.MULTILINE))
        assert documented <= flags, name


def test_a_rank_a_sparsity_or_a_pattern_wins_over_overrides(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "pattern: {sparsity: 0.5}\noverrides:\n"
        "- {match: '*.q_proj.*', rank: 3, sparsity: 0.4}\n- {match: '*.mlp.*', sparsity: 0.3}\n"
    )
    for flags, zeros, left in (
        ({"rank": "9"}, Zeros(), [("*.q_proj.*", None, 0.4), ("*.mlp.*", None, 0.3)]),
        ({}, Zeros(sparsity=0.9), [("*.q_proj.*", 3, None)]),
        ({}, Zeros(pattern="2:4"), [("*.q_proj.*", 3, None)]),
        ({}, Zeros(scope="row"), [("*.q_proj.*", 3, 0.4), ("*.mlp.*", None, 0.3)]),
    ):
        recipe = resolve_recipe(str(file), flags, zeros)
        assert [(o.match, o.rank, o.sparsity) for o in recipe.overrides] == left


def test_a_recipe_for_another_model_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("overrides:\n- {match: transformer.h.0.attn.c_proj.weight, rank: 3}\n")
    assert main(["compress", str(tiny_llama), str(tmp_path / "out"), "--recipe", str(file)]) == 2
    assert "'transformer.h.0.attn.c_proj.weight' is of a tensor that the model does not have" in capsys.readouterr().err
    file.write_text("overrides:\n- {match: '*.c_proj.weight', rank: 3}\n- {match: lm_head.weight, rank: 2}\n")
    assert main(["compress", str(tiny_llama), str(tmp_path / "out"), "--recipe", str(file), "--dry-run"]) == 2


@pytest.mark.parametrize(
    ("args", "said", "spins"),
    [
        (["recipes"], {}, "1000"),
        (["recipes"], {"GOMP_SPINCOUNT": "5"}, "5"),
        (["recipes"], {"OMP_WAIT_POLICY": "passive"}, "0"),
        (["bench", "nowhere"], {}, "300000"),
    ],
)
def test_waiting_threads_give_their_cores_away(args: list[str], said: dict[str, str], spins: str) -> None:
    """What libgomp says itself, which torch loads after the command has begun."""
    program = "import sys; from mendlm.cli import main; main(sys.argv[1:]); import torch"
    more = {"GOMP_SPINCOUNT": "", "OMP_WAIT_POLICY": "", "OMP_DISPLAY_ENV": "verbose"} | said
    env = {name: value for name, value in environment(**more).items() if value}
    run = [sys.executable, "-c", program, *args]
    result = subprocess.run(run, capture_output=True, text=True, env=env, timeout=60)
    told = set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr))
    if not told:
        pytest.skip("this torch does not come with libgomp")
    assert told == {spins}
