"""Low-rank factors: shapes by kernel, merging, what trains, how they are split over devices."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax import lora, sharding
from lara_jax.config import LoraConfig, load_recipe
from lara_jax.models.lara_vla import LaraVLA
from lara_jax.optimizer import make_optimizer, trained_paths
from lara_jax.param_tree import flat, nested
from lara_jax.train_step import init_params
from tests import devices
from tests.data_pipelines.handmade import write_tabletop
from tests.models import tiny

AXES = {
    "text": {
        "layers": {
            "q_proj": {"kernel": ("layers", "embed", "heads", "head_dim")},
            "o_proj": {"kernel": ("layers", "heads", "head_dim", "embed")},
            "norm": {"scale": ("layers", "embed")},
        }
    },
    "vision": {
        "qkv": {"kernel": ("layers", "vision_embed", None, "vision_heads", "head_dim")},
        "merger": {"kernel": ("vision_mlp", "embed"), "bias": ("embed",)},
    },
    "action_expert": {"out": {"kernel": ("expert_embed", "action")}},
}
SIZES = {"layers": 3, "embed": 8, "heads": 4, "head_dim": 2, "vision_embed": 6, None: 3}
SIZES |= {"vision_heads": 2, "vision_mlp": 10, "expert_embed": 5, "action": 7}
CONFIG = LoraConfig(rank=2, alpha=6.0, patterns=("text/*", "vision/*"))
ALL = {
    "text/layers/q_proj/kernel": ((3, 8, 2), (3, 2, 4, 2)),
    "text/layers/o_proj/kernel": ((3, 4, 2, 2), (3, 2, 8)),
    "vision/qkv/kernel": ((3, 6, 2), (3, 2, 3, 2, 2)),
    "vision/merger/kernel": ((10, 2), (2, 8)),
}


def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    leaves = {
        path: jnp.asarray(rng.normal(size=[SIZES[name] for name in names]), jnp.float32)
        for path, names in flat(AXES).items()
    }
    return nested(leaves)


def factors(config: LoraConfig = CONFIG) -> dict[str, Any]:
    return lora.init_factors(params(), AXES, config, jax.random.key(0))


def trained_factors() -> dict[str, Any]:
    """As after some steps: B is no longer zero."""
    key = jax.random.key(1)
    return jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), factors())


def test_every_kernel_has_factors_of_its_inputs_and_outputs() -> None:
    shapes = {path: leaf.shape for path, leaf in flat(factors()).items()}
    expected = {
        f"{path}/{name}": s for path, ab in ALL.items() for name, s in zip("ab", ab, strict=True)
    }
    assert shapes == expected


def test_the_adapted_model_starts_as_the_model_itself() -> None:
    whole = params() | {lora.LORA: factors()}
    jax.tree.map(np.testing.assert_array_equal, lora.merged(whole, CONFIG.scale), params())
    starts = flat(factors())["text/layers/q_proj/kernel/a"]
    assert np.std(starts) == pytest.approx(1 / np.sqrt(8), rel=0.3)


def test_merging_equals_the_two_paths() -> None:
    """x (W + 3 A B) = x W + 3 (x A) B, for kernels with heads on either side, layer by layer."""
    whole = params() | {lora.LORA: trained_factors()}
    together, kernels, low = (flat(t) for t in (lora.merged(whole, 3.0), params(), whole["lora"]))
    assert together.keys() == kernels.keys()
    for path in ALL:
        a, b = low[f"{path}/a"], low[f"{path}/b"]
        pieces = [kernels[path], together[path], a, b]
        if "merger" in path:
            pieces = [piece[None] for piece in pieces]
        inputs = pieces[2].ndim - 2
        x = jnp.asarray(np.random.default_rng(2).normal(size=pieces[2].shape[1:-1]), jnp.float32)
        for kernel, merged, one, two in zip(*pieces, strict=True):
            beside = jnp.tensordot(x, kernel, inputs) + 3.0 * jnp.tensordot(
                jnp.tensordot(x, one, inputs), two, 1
            )
            np.testing.assert_allclose(jnp.tensordot(x, merged, inputs), beside, rtol=1e-4)
    for path in kernels.keys() - ALL.keys():
        np.testing.assert_array_equal(together[path], kernels[path])


def test_without_factors_merging_changes_nothing() -> None:
    assert lora.merged(params(), 0.0).keys() == AXES.keys()
    jax.tree.map(np.testing.assert_array_equal, lora.merged(params(), 0.0), params())


def test_an_adapted_network_trains_by_its_factors_alone(repository: Path) -> None:
    """The action expert has none here, and trains as ever; nothing else has moments."""
    recipe = load_recipe(
        repository / "configs/debug.py", ["lora.rank=2", "lora.patterns=text/*,vision/*"]
    )
    whole = params() | {lora.LORA: factors()}
    trained = trained_paths(recipe, whole, recipe.stages)
    assert trained == {f"lora/{path}" for path in flat(factors())} | {"action_expert/out/kernel"}
    explicit = [stage for stage in recipe.stages if stage.trains == "backbone"][:1]
    assert trained_paths(recipe, whole, explicit) == {f"lora/{path}" for path in flat(factors())}
    state = make_optimizer(recipe).init(whole)
    assert set(flat(state["backbone"].mu)) == {f"lora/{path}" for path in flat(factors())}


def test_a_group_holds_the_factors_of_its_kernels(repository: Path) -> None:
    groups = "({'name': 'tower', 'patterns': ('vision/*',), 'freeze': True},)"
    recipe = load_recipe(
        repository / "configs/debug.py",
        ["lora.rank=2", "lora.patterns=text/*,vision/*", f"optimizer.groups={groups}"],
    )
    whole = params() | {lora.LORA: factors()}
    trained = trained_paths(recipe, whole, recipe.stages)
    networks = {path.removeprefix("lora/").partition("/")[0] for path in trained}
    assert networks == {"text", "action_expert"}


def test_a_pattern_without_a_kernel_is_refused() -> None:
    wrong = LoraConfig(rank=2, patterns=("text/layers/k_proj/kernel",))
    with pytest.raises(ValueError, match=r"near it: .*text/layers/q_proj/kernel"):
        factors(wrong)
    with pytest.raises(ValueError, match="patterns name no kernel"):
        LoraConfig(rank=2, patterns=())


def test_factors_are_split_as_their_kernels_are() -> None:
    axes = lora.factor_axes(AXES, factors())
    q = axes["text"]["layers"]["q_proj"]["kernel"]
    assert q == {"a": ("layers", "embed", None), "b": ("layers", None, "heads", "head_dim")}
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    for path, names in flat(axes).items():
        spec = sharding.partition_spec(mesh, names, flat(factors())[path].shape)
        assert ("fsdp" in spec) or ("tensor" in spec), (path, spec)


def test_every_kernel_of_the_model_can_be_adapted() -> None:
    """Also the shapes of the real model: kernel and A B agree in each of its dense layers."""
    model = LaraVLA(tiny.config())
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    axes, shapes = nn.get_partition_spec(boxed), nn.unbox(boxed)
    config = LoraConfig(rank=2, patterns=("*",))

    def adapt(networks: Any) -> Any:
        low = lora.init_factors(networks, axes, config, jax.random.key(0))
        return lora.merged(networks | {lora.LORA: low}, config.scale)

    assert jax.eval_shape(adapt, shapes) == shapes


# Factors and average on one device, and on a mesh with a resume on one device.
# The optimizer's epsilon is large for the reason given in `test_train.py`.
MESHES = """
import sys
from pathlib import Path

