"""`safetensors-factored`: S, A and B as plain dense tensors, for programs that want the factors and no bit masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mendlm.exporting._base import Layer, Layout, Stored


class Factored(Layout):
    """``X.S`` (d_out, d_in), ``X.lora_A`` (rank, d_in), ``X.lora_B`` (d_out, rank), always this way round.

    There is no ``X.weight``: whoever looks for one must stop, not go on with S alone.
    """

    name = "safetensors-factored"
    summary = "S with its zeros, A and B as plain tensors X.S, X.lora_A, X.lora_B, for other programs"
    mark = "factored"

    def stored(self, layer: Layer, file: str) -> Sequence[Stored]:
        """S and the factors."""
        d_out, d_in = layer.shape
        shapes = {"S": (d_out, d_in), "lora_A": (layer.packed.rank, d_in), "lora_B": (d_out, layer.packed.rank)}
        return [Stored(file, f"{layer.path}.{part}", layer.dtype, shape) for part, shape in shapes.items()]

    def tensors(self, layer: Layer) -> Iterator[Tensor]:
        """Bit for bit what is stored."""
        out = layer.read()
        yield from (out.S, out.A, out.B)

    def card(self, dest: str) -> str:
        """How to read it."""
        return f"""Here each compressed weight `X.weight` is three dense tensors: `X.S` (d_out, d_in) with its zeros,
`X.lora_A` (rank, d_in) and `X.lora_B` (d_out, rank); the weight is `X.S + X.lora_B @ X.lora_A`, nothing scaled.
**S without its factors is worse than plain pruning: use them together.** transformers does not open this form.

```python
from safetensors import safe_open

with safe_open("{dest}/model.safetensors", framework="pt") as f:   # of a sharded model: each file of the index
    S, A, B = (f.get_tensor(f"{{X}}.{{part}}") for part in ("S", "lora_A", "lora_B"))
```
"""
