"""Go on training the low-rank term of a compressed model as a LoRA adapter; S and its zeros stay.

    mendlm compress MODEL OUT --pattern 2:4 --rank 16
    python examples/finetune_adapter.py OUT TEXT [--steps 20] [--seqlen 256] [--out OUT-peft]

Needs PEFT. TEXT is a .txt file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import mendlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--out", type=Path, help="folder of the adapter; default: the compressed folder's name + -peft")
    options = parser.parse_args()
    out = options.out or options.compressed.with_name(options.compressed.name + "-peft")
    mendlm.export(options.compressed, out, "peft", overwrite=True)

    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, out, is_trainable=True)
    zeros = {name: p == 0 for name, p in model.named_parameters() if name.endswith("base_layer.weight")}

    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    n_windows = min(len(ids) // options.seqlen, options.steps + 1)
    if n_windows < 2:
        parser.error(f"the text has {len(ids)} tokens, two windows of {options.seqlen} are needed")
    held_out, *windows = ids[: n_windows * options.seqlen].view(n_windows, 1, options.seqlen)

    @torch.no_grad()
    def held_out_loss() -> float:
        return float(model.eval()(held_out, labels=held_out).loss)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    before = held_out_loss()
    model.train()
    for step in range(options.steps):
        window = windows[step % len(windows)]
        loss = model(window, labels=window).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1:3d}  loss {float(loss):.4f}")
    after = held_out_loss()

    kept = all(bool((p[zeros[name]] == 0).all()) for name, p in model.named_parameters() if name in zeros)
    n_zeros, n_entries = (sum(int(f(mask)) for mask in zeros.values()) for f in (torch.sum, torch.numel))
    model.save_pretrained(out)
    print(f"held-out loss {before:.4f} -> {after:.4f}")
    print(f"zeros of S: {n_zeros / n_entries:.1%} of {n_entries:,} entries, {'all kept' if kept else 'NOT KEPT'}")
    print(f"adapter: {out}")


if __name__ == "__main__":
    main()
