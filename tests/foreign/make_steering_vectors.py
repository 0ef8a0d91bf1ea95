"""Makes the files here that steering-vectors wrote; README.md says with which versions. Not run by pytest.

Run after make_repeng.py, whose model it trains on. It knows nothing of rt_lens: each kind of layer gets a vector,
saved as the dict that it is, and the logits under steering-vectors' own patch with one block steered at a time.
"""

from __future__ import annotations

import torch
from make_repeng import COEFFICIENT, HERE, entries
from safetensors.torch import load_file, save_file
from steering_vectors import SteeringVector, train_steering_vector
from transformers import AutoTokenizer, LlamaForCausalLM


def main() -> None:
    model = LlamaForCausalLM.from_pretrained(HERE / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    input_ids = load_file(HERE / "repeng.safetensors")["input_ids"]
    pairs = [(entry.positive, entry.negative) for entry in entries()]
    kept = {"input_ids": input_ids, "multiplier": torch.tensor(COEFFICIENT)}
    for kind in ("decoder_block", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        vector = train_steering_vector(model, tokenizer, pairs, layer_type=kind)
        assert sorted(vector.layer_activations) == [0, 1, 2, 3]
        if not kind.endswith("layernorm"):
            torch.save(vector.layer_activations, HERE / f"steering_vectors_{kind}.pt")
        for layer in range(4):
            one = SteeringVector({layer: vector.layer_activations[layer]}, kind)
            with torch.no_grad(), one.apply(model, multiplier=COEFFICIENT):
                if not kind.endswith("layernorm"):
                    kept[f"logits.{kind}.{layer}"] = model(input_ids).logits
    with torch.no_grad():
        kept["logits.plain"] = model(input_ids).logits
    save_file(kept, HERE / "steering_vectors.safetensors")


if __name__ == "__main__":
    main()
