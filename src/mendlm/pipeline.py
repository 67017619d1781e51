"""The pipeline: a checkpoint folder in, a compressed folder out. The only module that knows every stage.

Tensors stream: one at a time is read, masked, refined, packed and written to its place, so memory does not grow with
the model. `plan` does all the validation, from headers alone, before any work.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import safetensors
import torch

import mendlm
from mendlm.checkpoints.finish import hash_files, input_files, make_config, make_index, side_files, to_json
from mendlm.checkpoints.plan import LAYOUT, METHOD, VERSION, shard_layout
from mendlm.checkpoints.reader import CONFIG_FILE, INDEX_FILE, Checkpoint, open_checkpoint
from mendlm.checkpoints.remote import check_url, deliver, is_url, open_place, remote_errors
from mendlm.checkpoints.staging import (
    check_space,
    check_target,
    differences,
    has_partial,
    is_filled,
    open_staging,
    remove_leftovers,
)
from mendlm.checkpoints.writer import copy_file, write_file
from mendlm.errors import CheckpointError, MendError, UsageError, WorkerError
from mendlm.execution import AbstractExecutor, LocalExecutor, make_executor
from mendlm.execution.blocks import BlockRun
from mendlm.execution.run import BlockStarted as BlockStarted
from mendlm.execution.run import Event as Event
from mendlm.execution.run import Run
from mendlm.execution.run import TensorDone as TensorDone
from mendlm.execution.run import TensorStarted as TensorStarted
from mendlm.execution.tensors import TensorRun
from mendlm.paths import local_path
from mendlm.planning import CompressionPlan as CompressionPlan
from mendlm.planning import make_plan
from mendlm.report.records import MANIFEST_FILE, RUN_FILE, Manifest, TensorRecord, Totals, read_manifest

if TYPE_CHECKING:
    from mendlm.calibration.prepare import Prepared
    from mendlm.config import Recipe

logger = logging.getLogger(__name__)

_SLACK_BYTES = 2**20  # config, index, records


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` did.

    Attributes
    ----------
    out : the folder written.
    records : one per compressed tensor, in the order of the plan.
    totals : over all tensors.
    seconds : wall time of this call.
    resumed : how many of the records an earlier, unfinished run had already done.
    """

    out: Path
    records: tuple[TensorRecord, ...]
    totals: Totals
    seconds: float
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "out": str(self.out),
            "seconds": self.seconds,
            "resumed": self.resumed,
            "totals": self.totals.to_dict(),
            "records": [record.to_dict() for record in self.records],
        }


