"""A steering vector optimised on pairs of responses, in both signs (BiPO, Cao et al. 2024)."""

from __future__ import annotations

from rt_lens.arms.intervention import Interventions
from rt_lens.arms.knobs import Between, Blocks, Knob
from rt_lens.arms.registry import ArmInputs, register_arm
from rt_lens.arms.ways.dpo import of_pairs, pairs_of
from rt_lens.arms.ways.token_tuned import config_of
from rt_lens.steering.binding import add
from rt_lens.tuning.learned_edits import tune_vector
from rt_lens.tuning.tuning_data import trained_tokens

KNOBS: dict[str, Knob] = {
    "layer": Blocks(0.3, 0.95), "learning_rate": Between(0.005, 0.5, log=True), "beta": Between(0.03, 1.0, log=True),
}  # fmt: skip


@register_arm(
    "bipo", "A vector optimised to make the personas' responses likelier than the opposite ones is added.", tunes=True,
    like="token_tuned", differs={"token_loss": "preference", "kl_weight": 0.0, "learning_rate": 0.05}, knobs=KNOBS,
)  # fmt: skip
def bipo(inputs: ArmInputs) -> Interventions:
    """The vector at one layer, at every token. It is trained toward the direction, so it is added in both."""
    (layer,) = inputs.layers
    config = of_pairs(config_of("bipo", inputs, trained_layers=(layer,)))
    data = pairs_of(inputs, config)
    vectors, history = tune_vector(inputs.model, inputs.vectors, layer, data, config, progress=inputs.progress)
    inputs.tuned(inputs.direction, history, trained_tokens(data, config, history))
    return add(vectors, [layer], 1.0)
