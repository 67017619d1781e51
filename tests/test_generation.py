"""Generated text: that it is the model's, streamed whole, and that bad input is refused in a sentence."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mendlm
from conftest import TinyLlama
from mendlm import Recipe
from mendlm._inference import CachedReader
from mendlm.cli import main
from mendlm.cli._console import safe_text
from mendlm.errors import CheckpointError, NonFiniteError, UsageError
from mendlm.generation import _choose, _Pieces, _Sampling, generate_each
from mendlm.runtime import RUNTIMES
from tiny import BOS, EOS, byte_tokenizer, tiny_model

PROMPT = "It was the best of times"
HERE_RUNTIMES = [name for name in RUNTIMES if name != "semi-structured"]  # that one needs a CUDA device


@pytest.fixture(scope="module")
def untied(make_tiny_llama: TinyLlama) -> Path:
    """A random model with tied embeddings says the same token for ever; this one does not."""
    return make_tiny_llama(tied=False)


@pytest.fixture(scope="module")
def packed(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generation") / "out"
    mendlm.compress(untied, out, Recipe(rank=4, n_iter=2))
    return out


def without_cache(model: Any, prompt: list[int], n_new: int) -> list[int]:
    """Greedy tokens, the whole text read again for each."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n_new):
            token = model(ids, use_cache=False).logits[0, -1].argmax()
            if int(token) == EOS:
                break
            ids = torch.cat([ids, token[None, None]], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("runtime", HERE_RUNTIMES)
def test_greedy_text_is_the_argmax_of_every_step(packed: Path, runtime: str) -> None:
    tokenizer = byte_tokenizer()
    reference = without_cache(mendlm.load(packed, runtime="merged"), tokenizer(PROMPT)["input_ids"], 12)
    pieces: list[str] = []
    out = mendlm.generate(packed, PROMPT, max_new_tokens=12, runtime=runtime, on_text=pieces.append)
    assert out.text == tokenizer.decode(reference) == "".join(pieces)
    assert len(set(reference)) > 6
    assert len(pieces) > 1
    assert (out.n_prompt_tokens, out.n_new_tokens, out.stopped) == (len(PROMPT), 12, "length")
    assert out.settings["runtime"] == runtime
    assert out.settings["dtype"] == "float32"
    assert out.prefill_tokens_per_second > 0
    assert out.decode_tokens_per_second is not None
    assert out.decode_tokens_per_second > 0


@pytest.mark.parametrize(
    "kind", ["GPT2LMHeadModel", "OPTForCausalLM", "GPTNeoXForCausalLM", "MixtralForCausalLM", "Gemma2ForCausalLM"]
)
def test_the_cache_changes_nothing(kind: str) -> None:
    changes = {"head_dim": 16} if kind == "Gemma2ForCausalLM" else {}
    if kind == "OPTForCausalLM":
        changes = {"word_embed_proj_dim": 64, "ffn_dim": 96}
    model = tiny_model(kind, **changes)
    prompt, reader, tokens = list(range(40, 60)), CachedReader(model), []
    ids = torch.tensor([prompt])
    for _ in range(12):
        tokens.append(int(reader.read(ids).argmax()))
        ids = torch.tensor([tokens[-1:]])
    assert tokens == without_cache(model, prompt, 12)


def test_a_dense_model_and_one_token(tiny_llama: Path) -> None:
    out = mendlm.generate(tiny_llama, PROMPT, max_new_tokens=1)
    assert (out.n_new_tokens, out.decode_tokens_per_second, out.settings["runtime"]) == (1, None, None)


def test_draws_repeat_and_follow_the_seed(tiny_llama: Path) -> None:
    def text(**how: Any) -> str:
        return mendlm.generate(tiny_llama, PROMPT, max_new_tokens=16, **how).text

    greedy = text()
    assert text(temperature=1.0, seed=1) == text(temperature=1.0, seed=1) != text(temperature=1.0, seed=2)
    assert text(temperature=1.0, top_p=1e-6) == greedy  # the likeliest token alone
    assert text(temperature=1e-6) == greedy


def test_top_p_is_the_smallest_set_with_the_probability() -> None:
    logits, generator = torch.tensor([0.1, 0.5, 0.15, 0.25]).log(), torch.Generator().manual_seed(0)

    def drawn(top_p: float) -> set[int]:
        return {_choose(logits, _Sampling(1, 1.0, top_p, 0), generator) for _ in range(200)}

    assert drawn(0.5) == {1}
    assert drawn(0.7) == {1, 3}
    assert drawn(0.8) == {1, 2, 3}
    assert drawn(1.0) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_text_from_nan(temperature: float) -> None:
    with pytest.raises(NonFiniteError, match="logits hold nan"):
        _choose(torch.tensor([0.0, float("nan")]), _Sampling(1, temperature, 1.0, 0), torch.Generator())


def test_the_end_token_ends(untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(untied, folder)
    whole = mendlm.generate(folder, PROMPT, max_new_tokens=8)
    tokenizer, model = byte_tokenizer(), mendlm.load(folder)
    tokens = without_cache(model, tokenizer(PROMPT)["input_ids"], 8)
    end = next(i for i in range(1, 8) if tokens[i] not in tokens[:i])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, tokens[end]]}))
    out = mendlm.generate(folder, PROMPT, max_new_tokens=8)
    assert (out.stopped, out.n_new_tokens) == ("end", end + 1)
    assert whole.text.startswith(out.text)
    assert out.text == tokenizer.decode(tokens[:end])


