"""Checkpoints: complete or absent, the same numbers back, damage found, any mesh."""

import contextlib
import dataclasses
import hashlib
import json
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lara_jax import checkpoint, checkpoint_cli
from lara_jax import checkpoint_files as files
from lara_jax.checkpoint import CheckpointStore, RunInfo, SaveFailed, load_info, load_params
from lara_jax.config import CheckpointConfig, load_recipe
from lara_jax.sharding import make_mesh, replicated

KEEP_2 = CheckpointConfig(keep=2)
OPTIMIZER = optax.adamw(1e-3)


@flax.struct.dataclass
class State:
    """Fields of a train state; which they are does not matter."""

    step: Any
    params: Any
    opt_state: Any
    teacher: Any
    rng: Any
    ema: Any = None


@pytest.fixture(scope="module")
def info(repository: Path) -> RunInfo:
    recipe = load_recipe(repository / "configs" / "debug.py")
    return RunInfo(
        recipe=recipe,
        statistics={"action": [0.5]},
        tokenizer={"t.json": "ü{}"},
        samples=7,
        stream="f",
        metrics={"loss": 0.5},
    )


def make_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "vision": {"patch_embed": {"kernel": array(4, 6)}},
        "text": {"norm": {"scale": array(5)}, "embed_tokens": array(7, 5)},
        "action_expert": {"future_tokens": array(3, 2)},
    }
    grads = jax.tree.map(jnp.ones_like, params)
    _, opt_state = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
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
    with contextlib.closing(CheckpointStore(tmp_path, KEEP_2)) as store:
        for step in (3, 5, 7):
            store.save(step, make_state(seed=step), info)
    return tmp_path


