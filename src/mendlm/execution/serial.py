"""One process, one tensor after the other: the reference for every other executor."""

from __future__ import annotations

from mendlm.checkpoints.writer import ShardWriter
from mendlm.execution.run import Run


class SerialRun(Run):
    """Data-free work: shard by shard, tensor by tensor."""

    def execute(self) -> None:
        """Write every tensor that is not done yet; errors as `Run.execute`."""
        for shard in self.shards:
            with ShardWriter(self.staging.files, self.layouts[shard.name]) as writer:
                for tensor in self._tensors(shard):
                    if tensor.name in self._done:
                        continue
                    if tensor.action == "copy":
                        self._copy(writer, shard, tensor)
                    else:
                        self._compress(writer, shard, tensor)
                writer.sync()
            self.staging.journal.sync()
