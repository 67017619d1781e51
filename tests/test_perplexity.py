"""Perplexity against a float64 computation from whole logits, its protocol, and its refusals."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mendlm.errors import CheckpointError, NonFiniteError, UsageError
from mendlm.evaluation.perplexity import PerplexityResult, evaluate, perplexity
from tiny import tiny_model

CHUNKED, WHOLE = "base model once, output embedding in chunks", "the model's own forward, a whole window of logits"
SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, max_position_embeddings=64)


def llama(**changes: Any) -> Any:
    return amplified("LlamaForCausalLM", **changes)


def amplified(kind: str | type, *, factor: float = 40.0, **changes: Any) -> Any:
    """A random model whose logits spread over several units, as a trained model's do (fresh ones are all near 0)."""
    model = tiny_model(kind, **(SMALL | changes))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


def tokens(n: int, vocab: int = 97) -> Tensor:
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(1))


def oracle(model: Any, ids: Tensor, seqlen: int) -> tuple[float, float]:
    """Mean NLL in float64 from whole logits, token by token; and the rounding to expect of a float32 computation."""
    losses, largest = [], 0.0
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        window = ids[start : start + seqlen]
        with torch.inference_mode():
            logits = model(window[None]).logits[0].double()
        largest = max(largest, float(logits.abs().max()))
        for position in range(seqlen - 1):
            row = logits[position]
            losses.append(float(torch.log(torch.exp(row - row.max()).sum()) + row.max() - row[window[position + 1]]))
    eps = torch.finfo(torch.float32).eps
    return sum(losses) / len(losses), 16 * eps * largest


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def close(got: float, want: tuple[float, float]) -> None:
    torch.testing.assert_close(got, want[0], rtol=0.0, atol=want[1])


@pytest.mark.parametrize("logits_chunk", [None, 1, 5, 16, 1000])
def test_agrees_with_float64_from_whole_logits_at_any_chunk(model: Any, logits_chunk: int | None) -> None:
    ids = tokens(70)
    want = oracle(model, ids, 16)
    assert want[0] > math.log(97)  # a model that knows nothing, and loudly: the comparison below is not vacuous
    result = perplexity(model, ids, seqlen=16, logits_chunk=logits_chunk)
    close(result.nll, want)
    assert result.ppl == math.exp(result.nll)
    assert result.protocol["logits"] == CHUNKED


def test_counts_say_what_was_read_and_what_was_dropped(model: Any) -> None:
    result = perplexity(model, tokens(70), seqlen=16)
    assert (result.n_windows, result.seqlen, result.n_tokens) == (4, 16, 4 * 15)
    assert (result.protocol["n_tokens_given"], result.protocol["n_windows_given"]) == (70, 4)
    assert result.seconds > 0
    assert result.tokens_per_second == result.n_tokens / result.seconds


def test_remainder_is_dropped_and_windows_do_not_see_each_other(model: Any) -> None:
    ids = tokens(70)
    whole = perplexity(model, ids, seqlen=16).nll
    assert perplexity(model, ids[:64], seqlen=16).nll == whole
    swapped = torch.cat([ids[32:64], ids[:32]])
    torch.testing.assert_close(perplexity(model, swapped, seqlen=16).nll, whole, rtol=1e-12, atol=0.0)
    assert perplexity(model, ids, seqlen=32).nll != whole  # another context length is another number


def test_n_windows_takes_the_first(model: Any) -> None:
    ids = tokens(70)
    close(perplexity(model, ids, seqlen=16, n_windows=2).nll, oracle(model, ids[:32], 16))


def test_lists_rows_and_int32_are_the_same_stream(model: Any) -> None:
    ids = tokens(40)
    want = perplexity(model, ids, seqlen=16).nll
    for other in (ids.tolist(), ids[None], ids.to(torch.int32)):
        assert perplexity(model, other, seqlen=16).nll == want


def test_seqlen_none_is_the_shorter_of_2048_and_the_model(model: Any) -> None:
    assert perplexity(model, tokens(130), seqlen=None).seqlen == 64


def test_training_mode_of_each_module_comes_back() -> None:
    model = llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    first = perplexity(model, tokens(40), seqlen=16)
    assert [module.training for module in model.modules()] == before
    assert perplexity(model, tokens(40), seqlen=16).nll == first.nll  # evaluated without dropout
    assert all(p.grad is None for p in model.parameters())


