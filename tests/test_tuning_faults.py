"""What goes wrong while tuning: the error says what to mend, and the model is as it was, bit for bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_tuning import CONFIG, NEUTRAL, TARGETS

from rt_lens.models.backends import backend_of, has_hooked, parameters_of
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.delta import WeightDelta
from rt_lens.tuning.loop import LossNotFinite, tune
from rt_lens.tuning.targets import Target

# A step is two training passes, the targets' and the neutral texts'.
POINT = "blocks.1.hook_resid_post"


class Fault:
    """A user's own hook on the model that does `what` from its `at`-th training pass on.

    Attributes:
        seen: training passes.
        weights: at each validation pass (the targets' and then the neutral texts'), the model's weights.
        last: the weights at the last training pass.
        healthy: those at the last one before the fault.
    """

    def __init__(self, model: Any, what: Callable[[torch.Tensor], Any] | None = None, at: float = math.inf) -> None:
        self.model, self.what, self.at = model, what, at
        self.seen, self.weights, self.last, self.healthy = 0, [], {}, {}

    def __call__(self, residual: torch.Tensor, hook: Any) -> torch.Tensor | None:
        now = {name: parameter.detach().clone() for name, parameter in parameters_of(self.model).items()}
        if not residual.requires_grad:
            if self.seen:  # the material is made before
                self.weights.append(now)
            return None
        self.seen, self.last = self.seen + 1, now
        if self.seen < self.at:
            self.healthy = now
        return self.what(residual) if self.what and self.seen >= self.at else None


def raising(error: BaseException) -> Callable[[torch.Tensor], None]:
    def raise_it(residual: torch.Tensor) -> None:
        raise error

    return raise_it


def never_so_much_memory(residual: torch.Tensor) -> None:
    torch.empty(2**50)


def bad_gradient(residual: torch.Tensor) -> torch.Tensor:
    """The activation as it is, its gradient infinite."""
    residual = residual.clone()
    residual.register_hook(lambda gradient: gradient * math.inf)
    return residual


def everything_about(model: Any) -> tuple[Any, ...]:
    parameters = list(model.parameters())
    return (
        hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parameters)).hexdigest(),
        [(p.data_ptr(), p.stride(), p.requires_grad, p.grad) for p in parameters],
        [len(p._post_accumulate_grad_hooks or ()) for p in parameters],
        {name: list(point._forward_hooks) for name, point in model.hook_dict.items() if point._forward_hooks},
        ["forward" in vars(module) for module in model.modules()],
    )


@pytest.fixture
def as_before(tiny) -> Iterator[Any]:
    """The model, some of whose parameters its user has frozen; in the end it must be as in the beginning."""
    up = "blocks.1.mlp.W_in" if has_hooked() else "model.layers.1.mlp.up_proj.weight"
    for name in (backend_of(tiny).embeddings()[0], up):
        parameters_of(tiny)[name].requires_grad_(False)
    before = everything_about(tiny)
    yield tiny
    for point in tiny.hook_dict.values():
        assert not point.bwd_hooks
    tiny.reset_hooks()
    assert everything_about(tiny) == before


def tuned(model: Any, vectors: Any, config: TuneConfig = CONFIG, **more: Any) -> WeightDelta:
    settings = {"train": TARGETS, "neutral": NEUTRAL}
    return tune(model, vectors, config=config, progress=False, **{**settings, **more})


def fault(model: Any, what: Callable[[torch.Tensor], Any] | None = None, at: float = math.inf) -> Fault:
    made = Fault(model, what, at)
    model.add_hook(POINT, made)
    return made


def is_change_to(delta: WeightDelta, weights: dict[str, torch.Tensor], model: Any) -> bool:
    now = parameters_of(model)
    return all(torch.equal(change, weights[name] - now[name]) for name, change in delta.changes.items())


@pytest.mark.parametrize("rank", [0, 4])
def test_nan_stops_with_the_best_weights_of_the_validations_before(as_before, tiny_vectors, rank):
    """The third validation is spoilt, so that the best are the weights after step 2 or 4, and not the last seen."""
    config = replace(
        CONFIG, lora_rank=rank, cosine_weight=1.0, token_weight=0.0, kl_weight=0.0, centred=False, max_steps=20
    )
    broken = fault(as_before, lambda residual: residual * math.nan, at=7)  # a pass is a step here

    def spoil(residual: torch.Tensor, hook: Any) -> torch.Tensor | None:
        return residual + 1e4 * tiny_vectors.vectors[POINT] if len(broken.weights) == 3 else None

    as_before.add_hook(POINT, spoil)  # where tuning is to lead away from
    with pytest.raises(LossNotFinite, match="at step 7 cosine is not finite") as caught:
        tuned(as_before, tiny_vectors, config)
    delta = caught.value.delta
    losses = [row["total"] for row in delta.history if row["split"] == "validation"]
    assert len(losses) == 3
    best = losses.index(min(losses))
    assert best < 2
    assert is_change_to(delta, broken.weights[best], as_before)
    assert all(change.isfinite().all() for change in delta.changes.values())
    assert all(change.any() for name, change in delta.changes.items())
    assert not is_change_to(delta, broken.last, as_before)


def test_before_any_validation_the_last_weights_with_finite_losses_are_kept(as_before, tiny_vectors):
    broken = fault(as_before, lambda residual: residual * math.nan, at=7)
    with pytest.raises(LossNotFinite, match="at step 4 ") as caught:
        tuned(as_before, tiny_vectors, replace(CONFIG, validate_every=8))
    assert is_change_to(caught.value.delta, broken.healthy, as_before)
    assert not is_change_to(caught.value.delta, broken.last, as_before)
    assert any(change.any() for change in caught.value.delta.changes.values())
    assert [row["step"] for row in caught.value.delta.history] == [1, 2, 3]


def test_weights_that_a_step_has_ruined_are_not_the_last_good_ones(as_before, tiny_vectors):
    with pytest.raises(LossNotFinite, match="is not finite") as caught:
        tuned(as_before, tiny_vectors, replace(CONFIG, learning_rate=1e30, validate_every=8))
    with caught.value.delta.applied(as_before), torch.no_grad():
        assert as_before(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_gradients_that_a_caller_has_switched_off_or_gathered_are_no_matter(tiny, tiny_vectors):
    expected = tuned(tiny, tiny_vectors).changes
    mine = {name: torch.ones_like(parameter) for name, parameter in parameters_of(tiny).items()}
    for name, parameter in parameters_of(tiny).items():
        parameter.grad = mine[name]
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            found = tuned(tiny, tiny_vectors).changes
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(parameter.grad is mine[name] for name, parameter in parameters_of(tiny).items())


def test_at_the_first_step_nothing_has_changed(as_before, tiny_vectors):
    fault(as_before, lambda residual: residual * math.inf, at=1)
    with pytest.raises(LossNotFinite, match="at step 1 ") as caught:
        tuned(as_before, tiny_vectors)
    assert not any(change.any() for change in caught.value.delta.changes.values())


def test_a_hook_of_torchs_own_is_found_out_too(as_before, tiny_vectors):
    handle = as_before.blocks[1].mlp.register_forward_hook(lambda module, given, output: output / 0)
    try:
        with pytest.raises(LossNotFinite, match="is not finite"):
            tuned(as_before, tiny_vectors, replace(CONFIG, centred=False))
        assert handle.id in as_before.blocks[1].mlp._forward_hooks
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("settings", "says", "prompts"),
    [
        ({"kl_weight": 0.0}, "at step 5 cosine, token is", TARGETS),
        ({"kl_weight": 0.0, "token_weight": 0.0}, "at step 5 cosine is", TARGETS),
        ({"centred": False, "positions": "mean"}, "at step 3 cosine, token, kl is", [*TARGETS, *NEUTRAL]),
    ],
)
def test_the_message_names_the_step_the_losses_and_their_prompts(as_before, tiny_vectors, settings, says, prompts):
    fault(as_before, lambda residual: residual * math.nan, at=5)
    with pytest.raises(LossNotFinite, match=f"{says} not finite.*Lower learning_rate .now 0.003.") as caught:
        tuned(as_before, tiny_vectors, replace(CONFIG, **settings))
    named = [target for target in [*TARGETS, *NEUTRAL] if repr(target.prompt) in str(caught.value)]
    assert len(named) == (4 if NEUTRAL[0] in prompts else 2)  # the batch, not all
    assert set(named) <= set(prompts)


def test_a_kl_alone_that_is_not_finite_names_neutral_prompts_alone(as_before, tiny_vectors):
    broken = fault(as_before, lambda residual: residual * math.nan if broken.seen == 6 else None, at=6)
    with pytest.raises(LossNotFinite, match="at step 3 kl is not finite") as caught:
        tuned(as_before, tiny_vectors)
    assert sum(repr(target.prompt) in str(caught.value) for target in NEUTRAL) == 2
    assert not any(repr(target.prompt) in str(caught.value) for target in TARGETS)


def test_an_infinite_gradient_of_a_finite_loss_stops_too(as_before, tiny_vectors):
    broken = fault(as_before, bad_gradient, at=3)
    with pytest.raises(LossNotFinite, match="at step 2 the gradient is not finite") as caught:
        tuned(as_before, tiny_vectors)
    assert is_change_to(caught.value.delta, broken.healthy, as_before)
    assert sum(repr(target.prompt) in str(caught.value) for target in [*TARGETS, *NEUTRAL]) == 4  # it may be of either


def test_a_text_that_the_model_has_no_finite_answer_to_is_named(tiny, tiny_vectors):
    """A token whose embedding is infinite, in one target alone."""
    only = tiny.tokenizer.encode("zebra")[0]
    tiny.W_E.data[only] = math.inf
    texts = [*TARGETS[:3], Target("zebra: what is it?", " It is an animal."), *TARGETS[4:]]
    assert tuned(tiny, tiny_vectors, replace(CONFIG, centred=False, kl_weight=0.0)).changes  # the others are well
    with pytest.raises(LossNotFinite, match=r"'zebra: what is it\?'") as caught:
        tuned(tiny, tiny_vectors, replace(CONFIG, centred=False, kl_weight=0.0), train=texts)
    assert all(change.isfinite().all() for change in caught.value.delta.changes.values())
    steps = [row["step"] for row in caught.value.delta.history if row["split"] == "train"]
    assert f"at step {len(steps) + 1} " in str(caught.value)


def test_a_held_out_text_like_that_is_found_at_the_validation(tiny, tiny_vectors):
    tiny.W_E.data[tiny.tokenizer.encode("zebra")[0]] = math.inf
    held_out = [TARGETS[0], Target("zebra: what is it?", " It is an animal.")]
    with pytest.raises(LossNotFinite, match="at the validation after step 2 cosine, token is not finite.*zebra"):
        tuned(tiny, tiny_vectors, replace(CONFIG, centred=False, kl_weight=0.0), validation=held_out)


def test_a_rate_that_makes_the_weights_themselves_infinite_leaves_a_finite_delta(as_before, tiny_vectors):
    with pytest.raises(LossNotFinite) as caught:
        tuned(as_before, tiny_vectors, replace(CONFIG, learning_rate=1e38, warmup=0.0, validate_every=8))
    assert all(change.isfinite().all() for change in caught.value.delta.changes.values())


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"batch_size": 4}, r"Set micro_batch_size=2 \(it is 4 now"),
        ({"batch_size": 4, "micro_batch_size": 3}, r"Set micro_batch_size=1 \(it is 3 now"),
        ({"micro_batch_size": 1}, "Set target_tokens, or fewer trained_layers, or lora_rank=16"),
    ],
)
def test_too_little_memory_says_which_setting_to_lower(as_before, tiny_vectors, settings, advice):
    fault(as_before, never_so_much_memory, at=3)
    config = replace(CONFIG, kl_weight=0.0, token_weight=1.0, **settings)
    step = 3 if config.micro_batch_size is None else 2
    with pytest.raises(MemoryError, match=rf"tune: out of memory at step {step}, .* {advice}") as caught:
        tuned(as_before, tiny_vectors, config)
    assert "can't allocate memory" in str(caught.value.__cause__)


def test_too_little_memory_in_the_validation_says_so_too(as_before, tiny_vectors):
    held = Fault(as_before)

    def full(residual: torch.Tensor, hook: Any) -> None:
        held(residual, hook)
        if held.weights:
            never_so_much_memory(residual)

    as_before.add_hook(POINT, full)
    with pytest.raises(MemoryError, match="out of memory at step 2, .*micro_batch_size=1"):
        tuned(as_before, tiny_vectors)


def test_a_run_without_memory_goes_on_with_less_of_it(tiny, tiny_vectors, tmp_path):
    path = tmp_path / "run.safetensors"
    fault(tiny, never_so_much_memory, at=9)
    with pytest.raises(MemoryError, match="micro_batch_size=1"):
        tuned(tiny, tiny_vectors, checkpoint=path, checkpoint_every=1)
    tiny.reset_hooks()
    delta = tuned(tiny, tiny_vectors, replace(CONFIG, micro_batch_size=1), checkpoint=path)
    plain = tuned(tiny, tiny_vectors)
    assert [row["step"] for row in delta.history] == [row["step"] for row in plain.history]
    assert delta.history[:5] == plain.history[:5]
    for name, change in plain.changes.items():
        assert torch.allclose(delta.changes[name], change, atol=1e-4)


def test_errors_that_are_not_about_memory_pass_as_they_are(as_before, tiny_vectors):
    for error in (RuntimeError("shapes do not fit"), ValueError("the user's own"), KeyError("memory")):
        fault(as_before, raising(error), at=3)
        with pytest.raises(type(error)) as caught:
            tuned(as_before, tiny_vectors)
        assert caught.value is error
        as_before.reset_hooks()


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 16])
def test_ctrl_c_in_any_pass_leaves_the_model_as_it_was(as_before, tiny_vectors, rank, at):
    pressed = fault(as_before, raising(KeyboardInterrupt()), at=at)
    with pytest.raises(KeyboardInterrupt):
        tuned(as_before, tiny_vectors, replace(CONFIG, lora_rank=rank))
    assert pressed.seen == at
    changed = not torch.equal(pressed.last["blocks.1.mlp.W_out"], as_before.blocks[1].mlp.W_out)
    assert changed is (at > 2)  # and there was something to undo


@pytest.mark.parametrize("rank", [0, 4])
def test_ctrl_c_in_the_middle_of_the_gradients_too(as_before, tiny_vectors, rank):
    def in_the_backward_pass(residual: torch.Tensor) -> None:
        residual.register_hook(raising(KeyboardInterrupt()))

    fault(as_before, in_the_backward_pass, at=5)
    with pytest.raises(KeyboardInterrupt):
        tuned(as_before, tiny_vectors, replace(CONFIG, lora_rank=rank))


def test_ctrl_c_in_a_validation_and_then_the_same_call_ends_with_the_same_bits(as_before, tiny_vectors, tmp_path):
    unbroken = tuned(as_before, tiny_vectors)
    path = tmp_path / "run.safetensors"
    held = Fault(as_before)

    def press(residual: torch.Tensor, hook: Any) -> None:
        held(residual, hook)
        if len(held.weights) == 5:  # the third validation
            raise KeyboardInterrupt

    as_before.add_hook(POINT, press)
    with pytest.raises(KeyboardInterrupt):
        tuned(as_before, tiny_vectors, checkpoint=path, checkpoint_every=3)
    as_before.reset_hooks()
    resumed = tuned(as_before, tiny_vectors, checkpoint=path, checkpoint_every=3)
    assert resumed.history == unbroken.history
    assert all(torch.equal(resumed.changes[name], change) for name, change in unbroken.changes.items())
