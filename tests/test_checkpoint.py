"""Checkpoints: complete or absent, the same numbers back, damage found, any mesh."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax import checkpoint
from lara_jax.checkpoint import CheckpointStore, RunInfo, load_info, load_params
from lara_jax.config import load_recipe
from lara_jax.optimizer import make_optimizer
from lara_jax.sharding import make_mesh, replicated


@flax.struct.dataclass
class State:
    """The fields of a train state."""

    step: Any
    params: Any
    opt_state: Any
    teacher: Any
    rng: Any


@pytest.fixture(scope="module")
def info(repository: Path) -> RunInfo:
    recipe = load_recipe(repository / "configs" / "debug.py")
    return RunInfo(
        recipe=recipe,
        statistics={"action": [0.5]},
        tokenizer={"t.json": "ü{}"},
        samples=7,
        stream="f",
    )


def make_state(info: RunInfo, seed: int = 0) -> State:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "vision": {"patch_embed": {"kernel": array(4, 6)}},
        "text": {"norm": {"scale": array(5)}, "embed_tokens": array(7, 5)},
        "action_expert": {"future_tokens": array(3, 2)},
    }
    optimizer = make_optimizer(info.recipe)
    grads = jax.tree.map(jnp.ones_like, params)
    _, opt_state = optimizer.update(grads, optimizer.init(params), params)
    teacher = jax.tree.map(lambda x: x + 1, params["vision"])
    return State(jnp.int32(7), params, opt_state, teacher, jax.random.key(3))


def abstract(state: State) -> State:
    where = replicated(make_mesh(devices=jax.devices()[:1]))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(lambda: state),
    )


def raw(tree: Any) -> list[np.ndarray]:
    """Leaves as NumPy arrays, random keys as their numbers."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(tree)]


@pytest.fixture
def run(tmp_path: Path, info: RunInfo) -> Path:
    """A directory with checkpoints of steps 5 and 7."""
    with contextlib.closing(CheckpointStore(tmp_path, keep=2)) as store:
        for step in (3, 5, 7):
            store.save(step, make_state(info, seed=step), info)
    return tmp_path


