"""Local folders with tiny random weights: what the mapping covers equals Hugging Face, what it does not is refused."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import DEFAULT_KIND
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rt_lens.models.backends import backend_of
from rt_lens.models.forward import quick
from rt_lens.models.generation import generate_tokens
from rt_lens.models.llama import to_huggingface
from rt_lens.models.load import load_model
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder
from rt_lens.models.tokens.batches import encode, pad_id_of
from rt_lens.models.tokens.chats import chat_text
from rt_lens.tuning.export.hf import export_hf

SIZES = {
    "vocab_size": 49152, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
COVERED: dict[str, dict[str, Any]] = {
    "grouped": {},
    "not_grouped": {"num_key_value_heads": 4},
    "one_key_value_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "llama3_rope": {"rope_parameters": LLAMA3},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "rms_norm_eps": {"rms_norm_eps": 0.3},
    "head_dim": {"head_dim": 16},
    "gelu": {"hidden_act": "gelu"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_wide_window": {"model_type": "mistral", "sliding_window": 64},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_unused_window": {"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": False},
}
NOT_COVERED: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp_bias": ("mlp_bias", {"mlp_bias": True}),
    "linear_rope": ("rope_type", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn_rope": ("rope_type", {"rope_parameters": {**LLAMA3, "rope_type": "yarn"}}),
    "tanh_gelu": ("hidden_act", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral_window": ("sliding_window", {"model_type": "mistral", "sliding_window": 4}),
    "qwen2_window": (
        "sliding_window",
        {"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "multiplier": ("residual_multiplier", {"residual_multiplier": 0.5}),
    "granite": ("model_type", {"model_type": "granite", "residual_multiplier": 0.5, "attention_multiplier": 0.2}),
    "qwen3": ("model_type", {"model_type": "qwen3", "head_dim": 8}),
    "gpt2": (
        "model_type",
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 49152},
    ),
}


@pytest.fixture(scope="module")
def tokenizer_folder() -> Path:
    return bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])


def make_folder(folder: Path, tokenizer_folder: Path, changes: dict[str, Any], **saving: Any) -> Path:
    """A folder that save_pretrained wrote, of a model whose every parameter is random."""
    family = changes.get("model_type", "llama")
    config = CONFIG_MAPPING[family](**({} if family == "gpt2" else SIZES) | changes)
    noise = torch.Generator().manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in made.named_parameters():
        around = 1.0 if "norm" in name or ".ln_" in name else 0.0
        parameter.data = around + 0.25 * torch.randn(parameter.shape, generator=noise)
    made.save_pretrained(folder, **saving)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_folder / name, folder)
    return folder


@pytest.fixture
def plain(tmp_path: Path, tokenizer_folder: Path) -> Path:
    return make_folder(tmp_path / "plain", tokenizer_folder, {})


def logits_of_huggingface(folder: Path, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens, use_cache=False, **kwargs).logits


def assert_equals_huggingface(model: Any, folder: Path) -> None:
    """Logits of a single and of a left-padded batch, also inside `quick`, to 1e-4."""
    tokens = torch.randint(3, 49152, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(24) >= torch.tensor([[0], [9], [23]])).long()
    tokens = torch.where(mask.bool(), tokens, 2)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    single = logits_of_huggingface(folder, tokens[:1])
    batch = logits_of_huggingface(folder, tokens, attention_mask=mask, position_ids=positions)[mask.bool()]
    assert single.std() > 0.5
    with torch.no_grad():
        assert (model(tokens[:1]) - single).abs().max() < 1e-4
        assert (model(tokens, attention_mask=mask)[mask.bool()] - batch).abs().max() < 1e-4
        with quick(model):
            assert (model(tokens, attention_mask=mask)[mask.bool()] - batch).abs().max() < 1e-4


@pytest.mark.parametrize("changes", COVERED.values(), ids=COVERED)
def test_covered_configurations_equal_huggingface(changes, tmp_path, tokenizer_folder):
    folder = make_folder(tmp_path / "model", tokenizer_folder, changes)
    model = load_model(folder)
    assert backend_of(model).kind == DEFAULT_KIND
    assert_equals_huggingface(model, folder)


@pytest.mark.parametrize(("field", "changes"), NOT_COVERED.values(), ids=NOT_COVERED)
def test_other_configurations_become_a_bridge_and_refuse_hooked(field, changes, tmp_path, tokenizer_folder):
    folder = make_folder(tmp_path / "model", tokenizer_folder, changes)
    model = load_model(folder)
    assert backend_of(model).kind == "bridge"
    assert_equals_huggingface(model, folder)
    with pytest.raises(ValueError, match=rf"backend 'hooked' cannot load model: {field} .*backend='bridge'"):
        load_model(folder, backend="hooked")


@pytest.mark.parametrize("case", ["llama3_rope", "rope_theta", "rms_norm_eps", "gelu"])
def test_these_fields_matter(case, tmp_path, tokenizer_folder, plain):
    """The same seed gives the same weights: what differs is the field's doing."""
    tokens = torch.arange(100, 124)[None]
    changed = make_folder(tmp_path / case, tokenizer_folder, COVERED[case])
    assert (logits_of_huggingface(changed, tokens) - logits_of_huggingface(plain, tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("biased", ["", "gate_proj", "up_proj"])
def test_mlp_biases_are_covered_where_nothing_is_added_before_the_product(biased, plain, tmp_path):
    """Adding to the gate or to what it gates is no constant afterwards; adding to the MLP's output is `b_out`."""
    weights, noise = load_file(plain / "model.safetensors"), torch.Generator().manual_seed(4)
    without = logits_of_huggingface(plain, torch.arange(100, 124)[None])
    for layer in (0, 1):
        for kind, size in (("gate_proj", 48), ("up_proj", 48), ("down_proj", 32)):
            chosen = kind in ("down_proj", biased)
            weights[f"model.layers.{layer}.mlp.{kind}.bias"] = chosen * torch.randn(size, generator=noise)
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    edit_config(plain, mlp_bias=True)
    assert (logits_of_huggingface(plain, torch.arange(100, 124)[None]) - without).abs().max() > 0.1
    assert_equals_huggingface(load_model(plain), plain)
    if biased:
        with pytest.raises(ValueError, match=rf"mlp_bias True with a {biased}.bias other than 0 .*backend='bridge'"):
            load_model(plain, backend="hooked")
    else:
        assert torch.equal(load_model(plain, backend="hooked").b_out[1], weights["model.layers.1.mlp.down_proj.bias"])


@pytest.mark.parametrize("changes", COVERED.values(), ids=COVERED)
def test_each_parameter_goes_back_to_the_weight_it_came_from(changes, tmp_path, tokenizer_folder):
    folder = make_folder(tmp_path / "model", tokenizer_folder, changes)
    stored, model = load_file(folder / "model.safetensors"), load_model(folder, backend="hooked")
    found = dict(filter(None, (to_huggingface(name, p.data) for name, p in model.named_parameters())))
    assert stored.keys() <= found.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    left = {
        re.sub(r"^blocks.\d+.|^unembed.", "", name)
        for name, p in model.named_parameters()
        if to_huggingface(name, p.data) is None
    }
    assert left == {"b_U", "mlp.b_in"}
    assert model.cfg.rt_lens_config["model_type"] == json.loads((folder / "config.json").read_text())["model_type"]


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {field: value for field, value in config.items() if field not in remove}
    (folder / "config.json").write_text(json.dumps(kept | changes))


OLDER: dict[str, dict[str, Any]] = {
    "rope_theta outside": {"rope_theta": 50.0},
    "rope_theta outside, parameters inside": {"rope_theta": 50.0, "rope_parameters": {"rope_type": "default"}},
    "rope_scaling": {"rope_theta": 50.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    "rope_scaling without the first length": {
        "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    },
    "everything left to the defaults": {},
}


@pytest.mark.parametrize("changes", OLDER.values(), ids=OLDER)
def test_older_spellings_and_defaults_are_read_as_huggingface_reads_them(changes, tmp_path, tokenizer_folder):
    folder = make_folder(tmp_path / "model", tokenizer_folder, {"num_key_value_heads": 4})
    left_out = ("rope_parameters", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    edit_config(folder, (*left_out, "hidden_act", "mlp_bias", "attention_bias"), **changes)
    model = load_model(folder, backend="hooked")
    assert_equals_huggingface(model, folder)


def test_a_mistral_folder_without_key_value_heads_has_eight(tmp_path, tokenizer_folder):
    changes = {"model_type": "mistral", "sliding_window": None}
    folder = make_folder(tmp_path / "model", tokenizer_folder, changes)
    edit_config(folder, ("num_key_value_heads", "num_attention_heads"), num_attention_heads=16, head_dim=2)
    weights = load_file(folder / "model.safetensors")
    assert load_model(folder, backend="hooked").cfg.n_key_value_heads == 8
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)


def test_a_head_stored_beside_a_tied_configuration_is_treated_as_huggingface_does(plain):
    edit_config(plain, tie_word_embeddings=True)
    model = load_model(plain, backend="hooked")
    assert not model.cfg.tie_word_embeddings
    assert_equals_huggingface(model, plain)
    weights = load_file(plain / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    model = load_model(plain, backend="hooked")
    assert model.W_U.data_ptr() == model.W_E.data_ptr()
    assert_equals_huggingface(model, plain)


def test_shards_are_read_by_their_index_and_no_other_file_is(tmp_path, tokenizer_folder):
    folder = make_folder(tmp_path / "model", tokenizer_folder, {}, max_shard_size="5MB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shutil.copy(shards[0], folder / "consolidated.safetensors")
    save_file({"stray": torch.zeros(2)}, folder / "adapter_model.safetensors")
    assert_equals_huggingface(load_model(folder, backend="hooked"), folder)
    shards[-1].unlink()
    with pytest.raises(
        ValueError, match=rf"model must hold every shard .* got none called {shards[-1].name}.*Download it again"
    ):
        load_model(folder)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype_and_mode(plain, backend, dtype):
    model = load_model(plain, backend=backend, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, str(dtype).split(".")[-1])}
    assert not model.training


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("added", ["<|im_start|> $A", "$A <|im_end|>", "<|im_start|> $A <|im_end|>"])
def test_a_tokenizer_that_adds_a_start_token_doubles_none(plain, backend, added):
    tokenizer = AutoTokenizer.from_pretrained(plain)
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=added, special_tokens=special)
    tokenizer.save_pretrained(plain)
    assert (AutoTokenizer.from_pretrained(plain).encode("a")[0] == 1) == added.startswith("<|im_start|>")
    model = load_model(plain, backend=backend)
    tokens = model.to_tokens([chat_text(model, "Hi there, how are you?"), chat_text(model, "Hi")])
    assert tokens.shape[0] == 2
    for row in tokens.tolist():
        ids = row[next(i for i, token in enumerate(row) if token != 2) :]
        assert ids[0] == 1 != ids[1]


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_tokenizer_without_start_or_padding_token_still_pads_on_the_left(plain, backend):
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.bos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(plain)
    model = load_model(plain, backend=backend)
    assert model.tokenizer.pad_token == model.tokenizer.eos_token
    with torch.no_grad():
        together = model(["The quick brown fox", "b"])[:, -1]
        alone = torch.cat([model([text])[:, -1] for text in ("The quick brown fox", "b")])
    assert (together - alone).abs().max() < 1e-4


def test_a_path_under_the_home_folder_may_begin_with_a_tilde(plain, monkeypatch):
    monkeypatch.setenv("HOME", str(plain.parent))
    assert load_model("~/plain").cfg.rt_lens_name == "plain"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"backend": "onnx"}, r"backend must be 'auto', 'hooked' or 'bridge', got 'onnx'"),
        ({"dtype": "int8"}, r"dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"dtype": torch.float64}, r"dtype must be one of .*, got torch.float64"),
        ({"name_or_path": "missing.gguf"}, r"model must be an existing .gguf file, got missing.gguf"),
        ({"name_or_path": "./nowhere"}, r"model must be a Hugging Face folder, .* got ./nowhere, which does not"),
        ({"name_or_path": "/no/such/folder"}, r"model must be .* got /no/such/folder, which does not exist"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_its_value_and_the_fix(argument, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(load_model)(**argument)  # without the type checks of the tests, which would answer first


def test_an_unknown_name_offline_suggests_the_right_one(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"model must be .*got 'smollm2-135m-instrct'.*Did you mean 'smollm2-135m-instruct'\?"
    ):
        load_model("smollm2-135m-instrct")
    with pytest.raises(
        ValueError, match=r"model must be .*got 'nobody/nothing-7b'.*Bundled: smollm2-135m-instruct, gemma3-270m\."
    ):
        load_model("nobody/nothing-7b")


def test_folders_and_files_that_hold_no_model(tmp_path, plain):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model must be a folder with a config.json, got .*empty.*save_pretrained"):
        load_model(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"model must be a folder or a .gguf file, got the file .*model.safetensors"):
        load_model(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"backend 'hooked' .*neither model.safetensors nor model.safetensors.index"):
        load_model(plain, backend="hooked")


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_folder_with_missing_weights_is_refused(plain, lost):
    weights = load_file(plain / "model.safetensors")
    del weights[lost]
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=f"model: plain must hold the weight {lost}, got none. Download the folder again"
    ):
        load_model(plain)


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_folder_with_extra_weights_is_refused(plain, extra):
    weights = load_file(plain / "model.safetensors") | {extra: torch.ones(32)}
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=f"model: plain must hold only weights that its config.json describes, got {extra}"
    ):
        load_model(plain)


def test_a_folder_with_weights_of_another_shape_is_refused(plain):
    edit_config(plain, num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"k_proj.weight of plain must have the shape \(32, 32\) .*got \(16, 32\)"):
        load_model(plain)


# Memory


class Allocations(TorchDispatchMode):
    """Sizes of what is allocated on a device while the block lasts, views not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        makers = (torch.ops.aten.empty, torch.ops.aten.zeros, torch.ops.aten.ones, torch.ops.aten.clone)
        if func.overloadpacket in makers and out.device.type != "meta":
            self.sizes.append(out.numel())
        return out


def test_loading_holds_the_weights_once(tmp_path, tokenizer_folder, monkeypatch):
    """What was read is what the model computes with, but for matrices that are laid side by side, block by block."""
    folder = make_folder(tmp_path / "model", tokenizer_folder, {"tie_word_embeddings": True})
    read: dict[str, tuple[int, Any]] = {}
    from rt_lens.models.backends import hooked_folder

    reader = hooked_folder._read_weights

    def keeping(*arguments: Any) -> dict[str, torch.Tensor]:
        found = reader(*arguments)
        read.update({name: (tensor.data_ptr(), weakref.ref(tensor)) for name, tensor in found.items()})
        return found

    monkeypatch.setattr(hooked_folder, "_read_weights", keeping)
    with Allocations() as allocated:
        model = load_model(folder, backend="hooked")
    smallest = 16 * 32  # of the matrices
    beside = re.compile(r"\.(q|k|v|gate|up)_proj\.")
    large = [size for size in allocated.sizes if size >= smallest]
    assert large == [49152]  # the unembedding's zero bias
    held = {parameter.data_ptr() for parameter in model.parameters()}
    assert {place for name, (place, _) in read.items() if not beside.search(name)} <= held
    assert not any(tensor() is not None for name, (_, tensor) in read.items() if beside.search(name))
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert model.cfg.device == str(next(model.parameters()).device)


@pytest.mark.hooked
@pytest.mark.parametrize("changes", [{}, {"rope_parameters": LLAMA3}])
def test_all_blocks_share_one_table_of_transformerlenss_rotary_angles(changes, tmp_path, tokenizer_folder):
    from transformer_lens import HookedTransformer

    long = {**changes, "max_position_embeddings": 5000}
    model = load_model(make_folder(tmp_path / "model", tokenizer_folder, long), backend="hooked")
    theirs = dict(HookedTransformer(model.cfg).named_buffers())
    ours = dict(model.named_buffers())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    first, second = (block.attn for block in model.blocks)
    assert len(first.rotary_sin) < model.cfg.n_ctx == 5000
    assert first.rotary_sin.data_ptr() == second.rotary_sin.data_ptr()
    before = second.rotary_cos.clone()
    first._extend_rotary_embeddings(5000)
    assert len(first.rotary_cos) == 5000 and torch.equal(second.rotary_cos, before)


# Names on the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """Lays a folder into a hub cache under a name, read offline."""
    home = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))

    def lay(name: str, folder: Path) -> Path:
        place = home / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        return shutil.copytree(folder, place / "snapshots" / ("0" * 40))

    return lay


@pytest.mark.parametrize(
    ("name", "called", "changes"),
    [
        (
            "Qwen/Qwen3-0.6B",
            "Qwen/Qwen3-0.6B",
            {"model_type": "qwen3", "head_dim": 8, "max_position_embeddings": 40960},
        ),
        ("gpt2", "gpt2-small", NOT_COVERED["gpt2"][1]),
        ("Qwen/Qwen2-0.5B", "qwen2-0.5b", {"model_type": "qwen2", "max_position_embeddings": 32768}),
        ("google/gemma-2b", "google/gemma-2b", {"model_type": "gemma", "head_dim": 8}),
    ],
)
def test_an_official_name_is_read_as_its_folder_is(name, called, changes, hub, tmp_path, tokenizer_folder):
    folder = make_folder(tmp_path / "model", tokenizer_folder, changes)
    hub(name, folder)
    model, by_folder = load_model(called), load_model(folder)
    assert type(model) is type(by_folder)
    assert (
        model.cfg.n_ctx == by_folder.cfg.n_ctx == changes.get("max_position_embeddings", changes.get("n_positions", 64))
    )
    assert_equals_huggingface(model, folder)
    stored = load_file(folder / "model.safetensors").values()
    held = {parameter.data.sum().item() for parameter in model.parameters()}
    assert {tensor.sum().item() for tensor in stored if tensor.ndim == 1} <= held
    export_hf(model, tmp_path / "out", check=False)


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_a_repositorys_own_code_runs_only_on_the_users_word(known, by_name, hub, tmp_path, tokenizer_folder):
    folder, flag = make_folder(tmp_path / "model", tokenizer_folder, {}), tmp_path / "ran"
    edit_config(
        folder, auto_map={"AutoConfig": "own.OwnConfig"}, **({} if known else {"model_type": "nobodys"})
    )  # fmt: skip
    (folder / "own.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(flag)!r}, 'w').write('x')\n"
        "class OwnConfig(LlamaConfig):\n    pass\n"
    )
    hub("somebody/own", folder)
    named = "somebody/own" if by_name else folder
    if known:
        assert_equals_huggingface(load_model(named), folder)
    else:
        with pytest.raises(
            ValueError, match=r"brings Python code of its own\. If .*load_model\(\.\.\., trust_remote_code=True"
        ):
            load_model(named)
    assert not flag.exists()
    if not known:
        with suppress(ValueError, OSError):  # what becomes of it then is the repository's
            load_model(named, trust_remote_code=True)
        assert flag.exists()


def test_a_hub_name_without_safetensors_is_told_as_such(hub, plain):
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    hub("somebody/old", plain)
    with pytest.raises(
        ValueError, match=r"model: somebody/old must be on the hub with .*safetensors, got .*pytorch_model"
    ):
        load_model("somebody/old")


# Tokenizers


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("has_end", [True, False])
def test_a_padding_token_that_the_model_has_no_row_for_is_not_used(has_end, backend, plain):
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if not has_end:
        tokenizer.eos_token = None
    tokenizer.save_pretrained(plain)
    model = load_model(plain, backend=backend)
    assert pad_id_of(model) == (2 if has_end else 0)
    texts = ["The quick brown fox", "b"]
    with torch.no_grad():
        together = model(texts)[:, -1]
        alone = torch.cat([model([text])[:, -1] for text in texts])
    assert (together - alone).abs().max() < 1e-4
    assert [len(ids) for ids in generate_tokens(model, [encode(model, text) for text in texts], 3)] == [3, 3]
    model.tokenizer.add_special_tokens({"pad_token": "[PAD2]"})
    assert pad_id_of(model) == (2 if has_end else 0)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_tokenizer_that_knows_no_letter_a_loads(backend, plain):
    made = Tokenizer(WordLevel({letter: number for number, letter in enumerate("ACGT")} | {"<eos>": 4}))
    made.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(plain)
    (plain / "chat_template.jinja").unlink()
    model = load_model(plain, backend=backend)
    assert encode(model, "ACGT") == [0, 1, 2, 3]
    with torch.no_grad():
        assert model(["ACGT", "GG"]).shape[:2] == (2, 4)


def test_chat_template_arguments_are_kept_on_the_model(plain):
    assert load_model(plain).cfg.rt_lens_chat_template_kwargs == {}
    told = {"enable_thinking": False}
    assert load_model(plain, chat_template_kwargs=told).cfg.rt_lens_chat_template_kwargs == told


def test_a_lora_adapter_is_told_as_such(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(
        ValueError, match=r"model: lora must be .* whole model, got a LoRA adapter of some/base\. Merge"
    ):
        load_model(tmp_path / "lora")
