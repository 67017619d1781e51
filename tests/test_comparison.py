"""Intervals, KL divergence and paired differences against float64 NumPy, their coverage, several models at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mendlm
from mendlm import compare, paired_difference, perplexity
from mendlm.cli import main
from mendlm.errors import NonFiniteError, UsageError
from mendlm.evaluation.folders import Step, evaluate_each
from mendlm.evaluation.intervals import MAX_BLOCKS, MIN_BLOCKS, block_lengths, block_means, mean_interval, t_quantile
from mendlm.evaluation.perplexity import PerplexityResult, evaluate
from tiny import tiny_model

VOCAB, SEQLEN, N = 97, 64, 32  # 32 windows of 64 tokens: 8 blocks of four windows


def llama(seed: int = 0, factor: float = 40.0, **changes: Any) -> Any:
    """A random model whose logits spread over several units, as a trained model's do."""
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, max_position_embeddings=SEQLEN)
    model = tiny_model("LlamaForCausalLM", seed=seed, **(shape | changes))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


def near(factor: float) -> Any:
    """`llama()` with every weight of the output embedding off by a share of at most `factor`."""
    model = llama()
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight.mul_(1 + factor * (2 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) - 1))
    return model


def tokens(n: int = N * SEQLEN) -> torch.Tensor:
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(1))


def log_probabilities(model: Any, ids: torch.Tensor) -> np.ndarray:
    """Whole logits of every window to (n_windows, seqlen - 1, vocab) log-probabilities, in float64."""
    with torch.inference_mode():
        x = model(ids.view(-1, SEQLEN)).logits[:, :-1].double().numpy()
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def dense() -> Any:
    return llama()


@pytest.mark.parametrize(
    ("make", "chunk", "rtol"),
    [(lambda: near(0.3), None, 1e-5), (lambda: near(0.3), 5, 1e-5), (lambda: near(1e-3), None, 1e-3)],
)
def test_comparison_agrees_with_float64_from_whole_logits(
    dense: Any, make: Callable[[], Any], chunk: int | None, rtol: float
) -> None:
    model, ids = make(), tokens()
    p, q = log_probabilities(dense, ids), log_probabilities(model, ids)
    kl, targets = (np.exp(p) * (p - q)).sum(-1), ids.view(-1, SEQLEN)[:, 1:, None].numpy()
    agrees = p.argmax(-1) == q.argmax(-1)
    assert kl.mean() > 1e-7
    assert agrees.mean() > 0.5
    got = compare(model, dense, ids, seqlen=SEQLEN, logits_chunk=chunk)
    assert got.kl == pytest.approx(kl.mean(), rel=rtol)
    assert got.kl_p99 == pytest.approx(np.sort(kl.ravel())[math.ceil(0.99 * kl.size) - 1], rel=rtol)
    assert got.top1_agreement == pytest.approx(agrees.mean(), abs=1e-12)
    nll, reference_nll = (-np.take_along_axis(x, targets, -1)[..., 0] for x in (q, p))
    assert got.model.nll == pytest.approx(nll.mean(), rel=1e-6)
    assert got.reference.nll == pytest.approx(reference_nll.mean(), rel=1e-6)
    assert got.difference.nll == pytest.approx((nll - reference_nll).mean(), abs=1e-6)
    # Eight blocks of four windows each: the textbook's t interval, t_7 from its table.
    for interval, values in (
        (got.kl_ci95, kl),
        (got.model.nll_ci95, nll),
        (got.difference.nll_ci95, nll - reference_nll),
    ):
        blocks = values.reshape(8, -1).mean(-1)
        half = 2.364624 * blocks.std(ddof=1) / math.sqrt(8)
        assert interval is not None
        assert interval == pytest.approx((blocks.mean() - half, blocks.mean() + half), rel=2e-3, abs=1e-6)


def test_a_model_is_its_own_equal(dense: Any) -> None:
    got = compare(dense, dense, tokens(), seqlen=SEQLEN)
    assert (got.kl, got.kl_ci95, got.kl_p99) == (0.0, (0.0, 0.0), 0.0)
    assert (got.top1_agreement, got.top1_ci95) == (1.0, (1.0, 1.0))
    difference = got.difference
    assert (difference.nll, difference.ppl_ratio, difference.within_noise, difference.n_blocks) == (0.0, 1.0, True, 8)


