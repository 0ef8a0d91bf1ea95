"""What is exported computes the same under transformers and peft alone; what has no form there is refused by name."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_model_folders import COVERED, make_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import rt_lens as rtl
from rt_lens.apps.cli import app
from rt_lens.models.backends import parameters_of
from rt_lens.models.forward import dtype_name
from rt_lens.models.load import load_model
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder
from rt_lens.models.tokens.chats import chat_text
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.export.hf import export_hf
from rt_lens.tuning.export.peft import export_peft
from rt_lens.vectors.steering_vectors import SteeringVectors, hook_names

TOKENS = torch.randint(3, 49152, (2, 24), generator=torch.Generator().manual_seed(1))
FAMILIES = {
    "llama": {},
    "llama_biased": {"attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
}
ROW = {
    "arm": "rep_tuned", "direction": "away", "set": "test", "scorer": "VADER", "n": 72, "mean": -0.25, "low": -0.35,
    "high": -0.15, "perplexity": 21.5, "perplexity_low": 17.25, "perplexity_high": 26.75, "n_texts": 10, "kl": 0.125,
    "kl_low": 0.1, "kl_high": 0.15, "facts": None, "seeds": [0, 1, 2],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_folder() -> Path:
    return bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])


@pytest.fixture
def source(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    """Folders of tiny random models, by changes of their configuration."""

    def make(name: str = "plain", **changes: Any) -> Path:
        return make_folder(tmp_path / name, tokenizer_folder, changes)

    return make


@pytest.fixture
def plain(source: Callable[..., Path]) -> Any:
    return load_model(source())


def random_delta(model: Any, wanted: str = "", *, size: float = 0.1, seed: int = 3) -> WeightDelta:
    """Noise on every parameter whose name holds `wanted`, but those that no family has a place for."""
    noise = torch.Generator().manual_seed(seed)
    changes = {
        name: size * torch.randn(parameter.shape, generator=noise)
        for name, parameter in parameters_of(model).items()
        if re.search(wanted, name) and not name.endswith(("b_U", "lm_head.bias"))
    }
    return WeightDelta(changes, "plain", {"direction": "away", "seed": seed}, [])


def without_biases(delta: WeightDelta) -> WeightDelta:
    changes = {name: change for name, change in delta.changes.items() if ".b_" not in name and "._b_" not in name}
    return WeightDelta(changes, delta.model, delta.config, [])


@torch.no_grad()
def logits(model: Any, delta: WeightDelta | None = None) -> torch.Tensor:
    if delta is None:
        return model(TOKENS, attention_mask=torch.ones_like(TOKENS))
    with delta.applied(model):
        return logits(model)


@torch.no_grad()
def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return read(folder)(TOKENS, use_cache=False).logits


def check_exported(model: Any, delta: WeightDelta | None, folder: Path) -> Any:
    """The folder computes what the model does under the delta, the delta does something, and the model stays."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wanted, untouched = logits(model, delta), logits(model)
    assert export_hf(model, folder, delta=delta) == folder
    found = logits_of(folder)
    assert (found - wanted).abs().max() < 1e-4
    if delta is not None:
        assert (found - untouched).abs().max() > 0.01
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    return json.loads((folder / "config.json").read_text())


# The same logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_a_change_of_every_matrix_and_norm_is_written_in_the_familys_own_form(changes, tied, source, tmp_path):
    folder = source(**changes, tie_word_embeddings=tied)
    model = load_model(folder, backend="hooked")
    delta = without_biases(random_delta(model, "attn|mlp|ln"))
    config = check_exported(model, delta, tmp_path / "out")
    assert config["model_type"] == changes.get("model_type", "llama")
    assert config["tie_word_embeddings"] == tied
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied
    assert stored.keys() == load_file(folder / "model.safetensors").keys()


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_a_change_of_every_bias_is_written_as_a_llama_with_biases_and_loads_again(changes, source, tmp_path):
    model = load_model(source(**changes, num_key_value_heads=4), backend="hooked")  # ungrouped names too
    delta = random_delta(model)
    assert {"blocks.0.attn.b_K", "blocks.1.mlp.b_in", "embed.W_E"} <= delta.changes.keys()
    config = check_exported(model, delta, tmp_path / "out")
    assert (config["model_type"], config["attention_bias"], config["mlp_bias"]) == ("llama", True, True)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "written as LlamaForCausalLM with biases" in (tmp_path / "out" / "README.md").read_text()
    again = load_model(tmp_path / "out", backend="hooked")
    assert (logits(again) - logits(model, delta)).abs().max() < 1e-4
    with rtl.models.forward.quick(again):
        assert (logits(again) - logits(model, delta)).abs().max() < 1e-4


