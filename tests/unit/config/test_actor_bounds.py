"""--num-actors: a maximum, or the bounds between which the pool grows."""

import pytest

from selectmoe.config.loading import from_values, load_config, resolved
from selectmoe.config.selection import SelectConfig
from selectmoe.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "bounds"),
    [("null", (1, None)), ("4", (1, 4)), ("2:8", (2, 8)), ("3:3", (3, 3))],
)
def test_the_number_of_actors_is_a_maximum_or_two_bounds(text, bounds):
    config = load_config(SelectConfig, [f"num_actors={text}"])
    assert config.actor_bounds == bounds
    again = from_values(SelectConfig, resolved(config))
    assert again == config


@pytest.mark.parametrize("text", ["8:2", "0:3", ":3", "1:", "-1", "1.5", "a:b"])
def test_bounds_of_actors_that_no_pool_can_have_are_refused(text):
    with pytest.raises(ConfigError, match="num_actors must be a whole number from 1 or MIN:MAX"):
        load_config(SelectConfig, [f"num_actors={text}"])
