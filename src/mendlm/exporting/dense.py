"""`dense`: an ordinary transformers checkpoint of W' = S + B @ A."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mendlm.checkpoints.header import FLOATING
from mendlm.execution.tensor import dense_weight
from mendlm.exporting._base import Layer, Layout, Stored


class Dense(Layout):
    """Every weight merged: computed in at least float32 and rounded once to the storage dtype, as `merged` does."""

    name = "dense"
    summary = "an ordinary checkpoint of S + B @ A; opens everywhere, the zeros and the small size are gone"
    stacks = True

    def stored(self, layer: Layer, file: str) -> Sequence[Stored]:
        """One weight, the way round its family stores it."""
        return [Stored(file, f"{layer.path}.weight", layer.dtype, layer.dense_shape)]

    def tensors(self, layer: Layer) -> Iterator[Tensor]:
        """S + B @ A."""
        W = dense_weight([part.read() for part in layer.packed], layer.shape[1], FLOATING[layer.dtype])
        yield W.T.contiguous() if layer.transposed else W

    def card(self, dest: str) -> str:
        """How to load it with transformers alone."""
        return f"""This is the dense form, `W' = S + B @ A`: an ordinary checkpoint. **Merging destroyed the
zeros of S**: it takes as many bytes as the original and runs no faster. The compressed
folder that it was made from keeps S apart.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{dest}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{dest}")
```
"""
