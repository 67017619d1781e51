"""`export`: a compressed folder in another layout, tensor by tensor, into a folder that appears when it is complete."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mendlm
from mendlm.checkpoints.finish import hash_files, make_index, side_files, to_json
from mendlm.checkpoints.folder import Folder, open_folder
from mendlm.checkpoints.header import FLOATING
from mendlm.checkpoints.reader import CONFIG_FILE, INDEX_FILE, as_bytes, read_chunks
from mendlm.checkpoints.staging import Staging, check_space, check_target, open_staging
from mendlm.checkpoints.writer import ShardLayout, ShardWriter, copy_file, write_file
from mendlm.errors import CheckpointError, MendError, UsageError, located
from mendlm.evaluation.printed import Evaluation, read_evaluations
from mendlm.exporting._base import Layer, Layout, Source, Stored
from mendlm.exporting._card import CARD_FILE, ORIGINAL_CARD_FILE, model_card
from mendlm.exporting.dense import Dense
from mendlm.exporting.factored import Factored
from mendlm.exporting.peft import Peft
from mendlm.exporting.semi_structured import SemiStructured
from mendlm.families import STACKED_LAYOUT, split_expert
from mendlm.linalg import all_finite
from mendlm.names import lookup
from mendlm.paths import local_path
from mendlm.pipeline import stat_inputs
from mendlm.report.records import EXPORT_FILE, MANIFEST_FILE, read_manifest

LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (Dense, Peft, SemiStructured, Factored)}
_SLACK_BYTES = 2**20


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote.

    Attributes
    ----------
    path : the folder.
    layout : its name.
    n_layers : compressed weights in it.
    dense_bytes, packed_bytes, output_bytes : tensors of the original model, of the compressed folder, and written.
    seconds : wall time.
    """

    path: Path
    layout: str
    n_layers: int
    dense_bytes: int
    packed_bytes: int
    output_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {**vars(self), "path": str(self.path)}


@dataclass(frozen=True)
class _Job:
    """Some tensors to write and where their bytes come from: for each tensor an iterable of chunks.

    `n_layers` is the number of compressed weights among them.
    """

    name: str
    n_layers: int
    stored: Sequence[Stored]
    chunks: Callable[[], Iterable[Iterable[memoryview]]]


