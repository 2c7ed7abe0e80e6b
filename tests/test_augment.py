"""Augmentation: nothing where off, crops as Pillow's, colours as colorsys', one draw a view."""

import colorsys
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from lara_jax.augment import (
    AugmentConfig,
    _crop,
    _recolour,
    _taps,
    augment,
    evaluation_crop,
)

OPENVLA = AugmentConfig(
    crop_area=(0.9, 0.9),
    brightness=0.2,
    contrast=(0.8, 1.2),
    saturation=(0.8, 1.2),
    hue=0.05,
)
CROP = AugmentConfig(crop_area=(0.3, 0.9), crop_ratio=(0.7, 1.4))
CONFIGS = [
    OPENVLA,
    CROP,
    AugmentConfig(brightness=0.3),
    AugmentConfig(contrast=(0.5, 1.5)),
    AugmentConfig(saturation=(0.0, 2.0)),
    AugmentConfig(hue=0.5),
]

run = jax.jit(augment, static_argnames="config")
crop = jax.jit(_crop)
recolour = jax.jit(_recolour, static_argnames="config")


def frames(seed: int, rows: int = 3, views: int = 2, size: tuple[int, int] = (24, 32)):
    """Smooth coloured frames: uint8[rows, views, *size, 3]."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (rows * views, 5, 6, 3), np.uint8)
    large = [np.asarray(Image.fromarray(frame).resize(size[::-1])) for frame in small]
    return np.stack(large).reshape(rows, views, *size, 3)


def every(rows: int = 3, views: int = 2) -> np.ndarray:
    return np.ones((rows, views), bool)


def test_off_by_default() -> None:
    images, following = frames(0), frames(1)
    out = augment(images, following, every(), jax.random.key(0), AugmentConfig())
    assert out[0] is images
    assert out[1] is following
    assert evaluation_crop(images, AugmentConfig()) is images


@pytest.mark.parametrize("config", CONFIGS)
def test_shapes_and_draws(config: AugmentConfig) -> None:
    images, following = frames(0), frames(1)
    out = run(images, following, every(), jax.random.key(0), config=config)
    for new, old in zip(out, (images, following), strict=True):
        assert (new.shape, new.dtype) == (old.shape, np.uint8)
        changed = (np.asarray(new) != old).mean(axis=(2, 3, 4))
        assert (changed > 0.1).all()  # every row and view
    # The same key again, then another one.
    again = run(images, following, every(), jax.random.key(0), config=config)
    other = run(images, following, every(), jax.random.key(1), config=config)
    np.testing.assert_array_equal(again[0], out[0])
    assert (np.asarray(other[0]) != np.asarray(out[0])).any(axis=(2, 3, 4)).all()


@pytest.mark.parametrize("config", CONFIGS)
def test_both_frames_change_alike(config: AugmentConfig) -> None:
    images = frames(0)
    following = images.copy()
    following[:, :, 16:, :] = frames(1)[:, :, 16:, :]
    current, after = run(images, following, every(), jax.random.key(2), config=config)
    same = run(images, images, every(), jax.random.key(2), config=config)
    np.testing.assert_array_equal(same[0], same[1])
    if not config.crops:  # pixels that stayed the same do so afterwards
        np.testing.assert_array_equal(current[:, :, :16], after[:, :, :16])
    assert (np.asarray(current) != np.asarray(after)).any()


def test_rows_and_views_draw_for_themselves() -> None:
    images = np.broadcast_to(frames(0, 1, 1), (4, 2, 24, 32, 3))
    out, _ = run(images, images, every(4), jax.random.key(3), config=OPENVLA)
    flat = np.asarray(out).reshape(8, -1)
    assert len(np.unique(flat, axis=0)) == 8


def test_a_row_does_not_see_the_batch() -> None:
    images, following = frames(0, rows=5), frames(1, rows=5)
    key = jax.random.key(4)
    whole = run(images, following, every(5), key, config=OPENVLA)
    part = run(images[:2], following[:2], every(2), key, config=OPENVLA)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[:2], b)


def test_missing_views_stay() -> None:
    images, following = frames(0), frames(1)
    mask = np.array([[True, False], [False, True], [True, True]])
    out = run(images, following, mask, jax.random.key(5), config=OPENVLA)
    for new, old in zip(out, (images, following), strict=True):
        same = (np.asarray(new) == old).all(axis=(2, 3, 4))
        np.testing.assert_array_equal(same, ~mask)


@pytest.mark.parametrize("size", [(24, 32), (33, 7)])
@pytest.mark.parametrize("seed", range(4))
def test_crop_is_bilinear(size: tuple[int, int], seed: int) -> None:
    """Pillow with a fractional box; 2 levels for weights in 1/256 and the rounding between."""
    height, width = size
    random = np.random.default_rng(seed)
    h, w = random.uniform(0.3, 1, 2)
    top, left = random.uniform(0, 1 - h), random.uniform(0, 1 - w)
    images = random.integers(0, 256, (1, 1, 1, *size, 3), np.uint8)
    part = partial(np.full, (1, 1), dtype=np.float32)
    out = np.asarray(crop(images, part(top), part(left), part(h), part(w)))[0, 0, 0]
    box = (left * width, top * height, (left + w) * width, (top + h) * height)
    expected = np.asarray(
        Image.fromarray(images[0, 0, 0]).resize((width, height), Image.Resampling.BILINEAR, box=box)
    )
    difference = np.abs(out.astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.6


def test_whole_crop_is_the_image() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 1, 1, 40, 56, 3), np.uint8)
    zero, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    np.testing.assert_array_equal(crop(images, zero, zero, one, one), images)


@pytest.mark.parametrize(("start", "length"), [(0.0, 1.0), (0.1, 0.73), (0.4, 0.6)])
def test_weights_need_no_precision(start: float, length: float) -> None:
    """Two taps a pixel that sum to 1, exact in bfloat16: any matmul precision gives the same."""
    part = partial(np.full, (1, 1), dtype=np.float32)
    weights = np.asarray(_taps(part(start), part(length), 256))[0, 0]
    np.testing.assert_array_equal(weights.astype(ml_dtypes.bfloat16).astype(np.float32), weights)
    np.testing.assert_array_equal(weights.sum(axis=1), 1)
    assert (weights > 0).sum(axis=1).max() <= 2


def test_crops_have_the_area_and_ratio_asked_for() -> None:
    """A ramp of known slope shows each crop's size and place."""
    size, count = 200, 64
    ramp = np.arange(size, dtype=np.uint8)
    images = np.zeros((count, 1, size, size, 3), np.uint8)
    images[..., 0], images[..., 1] = ramp[:, None], ramp[None, :]
    out, _ = run(images, images, every(count, 1), jax.random.key(6), config=CROP)
    down, across = np.asarray(out)[:, 0, :, 0, 0], np.asarray(out)[:, 0, 0, :, 1]
    height = (down[:, -1].astype(float) - down[:, 0] + 1) / size
    width = (across[:, -1].astype(float) - across[:, 0] + 1) / size
    tolerance = 0.03  # 2 levels of 200 on each side
    assert height.max() <= 1 + tolerance
    area, ratio = height * width, width / height
    assert 0.3 - tolerance <= area.min() < 0.4
    assert 0.8 < area.max() <= 0.9 + tolerance
    assert 0.7 * (1 - tolerance) <= ratio.min() < 0.85
    assert 1.2 < ratio.max() <= 1.4 * (1 + tolerance)
    # Places fill what the size leaves free.
    place = down[:, 0] / size / np.maximum(1 - height, 1e-9)
    assert place[height < 0.8].min() < 0.1
    assert place[height < 0.8].max() > 0.9