def test_perplexities_of_a_comparison_are_those_of_perplexity(dense: Any) -> None:
    model, ids = near(0.3), tokens()
    calls: list[tuple[int, int, float]] = []
    got = compare(model, dense, ids, seqlen=SEQLEN, n_windows=20, progress=lambda *call: calls.append(call))
    for ours, one in ((got.model, model), (got.reference, dense)):
        alone = perplexity(one, ids, seqlen=SEQLEN, n_windows=20)
        torch.testing.assert_close(torch.tensor(ours.window_nll), torch.tensor(alone.window_nll))
        assert ours.protocol == alone.protocol
        assert ours.ppl_ci95 == pytest.approx(alone.ppl_ci95)
    assert [call[:2] for call in calls] == [(i + 1, 20) for i in range(20)]
    assert calls[-1][2] == got.model.ppl


def test_windows_and_blocks_make_up_the_mean(dense: Any) -> None:
    result = perplexity(dense, tokens(), seqlen=SEQLEN, n_windows=30)
    assert len(result.window_nll) == 30
    assert math.fsum(result.window_nll) / 30 == pytest.approx(result.nll, rel=1e-12)
    lengths = block_lengths(30, SEQLEN - 1)
    assert math.fsum(m * k for m, k in zip(result.block_nll, lengths, strict=True)) / result.n_tokens == pytest.approx(
        result.nll, rel=1e-12
    )
    assert result.nll_ci95 is not None
    assert result.ppl_ci95 is not None
    assert result.nll_ci95[0] < result.nll < result.nll_ci95[1]
    assert result.ppl_ci95 == tuple(map(math.exp, result.nll_ci95))
    # The mean of each window is what the window gives alone.
    assert perplexity(dense, tokens()[:SEQLEN], seqlen=SEQLEN).nll == pytest.approx(result.window_nll[0], rel=1e-6)


def test_a_short_text_has_no_interval(dense: Any) -> None:
    got = compare(near(0.3), dense, tokens(4 * SEQLEN), seqlen=SEQLEN)
    assert (got.model.nll_ci95, got.model.ppl_ci95, got.kl_ci95, got.top1_ci95) == (None,) * 4
    assert (got.difference.nll_ci95, got.difference.within_noise) == (None, None)
    json.dumps(got.to_dict(), allow_nan=False)


def test_training_mode_of_both_comes_back(dense: Any) -> None:
    model = llama(attention_dropout=0.5).train()
    assert compare(model, dense, tokens(SEQLEN), seqlen=SEQLEN).kl == 0.0
    assert model.training
    assert not dense.training


def masking_llama(token: int) -> Any:
    """`llama()`, which holds one token impossible."""
    from transformers import LlamaForCausalLM

    class MaskingLlama(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits[..., token] = -math.inf
            return out

    model = llama()
    masking = MaskingLlama(model.config).eval()
    masking.load_state_dict(model.state_dict())
    return masking


def test_a_token_that_the_reference_excludes_adds_nothing_and_one_that_the_model_excludes_is_refused(
    dense: Any,
) -> None:
    ids = torch.where(tokens(SEQLEN) == 3, 4, tokens(SEQLEN))
    p, q = log_probabilities(dense, ids), log_probabilities(masking_llama(3), ids)
    kept = [i for i in range(VOCAB) if i != 3]
    others = (np.exp(q[..., kept]) * (q[..., kept] - p[..., kept])).sum(-1)
    got = compare(dense, masking_llama(3), ids, seqlen=SEQLEN)
    assert got.kl == pytest.approx(others.mean(), rel=1e-4)
    with pytest.raises(NonFiniteError, match=r"the KL divergence from the reference of window 0 .* is inf"):
        compare(masking_llama(3), dense, ids, seqlen=SEQLEN)


def test_wrong_pairs_are_refused(dense: Any) -> None:
    with pytest.raises(UsageError, match=r"for 97 tokens and the reference for 104; .*pad the embedding.*\(97\)"):
        compare(dense, llama(vocab_size=104), tokens(), seqlen=SEQLEN)
    with pytest.raises(UsageError, match="seqlen 64 is longer than the 32 positions"):
        compare(dense, llama(max_position_embeddings=32), tokens(), seqlen=SEQLEN)
    assert compare(dense, llama(max_position_embeddings=32), tokens(), seqlen=None, n_windows=1).model.seqlen == 32
    broken = llama()
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"the reference's NLL of window 0 \(tokens 0 to 63\) is nan"):
        compare(dense, broken, tokens(), seqlen=SEQLEN)


