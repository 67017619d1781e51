"""Fixtures shared by all tests: seeds, a tiny random LLaMA checkpoint, paths of shared data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tiny import BOS, EOS, byte_tokenizer, tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No test asserts a time, and Hypothesis fails an example that takes 200 ms unless it is told not to: on a busy machine
# one of 5 ms does. What hangs still ends, by the timeout of each test.
settings.register_profile("mendlm", deadline=None)
settings.load_profile("mendlm")

# Evaluation text beside the project, where a checkout has it; tests that need it skip without.
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

TinyLlama = Callable[..., Path]

# For processes whose peak memory is compared. glibc keeps freed blocks up to a size that grows with what is freed: that
# moves a peak by 70 MB from run to run. With a fixed size larger ones go back, and a process holds what it uses.
STEADY_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536"}

# The files that take longest, the longest first: one that a test process began last would keep it alone for minutes.
LONGEST = ["smollm2", "cli", "tasks", "loading", "bench", "calibration", "ray", "triton", "matching", "sweep"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def wikitext() -> Path:
    path = SHARED_DATA / "wikitext-2-raw-v1" / "test.parquet"
    if not path.exists():
        pytest.skip("the shared evaluation text is not at hand")
    return path


@pytest.fixture(scope="session")
def make_tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    """Factory of tiny random LLaMA checkpoints with a byte-level tokenizer; keyword arguments vary them."""

    def make(
        *, dtype: torch.dtype = torch.float32, tied: bool = True, max_shard_size: str = "5GB", seed: int = 0
    ) -> Path:
        folder = tmp_path_factory.mktemp("tiny-llama")
        special = dict(bos_token_id=BOS, eos_token_id=EOS)
        model = tiny_model("LlamaForCausalLM", seed=seed, dtype=dtype, tie_word_embeddings=tied, **special)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_tiny_llama: TinyLlama) -> Path:
    """A float32 single-file tiny LLaMA. Read only: copy it before changing it."""
    return make_tiny_llama()
