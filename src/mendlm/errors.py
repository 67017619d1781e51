"""Every error mendlm raises on purpose.

A message has three parts: what is wrong, with its value; where (tensor, shard); what to do. The core raises
without names of tensors or files; the pipeline, which knows them, adds them with `located`.
"""

from __future__ import annotations


class MendError(Exception):
    """Base of all mendlm errors. `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(MendError, ValueError):
    """The caller asked for something that cannot be done; the input data is not at fault."""

    exit_code = 2


class CheckpointError(MendError, ValueError):
    """A checkpoint on disk is damaged, incomplete or unsafe to read."""


class NonFiniteError(MendError, ValueError):
    """A weight, a scale or an intermediate result holds NaN or infinity."""


class StorageError(MendError, OSError):
    """Writing failed: disk full, no permission, folder in use."""


class WorkerError(MendError):
    """A process that worked on a tensor died, or took too long, again and again; or there is no cluster to work on."""


class MissingDependencyError(MendError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    exit_code = 2


def located(error: MendError, where: str) -> MendError:
    """Return an error of the same class whose message also says `where` it arose.

    Use as ``raise located(err, "model.layers.3.mlp.up_proj.weight in model-00002.safetensors") from err``.
    """
    return type(error)(f"{error} [{where}]")