def plan(model: str | Path, recipe: Recipe | None = None) -> CompressionPlan:
    """What `compress` would do, from the headers alone: no weight is read, nothing is written.

    Parameters
    ----------
    model : a local checkpoint folder.
    recipe : how; ``Recipe()`` if not given.

    Raises
    ------
    UsageError : no such folder, not a dense safetensors checkpoint, unknown architecture, a glob that matches nothing,
        a rank or pattern that does not fit a tensor (the message names it).
    CheckpointError : a file is missing, damaged or unsafe.
    """
    return make_plan(open_model(model), recipe_or_default(recipe))


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str | torch.device = "cpu",
    executor: str | AbstractExecutor = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    activation_dir: str | Path | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> CompressionResult:
    """Compress a checkpoint folder into another one, in the `packed` layout.

    Parameters
    ----------
    model : a folder with config.json and safetensors, single or sharded; F64, F32, F16 or BF16 weights. For work
        without calibration also the URL of one (`mendlm.checkpoints.remote`).
    out : the folder to write. It appears only when it is complete. A URL: made on this machine, then sent.
    recipe : how; ``Recipe()`` if not given. Same recipe, same input, same bytes.
    device : where to compute: "cpu", "cuda", "cuda:1", or several, "cuda:0,1".
    executor : how data-free work is spread: "local", "ray", or an object of `mendlm.execution` with its settings.
        The bytes do not depend on it.
    workers : how many tensors are worked on at once; by default what the machine, or the cluster, has room for.
    ray_address : of the cluster for "ray", see `mendlm.execution.RayExecutor`.
    overwrite : replace `out` if it is a checkpoint folder, at the very end, and start anew if a run into it stopped
        half-way.
    resume : continue a run that stopped half-way; starts normally if there is none, returns its result if `out` is
        complete.
    activation_dir : a folder on a large disk for the hidden states of the calibration text; None keeps them in memory
        (``n_sequences * seqlen * hidden`` entries).
    on_event : called with `TensorStarted`, `TensorDone` and, in calibrated work, `BlockStarted`.

    Returns
    -------
    CompressionResult

    Raises
    ------
    UsageError : as `plan`; or `out` is not empty, in the input, or holds another run; device or executor unknown.
    CheckpointError : a file of the input is missing, damaged or unsafe.
    NonFiniteError : a weight holds NaN or infinity, or overflows the storage dtype; the message names it.
    StorageError : the disk is full or cannot be written, or another run writes to `out`.
    WorkerError : the process on a tensor died, or took too long, again and again; the work done so far is kept.

    Notes
    -----
    Memory: for every worker copies of the largest tensor (docs/executors.md); with calibration the embeddings, one
    block, the hidden states of the text and the Gram matrices of one block, whatever the number of blocks. After any of
    these errors but `WorkerError` nothing is left behind but the work of an earlier run; KeyboardInterrupt and
    unexpected errors leave the work done so far in a hidden folder beside `out`, for `resume`.
    """
    started = time.monotonic()
    recipe = recipe_or_default(recipe)
    if is_url(out):
        check_url(str(out), model)
        here = partial(
            compress,
            model,
            recipe=recipe,
            device=device,
            executor=executor,
            workers=workers,
            ray_address=ray_address,
            overwrite=overwrite,
            resume=resume,
            activation_dir=activation_dir,
            on_event=on_event,
        )

        def there(place: Path) -> CompressionResult:
            return _finished(place, open_model(model), recipe, started)

        result, place = deliver(str(out), here, there, overwrite=overwrite, resume=resume)
        return replace(result, out=place, seconds=time.monotonic() - started)
    spread = _executor(executor, workers=workers, ray_address=ray_address)
    checkpoint, planned, target, devices = _open(model, out, recipe, spread, device, overwrite=overwrite, resume=resume)
    where = devices[0]
    if resume and is_filled(target) and not has_partial(target):
        return _finished(target, checkpoint, recipe, started)
    prepared = prepare_calibration(checkpoint, planned, where, activation_dir)
    if prepared is not None and recipe.layer_sparsity is not None:
        planned = make_plan(checkpoint, recipe, _survey(prepared, checkpoint, planned, on_event))
    layouts = {shard.name: shard_layout(shard, planned.tensors, planned.guard) for shard in checkpoint.shards}
    fingerprint = _fingerprint(checkpoint, recipe, where)
    if prepared is not None:
        fingerprint["calibration"] = dict(prepared.facts)
    staging = open_staging(target, fingerprint, resume=resume, overwrite=overwrite)
    work = (planned, checkpoint.shards, layouts, staging, where, on_event)
    run: Run
    if prepared is None:
        run = TensorRun(*work, executor=spread, devices=devices)
    else:
        run = BlockRun(*work, model=prepared.model, text=prepared.text)
    records = _carry_out(checkpoint, run, started)
    return CompressionResult(target, records, planned.totals, time.monotonic() - started, run.n_resumed)


def rehearse(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    device: str | torch.device,
    executor: AbstractExecutor,
    overwrite: bool,
    resume: bool,
) -> CompressionPlan:
    """`plan`, with what `compress` of these arguments would refuse before any work; whether OUT exists does not matter.

    Raises
    ------
    UsageError, CheckpointError : as `compress`.
    """
    if recipe.calibration is not None:
        from mendlm.calibration.windows import check_source

        check_source(recipe.calibration.source)
    return _open(model, out, recipe, executor, device, overwrite=overwrite, resume=resume)[1]


