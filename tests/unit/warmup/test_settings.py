"""Rules that follow from the settings of a gate warm-up."""

from selectmoe.config.warmup import TrainingConfig
from selectmoe.corruptions.kinds import CORRUPTIONS, KINDS_FOR_BASES
from selectmoe.warmup.settings import corruption_kinds


def test_gates_on_a_base_are_shown_the_kinds_that_taught_them_most():
    assert set(KINDS_FOR_BASES) < set(CORRUPTIONS)
    default = TrainingConfig()
    assert corruption_kinds(default, for_base=True) == KINDS_FOR_BASES
    assert corruption_kinds(default) == tuple(CORRUPTIONS)
    chosen = TrainingConfig(corruptions=("truncated",))
    assert corruption_kinds(chosen, for_base=True) == ("truncated",)