def test_progress_is_told_each_window_and_ends_at_the_result(model: Any) -> None:
    calls: list[tuple[int, int, float]] = []
    result = perplexity(model, tokens(70), seqlen=16, progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert calls[-1][2] == result.ppl


def test_bfloat16_models_are_read_in_float32() -> None:
    model = llama(tie_word_embeddings=True).to(torch.bfloat16)
    ids = tokens(40)
    result = perplexity(model, ids, seqlen=16)
    close(result.nll, oracle(model, ids, 16))
    assert result.protocol["dtype"] == "bfloat16"


def gemma2() -> Any:
    return amplified("Gemma2ForCausalLM", head_dim=8, final_logit_softcapping=3.0)


def granite() -> Any:
    return amplified("GraniteForCausalLM", logits_scaling=7.0)


def shouting_llama() -> Any:
    """A model class that does to its logits what no config key tells."""
    from transformers import LlamaForCausalLM

    class ShoutingLlama(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.01
            return out

    return amplified(ShoutingLlama)


@pytest.mark.parametrize(("make", "way"), [(gemma2, CHUNKED), (granite, CHUNKED), (shouting_llama, WHOLE)])
def test_what_a_class_does_to_its_logits_is_done(make: Any, way: str) -> None:
    model, ids = make(), tokens(40)
    want = oracle(model, ids, 16)
    result = perplexity(model, ids, seqlen=16, logits_chunk=7)
    close(result.nll, want)
    assert result.protocol["logits"] == way
    # The head alone would have given another number by far more than rounding: the test can fail.
    with torch.inference_mode():
        bare = model.get_output_embeddings()(model.base_model(ids[None, :16]).last_hidden_state)
        assert float((bare - model(ids[None, :16]).logits).abs().max()) > 100 * want[1]


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        (tokens(15), dict(seqlen=16), r"the text has 15 tokens, fewer than one window of 16"),
        ([], dict(seqlen=16), r"the text has 0 tokens"),
        (tokens(70), dict(seqlen=1), r"seqlen must be at least 2 .* got 1"),
        (tokens(70), dict(seqlen=65), r"seqlen 65 is longer than the 64 positions.*Use --seqlen 64"),
        (tokens(70), dict(seqlen=16, n_windows=0), r"n_windows must be in \[1, 4\] for 70 tokens.*got 0"),
        (tokens(70), dict(seqlen=16, n_windows=5), r"n_windows must be in \[1, 4\].*got 5"),
        (tokens(70), dict(seqlen=16, logits_chunk=0), r"logits_chunk must be at least 1, got 0"),
        (torch.tensor([1, 97] * 8), dict(seqlen=16), r"token id 97 is not in the model's vocabulary of 97"),
        ([1, -1] * 8, dict(seqlen=16), r"token id -1 is not in the model's vocabulary"),
        (torch.ones(2, 16, dtype=torch.long), dict(seqlen=16), r"shape \(n,\) or \(1, n\), got \(2, 16\)"),
        (torch.ones(16), dict(seqlen=16), r"must be integers, got dtype torch.float32"),
        (["a"] * 16, dict(seqlen=16), r"token_ids must be integers, got a list"),
    ],
)
def test_wrong_use_is_refused_with_the_numbers(model: Any, ids: Any, kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        perplexity(model, ids, **kwargs)


def test_a_non_finite_window_is_named() -> None:
    model = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[96] = float("nan")
    ids = tokens(64, vocab=96)
    ids[40] = 96
    with pytest.raises(NonFiniteError, match=r"window 2 \(tokens 32 to 47\) is nan"):
        perplexity(model, ids, seqlen=16)


def test_an_overflowing_perplexity_is_infinite_and_null_in_json() -> None:
    result = PerplexityResult(math.inf, 800.0, 15, 1, 16, 1.0, 15.0)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (values["ppl"], values["nll"]) == (None, 800.0)
    assert perplexity(llama(factor=1e6), tokens(16), seqlen=16).ppl == math.inf


def test_evaluate_reads_a_dense_folder(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = "Alice was beginning to get very tired of sitting by her sister on the bank.\n" * 4
    file = tmp_path / "text.txt.gz"
    file.write_bytes(gzip.compress(text.encode()))
    result = evaluate(tiny_llama, text=file, seqlen=32, n_windows=3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(tiny_llama)(text, add_special_tokens=False)["input_ids"])
    assert ids.max() < 256  # no special token
    close(result.nll, oracle(model, ids[:96], 32))
    about = result.to_dict()["protocol"]
    assert (about["text"], about["n_rows"], about["dtype"]) == ("text.txt.gz", 1, "float32")
    json.dumps(about)


def test_evaluate_computes_in_the_dtype_asked_for(tiny_llama: Path) -> None:
    assert evaluate(tiny_llama, seqlen=32, n_windows=1, dtype="bfloat16").protocol["dtype"] == "bfloat16"
    with pytest.raises(UsageError, match=r"unknown dtype 'float8'. Did you mean"):
        evaluate(tiny_llama, dtype="float8")
    with pytest.raises(UsageError, match=r"'some/hub-id' is no folder. Download the model first"):
        evaluate("some/hub-id")


def test_evaluate_uses_the_bundled_text_when_none_is_given(tiny_llama: Path) -> None:
    result = evaluate(tiny_llama, n_windows=1)
    assert result.seqlen == 256
    assert result.protocol["text"] == "bundled alice.txt"


def test_evaluate_refuses_two_texts_and_a_wrong_path_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"both --text 'a.txt' and --dataset 'wikitext2'"):
        evaluate(tmp_path, text="a.txt", dataset="wikitext2")
    with pytest.raises(UsageError, match="no such file"):
        evaluate(tmp_path, text=tmp_path / "a.txt")


def test_evaluate_without_a_tokenizer_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot load a tokenizer from .*bare'.*Copy the tokenizer"):
        evaluate(bare, n_windows=1)
