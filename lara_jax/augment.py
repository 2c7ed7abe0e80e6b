"""Random crops and colours of camera frames, on device, compiled with the step.

Each row and view of a batch draws one crop and one colour change; the current and the next frame
share them, so that the visual target moves only where the world moved. In the usual order::

    crop        area, aspect ratio and place drawn; resized back to H x W, bilinear
    brightness  x + delta                            x in [0, 1], clipped after each step
    contrast    (x - m) * factor + m                 m: each colour's mean over the current frame
    saturation  S * factor                           in HSV, at most 1
    hue         H + delta                            in turns of the colour circle

What row i draws depends on the key and i alone: not on the batch's size, nor on how devices share
it. At evaluation, `evaluation_crop` takes the centre with the mean area, since a policy trained on
crops sees everything a little larger.

A crop is two small matrix products, one per axis, with two taps a row. Weights are multiples of
1/256 and pixels whole numbers: both are exact in bfloat16, every sum is exact in float32, so that
accelerators need a single pass at their lowest matmul precision and all backends agree::

    W_y[b,v,o,h] @ images[b,v,h,w,c] -> round -> W_x[b,v,o,w] @ ... -> round

Letters: B batch, V views, F frames (current, next), H W the image, O an output side, C colours.

Sources: Octo and OpenVLA for order and ranges; tf.image for the colour operations.
"""

import math

import jax
import jax.numpy as jnp

from lara_jax.config import UNCHANGED, AugmentConfig

Array = jax.Array

WEIGHT_STEPS = 256


def augment(
    images: Array, next_images: Array, view_mask: Array, key: Array, config: AugmentConfig
) -> tuple[Array, Array]:
    """Crops and recolours the frames of a batch.

    Args:
      images, next_images: uint8[B, V, H, W, 3].
      view_mask: bool[B, V]; views that are False stay as they are.
      key: of this step; the same on every host.
      config: static under `jit`.

    Returns:
      The same shapes and dtypes.
    """
    if not (config.crops or config.recolours):
        return images, next_images
    rows, views = view_mask.shape
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))
    # In [0, 1), each its own use; B V.
    draws = jax.vmap(lambda key: jax.random.uniform(key, (8, views)), out_axes=1)(keys)
    area, ratio, top, left, brightness, contrast, saturation, hue = draws

    frames = jnp.stack([images, next_images], axis=2)
    if config.crops:
        height, width = _crop_size(_between(area, config.crop_area), _log_between(ratio, config))
        frames = _crop(frames, top * (1 - height), left * (1 - width), height, width)
    if config.recolours:
        frames = _recolour(
            frames,
            brightness=_between(brightness, (-config.brightness, config.brightness)),
            contrast=_between(contrast, config.contrast),
            saturation=_between(saturation, config.saturation),
            hue=_between(hue, (-config.hue, config.hue)),
            config=config,
        )
    keep = view_mask[:, :, None, None, None]
    return (
        jnp.where(keep, frames[:, :, 0], images),
        jnp.where(keep, frames[:, :, 1], next_images),
    )


def evaluation_crop(images: Array, config: AugmentConfig) -> Array:
    """The centre of each frame, of the mean area and ratio of training's crops, at the same size.

    Args:
      images: uint8[B, V, H, W, 3].
      config: the training's; without crops the images come back as they are.

    Returns:
      uint8[B, V, H, W, 3].
    """
    if not config.crops:
        return images
    half = jnp.full(images.shape[:2], 0.5)
    height, width = _crop_size(_between(half, config.crop_area), _log_between(half, config))
    frames = _crop(images[:, :, None], (1 - height) / 2, (1 - width) / 2, height, width)
    return frames[:, :, 0]


def _between(draw: Array, limits: tuple[float, float]) -> Array:
    low, high = limits
    return low + draw * (high - low)


def _log_between(draw: Array, config: AugmentConfig) -> Array:
    low, high = config.crop_ratio
    return jnp.exp(_between(draw, (math.log(low), math.log(high))))


def _crop_size(area: Array, ratio: Array) -> tuple[Array, Array]:
    """Height and width of crops as parts of the image's, at most 1."""
    return jnp.minimum(jnp.sqrt(area / ratio), 1.0), jnp.minimum(jnp.sqrt(area * ratio), 1.0)


def _crop(frames: Array, top: Array, left: Array, height: Array, width: Array) -> Array:
    """Enlarges a box of each view's frames to their full size, bilinear.

    Args:
      frames: uint8[B, V, F, H, W, C].
      top, left, height, width: float32[B, V], as parts of the image's sides.
    """
    rows = _taps(top, height, frames.shape[-3])
    columns = _taps(left, width, frames.shape[-2])
    frames = _round(jnp.einsum("bvoh,bvfhwc->bvfowc", rows, frames.astype(jnp.float32)))
    return _round(jnp.einsum("bvow,bvfhwc->bvfhoc", columns, frames.astype(jnp.float32)))


def _taps(start: Array, length: Array, size: int) -> Array:
    """Weights float32[B, V, O, H] that resample the part [start, start + length) to `size` px."""
    middle = (jnp.arange(size) + 0.5) / size
    place = (start[..., None] + length[..., None] * middle) * size - 0.5
    steps = jnp.round(jnp.clip(place, 0, size - 1) * WEIGHT_STEPS)
    distance = jnp.abs(steps[..., None] - WEIGHT_STEPS * jnp.arange(size))
    return jnp.maximum(WEIGHT_STEPS - distance, 0) / WEIGHT_STEPS


def _round(values: Array) -> Array:
    return jnp.floor(values + 0.5).astype(jnp.uint8)


def _recolour(
    frames: Array,
    *,
    brightness: Array,
    contrast: Array,
    saturation: Array,
    hue: Array,
    config: AugmentConfig,
) -> Array:
    """Changes the colours of uint8[B, V, F, H, W, 3] by float32[B, V] each."""
    brightness, contrast, saturation, hue = (
        change[:, :, None, None, None] for change in (brightness, contrast, saturation, hue)
    )
    x = frames.astype(jnp.float32) / 255.0
    x = jnp.clip(x + brightness[..., None], 0, 1)
    if config.contrast != UNCHANGED:
        # One mean for both frames: a pixel that stays the same stays the same.
        mean = x[:, :, :1].mean(axis=(-3, -2), keepdims=True)
        x = jnp.clip((x - mean) * contrast[..., None] + mean, 0, 1)
    if config.saturation != UNCHANGED or config.hue:
        h, s, v = _rgb_to_hsv(x)
        x = _hsv_to_rgb(h + hue, jnp.clip(s * saturation, 0, 1), v)
    return _round(x * 255.0)


def _rgb_to_hsv(rgb: Array) -> tuple[Array, Array, Array]:
    """float32[..., 3] in [0, 1] -> hue in turns, saturation and value in [0, 1]."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value = rgb.max(axis=-1)
    spread = value - rgb.min(axis=-1)
    safe = jnp.where(spread == 0, 1.0, spread)
    sixths = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    return sixths / 6.0 % 1.0, spread / jnp.where(value == 0, 1.0, value), value


def _hsv_to_rgb(hue: Array, saturation: Array, value: Array) -> Array:
    """The inverse: each colour is the value, less what its distance on the circle takes away."""
    place = (hue[..., None] * 6.0 + jnp.array([5.0, 3.0, 1.0])) % 6.0
    share = jnp.clip(jnp.minimum(place, 4.0 - place), 0, 1)
    return value[..., None] * (1.0 - saturation[..., None] * share)
