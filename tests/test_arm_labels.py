"""The names of arms: written in one way, and taken apart in one way."""

from __future__ import annotations

import pytest

from rt_lens.common.arm_labels import DIRECTIONS, ArmLabel


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("arm", ["rep_tuned", "kl_then_steer", "away"])
def test_a_label_survives_being_written_and_parsed(arm, direction):
    label = ArmLabel(arm, direction)
    assert ArmLabel.parse(label.stem) == ArmLabel.parse(str(label)) == ArmLabel.parse(f"{arm} {direction}") == label
    assert ArmLabel.parse(f"{label.stem} seed 3") == label._replace(seed=3)


@pytest.mark.parametrize(
    "name", ["untuned", "steered", "away_tuned", "toward", "rep_tuned_away (honesty)", "LoRA, rank 8"]
)
def test_a_name_without_a_direction_is_the_arm_by_itself(name):
    assert ArmLabel.parse(name) == ArmLabel(name, "none", 0)
    assert str(ArmLabel(name)) == ArmLabel(name).stem == name


def test_the_older_word_for_suppress_is_read():
    assert ArmLabel.parse("rep_tuned_out seed 2") == ArmLabel("rep_tuned", "suppress", 2)
