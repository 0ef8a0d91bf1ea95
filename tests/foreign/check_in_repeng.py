"""Shows that repeng reads a GGUF file that rt_lens wrote: the same rows, at the same blocks. Not run by pytest.

In rt_lens's environment, `python check_in_repeng.py write FILE` saves `steering_vectors_decoder_block.pt` of
blocks 1 to 3; in repeng's, `python check_in_repeng.py read FILE` imports it, compares it, and steers with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def write(file: str) -> None:
    from rt_lens.vectors.interop.gguf import save_gguf
    from rt_lens.vectors.interop.tensors import import_vectors

    vectors = import_vectors(HERE / "steering_vectors_decoder_block.pt", model="tiny", behaviour="joy")
    print("saved", save_gguf(vectors.select(range(1, 4)), file))


def read(file: str) -> None:
    from repeng import ControlModel, ControlVector
    from transformers import LlamaForCausalLM

    vector = ControlVector.import_gguf(file)
    wanted = torch.load(HERE / "steering_vectors_decoder_block.pt", weights_only=True)
    assert sorted(vector.directions) == [1, 2, 3]
    assert all(torch.equal(torch.tensor(vector.directions[layer]), wanted[layer]) for layer in (1, 2, 3))
    print(f"model hint {vector.model_type!r}, layers {sorted(vector.directions)}: every row equal, bit for bit")

    kept = load_file(HERE / "steering_vectors.safetensors")
    model = LlamaForCausalLM.from_pretrained(HERE / "model").eval()
    for layer in (1, 2, 3):
        controlled = ControlModel(model, [layer])
        controlled.set_control(vector, kept["multiplier"].item())
        with torch.no_grad():
            logits = controlled(kept["input_ids"]).logits
        controlled.unwrap()
        away = (logits - kept[f"logits.decoder_block.{layer}"]).abs().max().item()
        moved = (logits - kept["logits.plain"]).abs().max().item()
        assert away < 1e-4 < moved
        print(f"layer {layer}: logits moved by {moved:.2f}, {away:.1e} from those under steering-vectors' patch")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](sys.argv[2])
