"""Damaged input in bulk: valid files, mutated at random, for every parser of what others wrote.

A target takes a source of randomness and makes, and parses, one input; nothing but a `MendError` may come out.
"""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mendlm._gguf_file import check_gguf
from mendlm.checkpoints.header import encode_header, parse_header
from mendlm.checkpoints.journal import Entry, Journal
from mendlm.checkpoints.reader import check_index, check_weight_map, parse_json_object
from mendlm.config import Recipe
from mendlm.curves import ErrorCurve, TensorCurves
from mendlm.errors import MendError
from mendlm.evaluation.printed import read_evaluations
from mendlm.measuring import ModelCurves
from mendlm.packing import check_packed, pack_mask, unpack
from mendlm.patterns import NM
from mendlm.report.records import read_manifest
from mendlm.sweeping.grid import read_grid
from mendlm.sweeping.records import FORMAT as SWEEP_FORMAT
from mendlm.sweeping.records import SWEEP_FILE, SweepRecord, frontier, read_sweep

Target = Callable[[random.Random], None]

ODD_NUMBERS = (0, 1, -1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, 0.5, float("nan"))
ODD_VALUES = (*ODD_NUMBERS, None, True, "", "a", "\ud800", "\x1b[31m", "../x", "a" * 2000, [], {}, [[]], [2**62] * 70)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """`data` with a few random changes."""
    raw = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            del raw[at : at + rng.randint(1, 16)]
        elif kind == 3:
            raw[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 4:
            number = rng.choice([n for n in ODD_NUMBERS if isinstance(n, int) and 0 <= n < 2**64])
            raw[at : at + 8] = struct.pack("<Q", number)
        else:
            raw[at:at] = raw[at : at + rng.randint(1, 64)]
    return bytes(raw)


def mutate_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one random part replaced, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return value | {str(rng.choice(ODD_VALUES)): value[key]}
        return value | {key: mutate_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return [*value[:i], mutate_value(rng, value[i]), *value[i + 1 :]]
    return rng.choice(ODD_VALUES)


def mutate_json(rng: random.Random, value: Any) -> bytes:
    """The text of a mutated JSON value; now and then with its bytes mutated too."""
    for _ in range(rng.randint(1, 3)):
        value = mutate_value(rng, value)
    text = json.dumps(value).encode()
    return mutate_bytes(rng, text) if rng.random() < 0.2 else text


def header(rng: random.Random) -> None:
    """A safetensors file."""
    listed = [(f"layers.{i}.w", rng.choice(("F32", "BF16", "U8", "F4")), (2, i)) for i in range(rng.randint(0, 4))]
    encoded, infos = encode_header(listed, {"format": "pt"} if rng.random() < 0.5 else {})
    data = bytes(infos[-1].end if infos else 0)
    if rng.random() < 0.5:
        whole = mutate_bytes(rng, encoded + data)
    else:
        text = mutate_json(rng, json.loads(encoded[8:]))
        whole = struct.pack("<Q", len(text)) + text + data
    found = parse_header(io.BytesIO(whole), len(whole), "x.safetensors")
    if sum(info.n_bytes for info in found.tensors) + found.data_start != len(whole):
        raise AssertionError("a header was taken that does not cover its file")


def index(rng: random.Random) -> None:
    """An index, and what it says about two shards."""
    valid = {"metadata": {"total_size": 8}, "weight_map": {f"layers.{i}.w": f"m-{i % 2}.safetensors" for i in range(4)}}
    weight_map = check_weight_map(parse_json_object(mutate_json(rng, valid), "index.json"))
    if any(set(name) & set("/\\\0") or name in ("", ".", "..") for name in weight_map.values()):
        raise AssertionError("a path was taken for a file name")
    held = {f"m-{i}.safetensors": [f"layers.{i}.w", f"layers.{i + 2}.w"] for i in range(2)}
    check_index(weight_map, {name: held.get(name, ()) for name in weight_map.values()})


def packed(rng: random.Random) -> None:
    """Values and bitmask of a matrix."""
    d_out, d_in = rng.randint(0, 5), rng.randint(0, 20)
    mask = torch.tensor([rng.random() < 0.5 for _ in range(d_out * d_in)], dtype=torch.bool).reshape(d_out, d_in)
    values, bitmask = torch.ones(int(mask.sum())), pack_mask(mask)
    kind = rng.randrange(6)
    if kind == 0 and bitmask.numel():
        bitmask.view(-1)[rng.randrange(bitmask.numel())] ^= 1 << rng.randrange(8)
    elif kind == 1:
        values = torch.ones(rng.randint(0, 40))
    elif kind == 2:
        bitmask = bitmask.to(rng.choice((torch.int8, torch.int64, torch.float32)))
    elif kind == 3:
        bitmask = bitmask.reshape(rng.choice(((-1,), (1, *bitmask.shape))) if bitmask.numel() else (0,))
    elif kind == 4:
        d_in = rng.choice((0, d_in + rng.randint(1, 9), 2**40))
    check_packed(values, bitmask, d_in)
    S = unpack(values, bitmask, d_in)
    if S.shape != (d_out, d_in) or int(S.count_nonzero()) != values.numel():
        raise AssertionError("a matrix was taken whose values have no places")


def gguf(rng: random.Random) -> None:
    """The header of a GGUF file."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.block_count") + struct.pack("<II", 4, 1),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + bytes(8),
        text("general.alignment") + struct.pack("<II", 4, 32),
    ]
    tensors = [text(f"t{i}") + struct.pack("<IQQIQ", 2, 4, 2, 0, 32 * i) for i in range(2)]
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields + tensors)
    raw += bytes(-len(raw) % 32 + 64)
    check_gguf(memoryview(mutate_bytes(rng, raw)), "x.gguf")


def journal_in(folder: Path) -> Target:
    """The journal of an unfinished run."""
    path = folder / "journal.jsonl"
    journal = Journal.create(path, {"recipe": {"rank": 4}})
    for i in range(3):
        journal.add(Entry(f"t{i}", i, {"rel_error": 0.25}, 0.5))
    journal.close()
    whole = path.read_bytes()

    def parse(rng: random.Random) -> None:
        path.write_bytes(mutate_bytes(rng, whole))
        found = Journal.reopen(path)
        if found is not None:
            found.close()
            if any(
                entry != Entry(f"t{entry.crc32}", entry.crc32, {"rel_error": 0.25}, 0.5)
                for entry in found.entries.values()
            ):
                raise AssertionError("an entry was taken that nobody wrote")

    return parse


def recipe_in(folder: Path) -> Target:
    """A recipe file, YAML or JSON."""
    valid = Recipe(rank=4, overrides=({"match": "*.0.*", "rank": 2},)).to_dict()
    yaml = b"criterion: magnitude\npattern: {sparsity: 0.5, scope: row}\nrefiner: tlr\nrank: 5%\nexclude: ['*.0.*']\n"

    def parse(rng: random.Random) -> None:
        kind = rng.choice(("yaml", "json"))
        path = folder / f"recipe.{kind}"
        path.write_bytes(mutate_bytes(rng, yaml) if kind == "yaml" else mutate_json(rng, valid))
        Recipe.from_file(path)

    return parse


def grid_in(folder: Path) -> Target:
    """The file of a sweep."""
    valid = {
        "pattern": {"sparsity": 0.5},
        "refiner": "tlr",
        "sweep": {"axes": {"rank": [2, 4], "criterion": ["magnitude", "random"]}, "points": [{"rank": 8}]},
    }
    yaml = (
        b"criterion: magnitude\nsweep:\n  axes:\n    rank: [2, 4]\n    pattern: ['2:4', {sparsity: 0.5}]\n"
        b"  exclude:\n    - {rank: 2, pattern: '2:4'}\n  n_windows: 2\n"
    )

    def parse(rng: random.Random) -> None:
        kind = rng.choice(("yaml", "json"))
        path = folder / f"grid.{kind}"
        path.write_bytes(mutate_bytes(rng, yaml) if kind == "yaml" else mutate_json(rng, valid))
        read_grid(path, lambda recipe: None)

    return parse


def sweep_in(folder: Path) -> Target:
    """The records of a sweep, one a line."""
    recipe, sha = Recipe(rank=2).to_dict(), "0" * 64
    record = SweepRecord(
        "rank=2", sha, {"rank": 2}, "done", None, recipe, sha, sha, {"n_windows": 2}, 20.5, 3.02, 100, 60
    )
    row = record.to_dict() | {"format": SWEEP_FORMAT}

    def parse(rng: random.Random) -> None:
        mutated = mutate_json(rng, row) if rng.random() < 0.7 else mutate_bytes(rng, json.dumps(row).encode())
        (folder / SWEEP_FILE).write_bytes(json.dumps(row).encode() + b"\n" + mutated + b"\n")
        for found in read_sweep(folder):
            found.to_dict()
            frontier([found])

    return parse


def curves_in(folder: Path) -> Target:
    """The error curves that mendlm plan keeps."""
    path = folder / "curves.json"
    curve = ErrorCurve(NM(2, 4), 8, (0.5, 0.25, 0.125))
    ModelCurves({"model": "x"}, {"a": TensorCurves("a", (4, 4), 2.0, (0, 1, 2), (curve,))}).save(path)
    valid = json.loads(path.read_bytes())

    def parse(rng: random.Random) -> None:
        path.write_bytes(mutate_json(rng, valid))
        ModelCurves.load(path)

    return parse


def evaluations_in(folder: Path) -> Target:
    """What mendlm eval --json prints."""
    path = folder / "evaluation.json"
    protocol = {"model": "m", "text": "t.txt", "dtype": "float32"}
    valid = [{"ppl": 20.5, "nll": 3.02, "n_windows": 2, "seqlen": 51, "protocol": protocol}] * 2

    def parse(rng: random.Random) -> None:
        path.write_bytes(mutate_json(rng, valid))
        read_evaluations([path])

    return parse


def manifest_in(folder: Path, valid: dict[str, Any]) -> Target:
    """mendlm.json."""

    def parse(rng: random.Random) -> None:
        (folder / "mendlm.json").write_bytes(mutate_json(rng, valid))
        read_manifest(folder)

    return parse


def targets(folder: Path) -> dict[str, Target]:
    """Those that need nothing but a folder to write to, by name."""
    return {
        "header": header,
        "index": index,
        "packed": packed,
        "gguf": gguf,
        "journal": journal_in(folder),
        "recipe": recipe_in(folder),
        "grid": grid_in(folder),
        "sweep": sweep_in(folder),
        "curves": curves_in(folder),
        "evaluations": evaluations_in(folder),
    }


def fuzz(target: Target, n: int, seed: int = 0) -> int:
    """Parse `n` inputs; how many were refused. Whatever is not a `MendError` comes out, with the input's number."""
    n_refused = 0
    for i in range(n):
        try:
            target(random.Random(f"{seed}:{i}"))
        except MendError as err:
            n_refused += 1
            if "\n" in str(err) or len(str(err)) > 5000:
                raise AssertionError(f"input {i}: the message is no sentence: {str(err)[:200]}") from err
        except Exception as err:
            raise AssertionError(f"input {i} of seed {seed}: {type(err).__name__}: {err}") from err
    return n_refused
