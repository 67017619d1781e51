"""`verify`: whether a compressed folder is what `compress` wrote, and whether what it states is true.

Everything that can be checked is checked, in three steps: the files against the hashes of `mendlm.json`; config, index,
headers and records against one another; and the tensors, one at a time. A fourth needs the original model. A damaged
file ends no step: what is found is collected.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mendlm.checkpoints.finish import hash_files, is_left_out
from mendlm.checkpoints.folder import Packed, Part, gather, open_folder
from mendlm.checkpoints.header import FLOATING, torch_name
from mendlm.checkpoints.plan import BITMASK, LAYOUT, METHOD, PARTS, VALUES, VERSION, PlannedTensor, natural_key
from mendlm.checkpoints.reader import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    Shard,
    as_bytes,
    check_index,
    check_weight_map,
    inside,
    open_checkpoint,
    open_shard,
    read_chunks,
    read_json_object,
    read_weight,
)
from mendlm.decomposition import merge
from mendlm.errors import CheckpointError, MendError, UsageError
from mendlm.linalg import all_finite, compute_dtype
from mendlm.metrics import ratio
from mendlm.packing import check_packed, scatter, unpack_mask
from mendlm.paths import local_path
from mendlm.patterns import Adjustable, Pattern, n_kept_total
from mendlm.report.records import EXPORT_FILE, MANIFEST_FILE, RUN_FILE, Manifest, TensorRecord, read_manifest

if TYPE_CHECKING:
    from mendlm.config import Recipe

Progress = Callable[[int, int, str], None]

# Of a stated error: another device or number of threads sums in another order, and may round products differently.
_RTOL = 1e-3
_ATOL = 1e-6
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes
    ----------
    check : which check found it, one of `CHECKS`.
    place : the file or the tensor.
    problem : what is wrong, one sentence.
    """

    check: str
    place: str
    problem: str


