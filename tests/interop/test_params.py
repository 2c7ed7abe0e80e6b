"""Import consumes every key and fills every parameter, or says what does not fit."""

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lara_jax.interop.golden import Golden
from lara_jax.interop.hf_keys import GOLDEN, HF, LAYOUTS, REFERENCE, KeyMismatch, Layout
from lara_jax.interop.params import NewTokens, export_params, import_params
from tests.interop.models import (
    abstract_params,
    assert_same,
    debug_model,
    random_params,
)

Tree = dict[str, Any]
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
PREFIX = "qwen_vl_interface.model."


@pytest.fixture(scope="module")
def abstract() -> Tree:
    return abstract_params(debug_model())


@pytest.fixture(scope="module")
def params(abstract: Tree) -> Tree:
    return random_params(abstract)


def test_golden_weights_come_back_bitwise(shared_dir: Path) -> None:
    files = sorted((shared_dir / "golden").glob("latent_*.safetensors"))
    assert files
    for file in files:
        golden = Golden.read(file)
        source = {k: v for k, v in golden.arrays.items() if k.startswith(("vlm.", "head."))}
        # Slots have no weights; without them all files share one tracing of the model.
        config = dataclasses.replace(golden.config(), latent_slots=0, position_mode="mrope")
        params = import_params(source, abstract_params(config), GOLDEN)
        exported = export_params(params, GOLDEN)
        assert exported.keys() == source.keys()
        for key, value in source.items():
            assert exported[key].tobytes() == value.tobytes(), (file.name, key)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_round_trip_is_bitwise(layout: Layout, tied: bool) -> None:
    abstract = layout.select(abstract_params(debug_model(tied=tied)))
    if layout.teacher:
        abstract["teacher"] = abstract["vision"]
    params = random_params(abstract)
    state = export_params(params, layout)
    assert_same(import_params(state, abstract, layout), params)
    assert all(value.dtype == np.float32 for value in state.values())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_widened_exactly(abstract: Tree, params: Tree, dtype: Any) -> None:
    state = export_params(params, REFERENCE, dtype=dtype)
    imported = import_params(state, abstract, REFERENCE)
    again = export_params(imported, REFERENCE, dtype=dtype)
    assert all(again[key].tobytes() == state[key].tobytes() for key in state)
    rounded = params["text"]["norm"]["scale"].astype(dtype).astype(np.float32)
    assert_same(imported["text"]["norm"], {"scale": rounded})


