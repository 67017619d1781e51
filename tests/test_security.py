"""Hostile checkpoints: no path leaves the folder, no code runs, nothing is allocated on a header's word."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

import mendlm
from mendlm.cli import main
from mendlm.errors import CheckpointError, MendError, UsageError


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_index_cannot_lead_out_of_the_folder(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    weights.rename(tmp_path / "elsewhere.safetensors")
    names = [name for name in header if name != "__metadata__"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'\.\./elsewhere\.safetensors', which is not a plain file name"):
        mendlm.load(model)
    (model / "model.safetensors.index.json").unlink()
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="is a link that leads out of the checkpoint's folder"):
        mendlm.load(model)


def test_a_pickle_is_never_opened(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    marker = tmp_path / "it ran"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(UsageError, match=r"weights as pickles only, e\.g\. 'pytorch_model\.bin'"):
        mendlm.load(model)
    assert main(["compress", str(model), str(tmp_path / "out")]) == 2
    assert main(["inspect", str(model)]) == 2
    assert not marker.exists()


def test_code_of_a_checkpoint_is_not_run(model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    edit(model / "config.json", auto_map=auto_map)
    edit(model / "tokenizer_config.json", auto_map=auto_map)
    mendlm.load(model)
    mendlm.compress(model, tmp_path / "out", mendlm.Recipe(refiner="none"))
    assert not (tmp_path / "out" / "evil.py").exists()
    edit(model / "config.json", model_type="evil")
    with pytest.raises(MendError):
        mendlm.load(model)
    assert not marker.exists()


def test_more_layers_than_tensors_are_not_built(model: Path) -> None:
    edit(model / "config.json", num_hidden_layers=10**9, layer_types=None)
    with pytest.raises(CheckpointError, match="says num_hidden_layers 1000000000, and its files hold 20 tensors"):
        mendlm.load(model)


def test_names_of_tensors_do_not_reach_the_terminal_raw(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.\x1b]0;pwned\x07[red]x\u202e"] = tensors["model.norm.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for argv in (
        ["inspect", str(model)],
        ["compress", str(model), str(tmp_path / "out"), "--refiner", "none"],
        ["compress", str(model), str(tmp_path / "out2"), "--dry-run"],
        ["inspect", str(tmp_path / "out"), "--tensor", "model.layers.0.\x1b"],
        ["verify", str(tmp_path / "out")],
    ):
        main(argv)
        captured = capsys.readouterr()
        printed = captured.out + captured.err
        assert not set("\x1b\x07\u202e") & set(printed), argv