def _open(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    executor: AbstractExecutor,
    device: str | torch.device,
    *,
    overwrite: bool,
    resume: bool,
) -> tuple[Checkpoint, CompressionPlan, Path, tuple[torch.device, ...]]:
    """MODEL, what to do with it, where it goes and where it is done; every check that needs no weights."""
    devices = executor.devices(str(device))
    if overwrite and resume:
        raise UsageError("overwrite starts anew and resume continues: pass one of them.")
    checkpoint = open_model(model)
    planned = make_plan(checkpoint, recipe)
    if is_url(out):
        check_url(str(out), model)
        target = open_place(out)
    else:
        target = check_target(out, checkpoint.folder)
    if walks(recipe):
        _check_one_worker(executor, devices)
    return checkpoint, planned, target, devices


def prepare_calibration(
    checkpoint: Checkpoint, planned: CompressionPlan, device: torch.device, activation_dir: str | Path | None
) -> Prepared | None:
    """The calibration of a recipe that needs one, else None."""
    recipe = planned.recipe
    if not walks(recipe):
        if recipe.calibration is not None:
            logger.warning("nothing in this recipe looks at the calibration text: criterion and metric use W alone")
        return None
    if is_url(checkpoint.folder):
        raise UsageError(
            f"{str(checkpoint.folder)!r} is a URL, and this recipe runs calibration text through the model. "
            "Download it and give the folder."
        )
    from mendlm.calibration.prepare import prepare

    folder = None if activation_dir is None else local_path(activation_dir)
    return prepare(checkpoint, planned, device, folder)


def _executor(executor: str | AbstractExecutor, **settings: Any) -> AbstractExecutor:
    if isinstance(executor, str):
        return make_executor(executor, **settings)
    for name, value in settings.items():
        if value is not None:
            raise UsageError(f"{name} is a setting of the executor: give it to the object.")
    return executor


def walks(recipe: Recipe) -> bool:
    """Whether a recipe sends calibration text through the model, block by block."""
    return recipe.needs != "weights" or recipe.layer_sparsity is not None or recipe.match_blocks is not None


def _check_one_worker(executor: AbstractExecutor, devices: tuple[torch.device, ...]) -> None:
    """Refuse to spread a walk: what a block gets is what the blocks before it gave."""
    if not isinstance(executor, LocalExecutor):
        what = f"executor {executor.name!r}"
    elif len(devices) > 1:
        what = f"devices {', '.join(map(str, devices))}"
    elif executor.workers not in (None, 1):
        what = f"workers {executor.workers}"
    elif executor.task_timeout is not None:
        what = f"task_timeout {executor.task_timeout:g}"
    else:
        return
    raise UsageError(
        f"{what} is for work without calibration, tensor by tensor. This recipe walks the model block by block, in one "
        "process and on one device: leave it out."
    )


def _survey(
    prepared: Prepared, checkpoint: Checkpoint, planned: CompressionPlan, on_event: Callable[[Event], None] | None
) -> dict[str, float]:
    from mendlm.calibration.prepare import survey

    def tell(index: int, phase: str) -> None:
        if on_event is not None:
            on_event(BlockStarted(index + 1, prepared.model.n_blocks, phase))

    return survey(prepared, checkpoint, planned, tell)


def _carry_out(checkpoint: Checkpoint, run: Run, started: float) -> tuple[TensorRecord, ...]:
    """Do the work and turn the staging folder into OUT, or leave behind what may be left."""
    staging = run.staging
    try:
        side_bytes = sum((checkpoint.folder / name).stat().st_size for name in side_files(checkpoint))
        check_space(staging, side_bytes + sum(layout.size_bytes for layout in run.layouts.values()) + _SLACK_BYTES)
        run.allocate()
        run.execute()
        records = run.records()
        _finish(checkpoint, run, records, time.monotonic() - started)
    except BaseException as err:
        _abandon(run, err)
        raise
    try:
        staging.publish()
    except BaseException:
        staging.release()
        raise
    return records


