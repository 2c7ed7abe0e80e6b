"""Runs with low-rank factors or a moving average: acting, exporting and importing agree."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lara_jax import lora
from lara_jax.assemble import load_recipe_tokenizer, model_config
from lara_jax.checkpoint import CheckpointStore, load_info, load_params
from lara_jax.config import load_recipe
from lara_jax.inference.policy import Policy
from lara_jax.interop.convert import export_main, import_main
from lara_jax.models.lara_vla import LaraVLA
from lara_jax.optimizer import trained_paths
from lara_jax.param_tree import flat, select
from lara_jax.train_step import TrainState, logical_axes
from tests.inference import test_policy

CONFIG = Path(__file__).parents[2] / "configs" / "debug.py"
LORA = ["lora.rank=2", "lora.alpha=6", "lora.patterns=text/*_proj/kernel,vision/*"]
EMA = [
    "ema.decay=0.9",
    "optimizer.groups=({'name': 'tower', 'patterns': ('vision/*',), 'freeze': True},)",
]
KERNELS = {
    "text/layers/attn/q_proj/kernel": "dr,rnh->dnh",
    "text/layers/attn/o_proj/kernel": "nhr,rd->nhd",
    "vision/blocks/attn/qkv/kernel": "dr,rcnh->dcnh",
}


@cache
def axes() -> Any:
    """Logical axis names of the model that `test_policy.params` belong to."""
    recipe = test_policy.RECIPE
    tokenizer = load_recipe_tokenizer(recipe)
    return logical_axes(LaraVLA(model_config(recipe, tokenizer, latent_slots=0)))


def shifted(tree: Any, seed: int) -> Any:
    """The tree as training might leave it: every number a little elsewhere."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (x + 0.05 * rng.standard_normal(x.shape)).astype(np.float32), tree
    )


def write_run(workdir: Path, changes: list[str]) -> TrainState:
    """A run's directory after one step, without the step."""
    recipe = load_recipe(CONFIG, ["train.stages=action", *changes])
    params: dict[str, Any] = dict(test_policy.params())
    if recipe.lora.rank:
        factors = lora.init_factors(params, axes(), recipe.lora, jax.random.key(0))
        params[lora.LORA] = shifted(factors, 1)
    average = None
    if recipe.ema.decay:
        average = shifted(select(params, trained_paths(recipe, params, recipe.stages)), 2)
    state = TrainState(
        step=np.int32(1),
        params=params,
        opt_state={},
        teacher=None,
        rng=jax.random.key(0),
        ema=average,
    )
    store = CheckpointStore(workdir)
    store.save(1, state, dataclasses.replace(test_policy.info(), recipe=recipe))
    store.close()
    return state


@pytest.mark.slow
@pytest.mark.parametrize("changes", [LORA, EMA, LORA + EMA], ids=["lora", "ema", "both"])
def test_a_policy_acts_as_its_export_does(tmp_path: Path, changes: list[str]) -> None:
    """Both with what the run has learnt, which parameters as such do not show."""
    run, out, again = tmp_path / "run", tmp_path / "out.safetensors", tmp_path / "again"
    state = write_run(run, changes)
    assert export_main(["--workdir", str(run), "--to", "reference", str(out)]) == 0
    made = ["--config", str(CONFIG), "--workdir", str(again)]
    assert import_main(["--from", "reference", str(out), *made]) == 0
    weights = load_params(again)

    values = flat(state.params) | flat(state.ema or {})
    expected = {path: x for path, x in values.items() if not path.startswith(lora.LORA)}
    assert flat(weights).keys() == expected.keys()
    for path, kernel in expected.items():
        a, b = (values.get(f"{lora.LORA}/{path}/{name}") for name in "ab")
        if a is None:
            np.testing.assert_array_equal(flat(weights)[path], kernel, err_msg=path)
        elif path in KERNELS:
            product = np.stack([np.einsum(KERNELS[path], *ab) for ab in zip(a, b, strict=True)])
            np.testing.assert_allclose(flat(weights)[path], kernel + 3 * product, atol=1e-5)

    info, seen = load_info(run), [test_policy.observation()]
    acted = Policy.from_workdir(run)(seen)
    np.testing.assert_array_equal(Policy(info, weights)(seen), acted)
    networks = {name: tree for name, tree in state.params.items() if name != lora.LORA}
    assert np.abs(Policy(info, networks)(seen) - acted).max() > 1e-3
