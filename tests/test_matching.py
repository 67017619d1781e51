"""Block matching: the loss on windows held out falls or nothing changes, masks stay, runs repeat and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mendlm
from conftest import TinyLlama
from faulting import bytes_of
from mendlm import NM, TLR, Recipe, Unstructured
from mendlm.calibration.activations import Activations
from mendlm.calibration.matching import (
    PackedWeight,
    State,
    batch_sizes,
    match_block,
    shared_frac,
    split_windows,
)
from mendlm.config import Calibration, Matching
from mendlm.errors import UsageError
from mendlm.packing import pack_mask, unpack, unpack_mask
from mendlm.pipeline import BlockStarted, CompressionResult, Event, TensorDone, compress, plan
from mendlm.report.records import BlockRecord, read_manifest
from test_family_models import KINDS, Kind, build

CPU = torch.device("cpu")
N_STEPS = 40
DEFAULTS: dict[str, Any] = {"refiner": TLR(rank=4, n_iter=3), "pattern": NM(2, 4)}


def recipe(n_steps: int = N_STEPS, *, text: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    calibration = Calibration(
        source="random-tokens", **({"n_sequences": 33, "seqlen": 32, "batch_size": 8} | (text or {}))
    )
    matching = Matching(n_steps=n_steps, lr=0.01) if n_steps else None
    return Recipe(**(DEFAULTS | {"calibration": calibration, "match_blocks": matching} | fields))


def matching_of(result: CompressionResult) -> tuple[BlockRecord, ...]:
    return read_manifest(result.out).matching


# The numerics, on a block of our own.


class Toy(nn.Module):
    """A residual block with a norm, two matrices and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return y


def toy(rank: int = 2, dtype: torch.dtype = torch.float32, n: int = 12) -> tuple[Toy, State, Activations, Activations]:
    """A block, its magnitude-pruned form with a small low-rank part, inputs and what the dense block makes of them."""
    generator = torch.Generator().manual_seed(0)
    block = Toy().requires_grad_(False)
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    weights = {}
    for path in ("up", "down"):
        W = block.get_submodule(path).get_parameter("weight")
        mask = W.abs() > W.abs().median()
        A = 0.1 * torch.randn(rank, W.shape[1], generator=generator)
        B = 0.1 * torch.randn(W.shape[0], rank, generator=generator)
        parts = (W[mask].to(dtype), pack_mask(mask), A.to(dtype), B.to(dtype))
        weights[path] = PackedWeight(parts, W.shape[1])
    vectors = {name: block.get_parameter(name).to(dtype) for name in ("norm.weight", "norm.bias", "up.bias")}
    inputs, targets = (Activations(n, 5, 8, torch.float32, 4, None) for _ in range(2))
    for batch, target in zip(inputs.batches(), targets.batches(), strict=True):
        batch.copy_(torch.randn(batch.shape, generator=generator))
        target.copy_(block(batch))
    return block, State(weights, vectors), inputs, targets


def match_toy(
    block: Toy,
    state: State,
    inputs: Activations,
    targets: Activations,
    matching: Matching,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    return match_block(
        block,
        lambda call, hidden: call(hidden),
        state,
        inputs,
        targets,
        matching,
        device=CPU,
        dtype=dtype,
        generator=torch.Generator().manual_seed(seed),
    )


def loss_by_hand(block: Toy, state: State, inputs: Tensor, targets: Tensor) -> float:
    copy = Toy()
    copy.load_state_dict(block.state_dict() | {name: vector.float() for name, vector in state.vectors.items()})
    for path, weight in state.weights.items():
        values, bitmask, A, B = weight.parts
        dense = unpack(values, bitmask, weight.d_in).float() + B.float() @ A.float()
        copy.get_submodule(path).get_parameter("weight").data.copy_(dense)
    with torch.no_grad():
        errors = (copy(inputs) - targets).double().square().sum(-1) / targets.double().square().sum(-1)
        return float(errors.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [0, 2])
def test_the_loss_falls_and_is_that_of_what_is_stored(rank: int, dtype: torch.dtype) -> None:
    block, state, inputs, targets = toy(rank, dtype)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    match = match_toy(block, state, inputs, targets, Matching(n_steps=200, lr=0.02))
    assert match.loss_after < 0.5 * match.loss_before
    assert 0 < match.best_step <= match.n_steps <= 200
    last = torch.arange(10, 12)  # an eighth of 12 windows, rounded
    for found, loss in ((state, match.loss_before), (match.state, match.loss_after)):
        assert loss_by_hand(block, found, inputs.select(last), targets.select(last)) == pytest.approx(loss, rel=1e-4)
    for path, weight in match.state.weights.items():
        old = state.weights[path]
        assert [(p.dtype, p.shape) for p in weight.parts] == [(p.dtype, p.shape) for p in old.parts]
        assert torch.equal(weight.parts[1], old.parts[1])
        assert not torch.equal(weight.parts[0], old.parts[0])
        S = unpack(weight.parts[0], weight.parts[1], weight.d_in)
        assert not bool(S[~unpack_mask(old.parts[1], old.d_in)].any())
    assert all(not torch.equal(match.state.vectors[name], vector) for name, vector in state.vectors.items())
    assert {vector.dtype for vector in match.state.vectors.values()} == {dtype}
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


def test_gradients_that_float16_has_no_numbers_for() -> None:
    """Of a mean over thousands of tokens whose norms are large, as those of real models are."""
    block, state, _, _ = toy(n=2)
    losses = {}
    for dtype in (torch.float32, torch.float16):
        inputs, targets = (Activations(800, 5, 8, dtype, 100, None) for _ in range(2))
        generator = torch.Generator().manual_seed(1)
        for batch, target in zip(inputs.batches(), targets.batches(), strict=True):
            hidden = 100 * torch.randn(batch.shape, generator=generator)
            batch.copy_(hidden)
            target.copy_(block(hidden))
        match = match_toy(block, state, inputs, targets, Matching(n_steps=60, lr=0.02, batch_size=600), dtype=dtype)
        losses[dtype] = match.loss_after / match.loss_before
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=0.05)
    assert losses[torch.float32] < 0.7