def recipe_or_default(recipe: Recipe | None) -> Recipe:
    """`recipe`, or ``Recipe()`` for None.

    Raises
    ------
    UsageError : something else, such as a name.
    """
    from mendlm.config import Recipe

    if recipe is None:
        return Recipe()
    if not isinstance(recipe, Recipe):
        raise UsageError(f"recipe must be a Recipe, got {recipe!r:.80}. Use Recipe(...) or Recipe.from_file(...).")
    return recipe


def open_model(model: str | Path) -> Checkpoint:
    """The checkpoint in a folder; errors as `plan`."""
    folder = open_place(model)
    if is_url(model):
        with remote_errors(str(model), writing=False):
            return open_checkpoint(folder)
    if folder.is_dir():
        return open_checkpoint(folder)
    if folder.suffix == ".gguf":
        raise UsageError(
            f"{str(model)!r} is a GGUF file. Turn it into a checkpoint first: mendlm import GGUF_FILE FOLDER."
        )
    if folder.is_file():
        raise UsageError(f"{str(model)!r} is a file. Give the folder that holds config.json and the weights.")
    raise UsageError(
        f"{str(model)!r} is not a folder. For a model of the hub, download it first, e.g. with "
        f"'hf download {model} --local-dir FOLDER', and give that folder."
    )


