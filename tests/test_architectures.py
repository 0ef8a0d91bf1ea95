"""Every family against transformers itself, and docs/architectures.md against what is found here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architecture_checks import (
    CONFIG,
    KINDS,
    PROMPTS,
    REFUSALS,
    Case,
    activations,
    adapted,
    baking,
    cached,
    cases,
    cosines,
    exchanged,
    exported,
    gradients,
    greedy,
    logits,
    message_of,
    opened,
    outcome,
    projections,
    rows_of,
    steered,
    tuned,
)
from architectures_table import baking_cells, below, committed, yes_or_no
from families import FAMILIES, ORIGINAL, random_model, with_config

from rt_lens.models.backends import has_hooked
from rt_lens.models.parameter_names import module_label
from rt_lens.tuning.config import MATRICES, TuneConfig
from rt_lens.tuning.weights import trained_by

TOLERANCE = 1e-4
ROWS, MESSAGES = committed()
REFUSED = [name for name, kind in cases() if ROWS[name, kind]["logits"] == "refused"]
LOADED = [(name, kind) for name, kind in cases() if name not in REFUSED]
FUSED = {"Phi-3": ("qkv_proj", "gate_up_proj"), "GPT-2": ("c_attn",), "GPT-NeoX": ("query_key_value",),
         "BLOOM": ("query_key_value",)}  # fmt: skip


@pytest.fixture(scope="module", params=LOADED, ids=lambda case: f"{case[0]} as {case[1]}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return opened(*request.param, tmp_path_factory.mktemp("families") / "tiny")


@pytest.fixture
def row(case: Case) -> dict[str, str]:
    """What the page says of it."""
    return ROWS[case.name, case.kind]


# What a configuration says


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in FAMILIES for field in FAMILIES[name].neutral])
def test_these_fields_matter(name: str, field: str) -> None:
    """The same seed gives the same weights: what differs is the field's doing."""
    tokens, family = rows_of(24)[0], FAMILIES[name]
    models = random_model(family), random_model(with_config(family, **{field: family.neutral[field]}))
    with torch.no_grad():
        with_it, without = (model(tokens, use_cache=False).logits for model in models)
    assert (with_it - without).abs().max() > 0.05


# Logits and activations


def test_logits_are_those_of_transformers(case: Case, row: dict[str, str]) -> None:
    assert float(row["logits"]) <= TOLERANCE
    assert logits(case, 24) < TOLERANCE
    assert logits(case, 24, 15, 3) < TOLERANCE


def test_logits_with_a_cache_are_those_without(case: Case, row: dict[str, str]) -> None:
    assert float(row["cached"]) <= TOLERANCE
    assert case.backend.caches()
    assert cached(case) < TOLERANCE


def test_greedy_tokens_are_those_of_transformers(case: Case) -> None:
    ours, theirs = greedy(case)
    assert ours == theirs
    assert all(ours)


def test_activations_are_the_hidden_states_of_transformers(case: Case) -> None:
    assert activations(case) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_steering_is_a_sum_at_the_module_of_transformers(kind: str, case: Case) -> None:
    difference, (ours, theirs) = steered(case, kind)
    assert difference < TOLERANCE
    assert ours == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_an_ablation_leaves_no_projection_and_there_was_some(kind: str, case: Case) -> None:
    before, after = projections(case, kind)
    assert before > 0.1
    assert after < 1e-5


def test_a_text_that_grows_past_the_short_angles_of_longrope_is_generated_without_a_cache(tmp_path: Path) -> None:
    """Its keys would have the angles of short texts, and its queries those of long ones."""
    case = opened("Phi-3, rope longrope", "bridge", tmp_path / "tiny")
    assert case.backend.caches(ORIGINAL - 1, ORIGINAL)
    assert case.backend.caches(ORIGINAL + 1, 2 * ORIGINAL)
    with pytest.warns(UserWarning, match="gives other logits with a key-value cache .*runs without a cache"):
        ours, theirs = greedy(case, prompts=PROMPTS[:1], n_new=ORIGINAL)
    assert ours == theirs
    assert len(ours[0]) == ORIGINAL


# Tuning


def test_gradients_of_a_step_are_those_of_the_same_loss_over_transformers(case: Case, row: dict[str, str]) -> None:
    assert float(row["gradients"]) <= TOLERANCE
    assert gradients(case) < TOLERANCE


def test_tuning_changes_logits_and_starts_at_the_first_trained_block(case: Case) -> None:
    moved, difference = tuned(case)
    assert moved > 1e-2
    assert difference < TOLERANCE


