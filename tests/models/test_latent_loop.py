"""The latent loop's layout and its tape: neither changes a number."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lara_jax.models.tape import Tape, blank, taped
from tests import devices


def test_a_tape_makes_the_gradient_of_a_loop() -> None:
    """Of steps whose kernels are differentiated as usual, and of steps that record."""
    steps, layers, rows, width = 3, 2, 4, 5
    keys = jax.random.split(jax.random.key(0), 2)
    kernels = jax.random.normal(keys[0], (layers, width, width))
    x = jax.random.normal(keys[1], (rows, 1, width))
    zeros = jnp.zeros((steps, layers, rows, 1, width))

    def plain(kernels: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(steps):
            for kernel in kernels:
                x = jnp.tanh(x @ kernel)
        return x.var()

    def recorded(kernels: jax.Array, x: jax.Array) -> jax.Array:
        tape = blank(kernels, Tape(zeros, zeros, jnp.matmul, ("embed", "mlp")))
        constant = jax.lax.stop_gradient(kernels)

        def step(x: jax.Array, places: Tape) -> tuple[jax.Array, None]:
            for layer in range(layers):
                place = jax.tree.map(lambda a, layer=layer: a[layer], places)
                x = jnp.tanh(taped(x, constant[layer], place))
            return x, None

        return jax.lax.scan(step, x, tape)[0].var()

    assert recorded(kernels, x) == plain(kernels, x) > 1e-3
    got, want = (jax.grad(f, argnums=(0, 1))(kernels, x) for f in (recorded, plain))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


# Runs in its own process, because the number of devices is fixed when JAX starts.
MESHES = """
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lara_jax import lora, sharding
from lara_jax.config import LoraConfig
from lara_jax.models.latent_loop import LatentLoop, think
from lara_jax.models.text_decoder import KeyValues, TextDecoder
from tests.models import tiny

SLOTS, ROWS, PREFIX = 3, 8, 4
cfg, rng = tiny.config().text, np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


text, position = TextDecoder(cfg), jnp.zeros((3, 1, 1), jnp.int32)
init = partial(text.init, jax.random.key(0), jnp.zeros((1, 1, cfg.width)), position)
boxed = jax.eval_shape(partial(init, jnp.ones((1, 1, 1), bool)))["params"]
axes = nn.get_partition_spec(boxed)
params = jax.tree.map(lambda s: draw(*s.shape) / s.shape[-1]**0.5, nn.unbox(boxed))
low = lora.init_factors(params, axes, LoraConfig(rank=2, patterns=("*/q_proj/kernel",)),
                        jax.random.key(1))
low = jax.tree.map(lambda x: x + 0.1 * draw(*x.shape), low)
loop = LatentLoop(cfg, SLOTS, "pre_norm", jnp.dtype("float32"), True, "xla")
past = (cfg.layers, ROWS, PREFIX, cfg.kv_heads, cfg.head_dim)
rows = draw(ROWS, 1, cfg.width), KeyValues(draw(*past), draw(*past))
valid = jnp.arange(PREFIX) >= jnp.arange(ROWS)[:, None] % 3
positions = jnp.broadcast_to(PREFIX + jnp.arange(SLOTS), (3, ROWS, SLOTS))


def loss(params, low, rows):
    with nn.intercept_methods(partial(lora._add_path, 1.5)):
        variables = {"params": params, "lora": low}
        hidden, kv = think(loop, variables, *rows, valid, positions)
    return (hidden**3).mean() + (kv.key**3).mean() + jnp.sin(kv.value).mean(), hidden


function = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
one = jax.device_get(jax.jit(function)(params, low, rows))
assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(one[1][1]))
for shape in ((2, 2, 2), (1, 8, 1)):
    mesh = sharding.make_mesh(*shape)
    where = sharding.shard_tree(mesh, axes, params), None, None
    with jax.set_mesh(mesh):
        many = jax.device_get(jax.jit(function, in_shardings=where)(params, low, rows))
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True):
        where = f"{shape} {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * max(np.abs(a).max(), 1e-2),
                                   err_msg=where)
print("done")
"""


def test_the_mesh_changes_nothing(repository: Path) -> None:
    """Hidden states and gradients, also of low-rank factors, of every parameter and input."""
    run = subprocess.run(
        [sys.executable, "-c", MESHES],
        cwd=repository,
        env=devices.environment(8),
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "done", run.stderr
