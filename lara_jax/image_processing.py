"""Camera frames to vision-tower patches, on device, the same in training and serving.

    uint8[H, W, 3] -> resize -> patchify -> normalize -> float32[patches, 3*T*P*P] in [-1, 1]

Resizing equals Pillow's bicubic filter bit for bit. Pillow resamples horizontally, rounds to uint8,
resamples vertically, rounds again, with weights in fixed point: q = round(2^22 w),
out = clip((sum q x + 2^21) >> 22). As dense matrices these are two small matrix products, which
accelerators like, but their sums need 31 bits. So each q is written in three digits of base 256,
q = 65536 d2 + 256 d1 + d0 with |d| <= 128: digits and pixels are then exact in bfloat16 and in
TF32, and every sum is below 2^24, exact in float32. Three float products, shifted and added as
integers, give the exact result at any matmul precision of any backend.

Pillow 13 began to swap the two passes where the height shrinks much more than the width, which
moves pixels by a level or two; here the horizontal pass always comes first, as in every earlier
version and so in published checkpoints.

Letters: H W the image, O the output side, C colours, D digits.

Sources: Pillow's Resample.c for the filter; Qwen's image processor for sizes, order, normalisation.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

MAX_ASPECT_RATIO = 200
WEIGHT_BITS = 22  # Pillow: 32 bits less 8 of the pixel less 2 for overshoot
MAX_TAPS = 512  # 512 taps * 255 * 128 < 2^24


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How frames become patches.

    Attributes:
      patch_size: side of a patch, px.
      merge_size: patches per side that the vision tower merges into one token.
      temporal_patch_size: frames in a patch; a still image is repeated.
      min_pixels, max_pixels: bounds on the area of what the vision tower sees, px.
      resize_px: (height, width) to bring every frame to first; None keeps the camera's size.
    """

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    resize_px: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_size", "temporal_patch_size", "min_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed 1 and more")
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}")
        if self.resize_px is not None and (len(self.resize_px) != 2 or min(self.resize_px) < 1):
            raise ValueError(f"resize_px is {self.resize_px}; expected (height, width) in px")

    def size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in px of what the vision tower sees of a frame of `image_size`."""
        return smart_size(
            *(self.resize_px or image_size),
            factor=self.patch_size * self.merge_size,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of a frame of `image_size`."""
        height, width = self.size(image_size)
        return height // self.patch_size, width // self.patch_size

    def tokens_per_view(self, image_size: tuple[int, int]) -> int:
        """Image tokens of one view: patches after merging."""
        rows, columns = self.grid(image_size)
        return rows * columns // self.merge_size**2


def preprocess(images: Array, config: ImageConfig) -> jax.Array:
    """Frames to patches: resized if asked for, then to the vision tower's size, cut, normalised.

    Args:
      images: uint8[..., H, W, 3].
      config: the numbers; static under `jit`.

    Returns:
      float32[..., patches, 3*T*P*P] in [-1, 1].
    """
    images = jnp.asarray(images)
    if config.resize_px is not None:
        images = resize(images, config.resize_px)
    height, width = images.shape[-3:-1]
    images = resize(images, config.size((height, width)))
    patches = patchify(
        images,
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
    )
    return normalize(patches)


