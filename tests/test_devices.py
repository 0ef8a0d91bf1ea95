"""Devices and types: statistics stay in float32, and nothing lands on the default device by chance."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model_folders import make_folder

import rt_lens as rtl
from rt_lens.models.backends import backend_of, has_hooked, parameters_of
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL
from rt_lens.models.sources import bundled_folder
from rt_lens.tuning.targets import Target

PACKAGE = Path(rtl.__file__).parent
MAKERS = {
    "as_tensor",
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "eye",
    "arange",
    "linspace",
    "rand",
    "randn",
    "randint",
    "randperm",
}
PROMPTS = ["Tell me about your weekend.", "How was your day?"]
TARGETS = [Target(f"Question {i}: what is it?", f" It is thing {i}.") for i in range(6)]
TUNING = {
    "direction": "toward", "layers": [1], "max_steps": 4, "epochs": 4, "batch_size": 3, "free_nats": 0.0,
    "kl_weight": 0.0, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    tokenizer = bundled_folder(BUNDLED_MODELS[DEFAULT_MODEL])
    return lambda name="model", **changes: make_folder(tmp_path / name, tokenizer, changes)


def everything(model: Any) -> dict[str, Any]:
    """What a user does with a model, in small: numbers on the CPU, by name."""
    pairs = rtl.load_pairs("mood").sample(6, seed=0)
    vectors = rtl.extract_vectors(model, pairs)
    with model.hooks(fwd_hooks=rtl.add(vectors, [1], 4.0) + rtl.ablate(vectors, [0])):
        steered = rtl.generate(model, PROMPTS, max_new_tokens=4, temperature=0.7, seed=1)
    delta = rtl.tune(model, vectors, TARGETS, rtl.TuneConfig(**TUNING), progress=False)
    baked = rtl.bake(model, rtl.add(vectors, [1], 2.0))
    with rtl.applied(model, delta):
        tuned = rtl.generate(model, PROMPTS, max_new_tokens=4)
    measured = rtl.evaluate(model, pairs.sample(2), scorer="vader", max_new_tokens=4)
    return {
        **vectors.vectors,
        **{f"delta {name}": change for name, change in delta.changes.items()},
        **{f"baked {name}": change for name, change in baked.changes.items()},
        "projections": rtl.token_projections(model, vectors, PROMPTS[0])[1],
        "answers": (steered, tuned),
        "scores": measured.scores,
    }


# The default device


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_tensor_that_is_made_names_its_device(file):
    """Else `torch.set_default_device`, which a user may have set, decides."""
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func).removeprefix("torch.") in MAKERS and
            ast.unparse(call.func).startswith("torch.")]  # fmt: skip
    unnamed = [call.lineno for call in made if not any(key.arg in ("device", None) for key in call.keywords)]
    assert not unnamed


def test_another_default_device_changes_nothing(make_tiny):
    expected = everything(make_tiny())
    model = make_tiny()
    with torch.device("meta"):  # what lands there by chance has no numbers, and fails
        found = everything(model)
    assert found["answers"] == expected["answers"] and found["scores"] == expected["scores"]
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(found[name], tensor), name


# Types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_and_statistics_of_a_model_in_half_precision_are_float32(make_tiny, dtype):
    found = everything(make_tiny(dtype=dtype))
    tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    assert {str(t.dtype) for n, t in tensors.items() if not n.startswith(("delta", "baked"))} == {"torch.float32"}
    assert {t.dtype for n, t in tensors.items() if n.startswith(("delta", "baked"))} == {dtype}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_edits_take_the_type_of_the_activation_that_they_meet(make_tiny, tiny_vectors):
    hooks = rtl.add(tiny_vectors, [1], 2.0) + rtl.ablate(tiny_vectors, [0])
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model, name = make_tiny(dtype=dtype), "blocks.1.hook_resid_post"
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            logits, cache = model.run_with_cache(torch.tensor([[5, 6, 7]]), names_filter=[name])
        assert logits.isfinite().all() and cache[name].dtype == dtype


@pytest.fixture(scope="module")
def half_model() -> Any:
    return rtl.load_model(dtype="bfloat16")


def test_vectors_of_the_real_model_in_bfloat16_are_near_float32s(model, half_model, pairs):
    chosen = pairs.sample(24, seed=0)
    ours, theirs = rtl.extract_vectors(half_model, chosen), rtl.extract_vectors(model, chosen)
    cosines = [float(torch.cosine_similarity(ours[name], theirs[name], dim=0)) for name in theirs.hook_names]
    assert min(cosines) > 0.7  # the first blocks write little, which bfloat16 rounds most
    assert min(cosines[15:]) > 0.98


def test_the_real_model_in_bfloat16_is_steered(half_model, pairs):
    vectors = rtl.extract_vectors(half_model, pairs.sample(16, seed=0))
    (plain,) = rtl.generate(half_model, PROMPTS[:1], max_new_tokens=12)
    answers = []
    for multiplier in (6.0, -6.0):
        with half_model.hooks(fwd_hooks=rtl.add(vectors, [21], multiplier)):
            answers += rtl.generate(half_model, PROMPTS[:1], max_new_tokens=12)
    assert len({plain, *answers}) == 3


@pytest.mark.parametrize("rank", [0, 4])
def test_a_bfloat16_model_learns_by_float32_masters_or_by_lora(make_tiny, tiny_vectors, rank):
    model = make_tiny(dtype=torch.bfloat16)
    config = rtl.TuneConfig(**{**TUNING, "max_steps": 12, "epochs": 12}, lora_rank=rank, centred=False)
    delta = rtl.tune(model, tiny_vectors, TARGETS, config, progress=False)
    losses = [row["total"] for row in delta.history if row["split"] == "validation"]
    assert losses[-1] < losses[0] or len(losses) == 1
    trained = [row["total"] for row in delta.history if row["split"] == "train"]
    assert sum(trained[-3:]) < sum(trained[:3])
    assert {change.dtype for change in delta.changes.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in parameters_of(model).values()} == {torch.bfloat16}


# Several devices


ON_CPU = dict.fromkeys(
    ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
)


def test_a_device_map_gives_a_bridge_that_computes_the_same(source):
    folder = source()
    whole, mapped = rtl.load_model(folder, backend="bridge"), rtl.load_model(folder, device_map=ON_CPU)
    assert backend_of(mapped).kind == "bridge"
    found, expected = everything(mapped), everything(whole)
    assert found["answers"] == expected["answers"]
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_device_map_is_refused_beside_a_device_or_a_hooked_transformer(source):
    folder = source()
    with pytest.raises(
        ValueError, match=r"device_map must come without a device .* got device='cpu' too\. Leave it out"
    ):
        rtl.load_model(folder, device="cpu", device_map=ON_CPU)
    with pytest.raises(ValueError, match=r"device_map must come .* with a bridge, got backend='hooked' too"):
        rtl.load_model(folder, device_map=ON_CPU, backend="hooked")
    with pytest.raises(ValueError, match=r"offload_folder must come with a device_map and transformer-lens 4"):
        rtl.load_model(folder, offload_folder="somewhere")


@pytest.mark.skipif(has_hooked(), reason="parts on the disk need TransformerLens 4: `make test-tl4` runs this")
def test_a_block_on_the_disk_is_read_and_steered_and_not_tuned(source, tmp_path, tiny_vectors):
    folder, map_ = source(), {**ON_CPU, "model.layers.1": "disk"}
    model = rtl.load_model(folder, device_map=map_, offload_folder=tmp_path / "parts")
    whole = rtl.load_model(folder)
    pairs = rtl.load_pairs("mood").sample(4, seed=0)
    ours, theirs = rtl.extract_vectors(model, pairs), rtl.extract_vectors(whole, pairs)
    for name in theirs.hook_names:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)
    answers = []
    for each in (model, whole):
        with each.hooks(fwd_hooks=rtl.add(theirs, [1], 4.0) + rtl.add(theirs, [0], 1.0)):
            answers.append(rtl.generate(each, PROMPTS, max_new_tokens=4))
    assert answers[0] == answers[1]
    message = r"model must have the weights that change in memory, got \d+ that device_map has put elsewhere"
    with pytest.raises(ValueError, match=message):
        rtl.tune(model, theirs, TARGETS, rtl.TuneConfig(**TUNING), progress=False)
    with pytest.raises(ValueError, match=message), rtl.applied(model, rtl.bake(whole, rtl.add(theirs, [1]))):
        pass


# A graphics card


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: this machine has no CUDA device")


@cuda
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_cuda_device_gives_what_the_cpu_gives(source, backend):
    folder = source()
    on_cpu, on_cuda = (everything(rtl.load_model(folder, backend=backend, device=d)) for d in ("cpu", "cuda"))
    for name, tensor in on_cpu.items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(on_cuda[name].cpu(), tensor, atol=1e-3, rtol=1e-2)


@cuda
def test_a_bfloat16_model_on_cuda_is_read_steered_and_tuned(source):
    found = everything(rtl.load_model(source(), device="cuda", dtype="bfloat16"))
    assert all(tensor.isfinite().all() for tensor in found.values() if isinstance(tensor, torch.Tensor))


@cuda
def test_a_model_over_cuda_and_cpu_computes_the_same(source):
    folder = source()
    mapped = rtl.load_model(folder, device_map={**dict.fromkeys(ON_CPU, 0)})
    torch.testing.assert_close(
        everything(mapped)["projections"].cpu(), everything(rtl.load_model(folder, device="cpu"))["projections"],
        atol=1e-3, rtol=1e-2,
    )  # fmt: skip