def export(
    folder: str | Path,
    dest: str | Path,
    to: str = "dense",
    *,
    uniform_rank: int | str | None = None,
    base_name: str | None = None,
    evaluations: Iterable[str | Path] = (),
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> ExportResult:
    """Write a folder that `compress` wrote in another layout, with a model card.

    Parameters
    ----------
    folder : compressed by mendlm; it is only read.
    dest : folder to write; its parents are made.
    to : "dense" (an ordinary checkpoint of S + B @ A), "peft" (S as an ordinary checkpoint in ``dest/base``, B and A
        as a LoRA adapter in `dest`), "semi-structured" (2:4 for torch's CUDA kernels) or "safetensors-factored" (S, A
        and B as plain tensors).
    uniform_rank : for "peft": zero-pad every factor to one rank, a number or "auto" (the smallest that vLLM serves).
    base_name : for "peft": what the adapter calls its base model, e.g. a hub id; ``dest/base`` if not given.
    evaluations : files that ``mendlm eval --json`` printed; the card shows their perplexities.
    overwrite : replace what `dest` holds, if that is a checkpoint folder and not the model that was compressed.
    progress : called with (layers done, layers, name).

    Returns
    -------
    ExportResult

    Raises
    ------
    UsageError : not a folder of mendlm, an unknown layout, one that cannot hold this model (the sentence says which
        layer and what to do), or `dest` is in the way.
    CheckpointError : the folder is damaged or of a newer format.
    StorageError : too little disk space, or writing failed.

    Notes
    -----
    One layer is in memory at a time. Nothing appears under `dest` before everything is written; after an error nothing
    is left behind.
    """
    started = time.monotonic()
    dest = local_path(dest)
    lookup(LAYOUTS, to, "layout")
    if to != Peft.name and (uniform_rank is not None or base_name is not None):
        raise UsageError(f"uniform_rank and base_name are for the layout 'peft', not {to!r}. Leave them out.")
    layout = Peft(uniform_rank=uniform_rank, base_name=base_name, dest=str(dest)) if to == Peft.name else LAYOUTS[to]()
    opened = _open(local_path(folder))
    checkpoint = opened.checkpoint
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    layers = [Layer.of(name, packed, checkpoint.model_type) for name, packed in sorted(opened.packed.items())]
    for layer in layers:
        layer.check()
    manifest = _manifest(checkpoint.folder)
    source = Source(checkpoint.folder, config, tuple(layers), manifest)
    evaluated = [replace(e, model=Path(e.model).name) for e in read_evaluations(evaluations)]  # no paths of a machine
    layout.check(source)
    jobs = _jobs(opened, source, layout)
    shards = _shard_layouts(jobs)
    target = check_target(dest, checkpoint.folder, names=("DEST", "OUT"))
    if overwrite:
        _check_not_original(target, manifest)
    fingerprint = {"export": to, "options": [uniform_rank, base_name], "inputs": stat_inputs(checkpoint)}
    staging = open_staging(target, fingerprint, resume=True, overwrite=overwrite)
    try:
        (staging.files / layout.base).mkdir(exist_ok=True)
        check_space(staging, sum(shard.size_bytes for shard in shards.values()) + _SLACK_BYTES)
        _write(staging, jobs, shards, len(layers), progress)
        output_bytes = sum(shard.data_bytes for shard in shards.values())
        result = ExportResult(
            path=dest,
            layout=to,
            n_layers=len(layers),
            dense_bytes=_dense_bytes(opened),
            packed_bytes=sum(info.n_bytes for shard in checkpoint.shards for info in shard.header.tensors),
            output_bytes=output_bytes,
            seconds=time.monotonic() - started,
        )
        _finish(staging.files, opened, source, layout, shards, result, evaluated)
    except BaseException:
        staging.discard()
        raise
    staging.publish()
    return result


def _open(folder: Path) -> Folder:
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is not a folder. Give one that mendlm compress wrote.")
    opened = open_folder(folder)
    if opened.layout == "dense":
        raise UsageError(f"{str(folder)!r} is not compressed by mendlm. Give a folder that mendlm compress wrote.")
    _check_modules(opened.config["quantization_config"].get("modules"), opened)
    return opened


def _check_modules(modules: Any, opened: Folder) -> None:
    """config.json and the tensors must tell the same."""
    promised = modules if isinstance(modules, dict) else {}
    held = {name.removesuffix(".weight"): packed for name, packed in opened.packed.items()}
    if odd := sorted(promised.keys() ^ held.keys()):
        raise CheckpointError(
            f"config.json and the weights differ in which layers are compressed, e.g. {odd[0]!r}. "
            "They are of different versions: fetch both again."
        )
    for path, packed in held.items():
        facts = {"n_kept": packed.n_kept, "rank": packed.rank}
        if promised[path] != facts:
            raise CheckpointError(
                f"config.json says {promised[path]!r} of {path!r}, its tensors have {facts!r}. Fetch the folder again."
            )


def _manifest(folder: Path) -> Mapping[str, Any]:
    """mendlm.json; a folder that `save_pretrained` wrote has none."""
    return read_manifest(folder).to_dict() if (folder / MANIFEST_FILE).exists() else {}


def _check_not_original(dest: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse to replace the model that was compressed, known by its files as mendlm.json states them.

    The weights are hashed only where every other file is the same.
    """
    inputs: Mapping[str, Mapping[str, Any]] = manifest.get("inputs", {})
    if not inputs or any((dest / name).exists() for name in (MANIFEST_FILE, EXPORT_FILE)):
        return
    sizes = {name: (dest / name).stat().st_size for name in inputs if (dest / name).is_file()}
    if sizes != {name: facts["size_bytes"] for name, facts in inputs.items()}:
        return
    if any(hash_files(dest, [name])[name] != inputs[name] for name in sorted(sizes, key=sizes.__getitem__)):
        return
    raise UsageError(f"DEST {str(dest)!r} is the model that was compressed, and will not be replaced. Choose another.")


def _dense_bytes(opened: Folder) -> int:
    sizes = [part.info.n_bytes for part in opened.copied.values()]
    for packed in opened.packed.values():
        d_out, d_in = packed.shape
        sizes.append(d_out * d_in * FLOATING[packed.values.info.dtype].itemsize)
    return sum(sizes)


def _jobs(opened: Folder, source: Source, layout: Layout) -> list[_Job]:
    base = f"{layout.base}/" if layout.base else ""
    jobs = []
    for name, part in opened.copied.items():
        stored = Stored(base + part.shard.name, name, part.info.dtype, part.info.shape)
        jobs.append(_Job(name, 0, [stored], lambda part=part: [read_chunks(part.shard, part.info)]))  # type: ignore[misc]
    stacks: dict[str, list[Layer]] = defaultdict(list)
    for layer in source.layers:
        if layout.stacks and (stack := _stack_of(layer, opened)):
            stacks[stack].append(layer)
            continue
        stored_parts = layout.stored(layer, layer.packed.values.shard.name)
        jobs.append(_Job(layer.path, 1, stored_parts, lambda layer=layer: _chunks(layout, layer)))  # type: ignore[misc]
    for stack, members in stacks.items():
        jobs.append(_stacked(stack, members, layout))
    return jobs


def _chunks(layout: Layout, layer: Layer) -> Iterator[list[memoryview]]:
    for tensor in layout.tensors(layer):
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError("a value is NaN or infinite. Compress the model again.")
        yield [as_bytes(tensor)] if tensor.numel() else []


def _stack_of(layer: Layer, opened: Folder) -> str | None:
    """Name of the 3-D tensor of the input that this expert's projection was a slice of, if it was."""
    expert = split_expert(layer.path)
    if expert is None:
        return None
    path, _, projection = expert
    names = {f"{path}.{name}" for name in STACKED_LAYOUT.names}
    guard = opened.config["quantization_config"].get("guard")
    fused = f"{path}.0.{STACKED_LAYOUT.gate_up[0]}.weight"
    stacked = fused in opened.packed or guard in names or not names.isdisjoint(opened.copied)
    return f"{path}.{projection}" if stacked else None


def _stacked(stack: str, members: list[Layer], layout: Layout) -> _Job:
    """One 3-D tensor (E, d_out, d_in) of the experts' matrices, written one after the other."""
    by_index = {expert[1]: layer for layer in members if (expert := split_expert(layer.path)) is not None}
    first = members[0]
    if sorted(by_index) != list(range(len(members))) or any(m.shape != first.shape for m in members):
        raise CheckpointError(
            f"{stack!r} is not complete: some experts are missing or of another shape. Fetch it again."
        )
    stored = Stored(first.packed.values.shard.name, stack, first.dtype, (len(members), *first.shape))

    def chunks() -> Iterator[Iterator[memoryview]]:
        yield (chunk for index in range(len(members)) for part in _chunks(layout, by_index[index]) for chunk in part)

    return _Job(stack, len(members), [stored], chunks)


def _shard_layouts(jobs: Iterable[_Job]) -> dict[str, ShardLayout]:
    by_file: dict[str, list[tuple[str, str, tuple[int, ...]]]] = defaultdict(list)
    for job in jobs:
        for stored in job.stored:
            by_file[stored.file].append((stored.name, stored.dtype, stored.shape))
    return {file: ShardLayout(file, tensors, {"format": "pt"}) for file, tensors in sorted(by_file.items())}


def _write(
    staging: Staging,
    jobs: Iterable[_Job],
    shards: Mapping[str, ShardLayout],
    n_layers: int,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    with ExitStack() as stack:
        writers = {file: stack.enter_context(ShardWriter(staging.files, shard)) for file, shard in shards.items()}
        for writer in writers.values():
            writer.allocate()
        done = 0
        for job in jobs:
            try:
                for stored, chunks in zip(job.stored, job.chunks(), strict=True):
                    writers[stored.file].write(stored.name, chunks)
            except MendError as err:
                raise located(err, job.name) from err
            done += job.n_layers
            if job.n_layers and progress is not None:
                progress(done, n_layers, job.name)
        for writer in writers.values():
            writer.sync()


def _finish(
    folder: Path,
    opened: Folder,
    source: Source,
    layout: Layout,
    shards: Mapping[str, ShardLayout],
    result: ExportResult,
    evaluations: Sequence[Evaluation],
) -> None:
    """Everything but the weights."""
    checkpoint = opened.checkpoint
    base = folder / layout.base
    for name in side_files(checkpoint):
        if name not in (CARD_FILE, ORIGINAL_CARD_FILE):
            copy_file(checkpoint.folder / name, base / name)
    original = checkpoint.folder / CARD_FILE
    if original.is_file():
        copy_file(original, folder / ORIGINAL_CARD_FILE)
    write_file(base / CONFIG_FILE, to_json(layout.config(source)))
    if checkpoint.index is not None:
        prefix = f"{layout.base}/" if layout.base else ""
        # A shard that held nothing but a bitmask, say, is not there any more.
        kept = [shard.name for shard in checkpoint.shards if prefix + shard.name in shards]
        inner = [_renamed(shards[prefix + name], name) for name in kept]
        write_file(base / INDEX_FILE, to_json(make_index(checkpoint, inner)))
    for name, content in layout.files(source).items():
        write_file(folder / name, content)
    facts = {
        "format": "mendlm-export",
        "version": 1,
        "mendlm_version": mendlm.__version__,
        "layout": layout.name,
        "dense_bytes": result.dense_bytes,
        "packed_bytes": result.packed_bytes,
        "output_bytes": result.output_bytes,
        "evaluations": [asdict(e) for e in evaluations],
        "compression": {
            key: source.manifest.get(key) for key in ("mendlm_version", "recipe", "seed", "totals", "inputs")
        },
    }
    write_file(folder / EXPORT_FILE, to_json(facts))
    card = model_card(source, result, layout.summary, layout.card(result.path.name or "."), evaluations)
    write_file(folder / CARD_FILE, card.encode())


def _renamed(shard: ShardLayout, name: str) -> ShardLayout:
    """The layout as seen from its own folder."""
    tensors = [(info.name, info.dtype, info.shape) for info in shard.infos.values()]
    return ShardLayout(name, tensors, {"format": "pt"})