@pytest.mark.parametrize("case", [case for case in COVERED if case not in ("grouped", "tied", "attention_bias")])
def test_every_configuration_that_loads_is_written_with_biases_too(case, source, tmp_path):
    model = load_model(source(**COVERED[case]), backend="hooked")
    check_exported(model, random_delta(model), tmp_path / "out")


@pytest.mark.parametrize("wanted", ["embed.W_E", "unembed.W_U"])
def test_tied_embeddings_part_only_if_one_is_changed_without_the_other(wanted, source, tmp_path):
    model = load_model(source(tie_word_embeddings=True), backend="hooked")
    config = check_exported(model, random_delta(model, rf"^{wanted}"), tmp_path / "out")
    assert not config["tie_word_embeddings"]
    both = random_delta(model, "^embed.W_E")
    both = WeightDelta(both.changes | {"unembed.W_U": both.changes["embed.W_E"].T}, "plain", {}, [])
    assert check_exported(model, both, tmp_path / "both")["tie_word_embeddings"]
    assert "lm_head.weight" not in load_file(tmp_path / "both" / "model.safetensors")


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_a_baked_edit_is_written_and_computes_what_the_hooks_do(changes, source, tmp_path, provenance):
    model = load_model(source(**changes), backend="hooked")
    noise = torch.Generator().manual_seed(2)
    names = [*hook_names([0, 1], "resid_post"), *hook_names([0, 1], "attn_out")]
    vectors = SteeringVectors({name: torch.randn(32, generator=noise) for name in names}, provenance)
    hooks = rtl.add(vectors, [0, 1], 1.5) + rtl.add(vectors, [1], -1.0, hook="attn_out")
    check_exported(model, rtl.bake(model, hooks), tmp_path / "out")
    with model.hooks(fwd_hooks=hooks):
        hooked = logits(model)
    assert (logits_of(tmp_path / "out") - hooked).abs().max() < 1e-4
    assert (logits(load_model(tmp_path / "out", backend="hooked")) - hooked).abs().max() < 1e-4


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("case", ["llama", "tied", "qwen2", "qwen3", "gpt2"])
def test_a_bridge_is_written_in_its_own_form(case, delta, source, tmp_path):
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 49152}
    changes = {
        "llama": {},
        "tied": {"tie_word_embeddings": True},
        "qwen2": {"model_type": "qwen2"},
        "qwen3": {"model_type": "qwen3", "head_dim": 8},
        "gpt2": {"model_type": "gpt2", **gpt2},
    }[case]
    folder = source(**changes)
    model = load_model(folder, backend="bridge")
    wanted = (
        r"layers|\.h\." if case in ("tied", "gpt2") else ""
    )  # a change of the one embedding alone unties it from the other
    config = check_exported(model, random_delta(model, wanted) if delta else None, tmp_path / "out")
    assert config["architectures"] == json.loads((folder / "config.json").read_text())["architectures"]
    stored, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {name: t.shape for name, t in before.items()}
    assert all(torch.equal(stored[name], before[name]) for name in before) != delta


def test_a_bridge_of_another_joint_layout_is_written_with_its_query_key_and_value(source, tmp_path):
    sizes = {"hidden_size": 32, "num_key_value_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    model = load_model(source(model_type="gpt_neox", vocab_size=49152, **sizes), backend="bridge")
    check_exported(model, random_delta(model, "mlp"), tmp_path / "out")
    check_exported(model, random_delta(model, "query_key_value"), tmp_path / "joint")


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_dtype_tokenizer_template_and_generation_settings_are_kept(source, tmp_path, backend):
    folder = source()
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [2, 0]}')
    model = load_model(folder, backend=backend, dtype="bfloat16")
    export_hf(model, tmp_path / "out", delta=random_delta(model, "attn"))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in written.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert written.generation_config.temperature == 0.6 and written.generation_config.eos_token_id == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = chat_text(model, "Hello, how are you?")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template is not None
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(folder).encode(text)
    assert str(tmp_path) not in "".join(
        (tmp_path / "out" / name).read_text() for name in ("config.json", "tokenizer_config.json", "README.md")
    )


