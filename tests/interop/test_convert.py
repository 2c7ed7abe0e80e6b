"""The commands: PyTorch weights to a checkpoint and back to the same bytes; wrong input is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lara_jax.assemble import load_recipe_tokenizer, model_config
from lara_jax.checkpoint import load_info, load_params
from lara_jax.config import load_recipe
from lara_jax.interop.convert import export_main, import_main
from lara_jax.interop.hf_keys import HF, REFERENCE, flatten
from lara_jax.interop.params import export_params
from lara_jax.interop.weights import load_torch_state, save_pt, save_safetensors
from tests.interop.models import abstract_params, assert_same, random_params

Tree = dict[str, Any]
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def config_file(repository: Path) -> str:
    return str(repository / "configs" / "debug.py")


@pytest.fixture(scope="module")
def params(config_file: str) -> Tree:
    recipe = load_recipe(config_file)
    config = model_config(recipe, load_recipe_tokenizer(recipe), latent_slots=0)
    return random_params(abstract_params(config))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls a command with `--verify`: exit code and report."""

    def call(command: Callable[[list[str]], int], *argv: object) -> tuple[int, dict[str, Any]]:
        code = command([*map(str, argv), "--verify"])
        (line,) = capsys.readouterr().out.splitlines()
        return code, json.loads(line)

    return call


@pytest.mark.parametrize(
    "name", ["x.safetensors", "folder", pytest.param("x.pt", marks=pytest.mark.torch)]
)
def test_reference_both_ways(
    tmp_path: Path, config_file: str, params: Tree, run: Run, name: str
) -> None:
    source, work, out = tmp_path / name, tmp_path / "work", tmp_path / f"out_{name}"
    state = export_params(params, REFERENCE)
    (save_pt if name.endswith(".pt") else save_safetensors)(state, source)

    made = ("--config", config_file, "--workdir", work)
    code, report = run(import_main, "--from", "reference", source, *made)
    assert (code, report["bitwise"], report["tensors"]) == (0, True, len(state))
    assert (report["at_random"], report["dropped"]) == ([], [])
    assert report["max_abs_difference"] == {"vision": 0, "text": 0, "action_expert": 0}
    assert_same(load_params(work), params)
    assert load_info(work).recipe == load_recipe(config_file)

    code, report = run(export_main, "--workdir", work, "--to", "reference", out, "--step", "0")
    assert (code, report["bitwise"], report["tensors"]) == (0, True, len(state))
    written = load_torch_state(out)
    assert written.keys() == state.keys()
    assert all(written[key].tobytes() == state[key].tobytes() for key in state)


def test_hugging_face_both_ways(tmp_path: Path, config_file: str, params: Tree, run: Run) -> None:
    """From bfloat16, with a smaller vocabulary; the expert starts at random."""
    state = export_params(HF.select(params), HF, dtype=ml_dtypes.bfloat16)
    embedding = "model.language_model.embed_tokens.weight"
    state[embedding] = state[embedding][:700]
    save_safetensors(state, tmp_path / "source")
    made = ("--from", "hf", tmp_path / "source", "--config", config_file, "--workdir")

    with pytest.raises(ValueError, match="fewer tokens: say how new ones start"):
        import_main([*map(str, made), str(tmp_path / "refused")])
    work = tmp_path / "work"
    code, report = run(import_main, *made, work, "--new-tokens")
    assert (code, report["bitwise"], report["at_random"]) == (0, True, ["action_expert"])
    expert = load_params(work)["action_expert"]
    assert all(np.isfinite(leaf).all() for leaf in flatten(expert).values())
    assert np.ptp(expert["future_tokens"]) > 0

    tokenizer = load_recipe_tokenizer(load_recipe(config_file))
    table = load_params(work)["text"]["embed_tokens"]
    seed = state[embedding][tokenizer.thought_seed_id].astype(np.float32)
    for token in (tokenizer.thinking_id, tokenizer.img_next_id, 700, 767):
        np.testing.assert_array_equal(table[token], seed)

    out = tmp_path / "out"
    code, report = run(export_main, "--workdir", work, "--to", "hf", out, "--dtype", "bfloat16")
    assert (code, report["bitwise"], report["left_out"]) == (0, True, ["action_expert"])
    assert report["max_abs_difference"] == {"vision": 0, "text": 0}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["text_config"]["vocab_size"] == tokenizer.vocab_size
    assert config["image_token_id"] == tokenizer.image_pad_id
    assert (out / "tokenizer.json").read_text() == load_info(work).tokenizer["tokenizer.json"]


def test_rounding_is_reported(tmp_path: Path, config_file: str, params: Tree, run: Run) -> None:
    save_safetensors(export_params(params, REFERENCE), tmp_path / "x.safetensors")
    work = tmp_path / "work"
    made = ("--config", config_file, "--workdir", work)
    run(import_main, "--from", "reference", tmp_path / "x.safetensors", *made)
    out = ("--to", "reference", tmp_path / "y.safetensors", "--dtype", "bfloat16")
    code, report = run(export_main, "--workdir", work, *out)
    assert (code, report["bitwise"], report["dtype"]) == (0, True, "bfloat16")
    assert all(0 < gap < 0.02 for gap in report["max_abs_difference"].values())

    for argv, message in (
        (["--to", "hf", str(tmp_path / "x.safetensors")], "exists already"),
        (["--to", "hf", str(tmp_path / "z.safetensors")], "--to hf writes a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            export_main(["--workdir", str(work), *argv])
    source = ["--from", "reference", str(tmp_path / "x.safetensors")]
    with pytest.raises(ValueError, match="has a checkpoint already"):
        import_main([*source, *map(str, made)])


def test_teacher_must_be_dropped_by_name(
    tmp_path: Path, config_file: str, params: Tree, run: Run
) -> None:
    state = export_params({**params, "teacher": params["vision"]}, REFERENCE)
    save_safetensors(state, tmp_path / "x.safetensors")
    made = ("--from", "reference", tmp_path / "x.safetensors", "--config", config_file)
    with pytest.raises(ValueError, match=r"unexpected qwen_vl_interface\.visual_ema"):
        import_main([*map(str, made), "--workdir", str(tmp_path / "a")])
    code, report = run(import_main, *made, "--workdir", tmp_path / "b", "--drop", "teacher")
    assert (code, report["bitwise"], report["dropped"]) == (0, True, ["teacher"])


def test_other_size_is_refused(tmp_path: Path, config_file: str, params: Tree) -> None:
    save_safetensors(export_params(params, REFERENCE), tmp_path / "x.safetensors")
    argv = ["--from", "reference", str(tmp_path / "x.safetensors"), "--config", config_file]
    argv += ["--workdir", str(tmp_path / "work"), "--config.model.state_dim=5"]
    with pytest.raises(ValueError, match=r"1 keys do not fit.*\n.*\(128, 8\).*\(128, 5\)"):
        import_main(argv)
    assert not (tmp_path / "work" / "checkpoints").exists()


def test_unknown_arguments(config_file: str) -> None:
    argv = ["--from", "hf", "x", "--config", config_file, "--workdir", "y", "--new-token"]
    with pytest.raises(ValueError, match="unknown arguments: --new-token"):
        import_main(argv)