import jax
import numpy as np

from lara_jax import sharding, train
from lara_jax.config import load_recipe

data, workdir = sys.argv[1], Path(sys.argv[2])
make_mesh = sharding.make_mesh


def run(name, steps, devices, mesh):
    sharding.make_mesh = lambda *sizes: make_mesh(*mesh, devices=devices)
    recipe = load_recipe("configs/debug.py", [
        f"data.path={data}", "train.stages=action", f"train.steps={steps}", "data.batch_size=8",
        "lora.rank=4", "lora.patterns=text/*_proj/kernel", "ema.decay=0.5",
        "optimizer.groups=({'name': 'tower', 'patterns': ('vision/*',), 'freeze': True},)",
        "optimizer.epsilon=1e-2", "optimizer.warmup_fraction=0", "optimizer.final_rate=1e-3",
        *(f"optimizer.{part}_rate=1e-3" for part in ("base", "backbone", "expert")),
        "checkpoint.every_steps=2", "log.every_steps=1",
    ])
    return train.train(recipe, workdir / name)


jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
one = run("one", 3, jax.devices()[:1], (1, 1, 1))
many = run("many", 2, jax.devices(), (1, 2, 4))
kernel = many.params["lora"]["text"]["layers"]["attn"]["q_proj"]["kernel"]
moments = many.opt_state["backbone"].mu["lora"]["text"]["layers"]["attn"]["q_proj"]["kernel"]
average = many.ema["lora"]["text"]["layers"]["attn"]["q_proj"]["kernel"]
for tree in (kernel, moments, average):
    assert tree["a"].addressable_shards[0].data.size == tree["a"].size // 2, tree["a"].sharding
    assert tree["b"].addressable_shards[0].data.size == tree["b"].size // 4, tree["b"].sharding
assert float(np.abs(kernel["b"]).max()) > 1e-5
assert set(many.opt_state["backbone"].mu) == {"lora"}
many = run("many", 3, jax.devices()[:1], (1, 1, 1))
for name in ("params", "ema"):
    flat, _ = jax.tree_util.tree_flatten_with_path(getattr(one, name))
    for (path, a), b in zip(flat, jax.tree.leaves(getattr(many, name)), strict=True):
        scale = max(np.abs(a).max(), 1e-2)
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * scale, err_msg=where)
print("done")
"""


@pytest.mark.slow
def test_the_mesh_changes_nothing(repository: Path, tmp_path: Path) -> None:
    data = write_tabletop(tmp_path / "lara_tabletop")
    run = subprocess.run(
        [sys.executable, "-c", MESHES, str(data), str(tmp_path)],
        cwd=repository,
        env=devices.environment(8),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "done"
