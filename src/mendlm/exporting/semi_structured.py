"""`semi-structured`: 2:4 weights as the two tensors that torch's sparse kernels on CUDA take, converted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from mendlm.checkpoints.header import FLOATING
from mendlm.errors import UsageError
from mendlm.exporting._base import Layer, Layout, Source, Stored, refuse_experts
from mendlm.families import split_expert
from mendlm.kernels.semi_structured import DTYPES, is_two_of_four


class SemiStructured(Layout):
    """``X.weight_packed`` (d_out, d_in / 2), ``X.weight_meta`` int16 (d_out, d_in / 16), ``X.lora_A``, ``X.lora_B``.

    The metadata has the order of elements of `torch.sparse.SparseSemiStructuredTensorCUTLASS`.
    """

    name = "semi-structured"
    summary = "2:4 weights as torch's CUDA kernels take them (packed values and metadata), A and B beside them"
    mark = name

    def check(self, source: Source) -> None:
        """Raise `UsageError` unless every layer is 2:4 and has 16-bit weights of a shape that the kernels serve."""
        for layer in source.layers:
            if split_expert(layer.path) is not None:
                raise refuse_experts(layer, "torch's sparse kernels serve single matrices.")
            dtype = FLOATING[layer.dtype]
            if dtype not in DTYPES:
                raise UsageError(
                    f"{layer.path!r} is stored as {layer.dtype}; torch's 2:4 kernels take BF16 and F16. "
                    "Compress with --dtype bfloat16."
                )
            d_out, d_in = layer.shape
            least = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[dtype]
            rows, columns = least.sparse_min_rows, least.sparse_min_cols
            if d_out % rows or d_in % columns:
                raise UsageError(
                    f"{layer.path!r} has shape {d_out}×{d_in}; torch's 2:4 kernels need multiples of {rows}×{columns}. "
                    "Export --to safetensors-factored or dense."
                )
            if not is_two_of_four(layer.packed.bitmask.read()):
                raise UsageError(
                    f"{layer.path!r} is not 2:4: some four columns keep more than two entries. Compress with "
                    "--pattern 2:4, or export --to safetensors-factored."
                )

    def stored(self, layer: Layer, file: str) -> Sequence[Stored]:
        """Values, metadata, factors."""
        d_out, d_in = layer.shape
        rank = layer.packed.rank
        return [
            Stored(file, f"{layer.path}.weight_packed", layer.dtype, (d_out, d_in // 2)),
            Stored(file, f"{layer.path}.weight_meta", "I16", (d_out, d_in // 16)),
            Stored(file, f"{layer.path}.lora_A", layer.dtype, (rank, d_in)),
            Stored(file, f"{layer.path}.lora_B", layer.dtype, (d_out, rank)),
        ]

    def tensors(self, layer: Layer) -> Iterator[Tensor]:
        """Converted by torch."""
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

        convert: Callable[[Tensor], tuple[Tensor, Tensor]] = sparse_semi_structured_from_dense_cutlass
        out = layer.read()
        packed, meta = convert(out.S)
        yield from (packed.contiguous(), meta.contiguous(), out.A, out.B)

    def card(self, dest: str) -> str:
        """How to use the tensors."""
        return f"""For programs that call torch's 2:4 kernels themselves, on a CUDA device of compute capability
8 or newer. Each compressed weight `X.weight` is `X.weight_packed`, `X.weight_meta`, `X.lora_A` and `X.lora_B`; **use
the factors with the sparse part, which is worse than plain pruning without them.** transformers does
not open this form.

```python
import torch
from safetensors.torch import load_file

t = load_file("{dest}/model.safetensors", device="cuda")           # of a sharded model: each file of the index
packed, meta, A, B = (t[f"{{X}}.{{part}}"] for part in ("weight_packed", "weight_meta", "lora_A", "lora_B"))
S = torch.sparse.SparseSemiStructuredTensorCUTLASS(
    torch.Size((packed.shape[0], 2 * packed.shape[1])), packed=packed, meta=meta,
    packed_t=None, meta_t=None, compressed_swizzled_bitmask=None,
)
y = torch.nn.functional.linear(x, S) + x @ A.T @ B.T
```
"""
