"""Edits learned on prompts with two answers, while the weights stay: activation scaling, and a vector beside it.

Strength 1 of the edit is to favour the positive answer and strength -1 the negative one (effectiveness), other tokens
are to keep their probabilities (faithfulness), and few numbers are to do it (minimality): Activation Scaling for
Steering and Interpreting Language Models (Stoehr et al. 2024, arXiv 2410.04962).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rt_lens.common.progress import Bar
from rt_lens.data.two_answers import TwoAnswers
from rt_lens.models.activations import check_hook_names
from rt_lens.models.context import token_context
from rt_lens.models.forward import check_layers, dtype_name, logits_where, model_name, quick
from rt_lens.models.positions import Row, rows_of
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode, pad, pad_id_of
from rt_lens.steering.edits import Edit, FwdHook
from rt_lens.tuning.config import TuneConfig
from rt_lens.tuning.losses import effectiveness_loss, faithfulness_loss
from rt_lens.tuning.weights import trainable_params
from rt_lens.vectors.extraction import package_version
from rt_lens.vectors.operators import Add, Operator, Scale
from rt_lens.vectors.scalings import EVERYWHERE, Scaling
from rt_lens.vectors.steering_vectors import Provenance, SteeringVectors, hook_names

History = list[dict[str, float]]
_COMPONENTS = {"attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "heads": "attn.hook_z"}


@dataclass(frozen=True)
class AnswerConfig:
    """How an edit is learned on prompts with two answers.

    Attributes:
        margin: logit difference at which an answer counts as favoured.
        faithfulness_weight: weight of the KL over all other tokens.
        minimality_weight: weight of the sum of absolute values. Those that are not worth it become exactly 0, by a
            proximal step.
        learning_rate: Adam's at the start; it falls linearly to 0.
        steps: of the optimiser.
        batch_size: prompts in a step, each with both signs.
        seed: for the order of the prompts.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> AnswerConfig(steps=20).margin
        2.0
        >>> AnswerConfig(steps=0)
        Traceback (most recent call last):
        ValueError: steps must be a whole number of at least 1, got 0.
    """

    margin: float = 2.0
    faithfulness_weight: float = 1.0
    minimality_weight: float = 0.01
    learning_rate: float = 0.02
    steps: int = 100
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in ("margin", "faithfulness_weight", "minimality_weight", "learning_rate"):
            above = name == "learning_rate"
            if not (0 <= (value := getattr(self, name)) < math.inf) or (above and value == 0):
                raise ValueError(
                    f"{name} must be a finite number {'above' if above else 'of at least'} 0, got {value!r}."
                )


@torch.inference_mode(mode=False)
@torch.enable_grad()
def learn_scaling(
    model: Model,
    pairs: Sequence[TwoAnswers],
    config: AnswerConfig | None = None,
    *,
    layers: Sequence[int] | None = None,
    components: Sequence[str] = ("attn_out", "mlp_out"),
    positions: str = "all",
    progress: bool = True,
) -> tuple[Scaling, History]:
    """Learns factors by which what a block writes is multiplied, so that one answer takes the place of another.

    h (1 + s alpha) with s = 1 and -1 in the same step, alpha a number per block, component and role. The loss: a hinge
    on the logit difference for both signs, the KL over all other tokens, and the sum of |alpha| (Stoehr et al. 2024).
    All alphas start at 0.

    Args:
        model: HookedTransformer or TransformerBridge; left as it was.
        pairs: prompts with their two answers.
        config: weights of the losses, steps, seed.
        layers: blocks to scale; all by default.
        components: `attn_out`, `mlp_out`, `heads` (one factor for each attention head).
        positions: `all` tokens, the `last` one of the prompt, or `roles`: a factor for each role of the pairs.
        progress: show a bar.

    Returns:
        The scaling, and the losses of each step.

    Raises:
        ValueError: no pairs, answers that share their first token, an unknown component, roles that pairs lack, a
            prompt longer than the context.
        FloatingPointError: a loss that is not finite; names the step and its prompts.

    Example:
        >>> pairs = load_two_answers("indirect_object", part="train")[:4]
        >>> scaling, history = learn_scaling(model, pairs, AnswerConfig(steps=2, batch_size=4), progress=False)
        >>> scaling.n_parameters, history[0]["step"], sorted(history[0])[:2]
        (60, 1, ['effectiveness', 'faithfulness'])
        >>> with model.hooks(fwd_hooks=rtl.steering.scale(scaling.everywhere, multiplier=-1.0)):
        ...     answer = generate(model, [pairs[0].prompt], max_new_tokens=1, chat=False)
    """
    config = config or AnswerConfig()
    if unknown := [name for name in components if name not in _COMPONENTS] or not components:
        raise ValueError(f"components must be some of {', '.join(_COMPONENTS)}, got {unknown or 'none'}.")
    names = [f"blocks.{layer}.{_COMPONENTS[part]}" for layer in check_layers(model, layers) for part in components]
    check_hook_names(model, names)
    answers = encoded_answers(model, pairs, positions)
    size = {True: (model.cfg.n_heads, 1), False: ()}
    edit = _Learned(model, Scale, {
        role: {name: torch.zeros(size[name.endswith("hook_z")], device=model.cfg.device) for name in names}
        for role in answers.places
    })  # fmt: skip
    history = _learn(model, answers, edit, config, progress)
    where = {"all": "every token", "last": "last token"}.get(positions, "roles")
    return Scaling(edit.found(), _provenance(model, answers, "scaling", where, config)), history


@torch.inference_mode(mode=False)
@torch.enable_grad()
def learn_vector(
    model: Model,
    pairs: Sequence[TwoAnswers],
    config: AnswerConfig | None = None,
    *,
    layers: Sequence[int],
    positions: str = "all",
    progress: bool = True,
) -> tuple[SteeringVectors, History]:
    """Learns steering vectors by gradient, on the losses of `learn_scaling`: h + s v after each of some blocks.

    Args:
        model: HookedTransformer or TransformerBridge; left as it was.
        pairs: prompts with their two answers.
        config: weights of the losses, steps, seed.
        layers: blocks to whose output a vector is added.
        positions: at `all` tokens, or at the `last` one of the prompt.
        progress: show a bar.

    Returns:
        The vectors, and the losses of each step.

    Raises:
        ValueError, FloatingPointError: as `learn_scaling`.

    Example:
        >>> pairs = load_two_answers("indirect_object", part="train")[:4]
        >>> quickly = AnswerConfig(steps=2, batch_size=4)
        >>> found, history = learn_vector(model, pairs, quickly, layers=[15], progress=False)
        >>> found.hook_names, found.provenance.method
        (['blocks.15.hook_resid_post'], 'gradient')
    """
    config = config or AnswerConfig()
    if positions not in ("all", "last"):
        raise ValueError(f"positions must be 'all' or 'last' for a vector, got {positions!r}.")
    names = hook_names(check_layers(model, layers))
    answers = encoded_answers(model, pairs, positions)
    (role,) = answers.places
    zeros = {name: torch.zeros(model.cfg.d_model, device=model.cfg.device) for name in names}
    edit = _Learned(model, Add, {role: zeros})
    history = _learn(model, answers, edit, config, progress)
    where = "every token" if positions == "all" else "last token of the text"
    return SteeringVectors(dict(edit.found()[role]), _provenance(model, answers, "gradient", where, config)), history


@dataclass(frozen=True)
class EncodedAnswers:
    """Prompts with two answers, as a model reads them.

    Attributes:
        pairs: the texts.
        rows: token ids of each prompt.
        answers: first token of the positive and of the negative answer.
        places: role -> for each prompt the numbers of its tokens; None where the role is every token.

    Example:
        >>> answers = encoded_answers(model, load_two_answers("indirect_object", part="test")[:2])
        >>> answers.logits(model, [0, 1], signs=(1.0,)).shape, answers.answers.shape
        (torch.Size([2, 49152]), torch.Size([2, 2]))
    """

    pairs: Sequence[TwoAnswers]
    rows: Sequence[Sequence[int]]
    answers: Int[Tensor, "n 2"]
    places: Mapping[str, Sequence[Sequence[int]] | None]

    def logits(self, model: Model, numbers: Sequence[int], signs: Sequence[float], edit: Any = None) -> Tensor:
        """Float[Tensor, "sign_and_prompt d_vocab"] after the prompts: all of the first sign, then of the next."""
        batch = pad([self.rows[n] for n in numbers] * len(signs), pad_id_of(model)).to(model.cfg.device)
        where = torch.zeros_like(batch.mask, dtype=torch.bool)
        where[:, -1] = True
        hooks = () if edit is None else edit(self, list(numbers), signs, batch.mask.shape[1])
        rows = list(numbers) * len(signs)
        with (
            quick(model), model.hooks(fwd_hooks=list(hooks)),
            token_context(batch.mask, rows=rows, n_rows=len(self.rows)),
        ):  # fmt: skip
            return torch.cat(list(logits_where(model, batch.tokens, batch.mask, where))).float()

    @torch.no_grad()
    def all_logits(self, model: Model, batch_size: int) -> Float[Tensor, "n d_vocab"]:
        """Logits after every prompt, under whatever acts on the model, on the CPU."""
        numbers = range(len(self.rows))
        parts = (self.logits(model, numbers[at : at + batch_size], (1.0,)) for at in numbers[::batch_size])
        return torch.cat([part.cpu() for part in parts])


def encoded_answers(model: Model, pairs: Sequence[TwoAnswers], positions: str = "all") -> EncodedAnswers:
    """The prompts as token ids, with the first tokens of their answers and the places of an edit.

    Raises:
        ValueError: no pairs, answers that share their first token, roles that pairs lack, a prompt longer than the
            context.

    Example:
        >>> encoded_answers(model, load_two_answers("capitals", part="test")[:2], "roles").places["country"][0]
        [3]
    """
    if not pairs:
        raise ValueError("pairs must be at least one prompt with two answers, got none.")
    rows = rows_of(model, [pair.prompt for pair in pairs])
    for row in rows:
        if len(row.ids) >= model.cfg.n_ctx:
            raise ValueError(
                f"pairs must fit the context of {model.cfg.n_ctx} tokens with an answer, got a prompt of "
                f"{len(row.ids)}: {row.text[:60]!r}. Shorten it."
            )
    firsts = [[_first(model, pair.prompt, answer) for answer in (pair.positive, pair.negative)] for pair in pairs]
    for pair, (positive, negative) in zip(pairs, firsts, strict=True):
        if positive == negative:
            raise ValueError(
                f"answers must differ in their first token, which is compared, got {pair.positive!r} and "
                f"{pair.negative!r}. Word one of them otherwise, or leave the prompt out."
            )
    return EncodedAnswers(
        pairs, [row.ids for row in rows], torch.tensor(firsts, device=model.cfg.device), _places(rows, pairs, positions)
    )


def scale_roles(model: Model, scaling: Scaling, pairs: Sequence[TwoAnswers], multiplier: float = 1.0) -> list[FwdHook]:
    """Hooks of a scaling by roles, for prompts that have these roles; they act on these prompts, in this order, alone.

    Args:
        model: for its tokenizer.
        scaling: learned with `positions="roles"` or `"last"`.
        pairs: the prompts.
        multiplier: the strength.

    Raises:
        ValueError: for a scaling of another model, or prompts that lack one of its roles.

    Example:
        >>> train, test = (load_two_answers("indirect_object", part=part)[:3] for part in ("train", "test"))
        >>> quickly = AnswerConfig(steps=1, batch_size=3)
        >>> scaling, _ = learn_scaling(model, train, quickly, layers=[20], positions="roles", progress=False)
        >>> effects = answer_effects(model, test, scale_roles(model, scaling, test))
        >>> sorted(scaling.alphas), effects.opposite.n
        (['giver', 'giver again', 'last', 'object', 'place', 'recipient'], 3)
    """
    scaling.check_fits(model)
    last = {"last"} == set(scaling.alphas)
    answers = encoded_answers(model, pairs, "last" if last else "roles")
    if missing := [role for role in scaling.alphas if role not in answers.places]:
        raise ValueError(
            f"pairs must have the roles of the scaling, got none called {missing[0]!r}. Give it in `roles`."
        )
    longest = max(len(ids) for ids in answers.rows)
    hooks: list[FwdHook] = []
    for role, of_role in scaling.alphas.items():
        mask = torch.zeros(len(pairs), longest, dtype=torch.bool, device="cpu")
        for row, places in enumerate(answers.places[role] or ()):
            mask[row, list(places)] = True
        hooks += [(name, Edit(Scale(alpha), multiplier, mask)) for name, alpha in of_role.items()]
    return hooks


def _first(model: Model, prompt: str, answer: str) -> int:
    """The first token of an answer where it follows the prompt."""
    before, whole = encode(model, prompt), encode(model, prompt + answer)
    if whole[: len(before)] == before and len(whole) > len(before):
        return whole[len(before)]
    return encode(model, answer)[-len(model.tokenizer.encode(answer, add_special_tokens=False))]


def _places(
    rows: Sequence[Row], pairs: Sequence[TwoAnswers], positions: str
) -> Mapping[str, Sequence[Sequence[int]] | None]:
    if positions == "all":
        return {EVERYWHERE: None}
    if positions == "last":
        return {"last": [[len(row.ids) - 1] for row in rows]}
    if positions != "roles":
        raise ValueError(f"positions must be 'all', 'last' or 'roles', got {positions!r}.")
    roles = list(pairs[0].roles)
    for pair in pairs:
        if not roles or set(pair.roles) != set(roles):
            raise ValueError(
                f"pairs must have the same roles, got {', '.join(pair.roles) or 'none'} for {pair.prompt[:60]!r} and "
                f"{', '.join(roles) or 'none'} for the first one. Give `roles`, or use positions='all'."
            )
    found: dict[str, Sequence[Sequence[int]]] = {
        role: [row.within(*pair.roles[role]) for row, pair in zip(rows, pairs, strict=True)] for role in roles
    }
    return {**found, "last": [[len(row.ids) - 1] for row in rows]}


class _Learned:
    """An edit whose tensors are learned: role -> hook name -> parameter."""

    def __init__(self, model: Model, operator: type[Any], start: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.model, self.operator = model, operator
        self.parts = {role: {n: nn.Parameter(tensor) for n, tensor in of.items()} for role, of in start.items()}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for of_role in self.parts.values() for parameter in of_role.values()]

    def found(self) -> dict[str, dict[str, Tensor]]:
        return {role: {name: p.detach().clone() for name, p in of.items()} for role, of in self.parts.items()}

    def __call__(
        self, answers: EncodedAnswers, numbers: Sequence[int], signs: Sequence[float], pos: int
    ) -> list[FwdHook]:
        """Hooks for prompts, each with all signs, padded on the left to `pos` tokens."""
        device = self.model.cfg.device
        strengths = torch.tensor(signs, device=device).repeat_interleave(len(numbers))[:, None].expand(-1, pos)
        hooks: list[FwdHook] = []
        for role, of_role in self.parts.items():
            acts = strengths * _mask(answers, role, numbers, len(signs), pos).to(device)
            hooks += [(name, _hook(self.operator(parameter), acts)) for name, parameter in of_role.items()]
        return hooks


def _hook(operator: Operator, strengths: Float[Tensor, "batch pos"]) -> Any:
    def edit(activation: Tensor, hook: Any) -> Tensor:
        heads = activation.ndim - 3
        return operator(activation, strengths[(..., *[None] * heads)] if heads else strengths)

    return edit


def _mask(
    answers: EncodedAnswers, role: str, numbers: Sequence[int], signs: int, pos: int
) -> Float[Tensor, "batch pos"]:
    """1 at the tokens of a role."""
    places = answers.places[role]
    if places is None:
        return torch.ones(len(numbers) * signs, pos, device="cpu")
    mask = torch.zeros(len(numbers), pos, device="cpu")
    for row, number in enumerate(numbers):
        mask[row, [pos - len(answers.rows[number]) + place for place in places[number]]] = 1
    return mask.repeat(signs, 1)


def _learn(
    model: Model, answers: EncodedAnswers, edit: _Learned, config: AnswerConfig, progress: bool
) -> History:  # fmt: skip
    """Adam on the edit's tensors, with a proximal step for the sum of absolute values."""
    optimiser = torch.optim.Adam(edit.parameters, lr=config.learning_rate)
    history: History = []
    with trainable_params(model, {}, TuneConfig()):
        untuned = answers.all_logits(model, config.batch_size)
        drawn = _batches(len(answers.rows), config)
        for step in (bar := Bar(range(config.steps), desc="learning", unit="step", disable=not progress)):
            numbers = next(drawn)
            optimiser.zero_grad()
            losses = _losses(model, answers, edit, config, numbers, untuned)
            total = losses["effectiveness"] + config.faithfulness_weight * losses["faithfulness"]
            torch.autograd.backward(total, inputs=edit.parameters)
            if not bool(torch.isfinite(total)):
                prompts = "; ".join(answers.pairs[n].prompt[-40:] for n in numbers[:3])
                raise FloatingPointError(
                    f"loss must be finite, got {float(total.detach())} in step {step + 1} (prompts: {prompts}). Lower "
                    "learning_rate, or see whether the model's weights are finite."
                )
            rate = config.learning_rate * (1 - step / config.steps)
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
            _shrink(optimiser, rate * config.minimality_weight)
            size = sum(float(parameter.detach().abs().sum()) for parameter in edit.parameters)
            named = {name: float(loss.detach()) for name, loss in losses.items()} | {"minimality": size}
            history.append(
                {"step": step + 1, **named, "total": float(total.detach()) + config.minimality_weight * size}
            )
            bar.set_postfix({name: f"{value:.3f}" for name, value in named.items()})
    return history