def test_a_rate_that_breaks_everything_leaves_everything_as_it_was() -> None:
    for lr in (50.0, 1e30):
        block, state, inputs, targets = toy()
        match = match_toy(block, state, inputs, targets, Matching(n_steps=200, lr=lr))
        assert match.state is state
        assert match.loss_after == match.loss_before
        assert match.best_step == 0
        assert match.n_steps <= 100  # the windows held out, or a loss that is not finite, end it early


def test_what_is_perfect_already_stays() -> None:
    block, state, inputs, _ = toy()
    exact = {}
    for path in ("up", "down"):
        W = block.get_submodule(path).get_parameter("weight")
        mask = torch.ones_like(W, dtype=torch.bool)
        none = (torch.zeros(0, W.shape[1]), torch.zeros(W.shape[0], 0))
        exact[path] = PackedWeight((W.flatten(), pack_mask(mask), *none), W.shape[1])
    targets = Activations(12, 5, 8, torch.float32, 4, None)
    for batch, target in zip(inputs.batches(), targets.batches(), strict=True):
        target.copy_(block(batch))
    match = match_toy(block, State(exact, state.vectors), inputs, targets, Matching(n_steps=50))
    assert match.loss_after == match.loss_before < 1e-12


def test_a_block_of_zeros_has_nothing_to_tune() -> None:
    block, state, inputs, targets = toy()
    zeros = {
        path: PackedWeight(
            tuple(torch.zeros_like(p) if p.is_floating_point() else p for p in weight.parts), weight.d_in
        )  # type: ignore[arg-type]
        for path, weight in state.weights.items()
    }
    start = State(zeros, {name: torch.zeros_like(vector) for name, vector in state.vectors.items()})
    match = match_toy(block, start, inputs, targets, Matching(n_steps=5))
    assert match.state is start
    assert match.n_steps == 0