def test_what_may_be_tuned_is_all_or_attention(case: Case, row: dict[str, str]) -> None:
    by_default = outcome(trained_by, case.model, CONFIG)
    assert isinstance(by_default, ValueError) == (row["tuned"] == "attention")
    if row["tuned"] == "attention":
        assert "in a mixture of experts" in str(by_default)


@pytest.mark.parametrize(("name", "matrix"), [(name, matrix) for name in FUSED for matrix in FUSED[name]])
def test_a_part_of_a_fused_matrix_is_not_tuned(name: str, matrix: str, tmp_path: Path) -> None:
    """Not one of its parts alone, under whichever name."""
    case = opened(name, "bridge", tmp_path / "tiny")
    parts = ("gate", "up") if matrix == "gate_up_proj" else ("q", "k", "v")
    for part in parts:
        chosen = outcome(trained_by, case.model, _with_modules(part))
        assert f"must name all or none of {', '.join(parts)}" in str(chosen)
        assert matrix in str(chosen)
    others = tuple(module for module in MATRICES if module not in parts and (module != "gate" or name == "Phi-3"))
    assert not any(matrix in found for found in trained_by(case.model, _with_modules(*others))["token"])


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("model.layers.0.self_attn.qkv_proj.weight", "q+k+v"), ("transformer.h.0.mlp.fc_in.weight", "up"),
        ("model.layers.0.mlp.fc2.weight", "down"), ("transformer.blocks.0.ffn.up_proj.weight", "up"),
        ("transformer.blocks.0.ffn.down_proj.weight", "down"), ("transformer.h.0.mlp.fc_out.weight", "down"),
    ],
)  # fmt: skip
def test_matrices_of_phi_gpt_j_and_mpt_have_names(name: str, module: str) -> None:
    """Before, tuning left them as they were, and took Phi-3's query and key for a part of its value."""
    assert module_label(name) == module


def _with_modules(*modules: str) -> TuneConfig:
    return replace(CONFIG, target_modules=modules)


# Into weights and files


def test_edits_are_baked_exactly_or_refused(case: Case, row: dict[str, str], tmp_path: Path) -> None:
    found = baking(case, tmp_path / "baked")
    for result in (*found.additions.values(), found.ablation):
        if isinstance(result, ValueError):
            assert case.backend.family in str(result)
            assert "Keep the hooks." in str(result)
        else:
            assert result < TOLERANCE
    if isinstance(found.export, ValueError):
        assert "delta must change only what" in str(found.export)
    elif found.export is not None:
        assert found.export < TOLERANCE
    assert {column: row[column] for column in baking_cells(found)} == baking_cells(found)


def test_an_exported_folder_gives_transformers_the_tuned_logits(
    case: Case, row: dict[str, str], tmp_path: Path
) -> None:
    assert row["exported"] == "yes"
    assert exported(case, case.low_rank, tmp_path / "exported") < TOLERANCE


def test_an_adapter_gives_peft_the_tuned_logits(case: Case, row: dict[str, str], tmp_path: Path) -> None:
    difference = outcome(adapted, case, tmp_path / "adapter")
    assert yes_or_no(difference) == row["LoRA"] == "yes"
    assert difference < TOLERANCE


# One kind of model against the other


@pytest.mark.skipif(not has_hooked(), reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.hooked])
def test_both_kinds_of_model_give_the_same_vectors_and_the_same_change(name: str, tmp_path: Path) -> None:
    one, other = (opened(name, kind, tmp_path / "tiny") for kind in ("hooked", "bridge"))
    assert cosines(one, other) > 1 - 1e-6
    between_changes, between_logits = exchanged(one, other)
    assert between_changes < 1e-3  # AdamW makes steps of one size of gradients that are next to nothing, too
    assert between_logits < TOLERANCE


# What is refused


@pytest.mark.parametrize("title", REFUSALS)
def test_what_is_not_covered_is_refused_as_the_page_says(title: str, tmp_path: Path) -> None:
    named, _ = REFUSALS[title]
    message = message_of(title, tmp_path)
    assert named in message
    assert message == MESSAGES[title]


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_the_page_has_as_refused_is(name: str, tmp_path: Path) -> None:
    assert isinstance(outcome(opened, name, "bridge", tmp_path / "tiny"), ValueError)


# The page


def test_the_page_has_every_family_and_every_refusal() -> None:
    assert set(ROWS) == set(cases())
    assert set(MESSAGES) == set(REFUSALS)
    assert all(ROWS[name, kind]["remark"] == FAMILIES[name].remark for name, kind in cases())


@pytest.mark.parametrize(("difference", "cell"), [(0.0, "0"), (3e-6, "1e-05"), (9.9e-5, "1e-04"), (0.2, "1e+00")])
def test_a_difference_is_shown_as_the_power_of_ten_above_it(difference: float, cell: str) -> None:
    assert below(difference) == cell
