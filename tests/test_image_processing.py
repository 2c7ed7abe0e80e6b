"""Image processing: resizing bit-equal to Pillow, Qwen's sizes and order, the golden pixels."""

from fractions import Fraction
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from lara_jax.image_processing import (
    ImageConfig,
    _weight_digits,
    normalize,
    patchify,
    preprocess,
    resize,
    smart_size,
)

# Heights and widths: larger, smaller, one of each, one axis only, whole and odd ratios, one pixel.
SIZES = [
    ((224, 224), (256, 256)),
    ((112, 112), (256, 256)),
    ((180, 320), (192, 352)),
    ((480, 640), (224, 224)),
    ((256, 256), (112, 112)),
    ((64, 48), (64, 96)),
    ((64, 48), (31, 48)),
    ((37, 53), (32, 64)),
    ((53, 37), (96, 17)),
    ((5, 7), (61, 3)),
    ((1, 1), (4, 4)),
    ((9, 300), (1, 3)),
]


def frames(*shape: int, kind: str = "noise") -> np.ndarray:
    """Random images; "edges" has only 0 and 255, so that the filter overshoots and clips."""
    random = np.random.default_rng(0)
    if kind == "edges":
        return (random.integers(0, 2, shape) * 255).astype(np.uint8)
    return random.integers(0, 256, shape, dtype=np.uint8)


def pillow(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's result, horizontal pass first in every version of Pillow."""
    height, width = size
    wide = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(wide.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize(("size", "new_size"), SIZES)
def test_resize_is_bit_equal_to_pillow(
    size: tuple[int, int], new_size: tuple[int, int], kind: str
) -> None:
    image = frames(*size, 3, kind=kind)
    resized = np.asarray(resize(image, new_size))
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, pillow(image, new_size))


@pytest.mark.parametrize(("size", "new_size"), [((224, 224), (256, 256)), ((480, 640), (224, 224))])
def test_one_call_of_pillow_gives_the_same_for_camera_sizes(
    size: tuple[int, int], new_size: tuple[int, int]
) -> None:
    image = frames(*size, 3)
    once = Image.fromarray(image).resize(new_size[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(resize(image, new_size)), np.asarray(once))


def test_resize_keeps_leading_axes_and_works_under_jit() -> None:
    images = frames(2, 3, 20, 30, 3)
    resized = jax.jit(resize, static_argnums=1)(images, (32, 16))
    assert resized.shape == (2, 3, 32, 16, 3)
    np.testing.assert_array_equal(resized[1, 2], pillow(images[1, 2], (32, 16)))


@pytest.mark.parametrize(("size", "new_size"), [(224, 256), (640, 224), (17, 16), (889, 7)])
def test_resize_needs_no_more_than_bfloat16_products(size: int, new_size: int) -> None:
    """Accelerators round operands to bfloat16 (TF32 on a GPU) and accumulate in float32."""
    digits = _weight_digits(size, new_size)
    np.testing.assert_array_equal(digits.astype(ml_dtypes.bfloat16).astype(np.float32), digits)
    assert np.abs(digits).sum(axis=-1).max() * 255 < 2**24
    weights = np.tensordot([2.0**16, 2.0**8, 1.0], digits.astype(np.float64), 1) / 2**22
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=size * 2.0**-23)


def test_resize_refuses_what_it_cannot_do_exactly() -> None:
    with pytest.raises(ValueError, match="float32"):
        resize(np.zeros((4, 4, 3), np.float32), (8, 8))
    with pytest.raises(ValueError, match="1000 px to 7 px"):
        resize(np.zeros((1000, 4, 3), np.uint8), (7, 4))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((224, 224), (256, 256)),
        ((112, 112), (256, 256)),
        ((256, 256), (256, 256)),
        ((180, 320), (192, 352)),
        ((480, 640), (480, 640)),
        ((240, 320), (256, 320)),  # 7.5 rounds to even 8
        ((272, 272), (256, 256)),  # 8.5 rounds to even 8
        ((336, 336), (320, 320)),  # 10.5 rounds to even 10
        ((5000, 5000), (4096, 4096)),
        ((8, 1000), (32, 2880)),
    ],
)
def test_smart_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_size(*size) == expected