def _fingerprint(checkpoint: Checkpoint, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Everything that decides the output's bytes, from stat and headers: cheap, for the journal."""
    import mendlm

    return {
        "mendlm_version": mendlm.__version__,
        "torch_version": torch.__version__,
        "device": device.type,
        "recipe": recipe.to_dict(),
        "inputs": stat_inputs(checkpoint),
        "headers": {shard.name: shard.header.sha256 for shard in checkpoint.shards},
    }


def stat_inputs(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Sizes and times of the files of the input, by name; `CheckpointError` if one can no longer be read."""
    try:
        stats = {name: (checkpoint.folder / name).stat() for name in input_files(checkpoint)}
    except OSError as err:
        raise CheckpointError(f"cannot read {err.filename!s}: {err.strerror or err}. Check the input folder.") from err
    return {name: {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in stats.items()}


def _finished(target: Path, checkpoint: Checkpoint, recipe: Recipe, started: float) -> CompressionResult:
    """What a run into a complete OUT gives; errors as `_finished_run`."""
    manifest = _finished_run(target, checkpoint, recipe)
    seconds = time.monotonic() - started
    return CompressionResult(target, manifest.records, manifest.totals, seconds, len(manifest.records))


def _finished_run(target: Path, checkpoint: Checkpoint, recipe: Recipe) -> Manifest:
    """The manifest of a complete OUT, if it is what this run would give.

    Raises
    ------
    UsageError : OUT was written by something else, from another input, or with another recipe.
    CheckpointError : OUT is damaged.
    """
    if not (target / MANIFEST_FILE).exists():
        raise UsageError(
            f"OUT {str(target)!r} exists, is not empty and holds no run to resume. "
            "Pass --overwrite, or choose another folder."
        )
    manifest = read_manifest(target)
    stats = stat_inputs(checkpoint)
    unchanged = _known_stats(target) == stats
    old = {
        "mendlm_version": manifest.mendlm_version,
        "torch_version": manifest.versions.get("torch"),
        "recipe": manifest.recipe,
        "inputs": {name: entry.get("sha256") for name, entry in manifest.inputs.items()},
    }
    new = {
        "mendlm_version": mendlm.__version__,
        "torch_version": torch.__version__,
        "recipe": recipe.to_dict(),
        "inputs": old["inputs"]
        if unchanged
        else {name: entry["sha256"] for name, entry in hash_files(checkpoint.folder, stats).items()},
    }
    tokens = _token_ids_sha256(checkpoint, recipe)
    if tokens is not None and manifest.calibration is not None:
        old["token_ids_sha256"], new["token_ids_sha256"] = manifest.calibration.get("token_ids_sha256"), tokens
    if changes := differences(old, new):
        raise UsageError(f"OUT {str(target)!r} is complete but another run wrote it: {changes}. Pass --overwrite.")
    for name, entry in manifest.outputs.items():
        if not (target / name).is_file() or (target / name).stat().st_size != entry.get("size_bytes"):
            raise CheckpointError(f"{name!r} in OUT {str(target)!r} is missing or damaged. Pass --overwrite.")
    if not is_url(target):
        remove_leftovers(target)
    return manifest


def _token_ids_sha256(checkpoint: Checkpoint, recipe: Recipe) -> str | None:
    """Of the windows of a calibration file, whose content no recipe states; None for any other source, or none now."""
    from mendlm.calibration.windows import SOURCES, windows_of

    calibration = recipe.calibration
    if calibration is None or not walks(recipe) or is_url(checkpoint.folder) or calibration.source in SOURCES:
        return None
    if not local_path(calibration.source).exists():
        return None
    return windows_of(checkpoint, calibration, recipe.seed, torch.device("cpu")).sha256


def _known_stats(target: Path) -> Any:
    """Sizes and times of the inputs when OUT was written; None if they are not known."""
    try:
        return json.loads((target / RUN_FILE).read_text(encoding="utf-8")).get("inputs")
    except (OSError, ValueError, AttributeError):
        return None


def _finish(checkpoint: Checkpoint, run: Run, records: tuple[TensorRecord, ...], seconds: float) -> None:
    """Write everything but the weights into the folder in the making."""
    folder, plan = run.staging.files, run.plan
    names = side_files(checkpoint)
    for name in names:
        copy_file(checkpoint.folder / name, folder / name)
    quantization = {
        "quant_method": METHOD,
        "version": VERSION,
        "layout": LAYOUT,
        "guard": plan.guard.name,
        "modules": {t.module: {"n_kept": t.n_kept, "rank": t.rank} for t in plan.compressed},
    }
    write_file(folder / CONFIG_FILE, to_json(make_config(checkpoint, quantization, plan.recipe.dtype)))
    outputs = {CONFIG_FILE, *names, *run.layouts}
    if checkpoint.index is not None:
        write_file(folder / INDEX_FILE, to_json(make_index(checkpoint, run.layouts.values())))
        outputs.add(INDEX_FILE)
    manifest = Manifest(
        mendlm_version=mendlm.__version__,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "numpy": numpy.__version__,
        },
        recipe=plan.recipe.to_dict(),
        inputs=hash_files(checkpoint.folder, input_files(checkpoint)),
        outputs=hash_files(folder, sorted(outputs)),
        totals=plan.totals,
        records=records,
        calibration=run.staging.journal.fingerprint.get("calibration"),
        matching=run.block_records(),
    )
    if stat_inputs(checkpoint) != run.staging.journal.fingerprint["inputs"]:
        raise CheckpointError("a file of MODEL was changed while it was read. Compress it again.")
    write_file(folder / MANIFEST_FILE, to_json(manifest.to_dict()))
    write_file(folder / RUN_FILE, to_json(_run_facts(run, seconds)))


def _run_facts(run: Run, seconds: float) -> dict[str, Any]:
    """What differs from run to run, and so has no place in the manifest."""
    return {
        "format": "mendlm-run",
        "version": 1,
        "started_at": (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "resumed": run.n_resumed,
        "device": str(run.device),
        "n_workers": run.n_workers,
        "n_threads": torch.get_num_threads() if run.n_threads is None else run.n_threads,
        "peak_memory_bytes": run.peak_memory_bytes(),
        "peak_device_bytes": run.peak_device_bytes(),
        "inputs": run.staging.journal.fingerprint["inputs"],
        "tensor_seconds": run.seconds(),
    }


def _abandon(run: Run, err: BaseException) -> None:
    """Keep work of an earlier run, and of this one unless what was wrong will be wrong again; remove it otherwise."""
    had_work = bool(run.staging.journal.entries)
    may_succeed = isinstance(err, WorkerError) or not isinstance(err, MendError)
    if had_work or (may_succeed and run.n_done > 0):
        run.staging.release()
    else:
        run.staging.discard()
