"""Weight gradients of a loop, made at once after it instead of in every step.

A kernel's gradient is a sum over tokens of input x cotangent of output. A loop that uses the same
kernels K times keeps a sum as large as the parameters, and adds to it K times. When its tokens are
few it is cheaper to write down both factors of every product, and to multiply them all at the end:

    forwards     place = blank(kernel), zeros         y = taped(multiply, x, kernel, place)
    backwards    kernel's gradient <- all (x, dy)     place <- (x, dy)

So a tape is an array of zeros whose cotangent is what was recorded. The kernel that the loop itself
uses is not differentiated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

# The collection in which a dense layer inside a loop finds its place on the tape.
TAPE = "tape"

Product = Callable[[jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class Tape:
    """What one dense layer records; the whole tape has leading axes K (steps) and L (layers).

    Attributes:
      inputs: float[B, 1, *inputs].
      outputs: cotangents, float[B, 1, *outputs].
      multiply: the layer's product of such inputs with its kernel.
      names: logical names of the kernel's axes.
    """

    inputs: jax.Array
    outputs: jax.Array
    multiply: Product = flax.struct.field(pytree_node=False)
    names: tuple[str | None, ...] = flax.struct.field(pytree_node=False)


@jax.custom_vjp
def taped(x: jax.Array, kernel: jax.Array, place: Tape) -> jax.Array:
    """`place.multiply(x, kernel)`; its backward pass records, and leaves the kernel alone."""
    return place.multiply(x, kernel)


def _taped_forward(x: jax.Array, kernel: jax.Array, place: Tape) -> tuple[jax.Array, Any]:
    return taped(x, kernel, place), (x, kernel, place)


def _taped_backward(saved: Any, cotangent: jax.Array) -> tuple[jax.Array, None, Tape]:
    x, kernel, place = saved
    (to_x,) = jax.linear_transpose(lambda x: place.multiply(x, kernel), x)(cotangent)
    return to_x, None, place.replace(inputs=x, outputs=cotangent)


taped.defvjp(_taped_forward, _taped_backward)


def blank(kernels: jax.Array, zeros: Tape) -> Tape:
    """A tape from which the kernels' gradient will be made.

    Args:
      kernels: float[L, ...], one of each layer.
      zeros: float[K, L, B, 1, ...].
    """

    @jax.custom_vjp
    def new(kernels: jax.Array) -> Tape:
        return zeros

    def backward(kernels: jax.Array, recorded: Tape) -> tuple[jax.Array]:
        # Steps become the tokens of a sequence: [K, L, B, 1, ...] -> [L, B, K, ...].
        x, y = (jnp.moveaxis(a[:, :, :, 0], 0, 2) for a in (recorded.inputs, recorded.outputs))

        def gradient(kernel: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
            return jax.linear_transpose(partial(recorded.multiply, x), kernel)(y)[0]

        return (jax.lax.map(lambda layer: gradient(*layer), (kernels, x, y)),)

    new.defvjp(lambda kernels: (zeros, kernels), backward)
    return new(kernels)
