"""The table gives exactly the reference's and transformers' keys and shapes, at every size."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from lara_jax.interop.hf_config import hf_config
from lara_jax.interop.hf_keys import (
    HF,
    LEAVES,
    REFERENCE,
    Axes,
    KeyMismatch,
    Layout,
    Shape,
    entries,
    flatten,
    is_tied,
)
from tests.interop.models import abstract_params, debug_model, published

SIZES = {"debug": 64, "2b": 151_936, "4b": 151_936, "8b": 151_936}


def torch_shapes(params: Mapping[str, Any], layout: Layout) -> dict[str, Shape]:
    """Every key that `export_params` writes, with its shape; needs no data.

    Args:
      params: tree of arrays or `jax.ShapeDtypeStruct`s.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    keys = {entry.key: entry.axes.torch for entry in entries(shapes, layout)}
    if layout.tied_head and is_tied(shapes):
        keys[f"{layout.lm_head}.weight"] = keys[f"{layout.text}embed_tokens.weight"]
    return keys


@pytest.mark.parametrize(("name", "state_dim", "horizon"), [("bridge", 8, 16), ("libero", 7, 8)])
def test_published_checkpoint(shared_dir: Any, name: str, state_dim: int, horizon: int) -> None:
    file = shared_dir / "golden" / f"upstream_state_dict_{name}_4b.json"
    expected = {key: tuple(shape) for key, shape in json.loads(file.read_text()).items()}
    model = published(
        "4b", "B", vocab_size=SIZES["4b"], state_dim=state_dim, action_horizon=horizon
    )
    assert torch_shapes(abstract_params(model), REFERENCE) == expected


@pytest.mark.torch
@pytest.mark.parametrize("size", SIZES)
def test_transformers_keys(size: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = published(size, "debug", vocab_size=SIZES[size])
    config = transformers.Qwen3VLConfig(**hf_config(model.vision, model.text))
    with torch.device("meta"):
        oracle = transformers.Qwen3VLForConditionalGeneration(config)
    expected = {key: tuple(value.shape) for key, value in oracle.state_dict().items()}
    if model.text.tied_embeddings:
        del expected["lm_head.weight"]  # a copy, which transformers' safetensors leave out
    ours = torch_shapes(HF.select(abstract_params(model)), HF)
    assert ours == expected


def test_every_row_is_used() -> None:
    """By an untied model whose expert has an odd number of blocks; the decoder has no biases."""
    params = abstract_params(debug_model(tied=False, layers=5))
    unused = LEAVES.keys() - flatten(params).keys()
    assert all(path.startswith("text/") and path.endswith("/bias") for path in unused), unused


def test_odd_number_of_expert_blocks() -> None:
    params = {"action_expert": abstract_params(debug_model(layers=5))["action_expert"]}
    blocks = {
        int(key.split(".")[3]): shape
        for key, shape in torch_shapes(params, REFERENCE).items()
        if key.endswith("attn1.to_q.weight")
    }
    assert sorted(blocks) == [0, 1, 2, 3, 4]


def test_teacher_is_a_second_vision_tower() -> None:
    vision = abstract_params(debug_model())["vision"]
    student = torch_shapes({"vision": vision}, REFERENCE)
    teacher = torch_shapes({"teacher": vision}, REFERENCE)
    old, new = "qwen_vl_interface.model.model.visual.", "qwen_vl_interface.visual_ema."
    assert teacher == {key.replace(old, new): shape for key, shape in student.items()}


def test_axes() -> None:
    """A query kernel [D, N, H] and torch's [N*H, D], element by element."""
    d, n, h = 2, 3, 4
    ours = np.arange(d * n * h).reshape(d, n, h)
    axes = Axes.bind("DNH -> (NH)D", ours.shape)
    theirs = axes.to_torch(ours)
    assert theirs.shape == (n * h, d)
    assert all(theirs[i * h + j, k] == ours[k, i, j] for k, i, j in np.ndindex(d, n, h))
    np.testing.assert_array_equal(axes.to_ours(theirs), ours)


def test_patch_axes() -> None:
    """Rows of our patch kernel are torch's colour, frame, row, column, in this order."""
    axes = Axes.bind("(CTYX)W -> WCTYX", (3 * 2 * 4 * 4, 5))
    assert axes.torch == (5, 3, 2, 4, 4)
    theirs = axes.to_torch(np.arange(96 * 5).reshape(96, 5))
    assert theirs[1, 2, 1, 3, 0] == (((2 * 2 + 1) * 4 + 3) * 4 + 0) * 5 + 1


def test_wrong_axes() -> None:
    with pytest.raises(KeyMismatch, match=r"patch_embed/kernel.*\(100, 8\).*square patches"):
        torch_shapes({"vision": {"patch_embed": {"kernel": np.zeros((100, 8))}}}, HF)
    with pytest.raises(KeyMismatch, match=r"text/norm/scale.*\(2, 3\)"):
        torch_shapes({"text": {"norm": {"scale": np.zeros((2, 3))}}}, HF)


def test_nameless_parameters_are_all_listed() -> None:
    params = {"text": {"norm": {"scale": np.zeros(3), "gain": np.zeros(3)}}, "critic": np.zeros(3)}
    with pytest.raises(KeyMismatch, match="'hf' for text/norm/gain, critic"):
        torch_shapes(params, HF)