def test_layers_and_heads_land_where_they_belong(params: Tree) -> None:
    state = export_params(params, REFERENCE)
    text, expert = params["text"], params["action_expert"]
    k_proj = state[f"{PREFIX}model.language_model.layers.2.self_attn.k_proj.weight"]
    kernel = text["layers"]["attn"]["k_proj"]["kernel"]
    np.testing.assert_array_equal(k_proj[16 + 7], kernel[2, :, 1, 7])
    qkv = state[f"{PREFIX}model.visual.blocks.1.attn.qkv.weight"]
    kernel = params["vision"]["blocks"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(qkv[2 * 64 + 3 * 16 + 5], kernel[1, :, 2, 3, 5])
    to_q = state["action_model.model.transformer_blocks.3.attn1.to_q.bias"]
    np.testing.assert_array_equal(to_q, expert["blocks"]["self"]["attn"]["to_q"]["bias"][1].ravel())
    square = state["action_model.model.proj_out_2.weight"]
    np.testing.assert_array_equal(square, expert["proj_out_2"]["kernel"].T)


@pytest.mark.parametrize(("layout", "written"), [(REFERENCE, True), (HF, False), (GOLDEN, False)])
def test_tied_head(abstract: Tree, params: Tree, layout: Layout, written: bool) -> None:
    abstract, params = layout.select(abstract), layout.select(params)
    state = export_params(params, layout)
    head, embedding = f"{layout.lm_head}.weight", f"{layout.text}embed_tokens.weight"
    assert (head in state) == written
    assert_same(import_params({**state, head: state[embedding]}, abstract, layout), params)
    with pytest.raises(KeyMismatch, match=r"1 keys do not fit.*\n.*lm_head.weight differs"):
        import_params({**state, head: state[embedding] + 1}, abstract, layout)


def test_untied_model_needs_its_head(params: Tree) -> None:
    abstract = HF.select(abstract_params(debug_model(tied=False)))
    with pytest.raises(KeyMismatch, match=r"missing lm_head.weight"):
        import_params(export_params(HF.select(params), HF), abstract, HF)


def test_every_misfit_is_listed(abstract: Tree, params: Tree) -> None:
    state = export_params(params, REFERENCE)
    norm = f"{PREFIX}model.language_model.norm.weight"
    wide = "action_model.model.proj_out_2.weight"
    count = "action_model.model.proj_out_2.bias"
    gone = [key for key in state if ".blocks.1." in key]
    state = {key: value for key, value in state.items() if key not in gone}
    state |= {
        "action_model.critic.weight": np.zeros((2, 3), np.float32),
        "qwen_vl_interface.visual_ema.pos_embed.weight": np.zeros((4, 5), np.float32),
        norm: np.zeros(7, np.float32),
        wide: state[wide].T[:5],
        count: state[count].astype(np.int64),
    }
    with pytest.raises(KeyMismatch) as error:
        import_params(state, abstract, REFERENCE)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{len(gone) + 5} keys do not fit")
    assert len(lines) == len(gone) + 6
    for expected in (
        *(f"missing {key} " for key in gone),
        "unexpected action_model.critic.weight (2, 3)",
        "unexpected qwen_vl_interface.visual_ema.pos_embed.weight (4, 5)",
        f"wrong shape {norm}: (7,) in the source, (64,) in the model",
        f"wrong shape {wide}: (5, 128) in the source, (128, 64) in the model",
        f"wrong dtype {count}: int64",
    ):
        assert any(line.strip().startswith(expected) for line in lines), expected


def test_more_layers_than_the_model_has(abstract: Tree, params: Tree) -> None:
    deep = export_params(params, REFERENCE)
    deep |= {k.replace("layers.3.", "layers.4."): v for k, v in deep.items() if "layers.3." in k}
    with pytest.raises(KeyMismatch, match=r"^11 keys do not fit.*\n.*unexpected .*layers\.4\.inp"):
        import_params(deep, abstract, REFERENCE)


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_grows_on_request(tied: bool) -> None:
    small = HF.select(abstract_params(debug_model(tied=tied, vocab_size=60)))
    large = HF.select(abstract_params(debug_model(tied=tied)))
    state = export_params(random_params(small), HF)
    if tied:
        state[HEAD] = state[EMBEDDING]
    with pytest.raises(KeyMismatch, match=r"\(60, 64\).*\(64, 64\).*say how new ones start"):
        import_params(state, large, HF)
    text = import_params(state, large, HF, new_tokens=NewTokens(17, ids=(58, 61)))["text"]
    tables = [(text["embed_tokens"], state[EMBEDDING])]
    tables += [] if tied else [(text["lm_head"]["kernel"].T, state[HEAD])]
    for table, old in tables:
        np.testing.assert_array_equal(table[:58], old[:58])
        np.testing.assert_array_equal(table[59], old[59])
        for row in (58, 60, 61, 62, 63):
            np.testing.assert_array_equal(table[row], old[17])


@pytest.mark.parametrize(
    ("new_tokens", "message"),
    [
        (NewTokens(64), "seed_id is 64; allowed: 0 to 63"),
        (NewTokens(3, (-1,)), "ids is -1; allowed: 0 to 63"),
    ],
)
def test_token_ids_are_checked(
    abstract: Tree, params: Tree, new_tokens: NewTokens, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        state = export_params(params, REFERENCE)
        import_params(state, abstract, REFERENCE, new_tokens=new_tokens)


def test_vocabulary_never_shrinks(params: Tree) -> None:
    small = HF.select(abstract_params(debug_model(vocab_size=60)))
    state = export_params(HF.select(params), HF)
    with pytest.raises(KeyMismatch, match="more tokens"):
        import_params(state, small, HF, new_tokens=NewTokens(3))


def test_teacher_is_imported_dropped_or_refused(abstract: Tree, params: Tree) -> None:
    teacher = random_params(abstract["vision"], seed=1)
    state = export_params({**params, "teacher": teacher}, REFERENCE)
    with_teacher = {**abstract, "teacher": abstract["vision"]}
    assert_same(import_params(state, with_teacher, REFERENCE)["teacher"], teacher)
    assert_same(import_params(state, abstract, REFERENCE, drop=["teacher"]), params)
    with pytest.raises(KeyMismatch, match=r"unexpected qwen_vl_interface\.visual_ema"):
        import_params(state, abstract, REFERENCE)
    with pytest.raises(KeyMismatch, match=r"missing qwen_vl_interface\.visual_ema"):
        import_params(export_params(params, REFERENCE), with_teacher, REFERENCE)


def test_backbone_alone_from_the_reference(abstract: Tree, params: Tree) -> None:
    state = export_params(params, REFERENCE)
    imported = import_params(state, HF.select(abstract), REFERENCE, drop=["action_expert"])
    assert_same(imported, HF.select(params))


def test_wrong_calls(abstract: Tree, params: Tree) -> None:
    with pytest.raises(ValueError, match="'text' is to be filled and to be dropped"):
        import_params({}, abstract, REFERENCE, drop=["text"])
    with pytest.raises(ValueError, match="layout 'hf' has no 'action_expert'; it has vision, text"):
        import_params({}, {}, HF, drop=["action_expert"])
    with pytest.raises(KeyMismatch, match="no name in layout 'hf' for action_expert/"):
        export_params(params, HF)
    with pytest.raises(ValueError, match="dtype is int8; allowed: float32"):
        export_params(params, REFERENCE, dtype=np.int8)