def test_without_generation_settings_none_are_written(plain, tmp_path):
    (tmp_path / "plain" / "generation_config.json").unlink()
    export_hf(load_model(tmp_path / "plain"), tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_large_models_are_written_in_shards(plain, tmp_path):
    delta = random_delta(plain, "attn")
    export_hf(plain, tmp_path / "out", delta=delta, max_shard_size="4MB", check=False)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (logits_of(tmp_path / "out") - logits(plain, delta)).abs().max() < 1e-4
    assert (logits(load_model(tmp_path / "out")) - logits(plain, delta)).abs().max() < 1e-4


def test_everybody_who_may_read_the_folder_may_read_the_weights(plain, tmp_path):
    export_hf(plain, tmp_path / "out")
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "out").stat().st_mode & 0o666}


def test_an_official_name_keeps_its_configuration_and_is_written(source, tmp_path):
    """A hub cache with a tiny model under an official name, read offline by another process."""
    cache = tmp_path / "home" / "hub" / "models--Qwen--Qwen2-0.5B"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    shutil.move(source(model_type="qwen2"), cache / "snapshots" / ("0" * 40))
    code = f"""
import torch, rt_lens as rtl
from transformers import AutoModelForCausalLM
from rt_lens.tuning.export.hf import export_hf
model = rtl.load_model("Qwen/Qwen2-0.5B", backend="hooked")
assert type(model).__name__ == "HookedTransformer"
tokens = torch.arange(100, 120)[None]
delta = rtl.WeightDelta({{"blocks.1.mlp.W_out": torch.ones(48, 32)}}, "Qwen2-0.5B", {{}}, [])
export_hf(model, {str(tmp_path / "out")!r}, delta=delta)
with torch.no_grad(), delta.applied(model):
    ours = model(tokens)
theirs = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})(tokens).logits
assert (ours - theirs).abs().max() < 1e-4 and ours.std() > 0.1
"""
    run_python(code, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_the_exported_tokenizer_pads_as_the_sources_does(backend, source, tmp_path):
    """Here padding is on the left, with the end-of-text token where there is none of its own."""
    folder = source()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model = load_model(folder, backend=backend)
    export_hf(model, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.padding_side, found.pad_token) == ("right", None)
    assert (model.tokenizer.padding_side, model.tokenizer.pad_token) == ("left", tokenizer.eos_token)
    model.tokenizer.pad_token = "<|endoftext|>"  # the user's own choice since
    export_hf(model, tmp_path / "chosen")
    assert AutoTokenizer.from_pretrained(tmp_path / "chosen").pad_token == "<|endoftext|>"


@pytest.mark.parametrize(("asked", "wanted"), [((), "bfloat16"), (("--dtype", "float32"), "float32")])
def test_the_command_reads_the_model_in_the_type_that_the_change_was_made_in(asked, wanted, source, tmp_path):
    model = load_model(source(), dtype="bfloat16")
    change = {"blocks.1.mlp.W_out": torch.ones(48, 32)}
    WeightDelta(change, str(tmp_path / "plain"), {}, [], "bfloat16").save(tmp_path / "delta.safetensors")
    assert WeightDelta.load(tmp_path / "delta.safetensors").dtype == "bfloat16"
    assert dtype_name(model) == "bfloat16"
    arguments = ["export", str(tmp_path / "delta.safetensors"), "--out", str(tmp_path / "out"), *asked]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == wanted


# Refusals


@pytest.mark.hooked
def test_a_model_that_did_not_come_from_a_folder_is_refused_with_the_way(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"HookedTransformer tiny with no config.*backend='bridge'"):
        export_hf(tiny, tmp_path / "out")
    tiny.cfg.rt_lens_config = {"model_type": "gpt2"}
    with pytest.raises(ValueError, match=r"\(llama, mistral, qwen2\), got .*family gpt2.*backend='bridge'"):
        export_hf(tiny, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_what_has_no_place_in_the_files_is_refused_by_name(plain, tmp_path):
    delta = WeightDelta({"unembed.b_U": torch.ones(49152)}, "plain", {}, [])
    with pytest.raises(
        ValueError,
        match=r"delta must change only what LlamaForCausalLM has in its files, got unembed.b_U, which is not",
    ):
        export_hf(plain, tmp_path / "out", delta=delta)
    bridge = load_model(tmp_path / "plain", backend="bridge")
    delta = WeightDelta({"lm_head._original_component.bias": torch.ones(49152)}, "plain", {}, [])
    with pytest.raises(
        ValueError, match=r"delta must change only what LlamaForCausalLM has in its files, got lm_head.bias"
    ):
        export_hf(bridge, tmp_path / "out", delta=delta)
    with pytest.raises(ValueError, match=r"delta must fit the model, got \(2, 2\) for blocks.0.mlp.W_in"):
        export_hf(plain, tmp_path / "out", delta=WeightDelta({"blocks.0.mlp.W_in": torch.ones(2, 2)}, "m", {}, []))
    assert [entry.name for entry in tmp_path.iterdir()] == ["plain"]


def test_a_sliding_window_is_never_lost_on_the_way_to_a_llama(source, tmp_path):
    model = load_model(source(model_type="mistral", sliding_window=None))
    model.cfg.rt_lens_config["sliding_window"] = 4
    with pytest.raises(ValueError, match=r"as a Llama it cannot be written \(.*sliding_window.*keep the hooks"):
        export_hf(model, tmp_path / "out", delta=random_delta(model, "b_out"))


@pytest.mark.hooked
def test_a_folder_that_computes_something_else_gets_no_name(plain, tmp_path):
    plain.cfg.rt_lens_config["rope_parameters"] = {"rope_type": "default", "rope_theta": 3.0}
    with pytest.raises(
        ValueError,
        match=r"exported model's logits differ from the original's \(relative error [\d.e-]+\); nothing was",
    ):
        export_hf(plain, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize("write", ["hf", "peft"])
def test_what_is_there_already_is_kept(plain, tmp_path, write):
    delta = random_delta(plain, "W_O")

    def export(path: Path) -> None:
        if write == "hf":
            export_hf(plain, path, delta=delta)
        else:
            export_peft(plain, path, delta, 1)

    (tmp_path / "out").mkdir()
    export(tmp_path / "out")  # an empty folder is no loss
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for there in (tmp_path / "out", tmp_path / "plain" / "config.json"):
        with pytest.raises(
            ValueError, match=r"path must be a new or empty folder, got .*\. Name a new folder, or delete"
        ):
            export(there)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_an_interrupted_export_leaves_nothing(plain, tmp_path, monkeypatch):
    for kind in (KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")):
        with monkeypatch.context() as patch:
            patch.setattr(plain.tokenizer, "save_pretrained", lambda folder, kind=kind: (_ for _ in ()).throw(kind))
            with pytest.raises((KeyboardInterrupt, OSError)):
                export_hf(plain, tmp_path / "deep" / "out")
        assert not any((tmp_path / "deep").iterdir())


def test_too_full_a_disk_is_told_before_anything_is_written(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"path must be on a disk with 1\d MB free, got .* with 1 MB"):
        export_hf(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_meanwhile_is_an_error_of_the_system(plain, tmp_path):
    """Under a limit of the size of a file, which safetensors meets as a write that fails."""
    code = f"""
import resource, signal, rt_lens as rtl
from rt_lens.tuning.export.hf import export_hf
model = rtl.load_model({str(tmp_path / "plain")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))
try:
    export_hf(model, {str(tmp_path / "out")!r})
except OSError as error:
    print(error)
"""
    assert "out could not be written" in run_python(code)
    assert [entry.name for entry in tmp_path.iterdir()] == ["plain"]


# The card


def test_the_card_shows_each_measured_value_with_n_interval_and_seeds(plain, tmp_path):
    delta = WeightDelta(random_delta(plain, "blocks.1.mlp.W_out").changes, "plain", {"vectors": {"method": "x"}}, [])
    untuned = {**ROW, "arm": "untuned", "direction": "none", "kl": None, "seeds": None, "seed": 7}
    export_hf(plain, tmp_path / "out", delta=delta, measured=[untuned, ROW], behaviour="mood | <b>happy</b>")
    card = (tmp_path / "out" / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert rows == [
        "| arm | direction | score | perplexity | KL (nats) | seeds |",
        "| untuned | none | -0.25 [-0.35, -0.15], n = 72 (VADER) | 21.5 [17.2, 26.8], n = 10 | – | 7 |",
        "| rep_tuned | away | -0.25 [-0.35, -0.15], n = 72 (VADER) | 21.5 [17.2, 26.8], n = 10 "
        "| 0.125 [0.1, 0.15], n = 10 | 0, 1, 2 |",
    ]
    assert "facts" not in card and "Nothing was measured" not in card and "<b>" not in card
    assert re.search(r"- changed: 1 of \d+ parameters, in blocks 1\n", card) and "- base model: plain\n" in card
    assert '- vectors: `{"method": "x"}`' in card
    assert "See the base model's" in card


def test_without_rows_the_card_says_that_nothing_was_measured(plain, tmp_path):
    export_hf(plain, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was measured" in card and "these are the weights of the base model" in card


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"measured must be at least one row"),
        (
            [{key: value for key, value in ROW.items() if key != "low"}],
            r"measured must have the columns low in every row",
        ),
        ([{**ROW, "seeds": []}], r"measured must have the columns seeds in every row"),
    ],
)
def test_rows_without_interval_or_seed_are_refused(plain, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        export_hf(plain, tmp_path / "out", measured=rows)
    assert not (tmp_path / "out").exists()


# Adapters


def low_rank(model: Any, rank: int, wanted: str = r"W_[QKVO]$|mlp\.W_") -> WeightDelta:
    """Changes whose matrices, in Hugging Face's layout, have a rank."""
    noise, changes = torch.Generator().manual_seed(5), {}
    heads = {"W_Q": 4, "_W_K": 2, "_W_V": 2, "W_O": 4}
    for name, parameter in model.named_parameters():
        if not re.search(wanted, name) or "embed" in name:
            continue
        n = heads.get(name.rsplit(".", 1)[-1])
        out = parameter.shape[-1] if n is None or name.endswith("W_O") else n * 8
        change = torch.randn(out, rank, generator=noise) @ torch.randn(rank, parameter.numel() // out, generator=noise)
        if n is None:
            changes[name] = 0.05 * change.T
        elif name.endswith("W_O"):
            changes[name] = 0.05 * change.T.reshape(n, 8, out)
        else:
            changes[name] = 0.05 * change.reshape(n, 8, -1).transpose(1, 2)
    return WeightDelta(changes, "plain", {"direction": "away"}, [])


def merged_error(folder: Path, adapter: Path, exported: Path) -> float:
    """Relative Frobenius error of an adapter's merged weights, from the files alone."""
    base, wanted = read(folder).state_dict(), read(exported).state_dict()
    merged = PeftModel.from_pretrained(read(folder), adapter).merge_and_unload().state_dict()
    lost = sum(float((merged[name] - wanted[name]).double().square().sum()) for name in wanted)
    return (lost / sum(float((wanted[name] - base[name]).double().square().sum()) for name in wanted)) ** 0.5


@pytest.mark.parametrize("changes", [*FAMILIES.values(), {"tie_word_embeddings": True}], ids=[*FAMILIES, "tied"])
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_change_of_rank_3_is_exact_at_rank_3_and_found_to_be_so(changes, backend, source, tmp_path):
    folder = source(**changes)
    model = load_model(folder, backend="hooked")
    delta = low_rank(model, 3)
    assert len(delta.changes) == 14
    wanted = logits(model, delta)
    if backend == "bridge":
        export_hf(model, tmp_path / "whole", delta=delta)
        model = load_model(folder, backend="bridge")
        goal = dict(load_model(tmp_path / "whole", backend="bridge").named_parameters())
        changed = {name: goal[name].data - parameter.data for name, parameter in model.named_parameters()}
        delta = WeightDelta({name: change for name, change in changed.items() if change.norm() > 1e-3}, "m", {}, [])
    for rank in (3, 8, None):
        adapter = export_peft(model, tmp_path / f"lora{rank}", delta, rank)
        assert (adapter.rank, adapter.relative_error < 1e-5) == (3, True)
        assert set(adapter.modules["rank"]) == {3} == set(adapter.modules["change_rank"]) or backend == "bridge"
        peft = PeftModel.from_pretrained(read(folder), tmp_path / f"lora{rank}").eval()
        with torch.no_grad():
            found = peft(TOKENS, use_cache=False).logits
            merged = peft.merge_and_unload()(TOKENS, use_cache=False).logits
        assert (found - wanted).abs().max() < 1e-4 and (merged - wanted).abs().max() < 1e-4
        assert (found - logits(model)).abs().max() > 0.01


def test_the_error_stated_is_that_of_the_merged_weights_and_falls_with_rank(plain, tmp_path):
    delta = low_rank(plain, 12, r"blocks.1.*(W_[QO]|W_out)$")
    export_hf(plain, tmp_path / "whole", delta=delta)
    errors = []
    for rank in (1, 2, 4, 8):
        adapter = export_peft(plain, tmp_path / f"rank{rank}", delta, rank)
        measured = merged_error(tmp_path / "plain", tmp_path / f"rank{rank}", tmp_path / "whole")
        assert adapter.relative_error == pytest.approx(measured, rel=1e-4)
        assert adapter.modules["kept"].between(0, 1).all()
        assert (1 - adapter.modules["relative_error"] ** 2).tolist() == pytest.approx(adapter.modules["kept"].tolist())
        assert f"{adapter.relative_error:.2g}" in (tmp_path / f"rank{rank}" / "README.md").read_text()
        errors.append(adapter.relative_error)
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1] > 0.1


def test_only_changed_modules_are_adapted_each_at_the_rank_it_needs(plain, tmp_path):
    some, others = low_rank(plain, 2, r"blocks.0.mlp.W_in"), low_rank(plain, 5, r"blocks.1.attn.W_O")
    zero = {"blocks.1.mlp.W_out": torch.zeros(48, 32), "blocks.0.ln1.w": torch.zeros(32)}
    delta = WeightDelta(some.changes | others.changes | zero, "plain", {}, [])
    adapter = export_peft(plain, tmp_path / "lora", delta, None, base="somebody/base")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    ranks = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.self_attn.o_proj": 5}
    assert dict(zip(adapter.modules["module"], adapter.modules["rank"], strict=True)) == ranks
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks and set(config["target_modules"]) == set(ranks)
    assert config["base_model_name_or_path"] == "somebody/base"
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert sorted(stored) == sorted(f"base_model.model.{m}.lora_{x}.weight" for m in ranks for x in "AB")
    assert sorted(file.name for file in (tmp_path / "lora").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ln_final.w", "blocks.0.ln1.w", "blocks.1.mlp.b_out", "embed.W_E", "unembed.W_U"])
def test_what_lora_cannot_hold_is_refused_by_name(plain, tmp_path, name):
    delta = random_delta(plain, rf"^{name}$|blocks.0.attn.W_Q")
    assert len(delta.changes) == 2
    with pytest.raises(ValueError, match=r"it cannot hold (model|lm_head)\.[\w.]+\. Use export_hf"):
        export_peft(plain, tmp_path / "lora", delta, 4)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_and_a_change_of_nothing_are_refused(plain, tmp_path, rank):
    with pytest.raises(ValueError, match=rf"rank must be 1 or more, or None for exact, got {rank}"):
        export_peft(plain, tmp_path / "lora", random_delta(plain, "W_O"), rank)
    with pytest.raises(ValueError, match=r"delta must change something"):
        export_peft(plain, tmp_path / "lora", WeightDelta({"blocks.0.mlp.W_in": torch.zeros(32, 48)}, "m", {}, []), 1)


def test_a_bfloat16_change_is_adapted_no_less_exactly(source, tmp_path):
    model = load_model(source(), dtype="bfloat16")
    delta = low_rank(model, 1, "blocks.0.mlp.W_in")
    halved = {name: change.bfloat16() for name, change in delta.changes.items()}
    adapter = export_peft(model, tmp_path / "lora", WeightDelta(halved, "m", {}, []), 1)
    assert 1e-5 < adapter.relative_error < 0.01  # rounded to bfloat16, a matrix of rank 1 is no longer quite that
    assert export_peft(model, tmp_path / "all", WeightDelta(halved, "m", {}, []), None).relative_error < 1e-5


# The command, and the model itself


@pytest.mark.hooked
def test_the_command_writes_a_folder_or_an_adapter_and_says_what_to_do_next(plain, tmp_path):
    folder, file, results = tmp_path / "plain", tmp_path / "away.safetensors", tmp_path / "results.json"
    delta = low_rank(plain, 4, r"blocks.0.mlp.W_")
    WeightDelta(delta.changes, "plain", {"direction": "away", "cosine_weight": 14.0}, []).save(file)
    rows = [
        {**ROW, "arm": arm, "direction": d} for arm in ("untuned", "token_tuned", "rep_tuned") for d in ("none", "away")
    ]
    results.write_text(json.dumps({"behaviour": "mood", "model": "plain", "summary": [*rows[:1], rows[3], rows[5]]}))
    given = ("export", str(file), "--model", str(folder), "--results", str(results))
    done = subprocess.run(
        [sys.executable, "-m", "rt_lens.apps.cli", *given, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert f"from_pretrained('{tmp_path / 'out'}')" in said.splitlines()[-1]
    assert (logits_of(tmp_path / "out") - logits(plain, delta)).abs().max() < 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| untuned |" in card and "| rep_tuned |" in card and "token_tuned" not in card and ": mood" in card
    within = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "lora"), "--peft", "2"])
    assert "rank 2 or less, relative error 0." in within.output
    assert "PeftModel.from_pretrained(" in within.output.splitlines()[-1]
    assert "These rows are of the whole change" in (tmp_path / "lora" / "README.md").read_text()
    exact = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "exact"), "--peft", "exact"])
    assert "3 matrices at rank 4 or less" in exact.output

    def refusal(*more: str) -> str:
        return str(CliRunner().invoke(app, [*given, "--out", str(tmp_path / "no"), *more]).exception)

    assert "peft must be a rank such as 16" in refusal("--peft", "two")
    results.write_text(json.dumps({"behaviour": "mood", "model": "other", "summary": rows}))
    assert "results must be those of the run that made this delta, with a row of rep_tuned, away on plain" in refusal()
    results.write_text("[]")
    assert "results must be the results.json of a run" in refusal()
    results.unlink()
    assert "results must be a file that exists" in refusal()
    assert not (tmp_path / "no").exists()


def test_the_real_model_says_the_same_without_rt_lens(model, tmp_path):
    noise = torch.Generator().manual_seed(0)
    shape = model.blocks[18].mlp.W_out.shape
    changes = {"blocks.18.mlp.W_out": 0.15 * torch.randn(shape, generator=noise)}
    delta = WeightDelta(changes, DEFAULT_MODEL, {}, [])
    prompts = ["Tell me about your weekend.", "Name three metals.", "How do I boil an egg?"]
    with delta.applied(model):
        ours = rtl.generate(model, prompts, max_new_tokens=20)
    assert ours != rtl.generate(model, prompts, max_new_tokens=20)
    export_hf(model, tmp_path / "out", delta=delta, check=False)
    code = f"""
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "out")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
answers = []
for prompt in {prompts!r}:
    chat = [{{"role": "user", "content": prompt}}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**tokens, max_new_tokens=20, do_sample=False)[0, tokens["input_ids"].shape[1]:]
    answers.append(tokenizer.decode(new, skip_special_tokens=True))
assert "transformer_lens" not in sys.modules and "rt_lens" not in sys.modules
print(json.dumps(answers))
"""
    try:
        assert json.loads(run_python(code, PYTHONPATH="")) == ours
        card = (tmp_path / "out" / "README.md").read_text()
        assert "license: apache-2.0" in card and "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card
    finally:
        shutil.rmtree(tmp_path / "out")