def smart_size(
    height: int,
    width: int,
    *,
    factor: int = 32,
    min_pixels: int = 65_536,
    max_pixels: int = 16_777_216,
) -> tuple[int, int]:
    """The size Qwen's processor gives an image: multiples of `factor`, of a bounded area.

    >>> smart_size(224, 224)
    (256, 256)

    Raises:
      ValueError: a side is below 1 px or the aspect ratio is above 200.

    Source: `smart_resize` of Qwen2-VL's image processor (halves round to even).
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"image of {height} x {width} px; allowed: at least 1 px a side, "
            f"aspect ratio at most {MAX_ASPECT_RATIO}"
        )
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * enlarge / factor)
        columns = math.ceil(width * enlarge / factor)
    return rows * factor, columns * factor


@partial(jax.jit, static_argnames="size")
def resize(images: Array, size: tuple[int, int]) -> jax.Array:
    """Bicubic resize, bit-equal to Pillow's (antialiased where it shrinks).

    Args:
      images: uint8[..., H, W, C].
      size: (height, width) in px, a tuple.

    Returns:
      uint8[..., height, width, C].

    Raises:
      ValueError: not uint8, or a side would shrink more than 127 times.
    """
    images = jnp.asarray(images)
    if images.dtype != jnp.uint8:
        raise ValueError(f"resize expects uint8 images, got {images.dtype}")
    height, width = size
    if images.shape[-2] != width:
        digits = _weight_digits(images.shape[-2], width)
        images = _round(jnp.einsum("dow,...hwc->d...hoc", digits, images.astype(jnp.float32)))
    if images.shape[-3] != height:
        digits = _weight_digits(images.shape[-3], height)
        images = _round(jnp.einsum("doh,...hwc->d...owc", digits, images.astype(jnp.float32)))
    return images


def patchify(
    images: Array, *, patch_size: int, merge_size: int, temporal_patch_size: int
) -> jax.Array:
    """Cuts images into patches in Qwen's order.

    Patches go merge block by merge block (row-major over blocks, then row-major inside a block), so
    that every `merge_size`**2 patches in a row become one token. The features of a patch go colour,
    frame, y, x.

    Args:
      images: [..., H, W, C], sides multiples of `patch_size * merge_size`.

    Returns:
      [..., patches, C * temporal_patch_size * patch_size**2], dtype of `images`.

    Raises:
      ValueError: a side is not such a multiple.
    """
    *batch, height, width, colours = images.shape
    block = patch_size * merge_size
    if height % block or width % block:
        raise ValueError(f"image of {height} x {width} px; sides must be multiples of {block}")
    rows, columns, n = height // block, width // block, len(batch)
    x = jnp.asarray(images).reshape(
        *batch, rows, merge_size, patch_size, columns, merge_size, patch_size, colours
    )
    # From row, inner row, y, column, inner column, x, colour
    # to   row, column, inner row, inner column, colour, y, x.
    x = x.transpose(*range(n), *(n + axis for axis in (0, 3, 1, 4, 6, 2, 5)))
    x = jnp.repeat(x[..., None, :, :], temporal_patch_size, axis=-3)
    return x.reshape(*batch, rows * columns * merge_size**2, -1)


def normalize(pixels: Array) -> jax.Array:
    """0..255 to float32 in [-1, 1]: scaled by 1/255, mean 0.5, standard deviation 0.5."""
    return (2.0 * jnp.asarray(pixels).astype(jnp.float32) - 255.0) / 255.0


def _round(sums: jax.Array) -> jax.Array:
    """Joins the digits' sums float32[3, ...] and rounds to uint8 as Pillow does."""
    high, middle, low = sums.astype(jnp.int32)
    fixed = (high << 16) + (middle << 8) + low + (1 << (WEIGHT_BITS - 1))
    return jnp.clip(fixed >> WEIGHT_BITS, 0, 255).astype(jnp.uint8)


@lru_cache(maxsize=64)
def _weight_digits(size: int, new_size: int) -> np.ndarray:
    """The weights' balanced base-256 digits: float32[3, new_size, size], the highest first."""
    fixed = _fixed_point_weights(size, new_size)
    low = (fixed + 128) % 256 - 128
    rest = (fixed - low) // 256
    middle = (rest + 128) % 256 - 128
    return np.stack([(rest - middle) // 256, middle, low]).astype(np.float32)


def _fixed_point_weights(size: int, new_size: int) -> np.ndarray:
    """Pillow's bicubic weights (a = -0.5) times 2^22: int64[new_size, size]."""
    scale = size / new_size
    stretch = max(scale, 1.0)  # shrinking widens the filter
    support = 2.0 * stretch
    if 2 * support + 1 > MAX_TAPS:
        raise ValueError(
            f"cannot resize {size} px to {new_size} px: allowed up to 127 times smaller"
        )
    centre = (np.arange(new_size)[:, None] + 0.5) * scale
    first = np.maximum(np.trunc(centre - support + 0.5), 0)
    last = np.minimum(np.trunc(centre + support + 0.5), size)
    source = np.arange(size)[None, :]
    distance = np.abs(source - centre + 0.5) * (1.0 / stretch)
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
    weights = np.where(distance < 1.0, near, np.where(distance < 2.0, far, 0.0))
    weights = np.where((source >= first) & (source < last), weights, 0.0)
    weights = weights / weights.sum(axis=1, keepdims=True)
    return np.trunc(weights * 2**WEIGHT_BITS + np.copysign(0.5, weights)).astype(np.int64)