def test_everything_comes_back_bit_for_bit(run: Path, info: RunInfo) -> None:
    state = make_state(seed=7)
    with contextlib.closing(CheckpointStore(run, KEEP_2)) as store:
        assert store.latest() == 7
        assert store.has_training(7)
        restored = store.restore(abstract(state), 7)
    assert str(jax.tree.structure(restored)) == str(jax.tree.structure(state))
    for a, b in zip(raw(restored), raw(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    saved = load_info(run)
    assert saved == info


def test_old_checkpoints_go_and_partial_ones_are_never_seen(
    run: Path, info: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run / "checkpoints"
    assert checkpoint.steps(root) == [5, 7]
    (root / "9.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (root / "11" / "params").mkdir(parents=True)  # a name, but no mark that it is complete
    assert checkpoint.steps(root) == [5, 7]
    assert checkpoint.find(run).name == "7"
    with contextlib.closing(CheckpointStore(run, KEEP_2)) as store:
        store.set_damaged_aside()
        assert store.latest() == 7
        told = capsys.readouterr().err.splitlines()
        assert "checkpoint 9 was cut off while it was written" in told[0]
        assert f"{root / '11'} is damaged: _CHECKPOINT_METADATA is missing" in told[1]
        assert told[1].endswith("going on from checkpoint 7 instead")
        assert told[2].endswith("the damaged one is now " + str(root / "11.damaged"))
        for step in (9, 11):
            store.save(step, make_state(seed=step), info)
    assert checkpoint.steps(root) == [9, 11]


def test_parameters_alone(tmp_path: Path, info: RunInfo) -> None:
    """What an import writes: parameters at step 0, nothing to resume."""
    params = make_state().params
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
    state = make_state()
    state.params["text"]["norm"]["scale"] = jnp.ones(6)
    state.params["text"]["lm_head"] = jnp.ones(2)
    del state.params["action_expert"]
    with (
        contextlib.closing(CheckpointStore(run, KEEP_2)) as store,
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
    expected = checkpoint.digest(make_state(seed=7).params)
    assert checkpoint_cli.main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == expected
    assert checkpoint_cli.main(["verify", str(run), "--step", "7", "--digest"]) == 0
    assert capsys.readouterr().out == expected + "\n"

    folder = run / "checkpoints" / "7"
    victim = flip_a_bit(folder / "training")
    assert checkpoint_cli.main(["verify", str(run)]) == 1
    assert f"{victim.relative_to(folder)} has changed" in capsys.readouterr().err
    victim.unlink()
    assert checkpoint_cli.main(["verify", str(run)]) == 1
    assert f"{victim.relative_to(folder)} is missing" in capsys.readouterr().err


def test_verify_finds_numbers_that_are_none(
    tmp_path: Path, info: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    params = make_state().params
    params["text"]["norm"]["scale"] = params["text"]["norm"]["scale"].at[2].set(jnp.nan)
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        store.save_params(params, info)
    assert checkpoint_cli.main(["verify", str(tmp_path)]) == 1
    assert "text/norm/scale has values that are not finite" in capsys.readouterr().err


def test_compare(run: Path, tmp_path_factory: pytest.TempPathFactory, info: RunInfo) -> None:
    steps = run / "checkpoints"
    assert checkpoint_cli.main(["compare", str(steps / "7"), str(run)]) == 0
    assert checkpoint_cli.main(["compare", str(steps / "5"), str(run), "--rtol", "1e-3"]) == 1

    other = tmp_path_factory.mktemp("other")
    params = make_state(seed=7).params
    kernel = params["vision"]["patch_embed"]["kernel"]
    params["vision"]["patch_embed"]["kernel"] = kernel + 1e-4 * jnp.abs(kernel).max()
    with contextlib.closing(CheckpointStore(other)) as store:
        store.save_params(params, info)
    assert checkpoint_cli.main(["compare", str(run), str(other), "--rtol", "2e-4"]) == 0
    assert checkpoint_cli.main(["compare", str(run), str(other), "--rtol", "5e-5"]) == 1


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
    assert checkpoint_cli.main(["ls", str(run), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["step"], row["kind"]) for row in rows] == [(5, "training"), (7, "training")]
    assert all(row["bytes"] > 0 and row["integrity"] == "not checked" for row in rows)

    flip_a_bit(run / "checkpoints" / "7" / "params")
    (run / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    assert checkpoint_cli.main(["ls", str(run), "--check"]) == 0
    head, five, seven, cut = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "size", "kind", "loss", "integrity"]
    assert re.fullmatch(r" +5 +0\.\d MiB  training +0\.5  ok", five)
    assert re.search(r"^ +7 .*  damaged: params/.* has changed$", seven)
    assert cut == "9.orbax-checkpoint-tmp: cut off, or still being written"

    assert checkpoint_cli.main(["rm", str(run), "--step", "5"]) == 0
    assert checkpoint.steps(run / "checkpoints") == [7]
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .*\[7\]"):
        checkpoint_cli.main(["rm", str(run), "--step", "5"])


def test_ls_lists_what_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own small files are looked at in any case, and none of them is needed for the list."""
    root = run / "checkpoints"
    cut(root / "7" / "recipe")
    remove(root / "5" / "logged")
    for arguments in ([], ["--check"]):
        assert checkpoint_cli.main(["ls", str(run), *arguments]) == 0
        head, five, seven = capsys.readouterr().out.splitlines()
        assert "loss" in head
        assert re.search(r"^ +5 .* -  damaged: logged/.* is missing$", five)
        assert re.search(r"^ +7 .* -  damaged: recipe/.* is cut off: .* bytes$", seven)
    (root / "7" / files.CHECKSUMS).write_text('{"params/x": {"cytes": 3}}')
    assert checkpoint_cli.main(["ls", str(run)]) == 0
    assert "damaged: checksums.json is damaged: 'bytes'" in capsys.readouterr().out


def test_rm_deletes_what_no_run_can_use(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run / "checkpoints"
    unusable = ("3", "9.damaged", "9.damaged-2", "9.orbax-checkpoint-tmp")
    for name in unusable:
        (root / name / "params").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"of step 9 in .*--damaged deletes 3, 9\.orbax"):
        checkpoint_cli.main(["rm", str(run), "--step", "9"])
    assert checkpoint_cli.main(["rm", str(run), "--damaged"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert sorted(told) == [f"deleted {root / name}" for name in unusable]
    assert sorted(path.name for path in root.iterdir()) == ["5", "7"]
    with pytest.raises(FileNotFoundError, match=r"nothing in .* was set aside"):
        checkpoint_cli.main(["rm", str(run), "--damaged"])
    for arguments in ([], ["--step", "7", "--damaged"]):
        with pytest.raises(SystemExit):
            checkpoint_cli.main(["rm", str(run), *arguments])
    assert checkpoint.steps(root) == [5, 7]


LOSSES = {0: {}, 100: {"loss": 3.0}, 200: {"loss": 1.0}, 300: {"loss": 1.0}, 400: {"loss": 2.0}}


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({"keep": 2}, {300, 400}),
        ({"keep": 9}, {0, 100, 200, 300, 400}),
        ({"keep": 1, "keep_every_steps": 200}, {0, 200, 400}),
        ({"keep": 1, "best_metric": "loss"}, {300, 400}),  # of equals the newer
        ({"keep": 1, "best_metric": "loss", "keep_best": 2}, {200, 300, 400}),
        ({"keep": 1, "best_metric": "loss", "best_mode": "max"}, {100, 400}),
        ({"keep": 1, "best_metric": "accuracy"}, {400}),
    ],
)
def test_what_is_kept(rules: dict[str, Any], kept: set[int]) -> None:
    config = CheckpointConfig(every_steps=100, **rules)
    assert checkpoint.kept_steps(LOSSES, config) == kept
    nan = {500: {"loss": float("nan")}, 600: {}}
    if rules["keep"] == 1:
        assert checkpoint.kept_steps({**LOSSES, **nan}, config) - {400, 600} == kept - {400}


def test_rules_of_retention_are_checked() -> None:
    with pytest.raises(ValueError, match="keep_every_steps must be 0 or a multiple of every_steps"):
        CheckpointConfig(every_steps=100, keep_every_steps=150)
    with pytest.raises(ValueError, match="best_mode must be one of min, max; got 'least'"):
        CheckpointConfig(best_mode="least")


def test_the_best_stay_across_restarts(
    tmp_path: Path, info: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    """The metric is in the checkpoint: a new process knows which was the best."""
    config = CheckpointConfig(every_steps=1, keep=1, best_metric="loss", keep_every_steps=4)
    for step, loss in enumerate((3.0, 1.0, 2.0, 5.0, 4.0), start=1):
        with contextlib.closing(CheckpointStore(tmp_path, config)) as store:
            logged = dataclasses.replace(info, metrics={"loss": loss})
            store.save(step, make_state(seed=step), logged)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 4, 5]
    assert load_info(tmp_path, 2).metrics == {"loss": 1.0}
    assert capsys.readouterr().err == ""
    misspelt = dataclasses.replace(config, best_metric="lost")
    with contextlib.closing(CheckpointStore(tmp_path, misspelt)) as store:
        store.save(6, make_state(), info)
    assert "has no metric 'lost' and is not among the best; it has loss" in capsys.readouterr().err


def flip_a_bit(folder: Path) -> Path:
    """Damages the largest file below a folder without changing its size."""
    victim = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    return victim


def cut(folder: Path) -> Path:
    """Cuts the largest file below a folder in half."""
    victim = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return victim


def remove(folder: Path) -> Path:
    """Deletes the largest file below a folder."""
    victim = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    victim.unlink()
    return victim


@pytest.mark.parametrize(
    ("harm", "item", "what"),
    [
        (flip_a_bit, "params", "has changed"),
        (cut, "training", "is cut off"),
        (remove, "statistics", "is missing"),
    ],
)
def test_damage_is_named_and_the_one_before_used(
    run: Path, capsys: pytest.CaptureFixture[str], harm: Any, item: str, what: str
) -> None:
    newest = run / "checkpoints" / "7"
    name = str(harm(newest / item).relative_to(newest))
    with contextlib.closing(CheckpointStore(run, KEEP_2)) as store:
        with pytest.raises(ValueError, match=f"{newest} is damaged: {name} {what}"):
            store.restore(abstract(make_state()), 7)
        with pytest.raises(ValueError, match=f"{name} {what}.*checkpoint 5 is whole"):
            store.set_damaged_aside("error")
        assert store.latest() == 7
        store.set_damaged_aside("previous")
        assert store.latest() == 5
        told = capsys.readouterr().err
        assert f"{newest} is damaged: {name} {what}" in told
        assert "going on from checkpoint 5 instead" in told
        restored = store.restore(abstract(make_state()), 5)
        for a, b in zip(raw(restored), raw(make_state(seed=5)), strict=True):
            np.testing.assert_array_equal(a, b)
        # The run comes by here again, and nothing of the damaged one is in its way.
        store.save(7, make_state(seed=7), load_info(run))
    assert checkpoint.steps(run / "checkpoints") == [5, 7]
    assert (run / "checkpoints" / "7.damaged").is_dir()


def test_a_run_never_starts_anew_because_all_is_damaged(run: Path) -> None:
    for step in ("5", "7"):
        cut(run / "checkpoints" / step / "params")
    message = "7 is damaged.*5 is damaged.*no other is whole"
    with (
        contextlib.closing(CheckpointStore(run, KEEP_2)) as store,
        pytest.raises(ValueError, match=message),
    ):
        store.set_damaged_aside()
    assert checkpoint.steps(run / "checkpoints") == [5, 7]


def test_readers_refuse_what_is_damaged(run: Path) -> None:
    newest = run / "checkpoints" / "7"
    cut(newest / "params")
    assert load_info(run).samples == 7  # its own files are whole
    for read in (load_params, lambda path: checkpoint.restore_params(path, {})):
        with pytest.raises(ValueError, match=r"is cut off: .* bytes; other steps there: \[5\]"):
            read(run)
    flip_a_bit(newest / "recipe")
    with pytest.raises(ValueError, match=r"recipe/.* has changed"):
        load_info(run)


@pytest.mark.parametrize(("saved", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_another_precision(tmp_path: Path, info: RunInfo, saved: str, wanted: str) -> None:
    """Parameters become what the run computes with; numbers that are no fractions do not change."""
    state = make_state()
    state = state.replace(params=jax.tree.map(lambda x: x.astype(saved), state.params))
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        store.save(1, state, info)
        store.wait()
        as_wanted = state.replace(params=jax.tree.map(lambda x: x.astype(wanted), state.params))
        restored = store.restore(abstract(as_wanted), 1)
        for a, b in zip(raw(restored), raw(as_wanted), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        with pytest.raises(ValueError, match="step is int32, not float"):
            store.restore(abstract(state.replace(step=jnp.float32(1))), 1)


def test_fields_of_the_state_may_be_absent(
    tmp_path: Path, info: RunInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the run has no use for stays on disk; what it needs and is not there is said."""
    state = make_state()
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        store.save(1, state, info)
        store.wait()
        less = store.restore(abstract(state.replace(teacher=None, opt_state=None)), 1)
        assert less.teacher is None and less.opt_state is None
        jax.tree.map(np.testing.assert_array_equal, less.params, state.params)
        assert "the run has no use for opt_state, teacher" in capsys.readouterr().err
        more = abstract(state.replace(ema=state.params))
        with pytest.raises(ValueError, match="has no ema, only opt_state, rng, step, teacher"):
            store.restore(more, 1)


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """A function after which no file of this process can grow beyond 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
def test_a_full_disk_is_one_error_and_harms_nothing(run: Path, info: RunInfo, full_disk) -> None:
    store = CheckpointStore(run, KEEP_2)
    full_disk()
    with pytest.raises(
        SaveFailed, match=r"checkpoint 9 cannot be written to .*; checkpoint 7 is intact"
    ) as e:
        store.save(9, make_state(seed=9), info)
        store.wait()
    assert "\n" not in str(e.value)
    assert checkpoint.steps(run / "checkpoints") == [5, 7]
    assert not any(files.damage(run / "checkpoints" / step) for step in ("5", "7"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
def test_a_save_that_fails_in_the_background_is_noticed_soon(
    run: Path, info: RunInfo, full_disk
) -> None:
    store = CheckpointStore(run, KEEP_2)
    store.check()
    full_disk()
    with pytest.raises(SaveFailed, match="; checkpoint 7 is intact"):
        store.save(9, make_state(seed=9), info)
        for _ in range(1000):
            store.check()
            time.sleep(0.01)


def test_a_directory_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(SaveFailed, match=r"cannot be written to .*checkpoints: .*File exists"):
        CheckpointStore(tmp_path)