@pytest.mark.parametrize("size", [(0, 10), (3, 601)])
def test_smart_size_refuses(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        smart_size(*size)


def test_smart_size_bounds_the_area_by_multiples_of_the_factor() -> None:
    random = np.random.default_rng(0)
    for height, width in random.integers(20, 3000, (200, 2)).tolist():
        rows, columns = smart_size(height, width, factor=28, min_pixels=40_000, max_pixels=900_000)
        assert rows % 28 == columns % 28 == 0
        # Long thin images may not come below the bound: no side can be less than one block.
        assert 40_000 <= rows * columns <= 900_000 or 28 in (rows, columns)


@pytest.mark.parametrize("case", ["0", "1", "3", "4"])
def test_golden_pixel_values(shared_dir: Path, case: str) -> None:
    golden = load_file(shared_dir / "golden" / "image_preprocessing.safetensors")
    image, expected = golden[f"{case}.image"], golden[f"{case}.pixel_values"]
    config = ImageConfig()
    patches = np.asarray(preprocess(image, config))
    assert [1, *config.grid(image.shape[:2])] == golden[f"{case}.grid"][0].tolist()
    error = np.abs(patches - expected.astype(np.float32))
    # The file holds float16, half a unit of which is 2.5e-4 near 1.
    assert error.max() <= 2.5e-4
    np.testing.assert_array_equal(patches.astype(np.float16), expected)


def test_patch_order_by_hand() -> None:
    """A pixel's value is its place: found again at block, place in block, colour, frame, y, x."""
    patch, merge, frames_, height, width = 2, 3, 2, 12, 18
    image = np.arange(height * width * 3).reshape(height, width, 3)
    patches = np.asarray(
        patchify(image, patch_size=patch, merge_size=merge, temporal_patch_size=frames_)
    )
    assert patches.shape == (54, 24)
    patches = patches.reshape(2, 3, merge, merge, 3, frames_, patch, patch)
    for index in np.ndindex(patches.shape):
        block_row, block_column, row, column, colour, _, y, x = index
        source = (
            (block_row * merge + row) * patch + y,
            (block_column * merge + column) * patch + x,
            colour,
        )
        assert patches[index] == image[source]


def test_patchify_refuses_a_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"48 x 64.*multiples of 32"):
        patchify(np.zeros((48, 64, 3)), patch_size=16, merge_size=2, temporal_patch_size=2)


def test_normalize_maps_bytes_to_minus_one_to_one() -> None:
    exact = np.array([float(Fraction(2 * byte, 255) - 1) for byte in range(256)])
    values = np.asarray(normalize(np.arange(256, dtype=np.uint8)))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, exact, rtol=0, atol=1.2e-7)


def test_preprocess_resizes_first_where_asked() -> None:
    """A 112 px stop on the way loses detail on purpose; each stop is Pillow's."""
    config = ImageConfig(resize_px=(112, 112))
    images = frames(1, 2, 96, 128, 3)
    patches = np.asarray(jax.jit(preprocess, static_argnums=1)(images, config))
    assert config.grid((96, 128)) == (16, 16)
    assert config.tokens_per_view((96, 128)) == 64
    assert patches.shape == (1, 2, 256, 3 * 2 * 16 * 16)
    seen = pillow(pillow(images[0, 1], (112, 112)), (256, 256))
    # Feature order is colour, frame, y, x: the first patch is the top left corner.
    corner = seen[:16, :16].transpose(2, 0, 1) / 127.5 - 1
    first = patches[0, 1, 0].reshape(3, 2, 16, 16)
    np.testing.assert_allclose(first[:, 0], corner, atol=1e-6)
    np.testing.assert_array_equal(first[:, 0], first[:, 1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch_size": 0}, "patch_size is 0"),
        ({"min_pixels": 10, "max_pixels": 9}, "max_pixels 9 is below min_pixels 10"),
        ({"resize_px": (0, 5)}, "resize_px"),
    ],
)
def test_config_checks(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageConfig(**wrong)
