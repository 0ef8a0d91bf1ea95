"""What rt_lens computes on a family against what transformers computes on the same folder, as numbers."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from families import D_MODEL, D_VOCAB, FAMILIES, N_BLOCKS, WINDOW, Family, blocks_of, folder_of, huggingface, tokenizer
from peft import PeftModel
from small_tuning import answer_of
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from rt_lens.data.contrast_pairs import ContrastPairs, Pair
from rt_lens.models.activations import read_activations
from rt_lens.models.backends import backend_of, has_hooked
from rt_lens.models.context import token_context
from rt_lens.models.generation import generate
from rt_lens.models.load import load_model
from rt_lens.models.parameter_names import block_and_modules
from rt_lens.models.tokens.batches import encode
from rt_lens.steering.binding import ablate, add
from rt_lens.tuning.baking import bake
from rt_lens.tuning.config import MATRICES, TuneConfig
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.direction_targets import resolve_targets
from rt_lens.tuning.export.hf import export_hf
from rt_lens.tuning.export.peft import export_peft
from rt_lens.tuning.export.weights import changes_as_huggingface
from rt_lens.tuning.loop import tune
from rt_lens.tuning.objective import Objective
from rt_lens.tuning.targets import Target
from rt_lens.tuning.tuning_data import prepare_data
from rt_lens.tuning.weights import trainable_params, trained_by
from rt_lens.vectors.extraction import extract_vectors
from rt_lens.vectors.steering_vectors import Provenance, SteeringVectors

PROMPTS = ["Is rain?", "Is it wet?"]  # longer than a window, with a beginning that they share
ANSWERS = [" no", " yes"]
N_NEW = 5
LAYER = 1
"""The block that is steered and tuned: neither the first nor the last."""
MULTIPLIER = 1.5
KINDS = ("resid_post", "attn_out", "mlp_out")
TARGETS = [Target(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
PAIRS = ContrastPairs("mood", tuple(Pair(f"{n} up", f"{n} down", f"topic {n}?") for n in range(6)))
CONFIG = TuneConfig(
    direction="toward", layers=[LAYER], trained_layers=[LAYER, LAYER + 1], kl_weight=0.0, cosine_weight=2.0,
    learning_rate=1e-3, max_steps=3, epochs=9, batch_size=2, validate_every=1,
)  # fmt: skip


@dataclass
class Case:
    """A family as one kind of model, and transformers' own model of the same folder."""

    name: str
    kind: str
    folder: Path
    model: Any
    plain: Any

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @property
    def backend(self) -> Any:
        return backend_of(self.model)

    @cached_property
    def vectors(self) -> dict[str, SteeringVectors]:
        """Kind of hook point -> a random direction at every block."""
        noise = torch.Generator().manual_seed(2)
        provenance = Provenance("model", "mood", "random", "last", "none", 6, "0" * 64, 0, "0.1.0")
        names = {kind: [f"blocks.{layer}.hook_{kind}" for layer in range(N_BLOCKS)] for kind in KINDS}
        return {
            kind: SteeringVectors({name: torch.randn(D_MODEL, generator=noise) for name in names[kind]}, provenance)
            for kind in KINDS
        }

    @cached_property
    def low_rank(self) -> WeightDelta:
        """A change that tuning of a low rank makes."""
        config = config_of(self, lora_rank=2, learning_rate=1e-2)
        return tune(self.model, self.vectors["resid_post"], TARGETS, config, validation=TARGETS[:1], progress=False)

    @torch.no_grad()
    def expected(self, tokens: Tensor, mask: Tensor, **settings: Any) -> Any:
        """transformers' own output without a cache; padding is not counted in positions."""
        if "position_ids" in inspect.signature(self.plain.forward).parameters:
            settings["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return self.plain(tokens, attention_mask=mask, use_cache=False, **settings)


def cases() -> list[tuple[str, str]]:
    """Family and kind of model, as far as this release of TransformerLens has them."""
    return [
        (name, kind)
        for name, family in FAMILIES.items()
        for kind in ("hooked", "bridge")
        if kind == "bridge" or (family.hooked and has_hooked())
    ]


def opened(name: str, kind: str, folder: Path) -> Case:
    """A family's folder, written and opened both ways.

    Raises:
        ValueError: rt_lens refuses to load it.
    """
    folder_of(FAMILIES[name], folder)
    return Case(name, kind, folder, load_model(folder, backend=kind), huggingface(folder))  # type: ignore[arg-type]


def rows_of(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random rows of these lengths, padded on the left, and their mask."""
    noise, longest = torch.Generator().manual_seed(1), max(lengths)
    tokens = torch.randint(2, D_VOCAB, (len(lengths), longest), generator=noise)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return torch.where(mask.bool(), tokens, 0), mask


def largest(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of numbers that are not all the same."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    return float((ours - theirs).abs().max())


# Logits


@torch.no_grad()
def logits(case: Case, *lengths: int) -> float:
    """Of rows of these lengths: through the model itself, and through rt_lens's faster forward pass."""
    tokens, mask = rows_of(*lengths)
    theirs = case.expected(tokens, mask).logits[mask.bool()]
    plainly = case.model(tokens, attention_mask=mask)[mask.bool()]
    quickly = torch.cat(list(case.backend.logits(tokens, mask, mask.bool(), 7)))
    return max(largest(plainly, theirs), largest(quickly, theirs))


@torch.no_grad()
def cached(case: Case) -> float:
    """A prompt, then token by token, then several tokens of rows that branch off."""
    n, first, last = case.family.length, 6, 3
    tokens, mask = rows_of(n, n - 4)
    theirs = case.expected(tokens, mask).logits
    cache, ours = case.backend.cache(2, n), []
    for end in range(first, n - last + 1):
        new = slice(0 if end == first else end - 1, end)
        ours.append(case.backend.next_logits(tokens[:, new], mask[:, new], cache))
    rows = [1, 1, 0]
    branch = cache.branch(case.model, rows, last)
    with case.backend.quick():
        ends = case.backend.unembed(case.backend.extend(tokens[rows, -last:], mask[rows, -last:], branch))
    return max(largest(torch.stack(ours, 1), theirs[:, first - 1 : n - last]), largest(ends, theirs[rows, -last:]))


@torch.no_grad()
def greedy(
    case: Case, hooks: Sequence[Any] = (), prompts: Sequence[str] = PROMPTS, n_new: int = N_NEW
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens that `generate` gives for all prompts together, and those of a loop over transformers by row."""
    ours: list[list[int]] = [[] for _ in prompts]
    with case.model.hooks(fwd_hooks=list(hooks)):
        generate(
            case.model, prompts, chat=False, max_new_tokens=n_new,
            on_token=lambda new: ours[new.row].append(new.token),
        )  # fmt: skip
    return ours, [_continued(case, encode(case.model, prompt), n_new) for prompt in prompts]


def _continued(case: Case, ids: list[int], n_new: int) -> list[int]:
    new: list[int] = []
    while len(new) < n_new:
        tokens = torch.tensor([ids + new])
        best = int(case.expected(tokens, torch.ones_like(tokens)).logits[0, -1].argmax())
        if best == case.model.tokenizer.eos_token_id:
            break
        new.append(best)
    return new


# Activations and steering


@torch.no_grad()
def activations(case: Case) -> float:
    """After each block but the last, whose output transformers norms before it gives it."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(N_BLOCKS - 1)]
    n = len(encode(case.model, PROMPTS[0]))
    ours = read_activations(case.model, PROMPTS, names, [[[i] for i in range(n)]] * 2)
    differences = []
    for row, prompt in enumerate(PROMPTS):
        tokens = torch.tensor([encode(case.model, prompt)])
        states = case.expected(tokens, torch.ones_like(tokens), output_hidden_states=True).hidden_states
        differences += [largest(ours[name][row], states[layer + 1][0, :n]) for layer, name in enumerate(names)]
    return max(differences)


@contextmanager
def adding(case: Case, kind: str, vector: Tensor) -> Iterator[None]:
    """transformers' model with a torch hook that adds a vector to what a block, its attention or its MLP gives."""
    path = {"resid_post": "", "attn_out": case.family.attention, "mlp_out": case.family.mlp}[kind]
    shift = vector if kind == "resid_post" else vector / case.family.written_times

    def add_it(module: Any, inputs: Any, output: Any) -> Any:
        return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

    handle = blocks_of(case.plain)[LAYER].get_submodule(path).register_forward_hook(add_it)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def steered(case: Case, kind: str) -> tuple[float, tuple[list[list[int]], list[list[int]]]]:
    """Logits under `add` against those under the torch hook, and the greedy tokens of both."""
    hooks = add(case.vectors[kind], [LAYER], MULTIPLIER, hook=kind)
    tokens, mask = rows_of(case.family.length, 9)
    unsteered = case.expected(tokens, mask).logits[mask.bool()]
    with adding(case, kind, MULTIPLIER * case.vectors[kind][f"blocks.{LAYER}.hook_{kind}"]):
        theirs = case.expected(tokens, mask).logits[mask.bool()]
        with case.model.hooks(fwd_hooks=hooks), token_context(mask):
            ours = torch.cat(list(case.backend.logits(tokens, mask, mask.bool(), 7)))
        answers = greedy(case, hooks)
    assert (theirs - unsteered).abs().max() > 0.1
    return largest(ours, theirs), answers


@torch.no_grad()
def projections(case: Case, kind: str) -> tuple[float, float]:
    """The largest projection on a direction without and with its ablation."""
    name, vectors = f"blocks.{LAYER}.hook_{kind}", case.vectors[kind]
    unit = vectors[name] / vectors[name].norm()

    def read() -> float:
        h = read_activations(case.model, PROMPTS, [name], [[[0], [3], [7]]] * len(PROMPTS))[name]
        return float((h @ unit).abs().max())

    before = read()
    with case.model.hooks(fwd_hooks=ablate(vectors, [LAYER], hook=kind)):
        return before, read()


# Tuning


def config_of(case: Case, **changes: Any) -> TuneConfig:
    """The configuration of a small run; experts are not tuned."""
    modules = {"target_modules": ("q", "k", "v", "o")} if case.family.experts else {}
    return replace(CONFIG, **{**modules, **changes})


def gradients(case: Case) -> float:
    """The largest difference in the gradients of a step, over the largest of these gradients.

    Of the cross-entropy of the answers, and of the cosine at one hook point, by every parameter of two blocks.
    """
    theirs = _their_gradients(case)
    modules = {module for name in theirs for module in block_and_modules(name)[1]}
    ours = _our_gradients(case, config_of(case, target_modules=tuple(modules)))
    for name in ours.keys() - theirs.keys():
        assert case.kind == "hooked" and name.endswith(".bias")  # which it has, and the family has not
    size = max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(float((ours[name] - gradient).abs().max()) for name, gradient in theirs.items()) / size


def _our_gradients(case: Case, config: TuneConfig) -> dict[str, Tensor]:
    """As a step of tuning takes them, from the first trained block on, by Hugging Face's names."""
    vectors, trained = case.vectors["resid_post"], trained_by(case.model, config)
    union = {name: parameter for group in trained.values() for name, parameter in group.items()}
    material = prepare_data(case.model, vectors, TARGETS, config, validation=TARGETS[:1])
    assert material.first_block == LAYER
    with trainable_params(case.model, union, config):
        objective = Objective(case.model, resolve_targets(case.model, vectors, config), config, material, trained)
        objective.gradients(material.train, [], [])
        found = {name: parameter.grad for name, parameter in union.items()}
    named = (case.backend.as_huggingface(name, grad) for name, grad in found.items() if grad is not None)
    return dict(filter(None, named))


def _their_gradients(case: Case) -> dict[str, Tensor]:
    """The same loss written out over transformers' model, row by row."""
    blocks, streams, scores, answers = blocks_of(case.plain), [], [], []
    for target in TARGETS:
        prompt, answer, kept = encode(case.model, target.prompt), answer_of(case.model, target), []
        handle = blocks[LAYER].register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        whole = case.plain(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        handle.remove()
        where = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        streams.append((kept[0][0] if isinstance(kept[0], tuple) else kept[0])[0, where])
        scores.append(whole[where])
        answers += answer
    stream, vector = torch.cat(streams), case.vectors["resid_post"][f"blocks.{LAYER}.hook_resid_post"]
    cosines = cosine_similarity(stream - stream.detach().mean(0), vector[None])
    loss = CONFIG.cosine_weight * ((1 - cosines) / 2).mean()
    loss = loss + CONFIG.token_weight * cross_entropy(torch.cat(scores), torch.tensor(answers))
    trained = {id(parameter) for block in blocks[LAYER : LAYER + 2] for parameter in _tuned_in(block, case.family)}
    parameters = {name: p for name, p in case.plain.named_parameters() if id(p) in trained}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def _tuned_in(block: Any, family: Family) -> Iterator[Tensor]:
    """A block's parameters, without those of experts and routers."""
    for name, parameter in block.named_parameters():
        if not (family.experts and name.startswith("mlp.")):
            yield parameter


def tuned(case: Case) -> tuple[float, float]:
    """How far `tune` moves logits, and how far they are from those of a run that stores nothing before its blocks."""
    deltas = [
        tune(case.model, case.vectors["resid_post"], TARGETS, config_of(case, prefix_cache=where, batch_size=1),
             validation=TARGETS[:1], progress=False)
        for where in ("memory", "off")
    ]  # fmt: skip
    tokens, mask = rows_of(9)
    with torch.no_grad():
        before = case.model(tokens, attention_mask=mask)
        after = [logits_under(case, delta, tokens, mask) for delta in deltas]
        assert torch.equal(case.model(tokens, attention_mask=mask), before)
    return largest(after[0], before), largest(after[0], after[1])


def logits_under(case: Case, delta: WeightDelta, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits of the model with a change of its weights."""
    with delta.applied(case.model):
        return case.model(tokens, attention_mask=mask)


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Norm of the difference between two changes of the same parameters, over the norm of one of them."""
    assert one.keys() == other.keys()
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (difference / sum(float(change.square().sum()) for change in one.values())) ** 0.5


# Baking


def additions(case: Case, kind: str) -> list[Any]:
    """An edit that adds a vector in one block."""
    return add(case.vectors[kind], [LAYER], MULTIPLIER, hook=kind)


def ablation(case: Case) -> list[Any]:
    """An edit that removes a direction from the whole residual stream."""
    return ablate(case.vectors["resid_post"].everywhere(case.model, N_BLOCKS - 1), hook="any")


@torch.no_grad()
def baked(case: Case, hooks: Sequence[Any]) -> tuple[float, WeightDelta]:
    """Logits with edits in the weights against those under the hooks, and the change of weights.

    Raises:
        ValueError: the edits have no exact fold.
    """
    delta = bake(case.model, hooks)
    tokens, mask = rows_of(case.family.length, 9)
    with case.model.hooks(fwd_hooks=list(hooks)), token_context(mask):
        hooked = case.model(tokens, attention_mask=mask)[mask.bool()]
    return largest(logits_under(case, delta, tokens, mask)[mask.bool()], hooked), delta


# Exports


@torch.no_grad()
def exported(case: Case, delta: WeightDelta, folder: Path) -> float:
    """Logits of the folder of a changed model, which transformers alone opens, against the model under the change.

    Raises:
        ValueError: the change has no place in the family's files.
    """
    export_hf(case.model, folder, delta=delta)
    return _reread(case, delta, huggingface(folder))


@torch.no_grad()
def adapted(case: Case, folder: Path) -> float:
    """Logits of transformers' model with the adapter of a tuned one, which peft opens.

    Raises:
        ValueError: LoRA cannot hold the change.
    """
    adapter = export_peft(case.model, folder, case.low_rank, rank=None, base=str(case.folder))
    assert adapter.rank == 2
    return _reread(case, case.low_rank, PeftModel.from_pretrained(huggingface(case.folder), folder).eval())


def _reread(case: Case, delta: WeightDelta, reread: Any) -> float:
    tokens, mask = rows_of(case.family.length)
    ours = logits_under(case, delta, tokens, mask)
    assert (ours - case.expected(tokens, mask).logits).abs().max() > 1e-3
    return largest(reread(tokens, attention_mask=mask, use_cache=False).logits, ours)


# One kind of model against the other


def cosines(one: Case, other: Case) -> float:
    """The smallest cosine between the vectors that both kinds of model give for the same pairs."""
    found = [extract_vectors(case.model, PAIRS, seed=0) for case in (one, other)]
    assert found[0].hook_names == found[1].hook_names
    return min(found[0].cosine(found[1]).values())


@torch.no_grad()
def exchanged(one: Case, other: Case) -> tuple[float, float]:
    """How far their changes of five steps are apart, and logits of a change on the model of the other kind."""
    config = replace(CONFIG, max_steps=5)
    found = [tune(case.model, one.vectors["resid_post"], TARGETS, config, validation=TARGETS[:1], progress=False)
             for case in (one, other)]  # fmt: skip
    named = [changes_as_huggingface(case.model, delta) for case, delta in zip((one, other), found, strict=True)]
    tokens, mask = rows_of(one.family.length)
    differences = []
    for delta in found:
        after = [logits_under(case, delta, tokens, mask) for case in (one, other)]
        assert (after[0] - one.expected(tokens, mask).logits).abs().max() > 1e-2
        differences.append(largest(after[0], after[1]))
    return apart(named[0], named[1]), max(differences)


# Outcomes


def outcome(check: Callable[..., Any], *arguments: Any) -> Any:
    """What a check gives, or the ValueError with which rt_lens refuses it."""
    try:
        return check(*arguments)
    except ValueError as refusal:
        return refusal


@dataclass(frozen=True)
class Baking:
    """What becomes of edits in weights.

    Attributes:
        additions: kind of hook point -> difference of logits, or the refusal.
        ablation: the same for an ablation of the whole stream.
        export: difference of logits of the exported folder of an addition at attn_out, the refusal, or None if it is
            not baked.
        exported_as: the class that the folder names.
    """

    additions: dict[str, float | ValueError]
    ablation: float | ValueError
    export: float | ValueError | None
    exported_as: str


def baking(case: Case, folder: Path) -> Baking:
    """Bakes an addition at each kind of hook point and an ablation of the whole stream, and exports one of them."""
    results = {kind: outcome(baked, case, additions(case, kind)) for kind in KINDS}
    ablated = outcome(baked, case, ablation(case))
    export, exported_as = None, ""
    if not isinstance(results["attn_out"], ValueError):
        export = outcome(exported, case, results["attn_out"][1], folder)
        if not isinstance(export, ValueError):
            (exported_as,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    return Baking({kind: _number(result) for kind, result in results.items()}, _number(ablated), export, exported_as)


def _number(result: Any) -> Any:
    return result if isinstance(result, ValueError) else result[0]


# Refusals


def _loading(name: str, folder: Path, backend: str = "auto", changes: Mapping[str, Any] | None = None) -> Any:
    """Loads a family's folder, with some fields of its `config.json` changed."""
    folder_of(FAMILIES[name], folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**stored, **(changes or {})}), encoding="utf-8")
    return load_model(folder, backend=backend)  # type: ignore[arg-type]


def _saving(model_class: Any, config_class: Any, folder: Path, **fields: Any) -> Any:
    """Loads the folder of a model that is no causal language model."""
    model_class(config_class(vocab_size=D_VOCAB, **fields)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return load_model(folder)


def _unknown_family(folder: Path) -> Any:
    helium = Family({**FAMILIES["Qwen3"].config, "model_type": "helium"})
    return load_model(folder_of(helium, folder))


def _unnamed_matrices(folder: Path) -> Any:
    sizes = {"vocab_size": D_VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_BLOCKS}
    return trained_by(load_model(folder_of(Family({"model_type": "mamba", **sizes}), folder)), CONFIG)


def _on(name: str, check: Callable[[Case, Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: check(opened(name, "bridge", folder), folder.parent / "out")


def _tuning(name: str, *modules: str) -> Callable[[Path], Any]:
    return _on(name, lambda case, out: trained_by(case.model, replace(CONFIG, target_modules=modules)))


def _baking(name: str, kind: str) -> Callable[[Path], Any]:
    return _on(name, lambda case, out: bake(case.model, additions(case, kind)))


def _exporting(name: str) -> Callable[[Path], Any]:
    return _on(name, lambda case, out: export_hf(case.model, out, delta=bake(case.model, additions(case, "attn_out"))))


def _norms_as_lora(case: Case, out: Path) -> Any:
    config = config_of(case, target_modules=("norm",))
    delta = tune(case.model, case.vectors["resid_post"], TARGETS, config, validation=TARGETS[:1], progress=False)
    return export_peft(case.model, out, delta, rank=None)


def _mid_of(case: Case, out: Path) -> Any:
    name = f"blocks.{LAYER}.hook_resid_mid"
    vectors = SteeringVectors({name: torch.ones(D_MODEL)}, case.vectors["resid_post"].provenance)
    with case.model.hooks(fwd_hooks=add(vectors, hook="resid_mid")):
        return case.model(torch.tensor([[5, 6]]))


_OLD = {"rope_type": "su", "rope_theta": 100.0}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
REFUSALS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "quantised weights": ("quantization_config", lambda folder: _loading(
        "Llama", folder, changes={"quantization_config": {"quant_method": "fp8"}})),
    "a kind of rope that transformers does not know": ("rope_type", lambda folder: _loading(
        "Llama", folder, changes={"rope_parameters": _OLD})),
    "an architecture without a bridge": ("HeliumForCausalLM", _unknown_family),
    "an encoder with a decoder": ("T5ForConditionalGeneration", lambda folder: _saving(
        T5ForConditionalGeneration, T5Config, folder, **_T5)),
    "a model that reads both ways": ("BertForMaskedLM", lambda folder: _saving(
        BertForMaskedLM, BertConfig, folder, **_BERT)),
    "experts to be tuned": ("MixtralForCausalLM", _tuning("Mixtral", *MATRICES)),
    "a part of a fused matrix to be tuned": ("qkv_proj.weight", _tuning("Phi-3", "q", "o")),
    "matrices of other kinds to be tuned": ("A_log", _unnamed_matrices),
    "baking where a block norms what it writes": ("Gemma2ForCausalLM", _baking("Gemma 2", "attn_out")),
    "baking where a block multiplies what it writes": ("GraniteForCausalLM", _baking("Granite", "attn_out")),
    "baking into experts": ("MixtralForCausalLM", _baking("Mixtral", "mlp_out")),
    "exporting a bake to a family without biases": ("o_proj.bias", _exporting("Qwen3")),
    "exporting a bake with a sliding window": ("sliding_window", _exporting("Mistral, sliding window")),
    "norms as a LoRA": ("input_layernorm.weight", _on("Llama", _norms_as_lora)),
    "an edit at resid_mid of a bridge": ("resid_mid", _on("Llama", _mid_of)),
    "an edit at resid_mid of parallel blocks": ("resid_mid", _on("GPT-NeoX", _mid_of)),
}  # fmt: skip
"""What is refused -> what the message names, and a call that is refused in a folder that does not exist yet."""
if has_hooked():
    REFUSALS |= {
        "Cohere as a bridge": ("CohereForCausalLM", lambda folder: _loading("Cohere", folder)),
        **{
            f"{name} as a HookedTransformer": (
                named, lambda folder, name=name: _loading(name, folder, "hooked"))
            for name, named in {
                "Llama, rope linear": "rope_type 'linear'", "Mistral, sliding window": f"sliding_window {WINDOW}",
                "Qwen3": "model_type 'qwen3'",
            }.items()
        },
    }  # fmt: skip


def message_of(title: str, folder: Path) -> str:
    """The message of a refusal, without numbers that depend on the machine."""
    _, refused = REFUSALS[title]
    result = outcome(refused, folder / "tiny")
    assert isinstance(result, ValueError), f"{title} is not refused"
    return re.sub(r"relative error [\d.e+-]+", "relative error ...", str(result))