def test_batches_follow_the_generator_alone() -> None:
    first, again, other = (match_toy(*toy(), Matching(n_steps=50), seed=seed) for seed in (0, 0, 1))
    values = [match.state.weights["up"].parts[0] for match in (first, again, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize(
    ("n", "share", "n_train"), [(2, 0.01, 1), (2, 0.99, 1), (8, 0.125, 7), (16, 0.125, 14), (5, 0.9, 1)]
)
def test_at_least_one_window_is_on_either_side(n: int, share: float, n_train: int) -> None:
    assert split_windows(n, share) == n_train


def test_the_batches_that_will_run() -> None:
    assert batch_sizes(9, Matching(n_steps=1, batch_size=2)) == {1, 2}
    assert batch_sizes(24, Matching(n_steps=1, batch_size=2)) == {1, 2}
    assert batch_sizes(32, Matching(n_steps=1, batch_size=2)) == {2}
    assert batch_sizes(32, Matching(n_steps=1, batch_size=100)) == {4, 28}
    assert batch_sizes(2, Matching(n_steps=1)) == {1}


# Whole runs.

METHODS: dict[str, dict[str, Any]] = {
    "2:4": {},
    "unstructured": {"pattern": Unstructured(0.6, "row"), "criterion": "wanda"},
    "rank 0": {"refiner": "none", "rank": 0},
    "prune only by sparsegpt": {"refiner": "none", "criterion": "sparsegpt"},
    "plain metric": {"metric": "plain"},
    "oats": {"refiner": "oats", "rank": 4, "n_iter": 3, "pattern": Unstructured(0.5, "row")},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", METHODS)
def test_matching_with_every_method(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    plain = compress(tiny_llama, tmp_path / "plain", recipe(0, **METHODS[name]))
    result = compress(tiny_llama, tmp_path / "matched", recipe(**METHODS[name]))
    blocks = matching_of(result)
    assert [block.block for block in blocks] == [0, 1]
    assert all(block.loss_after <= block.loss_before for block in blocks)
    assert blocks[0].status == "improved"
    before, after = (load_file(folder / "model.safetensors") for folder in (plain.out, result.out))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    first = {n for n in before if n.startswith("model.layers.0.")}
    masks = {n for n in first if n.endswith("_bitmask")}
    assert all(torch.equal(before[n], after[n]) for n in masks)
    assert all(not torch.equal(before[n], after[n]) for n in first - masks if after[n].numel())
    assert set(blocks[0].vectors) == {n for n in first if n.endswith("norm.weight")}
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert read_manifest(plain.out).matching == ()


def test_the_outputs_of_the_whole_model_come_closer(tiny_llama: Path, tmp_path: Path) -> None:
    """The last hidden states on tokens that matching has not seen."""
    ids = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(9))
    found = {}
    with torch.no_grad():  # which matching does not inherit
        want = mendlm.load(tiny_llama).model(ids).last_hidden_state
        for n_steps in (0, 100):
            compress(tiny_llama, tmp_path / str(n_steps), recipe(n_steps, refiner="none"))
            states = mendlm.load(tmp_path / str(n_steps)).model(ids).last_hidden_state
            found[n_steps] = float((states - want).square().sum())
    assert found[100] < 0.75 * found[0]


def test_the_records_are_of_what_is_stored(tiny_llama: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    result = compress(tiny_llama, tmp_path / "out", recipe(), on_event=events.append)
    phases = [(e.index, e.phase) for e in events if isinstance(e, BlockStarted)]
    each = ["gather", "dense", "match"]
    assert phases == [(1, p) for p in [*each, "propagate"]] + [(2, p) for p in each]
    assert [e.index for e in events if isinstance(e, TensorDone)] == list(range(1, 15))
    dense, stored = load_file(tiny_llama / "model.safetensors"), mendlm.load(tmp_path / "out").state_dict()
    for record in result.records:
        W = dense[record.name].double()
        error = float(torch.linalg.vector_norm(W - stored[record.name]) / torch.linalg.vector_norm(W))
        assert record.rel_error == pytest.approx(error, rel=1e-4)
        assert record.rel_output_error is not None
    for block in matching_of(result):
        assert block.n_windows + block.n_held_out == 33
        assert BlockRecord.from_dict(json.loads(json.dumps(block.to_dict()))) == block
    ranks = {e.record.name: e.record.rel_error for e in events if isinstance(e, TensorDone)}
    assert ranks == {record.name: record.rel_error for record in result.records}


def test_a_run_stopped_anywhere_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    matched = recipe(26)
    compress(tiny_llama, tmp_path / "whole", matched)
    compress(tiny_llama, tmp_path / "again", matched)
    expected = bytes_of(tmp_path / "whole")
    assert bytes_of(tmp_path / "again") == expected
    for stop_after, resumed in ((1, 0), (7, 0), (8, 7), (13, 7)):  # of a block that is not whole nothing counts
        out = tmp_path / f"stopped-{stop_after}"

        def stop(event: Event, at: int = stop_after) -> None:
            if isinstance(event, TensorDone) and event.index == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress(tiny_llama, out, matched, on_event=stop)
        result = compress(tiny_llama, out, matched, resume=True)
        assert result.resumed == resumed
        assert bytes_of(out) == expected, stop_after


def test_blocks_that_are_skipped_stay_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    result = compress(tiny_llama, tmp_path / "out", recipe(skip_layers=(0,)))
    assert [block.block for block in matching_of(result)] == [1]
    dense, stored = (load_file(folder / "model.safetensors") for folder in (tiny_llama, result.out))
    first = [n for n in dense if n.startswith("model.layers.0.")]
    assert len(first) == 9
    assert all(torch.equal(dense[n], stored[n]) for n in first)


def test_shards_and_activations_in_a_file(make_tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = make_tiny_llama(max_shard_size="100KB")
    (tmp_path / "activations").mkdir()
    compress(folder, tmp_path / "memory", recipe())
    compress(folder, tmp_path / "file", recipe(), activation_dir=tmp_path / "activations")
    assert bytes_of(tmp_path / "memory") == bytes_of(tmp_path / "file")
    assert len(list((tmp_path / "memory").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_family(kind: Kind, tmp_path: Path) -> None:
    """Transposed, fused and stacked weights, biases, experts that few tokens reach; routers are left alone."""
    build(kind).save_pretrained(tmp_path / "dense", save_original_format=not kind.stacked)
    how = recipe(25, refiner=TLR(rank=2, n_iter=2))
    result = compress(tmp_path / "dense", tmp_path / "out", how)
    blocks = matching_of(result)
    assert blocks[0].status == "improved"
    assert all(block.loss_after <= block.loss_before for block in blocks)
    dense, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "dense", result.out))
    copied = {t.name for t in plan(tmp_path / "dense", how).tensors if t.action == "copy"}
    changed = {name for name in copied if not torch.equal(dense[name], stored[name])}
    assert changed == {name for block in blocks for name in block.vectors}
    blocks_name = "h" if kind.model_type == "gpt2" else "layers"
    for block in blocks:
        own = {n for n in copied if dense[n].ndim == 1 and f"{blocks_name}.{block.block}." in n}
        assert set(block.vectors) == (own if block.status == "improved" else set())
    ids = torch.randint(3, 40, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert bool(mendlm.load(result.out)(ids).logits.isfinite().all())


# What is refused.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"match_blocks": 10}, r"match_blocks compares outputs of blocks, so it needs calibration data"),
        ({"match_blocks": 10, "calibration": {"source": "self", "propagate": "dense"}}, r"Take propagate 'sequential'"),
        (
            {"match_blocks": 10, "calibration": {"source": "self", "n_sequences": 1}},
            r"holds out others, got 1 in all\. Raise --n-sequences",
        ),
        ({"match_blocks": -1, "calibration": "self"}, r"match_blocks\.n_steps: .*greater than or equal to 1, got -1"),
        ({"match_blocks": True, "calibration": "self"}, r"match_blocks: .*got True"),
        ({"match_blocks": {"lr": 0}, "calibration": "self"}, r"match_blocks\.lr: .*greater than 0, got 0"),
        ({"match_blocks": {"held_out": 1}, "calibration": "self"}, r"match_blocks\.held_out: .*less than 1, got 1"),
        ({"match_blocks": {"steps": 1}, "calibration": "self"}, r"unknown recipe field 'steps' in match_blocks"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**fields)


def test_forms_of_the_field() -> None:
    assert Recipe(match_blocks=0) == Recipe()
    short = Recipe(match_blocks=30, calibration="self")
    assert short.match_blocks == Matching(n_steps=30)
    assert Recipe(**json.loads(json.dumps(short.to_dict()))) == short


@pytest.mark.parametrize("windows", ["random", "leading"])
def test_text_held_out_and_tuned_on_is_pointed_out(windows: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Random windows of one text overlap."""
    words = torch.randint(10**6, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(map(str, words))[:2100])
    calibration = Calibration(source=str(tmp_path / "text.txt"), n_sequences=32, seqlen=64, windows=windows)
    for matching in (Matching(n_steps=1), None):
        out = tmp_path / f"{matching is None}"
        result = compress(
            tiny_llama, out, Recipe(**DEFAULTS, calibration=calibration, metric="gram", match_blocks=matching)
        )
        facts = read_manifest(result.out).calibration
        assert facts is not None
        found = [warning for warning in facts["warnings"] if "of the text that block matching holds out" in warning]
        assert len(found) == (windows == "random" and matching is not None)


def test_the_share_of_what_is_held_out_and_tuned_on() -> None:
    text = torch.randint(50_000, (1000,), generator=torch.Generator().manual_seed(0))
    tuned = text[:200].reshape(4, 50)
    for start, is_shared in ((950, False), (100, True), (110, True), (190, False)):
        ids = torch.cat([tuned, text[start : start + 50][None]])
        expected = sum(
            any(torch.equal(ids[4, i : i + 16], row[j : j + 16]) for row in tuned for j in range(35)) for i in range(35)
        )
        assert shared_frac(ids, 4) == pytest.approx(expected / 35)
        assert (expected > 0) is is_shared
    short = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
    assert shared_frac(short, 2) == 1
    assert shared_frac(short[:2], 1) == 0


def test_two_windows_are_enough(tiny_llama: Path, tmp_path: Path) -> None:
    blocks = matching_of(compress(tiny_llama, tmp_path / "out", recipe(text={"n_sequences": 2})))
    assert [(block.n_windows, block.n_held_out) for block in blocks] == [(1, 1), (1, 1)]