def _losses(
    model: Model, answers: EncodedAnswers, edit: _Learned, config: AnswerConfig, numbers: Sequence[int],
    untuned: Float[Tensor, "n d_vocab"],
) -> dict[str, Tensor]:  # fmt: skip
    """Effectiveness and faithfulness, means over the prompts and both signs."""
    logits = answers.logits(model, numbers, (1.0, -1.0), edit)
    tokens = answers.answers[list(numbers)]
    signs = torch.tensor([1.0, -1.0], device=logits.device).repeat_interleave(len(numbers))
    of_answers = logits.gather(1, tokens.repeat(2, 1))
    wanted = signs * (of_answers[:, 0] - of_answers[:, 1])
    before = untuned[list(numbers)].to(logits.device).repeat(2, 1)
    return {
        "effectiveness": effectiveness_loss(wanted, config.margin).mean(),
        "faithfulness": faithfulness_loss(logits, before, tokens.repeat(2, 1)).mean(),
    }


def _batches(n: int, config: AnswerConfig) -> Iterator[list[int]]:
    """Prompts of each step: every one once before any comes again."""
    chance, left = random.Random(config.seed), list[int]()
    while True:
        while len(left) < min(config.batch_size, n):
            left += chance.sample(range(n), n)
        yield left[: config.batch_size]
        left = left[config.batch_size :]


@torch.no_grad()
def _shrink(optimiser: torch.optim.Adam, amount: float) -> None:
    """The proximal step of `amount` times the sum of absolute values, in the metric of Adam's own step."""
    for parameter in optimiser.param_groups[0]["params"]:
        state = optimiser.state[parameter]
        second = state["exp_avg_sq"] / (1 - optimiser.param_groups[0]["betas"][1] ** float(state["step"]))
        threshold = amount / (second.sqrt() + optimiser.param_groups[0]["eps"])
        parameter.copy_(parameter.sign() * (parameter.abs() - threshold).clamp(min=0))


def _provenance(model: Model, answers: EncodedAnswers, method: str, where: str, config: AnswerConfig) -> Provenance:
    content = json.dumps([[pair.prompt, pair.positive, pair.negative] for pair in answers.pairs])
    settings = ", ".join(f"{name} {value:g}" for name, value in asdict(config).items() if name != "seed")
    return Provenance(
        model_name(model), f"positive answer ({settings})", method, where, "none", len(answers.pairs),
        hashlib.sha256(content.encode()).hexdigest(), config.seed, package_version(), dtype=dtype_name(model),
    )  # fmt: skip
