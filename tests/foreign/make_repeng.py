"""Makes the files here that repeng and Hugging Face wrote; README.md says with which versions. Not run by pytest.

It knows nothing of rt_lens: a small random Llama is saved, repeng trains a control vector on it and exports it, and the
logits that repeng's own controlled model gives with one block steered at a time are kept beside it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from repeng import ControlModel, ControlVector, DatasetEntry
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
COEFFICIENT = 3.0
POSITIVE, NEGATIVE = "happy glad joyful cheerful bright merry", "sad gloomy miserable tearful dark bitter"
WORDS = (
    f"i you we they am are was were feel felt think very quite so {POSITIVE} {NEGATIVE} today now always never the a "
    "my this day life work song rain sun home friend and but or to of in with it is one two three four five six . ,"
)


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as large as the residual stream, or no block would matter
            spread = torch.randn(parameter.shape, generator=noise)
            parameter.copy_(1 + 0.2 * spread if "norm" in name else spread if "embed" in name else 0.2 * spread)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS.split()]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def entries() -> list[DatasetEntry]:
    return [
        DatasetEntry(f"{who} {how} {good} {when}", f"{who} {how} {bad} {when}")
        for good, bad in zip(POSITIVE.split(), NEGATIVE.split(), strict=True)
        for who, how, when in (("i", "feel", "today"), ("we", "felt very", "now"))
    ]


def blocks_output(model: LlamaForCausalLM, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """What each block gave, by forward hooks and not by Hugging Face's own list of hidden states."""
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda *call: seen.append(call[-1][0] if isinstance(call[-1], tuple) else call[-1]))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids)
    for hook in hooks:
        hook.remove()
    return seen


def main() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")
    input_ids = tokenizer("i feel quite bright this day but it is the rain", return_tensors="pt").input_ids

    # repeng reads hidden_states[layer + 1]: block `layer`'s output, but for the last, which is after the final norm.
    with torch.no_grad():
        states = model(input_ids, output_hidden_states=True).hidden_states
    outputs = blocks_output(model, input_ids)
    assert all(torch.equal(states[layer + 1], outputs[layer]) for layer in range(3))
    assert not torch.equal(states[4], outputs[3])
    assert torch.equal(states[4], model.model.norm(outputs[3]))

    vector = ControlVector.train(model, tokenizer, entries())
    assert sorted(vector.directions) == [1, 2, 3], "repeng's default leaves block 0 out"
    vector.export_gguf(HERE / "repeng.gguf")

    kept = {"input_ids": input_ids, "coefficient": torch.tensor(COEFFICIENT)}
    kept |= {f"direction.{layer}": torch.from_numpy(np.array(way)) for layer, way in vector.directions.items()}
    with torch.no_grad():
        kept["logits.plain"] = model(input_ids).logits
        for layers in ([1], [2], [3], [1, 2, 3]):
            controlled = ControlModel(model, layers)
            controlled.set_control(vector, COEFFICIENT)
            kept["logits." + "_".join(map(str, layers))] = controlled(input_ids).logits
            controlled.unwrap()
        assert torch.equal(model(input_ids).logits, kept["logits.plain"])
    save_file(kept, HERE / "repeng.safetensors")


if __name__ == "__main__":
    main()