# Two-sided 95 % points of Student's t as printed in tables.
@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (7, 2.36462), (15, 2.13145), (60, 2.0003)]
)
def test_t_quantiles(df: int, t: float) -> None:
    assert t_quantile(df) == pytest.approx(t, rel=1e-5)
    assert t_quantile(100_000) == pytest.approx(1.959964, rel=2e-5)  # the normal's


@pytest.mark.parametrize("n_windows", [*range(1, 40), 141, 148, 5000])
@pytest.mark.parametrize("seqlen", [2, 64, 256, 1024, 2048, 4096])
def test_blocks_are_parts_of_windows_or_whole_ones(n_windows: int, seqlen: int) -> None:
    lengths = block_lengths(n_windows, seqlen - 1)
    assert sum(lengths) == n_windows * (seqlen - 1)
    if len(lengths) <= n_windows:
        assert all(n % (seqlen - 1) == 0 for n in lengths)
        assert max(lengths) - min(lengths) <= seqlen - 1
    else:
        parts = len(lengths) // n_windows
        assert all(sum(lengths[i : i + parts]) == seqlen - 1 for i in range(0, len(lengths), parts))
        assert max(lengths) - min(lengths) <= 1
    assert len(lengths) <= MAX_BLOCKS
    if n_windows * min(seqlen, 256) >= 256 * MIN_BLOCKS:
        assert len(lengths) >= MIN_BLOCKS
    if n_windows >= MIN_BLOCKS:
        assert len(lengths) <= n_windows
    # 256 tokens, of which the first of a window is not predicted; windows are not cut to fill the last block
    assert len(lengths) == 1 or min(lengths) >= 256 - max(1, 256 // seqlen) - seqlen * (seqlen < 256)


def test_blocks_of_unequal_lengths_count_by_length() -> None:
    low, high = mean_interval([1.0, 2.0, 4.0], [100, 100, 200]) or (0.0, 0.0)
    assert (low + high) / 2 == pytest.approx(2.75)
    assert low < 1.0  # three blocks say little
    assert mean_interval([1.0], [100]) is None


def text_like(rng: np.random.Generator, n: int) -> np.ndarray:
    """NLLs (n, 8, 2047) of `n` texts with mean 3: skewed, over some 100 tokens correlated, hard and easy passages."""
    noise = rng.exponential(3.0, (n, 8 * 2047 + 100))
    summed = np.cumsum(noise, axis=1)
    passages = (summed[:, 100:] - summed[:, :-100]) / 100  # mean 3
    return (0.5 * noise[:, 100:] + 0.5 * passages).reshape(n, 8, 2047)


def covers(interval: tuple[float, float] | None, mean: float) -> bool:
    assert interval is not None
    return interval[0] <= mean <= interval[1]


def test_intervals_cover_as_often_as_they_say_where_those_from_tokens_do_not() -> None:
    rng = np.random.default_rng(0)
    hits, of_tokens = [], []
    for _ in range(20):
        for values in text_like(rng, 20):
            means, lengths = block_means(torch.from_numpy(values)), block_lengths(*values.shape)
            hits.append(covers(mean_interval(means, lengths), 3.0))
            half = 1.96 * values.std() / math.sqrt(values.size)
            of_tokens.append(covers((values.mean() - half, values.mean() + half), 3.0))
    assert 0.92 <= np.mean(hits) <= 0.98  # 400 texts: a standard error of 0.011
    assert np.mean(of_tokens) < 0.8


def saved(nll: np.ndarray, name: str = "m", sha: str = "abc") -> dict[str, Any]:
    """What `mendlm eval --json` prints for NLLs (n_windows, seqlen - 1)."""
    n_windows, n_predicted = nll.shape
    result = PerplexityResult(
        ppl=math.exp(nll.mean()),
        nll=float(nll.mean()),
        n_tokens=nll.size,
        n_windows=n_windows,
        seqlen=n_predicted + 1,
        seconds=1.0,
        tokens_per_second=float(nll.size),
        protocol={"model": name, "token_ids_sha256": sha},
        block_nll=block_means(torch.from_numpy(nll)),
    )
    parsed: dict[str, Any] = json.loads(json.dumps(result.to_dict()))
    return parsed


def test_pairing_sees_a_change_that_the_texts_spread_hides() -> None:
    rng = np.random.default_rng(1)
    base = text_like(rng, 1)[0]
    worse = base + 0.02 + 0.1 * rng.standard_normal(base.shape)
    same = base + 0.5 * rng.standard_normal(base.shape)
    found = paired_difference(saved(worse), saved(base, "dense"))
    assert (found.baseline, found.n_blocks, found.within_noise) == ("dense", 8, False)
    assert found.nll == pytest.approx(0.02, abs=0.003)
    assert found.ppl_ratio == pytest.approx(math.exp(found.nll))
    assert found.nll_ci95 is not None
    assert 0 < found.nll_ci95[0] < 0.02 < found.nll_ci95[1]
    alone = mean_interval(block_means(torch.from_numpy(base)), block_lengths(*base.shape))
    assert alone is not None
    assert alone[1] - alone[0] > 5 * (found.nll_ci95[1] - found.nll_ci95[0])
    assert paired_difference(saved(same), saved(base)).within_noise


def test_only_the_same_tokens_can_be_paired() -> None:
    values = np.ones((8, 511))
    one = saved(values)
    for other, message in (
        (saved(values, sha="def"), r"differ in tokens \(token_ids_sha256\): 'abc' and 'def'"),
        (saved(np.ones((9, 511))), r"differ in n_windows: 8 and 9"),
        (saved(np.ones((8, 255))), r"differ in seqlen: 512 and 256"),
        (one | {"block_nll": [1.0]}, r"has 8 blocks, this one holds block_nll of 1"),
        ({"ppl": 12.0}, r"no result of 'mendlm eval --json' .*KeyError\('nll'\)"),
        ([one], r"no result of 'mendlm eval --json'.*of a list, give one of its objects"),
    ):
        with pytest.raises(UsageError, match=message):
            paired_difference(one, other)  # type: ignore[arg-type]
    old = {key: value for key, value in one.items() if key != "block_nll"}
    with pytest.raises(UsageError, match="Evaluate again"):
        paired_difference(old, old)


@pytest.fixture(scope="module")
def other_llama(make_tiny_llama: Callable[..., Path]) -> Path:
    return make_tiny_llama(seed=1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "b").mkdir()
    first, second = folder / "a.txt", folder / "b" / "a.txt"
    first.write_text("Alice was beginning to get very tired of sitting by her sister on the bank.\n" * 12)
    second.write_text("Why, sometimes I've believed as many as six impossible things before breakfast.\n" * 12)
    return [first, second]


def test_each_model_on_each_text_as_alone(tiny_llama: Path, other_llama: Path, texts: list[Path]) -> None:
    steps: list[Step] = []
    found = evaluate_each([tiny_llama, other_llama], texts=texts, seqlen=128, progress=steps.append)
    labels = [(e.result.protocol["model"], e.result.protocol["text"]) for e in found]
    assert labels == [(str(m), str(t)) for t in texts for m in (tiny_llama, other_llama)]  # both are a.txt
    alone = evaluate(other_llama, text=texts[1], seqlen=128)
    assert found[3].result.window_nll == alone.window_nll
    assert [e.difference is None for e in found] == [True, False, True, False]
    assert found[3].difference == paired_difference(found[3].result, found[2].result)
    shares = [step.share for step in steps]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert len(steps) == sum(e.result.n_windows for e in found)


def test_a_reference_is_compared_with_each(tiny_llama: Path, other_llama: Path, texts: list[Path]) -> None:
    found = evaluate_each([other_llama, tiny_llama], texts=texts[:1], reference=tiny_llama, seqlen=128)
    ids = torch.tensor(list(texts[0].read_bytes()))  # the tokenizer's vocabulary is not in the order of the bytes
    other, own = found
    assert own.comparison is not None
    assert own.comparison.kl == 0.0
    assert other.comparison is not None
    assert other.comparison.kl > 0.0
    assert other.difference == other.comparison.difference
    assert other.difference is not None
    assert other.difference.baseline == str(tiny_llama)
    assert other.result.n_windows == ids.numel() // 128
    document = json.loads(json.dumps(other.to_dict(), allow_nan=False))
    assert document["ppl"] == evaluate(other_llama, text=texts[0], seqlen=128).to_dict()["ppl"]
    assert document["reference"]["perplexity"]["protocol"]["model"] == str(tiny_llama)
    assert document["difference"]["nll"] == pytest.approx(
        document["nll"] - document["reference"]["perplexity"]["nll"], rel=1e-9
    )


def test_what_cannot_work_is_said_before_a_model_is_loaded(
    tiny_llama: Path, tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mendlm.loading, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["e"], vocab["i"] = vocab["i"], vocab["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"cut 'a.txt' into different tokens"):
        evaluate_each([other], texts=texts[:1], reference=tiny_llama)
    with pytest.raises(UsageError, match=r"no text to evaluate on"):
        evaluate_each([tiny_llama])
    with pytest.raises(UsageError, match=r"no model to evaluate"):
        evaluate_each([], texts=texts)
    short = tmp_path / "short.txt"
    short.write_text("Oh!")
    with pytest.raises(UsageError, match=r"the text has 3 tokens.*\[short.txt\]"):
        evaluate_each([tiny_llama], texts=[texts[0], short], seqlen=64)
    with pytest.raises(UsageError, match=r"'some/hub-id' is no folder"):
        evaluate_each([tiny_llama], texts=texts, reference="some/hub-id")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in ("eval", *arguments)]) == 0
    return capsys.readouterr().out


def test_one_model_prints_an_object_and_several_a_list(
    tiny_llama: Path, other_llama: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one = json.loads(run(capsys, tiny_llama, "--text", texts[0], "--seqlen", 128, "--json"))
    assert one["ppl"] == pytest.approx(math.exp(one["nll"]))
    assert one["ppl_ci95"][0] < one["ppl"] < one["ppl_ci95"][1]
    assert len(one["window_nll"]) == one["n_windows"]
    assert not {"difference", "reference"} & one.keys()
    pair = ("--reference", tiny_llama)
    with_reference = json.loads(run(capsys, other_llama, "--text", texts[0], "--seqlen", 128, *pair, "--json"))
    assert with_reference["reference"]["kl"] > 0
    assert with_reference["reference"]["perplexity"]["ppl"] == pytest.approx(one["ppl"], rel=1e-6)
    two = json.loads(run(capsys, tiny_llama, other_llama, "--text", texts[0], "--seqlen", 128, "--json"))
    assert [row["protocol"]["model"] for row in two] == [str(tiny_llama), str(other_llama)]
    assert two[1]["difference"]["baseline"] == str(tiny_llama)


def test_the_table_has_a_row_for_each(
    tiny_llama: Path, other_llama: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    both = [part for text in texts for part in ("--text", text)]
    out = run(capsys, other_llama, *both, "--seqlen", 128, "--reference", tiny_llama)
    lines = out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("model "))
    rows = lines[header + 1 : header + 5]
    assert [row.split()[0] for row in rows] == [str(tiny_llama), str(other_llama)] * 2
    assert [row.split()[1] for row in rows] == [str(texts[0])] * 2 + [str(texts[1])] * 2
    assert "KL p99" in lines[header]
    assert "verdict" in lines[header]
    assert any(word in rows[1] for word in ("within noise", "worse", "better"))
    assert f"mean NLL less that of {tiny_llama}" in out
