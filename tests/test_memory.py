"""What a step holds, by XLA's own account: what is frozen or adapted costs no gradient or moments.

arguments: parameters, moments, batch        temporaries: gradients, activations
"""

import dataclasses
from typing import Any

import jax
import pytest

from lara_jax.curriculum import Stage
from lara_jax.models.lara_vla import LaraVLA
from lara_jax.optimizer import make_optimizer, trained_paths
from lara_jax.param_tree import flat, select
from lara_jax.train_step import init_state, make_train_step
from tests import test_train_step as steps

STAGE = Stage(name="act", action_weight=1.0)
CHANGES = {
    "optimizer.groups": "({'name': 'tower', 'patterns': ('vision/*',), 'freeze': True},)",
    "lora.rank": 2,
    "lora.patterns": "text/*",
    "ema.decay": 0,
    "train.stages": "action",
}


def wide_model() -> LaraVLA:
    """With parameters that outweigh the activations of a row."""
    config = steps.model().config
    return LaraVLA(
        dataclasses.replace(
            config,
            vision=dataclasses.replace(config.vision, width=192, mlp=768, depth=8, out_width=256),
            text=dataclasses.replace(config.text, width=256, mlp=512, layers=8),
            expert=dataclasses.replace(config.expert, context_width=256),
            latent_slots=0,
        )
    )


def size(tree: Any) -> int:
    """Bytes."""
    return sum(x.size * x.dtype.itemsize for x in flat(tree).values())


@pytest.mark.slow
def test_a_frozen_tower_and_an_adapted_decoder_cost_no_gradient() -> None:
    """A gradient of either, a copy of it or its moments alone would break a bound."""
    recipe = steps.recipe(**CHANGES)
    model, optimizer = wide_model(), make_optimizer(recipe)
    state = jax.eval_shape(lambda: init_state(model, optimizer, recipe, jax.random.key(0)))
    row = jax.tree.map(lambda x: x[:1], steps.batch())
    step = jax.jit(make_train_step(model, optimizer, STAGE, recipe), donate_argnums=0)
    memory = step.lower(state, row).compile().memory_analysis()

    trained = size(select(state.params, trained_paths(recipe, state.params, [STAGE])))
    least = min(size(state.params["vision"]), size(state.params["text"]))
    assert trained < least / 10
    teacher = size(state.teacher)
    arguments = size(state.params) + teacher + 2 * trained
    assert arguments <= memory.argument_size_in_bytes < arguments + least / 10
    assert memory.temp_size_in_bytes < least / 2