def test_everything_comes_back_bit_for_bit(run: Path, info: RunInfo) -> None:
    state = make_state(info, seed=7)
    with contextlib.closing(CheckpointStore(run, keep=2)) as store:
        assert store.latest() == 7
        assert store.has_training(7)
        restored = store.restore(abstract(state), 7)
    assert str(jax.tree.structure(restored)) == str(jax.tree.structure(state))
    for a, b in zip(raw(restored), raw(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    saved = load_info(run)
    assert saved == info


def test_old_checkpoints_go_and_partial_ones_are_never_seen(run: Path, info: RunInfo) -> None:
    root = run / "checkpoints"
    assert checkpoint.steps(root) == [5, 7]
    (root / "9.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (root / "11" / "params").mkdir(parents=True)  # a name, but no mark that it is complete
    assert checkpoint.steps(root) == [5, 7]
    assert checkpoint.find(run).name == "7"
    with contextlib.closing(CheckpointStore(run, keep=2)) as store:
        assert store.latest() == 7
        store.save(9, make_state(info, seed=9), info)
    assert checkpoint.find(run).name == "9"


def test_parameters_alone(tmp_path: Path, info: RunInfo) -> None:
    """What an import writes: parameters at step 0, nothing to resume."""
    params = make_state(info).params
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        store.save_params(params, info)
        assert store.latest() == 0 or store.latest() is None  # may still be writing
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        assert store.latest() == 0
        assert not store.has_training(0)
    loaded = load_params(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert all(type(x) is np.ndarray and x.dtype == np.float32 for x in jax.tree.leaves(loaded))


def test_a_state_of_another_model_is_refused_with_the_list(run: Path, info: RunInfo) -> None:
    state = make_state(info)
    state.params["text"]["norm"]["scale"] = jnp.ones(6)
    state.params["text"]["lm_head"] = jnp.ones(2)
    del state.params["action_expert"]
    with (
        contextlib.closing(CheckpointStore(run, keep=2)) as store,
        pytest.raises(ValueError) as error,
    ):
        store.restore(abstract(state), 7)
    for part in (
        "no text/lm_head",
        "unwanted action_expert/future_tokens",
        "text/norm/scale is (5,), not (6,)",
    ):
        assert part in str(error.value)


def test_find_takes_any_of_three_directories(run: Path) -> None:
    newest = run / "checkpoints" / "7"
    for directory in (run, run / "checkpoints", newest):
        assert checkpoint.find(directory) == newest
    assert checkpoint.find(run, 5).name == "5"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 6.*\[5, 7\]"):
        checkpoint.find(run, 6)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.find(run / "nowhere")


def test_digest_is_of_the_sorted_float32_bytes() -> None:
    a, b = np.arange(3, dtype=np.float32), np.full((2, 2), -1.5, np.float32)
    expected = hashlib.sha256(b.tobytes() + a.tobytes()).hexdigest()
    assert checkpoint.digest({"z": {"a": a}, "b": {"x": b}}) == expected
    # Sorted by whole path: "a.b/x" stands before "a/y", as the strings do.
    assert list(checkpoint.flatten({"a": {"y": a}, "a.b": {"x": b}})) == ["a.b/x", "a/y"]


def test_verify_says_the_digest_and_finds_damage(
    run: Path, info: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = checkpoint.digest(make_state(info, seed=7).params)
    assert checkpoint.main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == expected
    assert checkpoint.main(["verify", str(run), "--step", "7", "--digest"]) == 0
    assert capsys.readouterr().out == expected + "\n"

    folder = run / "checkpoints" / "7"
    files = [file for file in (folder / "training").rglob("*") if file.is_file()]
    victim = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert checkpoint.main(["verify", str(run)]) == 1
    assert f"{victim.relative_to(folder)} has changed" in capsys.readouterr().err
    victim.unlink()
    assert checkpoint.main(["verify", str(run)]) == 1
    assert f"{victim.relative_to(folder)} is missing" in capsys.readouterr().err


def test_verify_finds_numbers_that_are_none(
    tmp_path: Path, info: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    params = make_state(info).params
    params["text"]["norm"]["scale"] = params["text"]["norm"]["scale"].at[2].set(jnp.nan)
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        store.save_params(params, info)
    assert checkpoint.main(["verify", str(tmp_path)]) == 1
    assert "text/norm/scale has values that are not finite" in capsys.readouterr().err


def test_compare(run: Path, tmp_path_factory: pytest.TempPathFactory, info: RunInfo) -> None:
    steps = run / "checkpoints"
    assert checkpoint.main(["compare", str(steps / "7"), str(run)]) == 0
    assert checkpoint.main(["compare", str(steps / "5"), str(run), "--rtol", "1e-3"]) == 1

    other = tmp_path_factory.mktemp("other")
    params = make_state(info, seed=7).params
    kernel = params["vision"]["patch_embed"]["kernel"]
    params["vision"]["patch_embed"]["kernel"] = kernel + 1e-4 * jnp.abs(kernel).max()
    with contextlib.closing(CheckpointStore(other)) as store:
        store.save_params(params, info)
    assert checkpoint.main(["compare", str(run), str(other), "--rtol", "2e-4"]) == 0
    assert checkpoint.main(["compare", str(run), str(other), "--rtol", "5e-5"]) == 1


def test_compare_refuses_two_models_and_not_a_number() -> None:
    a = {"x": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match=r"x: \(2,\) and \(3,\)"):
        checkpoint.difference(a, {"x": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="only one has y"):
        checkpoint.difference(a, {**a, "y": a["x"]})
    b = {"x": np.array([1, np.nan], np.float32), "y": np.zeros(2, np.float32)}
    error, path = checkpoint.difference({**a, "y": a["x"]}, b)
    assert error == np.inf and path == "x"


def test_ls_and_rm(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint.main(["ls", str(run), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["step"], row["resumable"]) for row in rows] == [(5, True), (7, True)]
    assert all(row["bytes"] > 0 for row in rows)
    assert checkpoint.main(["rm", str(run), "--step", "5"]) == 0
    assert checkpoint.steps(run / "checkpoints") == [7]