# What a finding can be about; `Verification.checked` counts how often each was looked at.
CHECKS = {
    "hash": "files have the size and SHA-256 that mendlm.json states, and none is missing or added",
    "structure": "config, index, headers and records name the same tensors, shapes, dtypes, ranks and kept entries",
    "mask": "padding bits of the bitmask are 0 and its population is the number of values, so S is zero elsewhere",
    "pattern": "the mask has the recipe's pattern: n of m, so many a row, whole tiles",
    "finite": "values and factors hold neither NaN nor infinity",
    "input": "the original's files have the SHA-256 that mendlm.json states",
    "error": "the stated errors are those of what is stored, against the original",
    "copy": "tensors that were copied are the original's",
}


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    path, original : the folders.
    findings : what is wrong; empty for a sound folder.
    checked : check -> how many files or tensors it looked at.
    skipped : checks that could not be made, a sentence each; they are no damage.
    n_tensors, n_bytes : tensors and bytes of the folder's weight files.
    manifest_sha256 : of mendlm.json, which no hash in the folder covers; None if there is none.
    seconds : wall time.
    """

    path: Path
    original: Path | None
    findings: tuple[Finding, ...]
    checked: Mapping[str, int]
    skipped: tuple[str, ...]
    n_tensors: int
    n_bytes: int
    manifest_sha256: str | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        original = None if self.original is None else str(self.original)
        return {"ok": self.ok, **asdict(self), "path": str(self.path), "original": original}


def verify(out: str | Path, original: str | Path | None = None, *, progress: Progress | None = None) -> Verification:
    """Check a folder that `compress` wrote.

    Parameters
    ----------
    out : the folder; it is only read.
    original : the dense model that was compressed, to check the stated errors and the copied tensors too.
    progress : called with (bytes looked at, bytes to look at, file or tensor) after each.

    Returns
    -------
    Verification

    Raises
    ------
    UsageError : no such folder, an unfinished run, an export, or a folder that mendlm did not compress; or `original`
        is no dense checkpoint.
    CheckpointError : `original` is damaged.

    Notes
    -----
    Everything is read twice, for the hashes and tensor by tensor; with `original`, compressed tensors a third time.
    Memory: a few copies of the largest tensor. Hashes find every change but one of `mendlm.json` itself, which has no
    hash: someone who can write to the folder can make both fit. Compare `manifest_sha256` with one that was kept
    elsewhere.
    """
    started = time.monotonic()
    folder = local_path(out)
    _refuse(folder, str(out))
    dense = None if original is None else open_checkpoint(local_path(original))
    work = _Work(folder, progress)
    manifest = work.read_manifest()
    shards = work.open_shards()
    work.n_total = _total_bytes(folder, manifest, shards, dense)
    if manifest is not None:
        work.check_files(manifest)
    packed, copied = work.check_structure(shards, manifest)
    recipe = work.recipe_of(manifest)
    for name in sorted(packed, key=natural_key):
        work.check_packed(name, packed[name], recipe)
    if dense is not None and manifest is not None and recipe is not None:
        work.check_original(dense, manifest, recipe, packed, copied)
    elif dense is not None:
        work.skipped.append(f"the original was not looked at: without {MANIFEST_FILE} nothing is stated about it.")
    path = folder / MANIFEST_FILE
    return Verification(
        path=folder,
        original=None if dense is None else dense.folder,
        findings=tuple(work.findings),
        checked={check: work.checked[check] for check in CHECKS if work.checked[check]},
        skipped=tuple(work.skipped),
        n_tensors=sum(len(shard.header.tensors) for shard in shards),
        n_bytes=sum(info.n_bytes for shard in shards for info in shard.header.tensors),
        manifest_sha256=hashlib.sha256(path.read_bytes()).hexdigest() if manifest is not None else None,
        seconds=time.monotonic() - started,
    )


def _refuse(folder: Path, shown: str) -> None:
    """Raise `UsageError` for what is no compressed folder, damaged or not."""
    if not folder.is_dir():
        open_folder(folder)
        raise UsageError(f"{shown!r} is not a folder. Give one that mendlm compress wrote.")
    if (folder / EXPORT_FILE).exists():
        raise UsageError(
            f"{shown!r} is an export, and exports carry no hashes to check. Verify the folder that it was made from, "
            "and export that again if in doubt."
        )
    if (folder / MANIFEST_FILE).exists():
        return
    try:
        quantization = read_json_object(inside(folder, CONFIG_FILE)).get("quantization_config")
    except CheckpointError as err:
        raise UsageError(f"{shown!r} holds no {MANIFEST_FILE}, and {err} Give a folder of mendlm compress.") from err
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise UsageError(f"{shown!r} is not compressed by mendlm. Give a folder that mendlm compress wrote.")


class _Work:
    """The checks and what they have found so far."""

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        self.folder = folder
        self.findings: list[Finding] = []
        self.checked: Counter[str] = Counter()
        self.skipped: list[str] = []
        self.n_total = 0
        self._progress = progress
        self._n_done = 0

    def found(self, check: str, place: str, problem: object) -> None:
        """Note what is wrong."""
        self.findings.append(Finding(check, place, str(problem)))

    def advance(self, n_bytes: int, place: str) -> None:
        """So much more is looked at."""
        self._n_done += n_bytes
        if self._progress is not None:
            self._progress(self._n_done, max(self.n_total, self._n_done), place)

    # ------------------------------------------------------------------------------------------ files

    def read_manifest(self) -> Manifest | None:
        """`mendlm.json`, if it is there and sound."""
        if not (self.folder / MANIFEST_FILE).exists():
            self.skipped.append(f"there is no {MANIFEST_FILE}: hashes and records were not checked.")
            return None
        try:
            inside(self.folder, MANIFEST_FILE)
            manifest = read_manifest(self.folder)
            _check_manifest(manifest)
        except MendError as err:
            self.found("structure", MANIFEST_FILE, err)
            return None
        return manifest

    def open_shards(self) -> tuple[Shard, ...]:
        """The shards whose headers are sound; the index must fit them."""
        names, weight_map = {SINGLE_FILE}, {}
        if not (self.folder / SINGLE_FILE).exists() and (self.folder / INDEX_FILE).exists():
            try:
                weight_map = check_weight_map(read_json_object(inside(self.folder, INDEX_FILE)))
                names = set(weight_map.values())
            except MendError as err:
                self.found("structure", INDEX_FILE, err)
                names = {path.name for path in self.folder.glob("*.safetensors")}
        shards = []
        for name in sorted(names):
            try:
                shards.append(open_shard(self.folder, name))
            except MendError as err:
                self.found("structure", name, err)
        if weight_map:
            held = {shard.name: shard.header.by_name.keys() for shard in shards}
            try:
                check_index({name: shard for name, shard in weight_map.items() if shard in held}, held)
            except MendError as err:
                self.found("structure", INDEX_FILE, err)
        return tuple(shards)

    def check_files(self, manifest: Manifest) -> None:
        """Sizes, hashes, and files that do not belong."""
        for name, entry in manifest.outputs.items():
            self._check_file("hash", self.folder, name, entry)
        others = {path.name for path in self.folder.iterdir()} - {*manifest.outputs, MANIFEST_FILE, RUN_FILE}
        extra = []
        for name in sorted(others):
            if is_left_out(name):
                self.found("hash", name, f"{MANIFEST_FILE} does not list it, and a loader may take it for its own")
            else:
                extra.append(name)
        if extra:
            self.skipped.append(f"{len(extra)} files that are not mendlm's were not looked at, e.g. {extra[0]!r}.")

    def _check_file(self, check: str, folder: Path, name: str, entry: Mapping[str, Any]) -> bool:
        """Compare a file with what the manifest says; whether it is the same."""
        self.checked[check] += 1
        try:
            path = inside(folder, name)
            if not path.is_file():
                self.found(check, name, "it is missing")
                return False
            size = path.stat().st_size
            if size != entry["size_bytes"]:
                self.found(check, name, f"it has {size} bytes, {MANIFEST_FILE} says {entry['size_bytes']}")
                return False
            sha256 = hash_files(folder, [name])[name]["sha256"]
        except (MendError, OSError) as err:
            self.found(check, name, err)
            return False
        self.advance(size, name)
        if sha256 != entry["sha256"]:
            self.found(check, name, f"its SHA-256 is {sha256}, {MANIFEST_FILE} says {entry['sha256']}")
            return False
        return True

    # ------------------------------------------------------------------------------------------ structure

    def check_structure(
        self, shards: Iterable[Shard], manifest: Manifest | None
    ) -> tuple[dict[str, Packed], dict[str, Part]]:
        """Compare config, index, headers and records; the compressed weights that are whole, and the other tensors."""
        parts: dict[str, Part] = {}
        for shard in shards:
            self.checked["structure"] += len(shard.header.tensors)
            for info in shard.header.tensors:
                if info.name in parts:
                    first = parts[info.name].shard.name
                    self.found("structure", info.name, f"it is in {first!r} and in {shard.name!r}")
                parts[info.name] = Part(shard, info)
        stems = {n.removesuffix(part) for n in parts for part in (VALUES, BITMASK) if n.endswith(f".{part}")}
        packed: dict[str, Packed] = {}
        for stem in sorted(stems):
            try:
                packed[f"{stem}weight"] = gather(stem, parts)
            except CheckpointError as err:
                self.found("structure", f"{stem}weight", err)
        guard = self._check_config(packed, parts)
        owned = {f"{stem}{part}" for stem in stems for part in PARTS}
        owned |= {guard} if guard else {f"{stem}weight" for stem in stems}
        copied = {name: part for name, part in parts.items() if name not in owned}
        for name in sorted(copied):
            if name.rpartition(".")[2] in PARTS:
                self.found("structure", name, "it belongs to no compressed weight")
        if manifest is not None:
            self._check_records(packed, copied, manifest)
        return packed, copied

    def _check_config(self, packed: Mapping[str, Packed], parts: Mapping[str, Part]) -> str | None:
        """Compare config.json with the tensors; the name of the guard, None if there is no such tensor."""
        self.checked["structure"] += 1
        tell = partial(self.found, "structure", CONFIG_FILE)
        try:
            quantization = read_json_object(inside(self.folder, CONFIG_FILE)).get("quantization_config")
        except MendError as err:
            tell(err)
            return None
        if not isinstance(quantization, dict):
            tell("it has no quantization_config: loaders take the folder for a dense one")
            return None
        for key, wanted in (("quant_method", METHOD), ("version", VERSION), ("layout", LAYOUT)):
            if quantization.get(key) != wanted:
                tell(f"{key} is {quantization.get(key)!r}, not {wanted!r}")
        guard = quantization.get("guard")
        if not isinstance(guard, str) or guard not in parts or parts[guard].info.shape != (0,):
            tell(f"there is no empty tensor {guard!r}, the guard against loaders that do not know this format")
            guard = None
        listed = quantization.get("modules")
        modules = listed if isinstance(listed, dict) else {}
        held = {name.removesuffix(".weight"): {"n_kept": p.n_kept, "rank": p.rank} for name, p in packed.items()}
        for path in sorted(modules.keys() | held.keys()):
            if modules.get(path) != held.get(path):
                tell(f"it says {modules.get(path)} of {path!r}, the tensors say {held.get(path)}")
        return guard

    def _check_records(self, packed: Mapping[str, Packed], copied: Mapping[str, Part], manifest: Manifest) -> None:
        """Compare the records with the headers."""
        records = {record.name: record for record in manifest.records}
        for name in sorted(records.keys() ^ packed.keys()):
            where = "the weights" if name in records else MANIFEST_FILE
            self.found("structure", name, f"{where} lack it, or its parts do not fit together")
        for name in records.keys() & packed.keys():
            record, held = records[name], packed[name]
            stated = (record.shape, record.n_kept, record.rank, record.storage_dtype, record.shard)
            there = (held.shape, held.n_kept, held.rank, torch_name(held.values.info.dtype), held.values.shard.name)
            if stated != there:
                self.found("structure", name, f"{MANIFEST_FILE} says {stated}, the headers say {there}")
            if held.n_bytes != record.stored_bytes:
                self.found(
                    "structure", name, f"it has {held.n_bytes} bytes, {MANIFEST_FILE} says {record.stored_bytes}"
                )
        totals = manifest.totals
        n_tensors = len(packed) + len(copied)
        n_bytes = sum(held.n_bytes for held in packed.values()) + sum(part.info.n_bytes for part in copied.values())
        if (n_tensors, n_bytes) != (totals.n_tensors, totals.stored_bytes):
            self.found(
                "structure",
                MANIFEST_FILE,
                f"it counts {totals.n_tensors} tensors of {totals.stored_bytes} bytes, "
                f"there are {n_tensors} of {n_bytes}",
            )

    def recipe_of(self, manifest: Manifest | None) -> Recipe | None:
        """The recipe of the run, if it can be read."""
        from mendlm.config import Recipe

        if manifest is None:
            return None
        try:
            return Recipe(**manifest.recipe)
        except (UsageError, TypeError) as err:
            self.skipped.append(f"patterns and errors were not checked: the recipe cannot be read ({err})")
            return None

    # ------------------------------------------------------------------------------------------ tensors

    def check_packed(self, name: str, packed: Packed, recipe: Recipe | None) -> None:
        """Bitmask, values and factors of one compressed weight."""
        try:
            values, bitmask, A, B = (part.read() for part in packed)
        except MendError as err:
            self.found("mask", name, err)
            return
        self.checked["mask"] += 1
        self.checked["finite"] += 1
        for part, tensor in zip((VALUES, *PARTS[2:]), (values, A, B), strict=True):
            if not all_finite(tensor):
                self.found("finite", f"{name.removesuffix('weight')}{part}", "it holds NaN or infinity")
        try:
            check_packed(values, bitmask, packed.shape[1])
        except CheckpointError as err:
            self.found("mask", name, err)
        else:
            if recipe is not None:
                self.checked["pattern"] += 1
                pattern = recipe.pattern_for(name)
                adjusted = recipe.layer_sparsity is not None and isinstance(pattern, Adjustable)
                if problem := _pattern_problem(unpack_mask(bitmask, packed.shape[1]), pattern, exact=not adjusted):
                    self.found("pattern", name, problem)
        self.advance(packed.n_bytes, name)

    def check_original(
        self,
        dense: Checkpoint,
        manifest: Manifest,
        recipe: Recipe,
        packed: Mapping[str, Packed],
        copied: Mapping[str, Part],
    ) -> None:
        """What can be said with the original model at hand."""
        from mendlm.planning import make_plan

        same = [self._check_file("input", dense.folder, name, entry) for name, entry in manifest.inputs.items()]
        if not all(same):
            self.skipped.append("errors and copied tensors were not checked: this is not the original of the folder.")
            return
        shards = {shard.name: shard for shard in dense.shards}
        records = {record.name: record for record in manifest.records}
        tuned = {name for block in manifest.matching for name in block.vectors}
        try:
            plan = make_plan(dense, recipe)
        except UsageError as err:  # of another mendlm perhaps, or changed: what was found before is to be told
            self.skipped.append(f"errors and copied tensors were not checked: the recipe cannot be planned ({err})")
            return
        n_dead = 0
        for name in sorted(copied.keys() - {tensor.name for tensor in plan.tensors}):
            self.found("copy", name, "the original has no such tensor")
        for tensor in plan.tensors:
            if tensor.action == "copy":
                if tensor.name not in tuned:
                    self._check_copy(shards[tensor.shard], tensor, copied.get(tensor.name))
            elif tensor.name in packed and tensor.name in records:
                # The policy has zeroed columns of W, and which ones only the calibration text says.
                if recipe.dead_columns == "drop" and records[tensor.name].n_dead:
                    n_dead += 1
                else:
                    self._check_error(shards[tensor.shard], tensor, packed[tensor.name], records[tensor.name], recipe)
            self.advance(tensor.dense_bytes, tensor.name)
        if n_dead:
            self.skipped.append(f"errors of {n_dead} tensors with dropped dead inputs were not checked.")
        if tuned:
            self.skipped.append(f"{len(tuned)} norms and biases that block matching tuned differ from the original's.")

    def _check_copy(self, shard: Shard, tensor: PlannedTensor, held: Part | None) -> None:
        self.checked["copy"] += 1
        source = Part(shard, shard.header.by_name[tensor.source])
        if held is None:
            self.found("copy", tensor.name, "it is missing")
        elif held.info.shape != source.info.shape or torch_name(held.info.dtype) != tensor.storage_dtype:
            self.found("copy", tensor.name, f"it is {held.info.dtype} of shape {held.info.shape}")
        else:
            try:
                if not _same_values(source, held):
                    self.found("copy", tensor.name, "its values are not the original's")
            except MendError as err:
                self.found("copy", tensor.name, err)

    def _check_error(
        self, shard: Shard, tensor: PlannedTensor, packed: Packed, record: TensorRecord, recipe: Recipe
    ) -> None:
        """Measure the error of what is stored."""
        self.checked["error"] += 1
        try:
            W = read_weight(shard, tensor)
            values, bitmask, A, B = (part.read() for part in packed)
            if tuple(W.shape) != packed.shape:
                self.found("error", tensor.name, f"the original's shape is {tuple(W.shape)}, not {packed.shape}")
                return
            check_packed(values, bitmask, packed.shape[1])
        except MendError as err:
            self.found("error", tensor.name, err)
            return
        compute = compute_dtype(W.dtype)
        W = W.to(compute)
        error = W - merge(scatter(values, bitmask, W.shape[1]), B, A, compute)
        size = float(torch.linalg.vector_norm(W))
        rel_error = ratio(float(torch.linalg.vector_norm(error)), size)
        if not math.isclose(rel_error, record.rel_error, rel_tol=_RTOL, abs_tol=_ATOL):
            self.found(
                "error", tensor.name, f"rel_error is {rel_error:.6g}, {MANIFEST_FILE} says {record.rel_error:.6g}"
            )
        if record.metric != "plain" or recipe.match_blocks is not None:
            return  # it needs the calibration statistics, or is not of what is stored
        refiner = recipe.refiner_for(*packed.shape, name=tensor.name)
        if refiner.refits_S and refiner.rank > 0:
            error = (W - B.to(compute) @ A.to(compute)).masked_fill_(unpack_mask(bitmask, W.shape[1]), 0)
        objective = float(torch.linalg.vector_norm(error))
        # It was measured before rounding, which changes each entry of S, B and A by half an eps of itself at most.
        sizes = [float(torch.linalg.vector_norm(part.double())) for part in (values, B, A)]
        slack = torch.finfo(A.dtype).eps * (sizes[0] + sizes[1] * sizes[2]) + _ATOL * size
        if not math.isclose(objective, record.objective, rel_tol=_RTOL, abs_tol=slack):
            self.found(
                "error", tensor.name, f"objective is {objective:.6g}, {MANIFEST_FILE} says {record.objective:.6g}"
            )


def _check_manifest(manifest: Manifest) -> None:
    """Raise `CheckpointError` unless everything that `verify` uses of a manifest has the type it must have."""
    for files in (manifest.inputs, manifest.outputs):
        entries = files.values() if isinstance(files, dict) else [None]
        if not all(isinstance(e, dict) and {"sha256", "size_bytes"} <= e.keys() for e in entries):
            raise CheckpointError(f"{MANIFEST_FILE!r} does not map file names to size_bytes and sha256.")
    numbers = ("rel_error", "objective", "n_kept", "rank", "stored_bytes")
    for record in manifest.records:
        if not isinstance(record.name, str) or not all(type(n) is int for n in record.shape):
            raise CheckpointError(f"{MANIFEST_FILE!r} has a record whose name or shape is none.")
        if not all(isinstance(getattr(record, key), int | float) for key in numbers):
            raise CheckpointError(f"{MANIFEST_FILE!r} has a record of {record.name!r} whose numbers are none.")
    names = [record.name for record in manifest.records]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{MANIFEST_FILE!r} has two records of one tensor.")


def _total_bytes(folder: Path, manifest: Manifest | None, shards: Iterable[Shard], dense: Checkpoint | None) -> int:
    """Bytes that are going to be looked at."""
    infos = (info for shard in shards for info in shard.header.tensors)
    total = sum(info.n_bytes for info in infos if info.name.rpartition(".")[2] in PARTS)
    stated = [] if manifest is None else [*manifest.outputs.values()]
    if dense is not None and manifest is not None:
        stated += manifest.inputs.values()
        total += sum(info.n_bytes for shard in dense.shards for info in shard.header.tensors)
    return total + sum(entry["size_bytes"] for entry in stated if isinstance(entry["size_bytes"], int))


def _pattern_problem(mask: Tensor, pattern: Pattern, *, exact: bool) -> str:
    """What keeps a mask (d_out, d_in) from having a pattern; "" if nothing does.

    Without `exact` every group must keep the same number, whichever it is.
    """
    try:
        size = pattern.group_size(*mask.shape)
        n_kept = n_kept_total(pattern, *mask.shape)
    except UsageError as err:
        return str(err)
    if not mask.numel() or not size:
        return ""
    rows, cols = pattern.unit
    tiles = mask.reshape(mask.shape[0] // rows, rows, mask.shape[1] // cols, cols)
    units = tiles[:, 0, :, 0]
    if (rows, cols) != (1, 1) and not bool((tiles == units[:, None, :, None]).all()):
        return f"some tiles of {rows}x{cols} are kept in part"
    population = int(mask.sum())
    if exact and population != n_kept:
        return f"{population} entries are kept, the pattern {pattern} keeps {n_kept}"
    kept = units.reshape(-1, size).sum(dim=1)
    wanted = pattern.n_kept(size) if exact else int(kept[0])
    if n_odd := int((kept != wanted).sum()):
        return f"{n_odd} of {kept.numel()} groups of {size} do not keep the {wanted} of the pattern {pattern}"
    return ""


def _same_values(source: Part, held: Part) -> bool:
    """Whether a tensor is the original's of the same shape, converted to its dtype; chunk by chunk."""
    before, after = source.info.dtype, held.info.dtype
    if before == after:
        return all(a == b for a, b in zip(read_chunks(*source), read_chunks(*held), strict=True))
    n = _CHUNK_BYTES // 8  # entries
    wide, narrow = FLOATING[before], FLOATING[after]
    wide_chunks = read_chunks(*source, chunk_bytes=n * wide.itemsize)
    chunks = zip(wide_chunks, read_chunks(*held, chunk_bytes=n * narrow.itemsize), strict=True)
    return all(as_bytes(torch.frombuffer(a, dtype=wide).to(narrow)) == b for a, b in chunks)