def colours(image: np.ndarray, **changes: float) -> np.ndarray:
    """`_recolour` of uint8[H, W, 3] by the given changes, others neutral."""
    neutral = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    values = {k: np.full((1, 1), v, np.float32) for k, v in {**neutral, **changes}.items()}
    config = AugmentConfig(brightness=1, contrast=(0, 9), saturation=(0, 9), hue=0.5)
    return np.asarray(recolour(image[None, None, None], **values, config=config))[0, 0, 0]


@pytest.mark.parametrize(
    ("hue", "saturation"),
    [(0.0, 1.0), (0.05, 1.0), (-0.3, 1.0), (0.5, 1.0), (0.0, 0.4), (0.0, 1.7), (0.2, 0.0)],
)
def test_hue_and_saturation(hue: float, saturation: float) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (20, 20, 3), np.uint8)
    image[0] = random.integers(0, 256, (20, 1), np.uint8)  # grey
    image[1, :4] = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 255]]
    expected = np.empty((20, 20, 3))
    for place in np.ndindex(20, 20):
        h, s, v = colorsys.rgb_to_hsv(*(image[place] / 255.0))
        expected[place] = colorsys.hsv_to_rgb((h + hue) % 1.0, min(s * saturation, 1.0), v)
    out = colours(image, hue=hue, saturation=saturation)
    assert np.abs(out - expected * 255).max() <= 0.51
    if (hue, saturation) == (0.0, 1.0):
        np.testing.assert_array_equal(out, image)


def test_brightness_and_contrast() -> None:
    image = frames(0, 1, 1)[0, 0]
    scaled = image / 255.0
    brighter = np.clip(scaled + 0.2, 0, 1)
    assert np.abs(colours(image, brightness=0.2) - brighter * 255).max() <= 0.51
    mean = brighter.mean(axis=(0, 1))
    both = np.clip((brighter - mean) * 1.4 + mean, 0, 1)
    assert np.abs(colours(image, brightness=0.2, contrast=1.4) - both * 255).max() <= 0.51


def test_evaluation_takes_the_centre() -> None:
    images = frames(0)
    config = AugmentConfig(crop_area=(0.5, 0.7), crop_ratio=(0.5, 2.0))
    out = np.asarray(jax.jit(evaluation_crop, static_argnames="config")(images, config=config))
    assert (out.shape, out.dtype) == (images.shape, np.uint8)
    side = 0.6**0.5
    margin_y, margin_x = (1 - side) / 2 * 24, (1 - side) / 2 * 32
    box = (margin_x, margin_y, 32 - margin_x, 24 - margin_y)
    for place in np.ndindex(3, 2):
        expected = Image.fromarray(images[place]).resize((32, 24), Image.Resampling.BILINEAR, box)
        assert np.abs(out[place].astype(int) - np.asarray(expected)).max() <= 2
    # Colours stay as they are, and so does everything without crops.
    assert evaluation_crop(images, AugmentConfig(hue=0.1, brightness=0.2)) is images


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_area": (0.0, 1.0)}, "crop_area"),
        ({"crop_area": (0.9, 1.1)}, r"crop_area is \(0.9, 1.1\); allowed: 0.0001 <= low"),
        ({"crop_area": (0.9, 0.8)}, "low <= high"),
        ({"crop_ratio": (-1.0, 1.0)}, "crop_ratio"),
        ({"contrast": (-0.1, 1.0)}, "contrast"),
        ({"saturation": (1.2, 0.8)}, "saturation"),
        ({"brightness": 1.5}, r"brightness is 1.5; allowed 0\.\.1"),
        ({"brightness": float("nan")}, "brightness"),
        ({"hue": 0.6}, "hue"),
    ],
)
def test_ranges_are_checked(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**values)
