"""transformers loads what we export, with nothing missing, and computes our hidden states."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax.interop.hf_config import VisionTokens, hf_config
from lara_jax.interop.hf_keys import HF
from lara_jax.interop.params import export_params
from lara_jax.interop.weights import INDEX, save_safetensors
from lara_jax.models.lara_vla import Inputs, LaraVLA, LaraVLAConfig
from tests.interop.models import abstract_params, debug_model, random_params

pytestmark = pytest.mark.torch

IMAGE, START, END = 5, 7, 8  # token ids
GRID, IMAGE_TOKENS = (4, 6), 6
PREFIX, SUFFIX = 22, 9
TOLERANCE = 1e-4  # of the largest entry of a row


def prompts(rng: np.random.Generator, config: LaraVLAConfig) -> Inputs:
    """Two rows of two images each: text, image, text, image, text; the second row is padded."""
    ids = rng.integers(20, 60, (2, PREFIX + SUFFIX)).astype(np.int32)
    image = [START, *[IMAGE] * IMAGE_TOKENS, END]
    for row, at in ((0, 0), (0, 10), (1, 4), (1, 13)):
        ids[row, at : at + len(image)] = image
    valid = np.ones(ids.shape, bool)
    valid[1, :3] = False
    valid[1, -2:] = False
    patches = rng.standard_normal((2, 2, GRID[0] * GRID[1], config.vision.patch_values))
    return Inputs(
        patches=jnp.asarray(patches, jnp.float32),
        view_mask=jnp.ones((2, 2), bool),
        prefix_ids=jnp.asarray(ids[:, :PREFIX]),
        prefix_mask=jnp.asarray(valid[:, :PREFIX]),
        suffix_ids=jnp.asarray(ids[:, PREFIX:]),
        suffix_mask=jnp.asarray(valid[:, PREFIX:]),
    )


def export(config: LaraVLAConfig, params: Any, out: Path, *, shard_bytes: int) -> None:
    """What `lara export --to hf` writes."""
    save_safetensors(export_params(HF.select(params), HF), out, shard_bytes=shard_bytes)
    tokens = VisionTokens(image=IMAGE, start=START, end=END)
    content = hf_config(config.vision, config.text, tokens=tokens)
    (out / "config.json").write_text(json.dumps(content))


def assert_close(ours: Any, theirs: Any, valid: np.ndarray) -> None:
    ours, theirs = np.asarray(ours)[valid], theirs.numpy()[valid]
    scale = np.abs(theirs).max(axis=-1, keepdims=True)
    assert (np.abs(ours - theirs) / scale).max() < TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_and_logits(tmp_path: Path, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(
        debug_model(tied=tied), image_id=IMAGE, img_next_id=63, latent_source="post_norm"
    )
    params = random_params(abstract_params(debug_model(tied=tied)))
    export(config, params, tmp_path, shard_bytes=400_000 if tied else 10**9)
    assert (tmp_path / INDEX).exists() == tied

    oracle, report = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(report.values()), report
    rope = oracle.config.text_config.rope_parameters
    assert rope["rope_theta"] == config.text.rope_theta
    assert tuple(rope["mrope_section"]) == config.text.mrope_section

    inputs = prompts(np.random.default_rng(0), config)
    ids = np.concatenate([inputs.prefix_ids, inputs.suffix_ids], axis=1)
    valid = np.concatenate([inputs.prefix_mask, inputs.suffix_mask], axis=1)
    with torch.no_grad():
        theirs = oracle.eval()(
            input_ids=torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(valid.astype(int)),
            mm_token_type_ids=torch.tensor((ids == IMAGE).astype(int)),
            pixel_values=torch.tensor(np.asarray(inputs.patches)).flatten(0, 2),
            image_grid_thw=torch.tensor([[1, *GRID]] * 4),
            output_hidden_states=True,
        )
    ours = LaraVLA(config).apply({"params": params}, inputs, GRID)
    # transformers 5 norms the last of `hidden_states`, so it is `last_hidden_state`.
    assert_close(ours.hidden, theirs.hidden_states[-1], valid)
    assert_close(ours.logits, theirs.logits[:, PREFIX - 1 : -1], valid[:, PREFIX - 1 : -1])