def test_the_text_ends_where_positions_do(tiny_llama: Path) -> None:
    out = mendlm.generate(tiny_llama, "a" * 250, max_new_tokens=100)
    assert (out.stopped, out.n_new_tokens) == ("positions", 7)
    assert mendlm.generate(tiny_llama, "a" * 256, max_new_tokens=1).n_new_tokens == 1


def test_pieces_join_to_the_text() -> None:
    tokenizer = byte_tokenizer()
    text = "naïve — 日本語, 🙂\n\tend "
    pieces = _Pieces(tokenizer, tokenizer("before ")["input_ids"])
    streamed = [pieces.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(streamed) + pieces.rest() == text
    assert "🙂" in streamed
    half = _Pieces(tokenizer, [65])
    assert half.add(tokenizer("日")["input_ids"][0]) == ""
    assert half.rest() == "\ufffd"


def test_leading_spaces_that_a_decoder_drops_stay() -> None:
    class Stripping:
        """As SentencePiece does: what is decoded loses its first space."""

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join([" one", " two", "\n", " three"][i] for i in ids).removeprefix(" ")

    pieces = _Pieces(Stripping(), [0])
    assert [pieces.add(token) for token in (1, 2, 3)] == [" two", "\n", " three"]


def test_chat(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    written = "<user>Hi<assistant>"
    out = mendlm.generate(folder, "Hi", max_new_tokens=6, chat=True)
    assert out.n_prompt_tokens == 1 + len(written)
    reference = without_cache(mendlm.load(folder), [BOS, *tokenizer(written)["input_ids"]], 6)
    assert out.text == tokenizer.decode(reference)
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"chat template in .* fails: no users here\. Leave out --chat"):
        mendlm.generate(folder, "Hi", chat=True)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "\udcff"}, "not UTF-8"),
        ({"prompt": "a" * 257}, "the prompt has 257 tokens, more than the 256 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 0.9}, "top_p 0.9 has no effect at temperature 0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens must be a whole number, got 2\.5"),
        ({"seed": "1"}, "seed must be a whole number, got '1'"),
        ({"seed": -1}, "seed must be in"),
        ({"chat": True}, "has no chat template"),
        ({"runtime": "packed"}, "is not compressed by mendlm"),
        ({"runtime": "packd"}, "Did you mean 'packed'"),
        ({"dtype": "float23"}, "Did you mean 'float32'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_wrong_use(tiny_llama: Path, how: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        mendlm.generate(tiny_llama, **({"prompt": PROMPT} | how))


def test_a_folder_that_cannot_write(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        mendlm.generate(tmp_path / "nowhere", PROMPT)
    mute = tmp_path / "mute"
    shutil.copytree(tiny_llama, mute, ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
        mendlm.generate(mute, PROMPT)
    foreign = tmp_path / "foreign"
    tiny_model("LlamaForCausalLM", vocab_size=60).save_pretrained(foreign)
    byte_tokenizer().save_pretrained(foreign)
    with pytest.raises(UsageError, match="is not in the vocabulary of 60"):
        mendlm.generate(foreign, PROMPT)


def test_each_model_has_its_own_tokenizer_and_the_dense_one_no_runtime(packed: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    other = tmp_path / "words"
    tiny_model("LlamaForCausalLM", vocab_size=10, seed=1).save_pretrained(other)
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "It": 1, "was": 2} | {f"w{i}": i for i in range(3, 10)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(other)
    heard: list[str] = ["", ""]

    def on_text(index: int, piece: str) -> None:
        heard[index] += piece

    first, second = generate_each([packed, other], "It was", max_new_tokens=5, runtime="packed", on_text=on_text)
    assert (first.n_prompt_tokens, second.n_prompt_tokens) == (6, 2)
    assert (first.settings["runtime"], second.settings["runtime"]) == ("packed", None)
    assert heard == [first.text, second.text]


# the command line


def test_text_on_stdout_and_facts_on_stderr(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = mendlm.generate(packed, PROMPT, max_new_tokens=12).text
    assert main(["generate", str(packed), PROMPT, "--max-new-tokens", "12"]) == 0
    shown = capsys.readouterr()
    assert shown.out == safe_text(expected) + "\n"
    assert re.fullmatch(
        r"24 \+ 12 tokens, cut at --max-new-tokens; prefill \S+ tokens/s, decode \S+ tokens/s\n", shown.err
    )


def test_compare_in_a_pipe(packed: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = [str(packed), PROMPT, "--max-new-tokens", "6", "--compare", str(tiny_llama)]
    assert main(["generate", *how]) == 0
    shown = capsys.readouterr()
    texts = [safe_text(mendlm.generate(folder, PROMPT, max_new_tokens=6).text) for folder in (packed, tiny_llama)]
    assert shown.out == f"== {packed} ==\n{texts[0]}\n\n== {tiny_llama} ==\n{texts[1]}\n"
    assert [line.split(": ")[0] for line in shown.err.splitlines()] == [str(packed), str(tiny_llama)]
    assert main(["generate", *how, "--json"]) == 0
    documents = json.loads(capsys.readouterr().out)
    assert [document["model"] for document in documents] == [str(packed), str(tiny_llama)]


def test_json(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--max-new-tokens", "5", "--temperature", "0.5", "--top-p", "0.9", "--seed", "3", "--runtime", "packed"]
    assert main(["generate", str(packed), PROMPT, *how, "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert shown.err == ""
    assert set(document) == {
        *("model", "prompt", "text", "n_prompt_tokens", "n_new_tokens", "stopped"),
        *("prefill_tokens_per_second", "decode_tokens_per_second", "settings"),
    }
    assert (document["model"], document["prompt"]) == (str(packed), PROMPT)
    assert document["settings"] == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "chat": False,
        "device": "cpu",
        "dtype": "float32",
        "runtime": "packed",
    }


def test_the_prompt_from_stdin(tiny_llama: Path) -> None:
    args = [sys.executable, "-m", "mendlm", "generate", str(tiny_llama), "-", "--max-new-tokens", "2", "--json"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(args, input=b"one\ntwo\n", capture_output=True, env=env, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["prompt"] == "one\ntwo"


def test_two_columns_on_a_terminal(packed: Path, tiny_llama: Path) -> None:
    ours, theirs = pty.openpty()
    args = [sys.executable, "-m", "mendlm", "generate", str(packed), PROMPT, "--compare", str(tiny_llama)]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "400", "LINES": "40", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*args, "--max-new-tokens", "8"], stdout=theirs, stderr=subprocess.DEVNULL, env=env) as run:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # EIO: the other end was closed
            pass
    os.close(ours)
    assert run.returncode == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).splitlines()
    assert any(str(packed) in line and str(tiny_llama) in line for line in lines)


def test_control_characters_never_reach_a_terminal() -> None:
    raw = "a\tb\nc\x1b[31m\r\x07\x9b\u202e\u00a0\u3000\u0915\u094d\u200d\u0937 é 🙂"
    assert safe_text(raw) == ("a\tb\nc\\x1b[31m\\r\\x07\\x9b\\u202e\u00a0\u3000\u0915\u094d\u200d\u0937 é 🙂")


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["@nowhere", "x"], 2, "is no folder"),
        (["@tiny", " "], 2, "the prompt is empty"),
        (["@tiny"], 2, "Missing argument 'PROMPT'"),
        (["@tiny", "x", "--compare", "@nowhere"], 2, "nowhere' is no folder"),
        (["@tiny", "x", "--top-p", "2"], 2, "top_p must be in"),
        (["@tiny", "x", "--max-new-tokens", "0"], 2, "Invalid value for '--max-new-tokens'"),
    ],
)
def test_bad_input_is_one_sentence(
    args: list[str], code: int, sentence: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"@tiny": str(tiny_llama), "@nowhere": str(tmp_path / "nowhere")}
    assert main(["generate", *(places.get(arg, arg) for arg in args)]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert re.search(sentence, shown.err), shown.err
