"""Training end to end: bitwise resume after a kill, a clean stop, any mesh, every recipe."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax import assemble, checkpoint, sharding, train
from lara_jax.checkpoint import CheckpointStore, RunInfo, load_params
from lara_jax.config import load_recipe
from lara_jax.optimizer import make_optimizer
from lara_jax.optimizer_config import LoraConfig
from lara_jax.outline import outlines, state_outline
from lara_jax.train_step import TrainState, init_state, logical_axes, make_train_step
from tests import devices
from tests.data_pipelines.handmade import write_tabletop

STEPS = 8
RECIPES = sorted(path.stem for path in Path(__file__).parents[1].glob("configs/[!_]*.py"))
OVERRIDES = (
    f"train.steps={STEPS}",
    "train.stages=latent_1,action",  # four steps each
    "stages.latent_1.share=50",
    "stages.action.share=50",
    "checkpoint.every_steps=3",
    "log.every_steps=1",
    "data.batch_size=4",
    "model.dropout=0.2",
    "ema.decay=0.9",
    "optimizer.moments=bfloat16_first",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small annotated data set."""
    return write_tabletop(tmp_path_factory.mktemp("data") / "lara_tabletop")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Quick compilation, and each program compiled once for all processes of this file."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
    }


def start(
    repository: Path,
    environment: dict[str, str],
    workdir: Path,
    data: Path,
    overrides: tuple[str, ...] = OVERRIDES,
) -> subprocess.Popen[str]:
    """`lara train` in its own process."""
    command = [sys.executable, "-m", "lara_jax.cli", "train", "--config", "configs/debug.py"]
    command += ["--workdir", str(workdir), f"--config.data.path={data}"]
    command += [f"--config.{override}" for override in overrides]
    return subprocess.Popen(
        command, cwd=repository, env=environment, stderr=subprocess.PIPE, text=True
    )


def rows(workdir: Path) -> list[dict[str, str]]:
    """The metrics without what depends on the clock."""
    with (workdir / "metrics.csv").open() as stream:
        found = list(csv.DictReader(stream))
    clock = ("samples_per_second", "data_wait_fraction", "mfu", "device_memory_gb")
    return [{name: value for name, value in row.items() if name not in clock} for row in found]


@pytest.mark.slow
def test_a_killed_run_ends_like_an_undisturbed_one(
    repository: Path, environment: dict[str, str], data: Path, tmp_path: Path
) -> None:
    """N steps == 3 steps, kill -9, resume, SIGTERM, resume: to the last bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(repository, environment, whole, data)
    _, log = process.communicate()
    assert process.returncode == 0, log
    assert "starting from random parameters" in log
    assert [int(row["step"]) for row in rows(whole)] == list(range(1, STEPS + 1))

    # Killed while it builds the second stage, four steps in, with a checkpoint of step 3.
    process = start(repository, environment, broken, data)
    while process.poll() is None and 3 not in checkpoint.steps(broken / "checkpoints"):
        time.sleep(0.01)
    process.kill()
    _, log = process.communicate()
    assert process.returncode == -signal.SIGKILL, log
    assert max(checkpoint.steps(broken / "checkpoints")) < STEPS

    # Asked to stop as soon as it has resumed: it does one step, saves, and ends well.
    process = start(repository, environment, broken, data)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    resumed = next(line for line in lines if "resuming at step" in line)
    assert "resuming at step 3 " in resumed
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate()
    assert process.returncode == 1
    assert f"stopped at step 4 of {STEPS}" in log
    assert max(checkpoint.steps(broken / "checkpoints")) == 4

    process = start(repository, environment, broken, data)
    _, log = process.communicate()
    assert process.returncode == 0, log
    assert "resuming at step 4 " in log

    assert checkpoint.digest(load_params(broken)) == checkpoint.digest(load_params(whole))
    assert rows(broken) == rows(whole)
    info = checkpoint.load_info(broken)
    assert info.samples == STEPS * info.recipe.data.batch_size
    assert info.statistics == checkpoint.load_info(whole).statistics


@pytest.mark.slow
def test_training_on_real_robot_data_lowers_every_loss(
    repository: Path, environment: dict[str, str], shared_dir: Path, tmp_path: Path
) -> None:
    """BridgeData has no annotations: tokens are then what closes the thoughts and the turn."""
    overrides = (
        "train.steps=60",
        "train.stages=latent_3,action",
        "stages.latent_3.share=1",
        "stages.action.share=2",
        "data.batch_size=8",
        "log.every_steps=1",
    )
    bridge = shared_dir / "data" / "bridge_dataset" / "1.0.0"
    process = start(repository, environment, tmp_path, bridge, overrides)
    _, log = process.communicate()
    assert process.returncode == 0, log
    assert "bridge_dataset: 200 steps, 25 episodes of train, weight 1; 50 stored steps" in log
    for name in ("loss_token", "loss_visual", "loss_action"):
        values = [float(row[name]) for row in rows(tmp_path) if row[name]]
        assert len(values) in (20, 40)
        assert np.mean(values[-5:]) < 0.9 * np.mean(values[:5]), (name, values)


# Meshes against one device, through `train` itself. The optimizer's epsilon is larger than
# usual: Adam divides gradients that are zero in exact arithmetic, such as those of the attention
# keys' biases, by their own rounding noise, and would show that noise at full size.
MESHES = """
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lara_jax import sharding, train
from lara_jax.config import load_recipe

data, workdir = sys.argv[1], Path(sys.argv[2])
make_mesh = sharding.make_mesh


def run(name, devices, *mesh):
    sharding.make_mesh = lambda *sizes: make_mesh(*sizes, devices=devices)
    sizes = [f"mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh)]
    recipe = load_recipe("configs/debug.py", sizes + [
        f"data.path={data}", "train.steps=3", "train.stages=latent_2", "data.batch_size=8",
        "stages.latent_2.action_weight=1.0", "stages.latent_2.trains=full", "teacher.momentum=0.5",
        "model.dropout=0.2", "optimizer.epsilon=1e-3", "log.every_steps=1",
    ])
    return train.train(recipe, workdir / name)


def numbers(state):
    tree = {"params": state.params, "teacher": state.teacher}
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in flat}


def losses(name):
    lines = [line.split(",") for line in (workdir / name / "metrics.csv").read_text().splitlines()]
    return np.array([[float(x) for x in line[2:7]] for line in lines[1:]])


one = numbers(run("one", jax.devices()[:1], 1, 1, 1))
for mesh in ((1, 8, 1), (2, 2, 2)):  # (1, 2, 4) in test_lora.py
    name = "x".join(map(str, mesh))
    state = run(name, jax.devices(), *mesh)
    if mesh[1] == 8:
        kernel = state.params["text"]["layers"]["mlp"]["up_proj"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 8, kernel.sharding
    for path, value in numbers(state).items():
        scale = max(np.abs(one[path]).max(), 1e-2)  # some start at zero and are hardly moved
        np.testing.assert_allclose(value, one[path], rtol=0, atol=1e-5 * scale, err_msg=name + path)
    np.testing.assert_allclose(losses(name), losses("one"), rtol=1e-5, err_msg=name)
print("done")
"""


@pytest.mark.slow
def test_the_mesh_changes_nothing(repository: Path, data: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MESHES, str(data), str(tmp_path)],
        cwd=repository,
        env=devices.environment(8),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "done"


# Billions of parameters: Qwen3-VL with its vocabulary grown by 2,052 rows, and the expert.
SIZES = {
    "bridge_4b": 4.60,
    "debug": 0.00095,
    "libero_4b": 4.60,
    "oxe_2b": 2.29,
    "oxe_4b": 4.60,
    "oxe_8b": 9.4,
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_shapes_names_and_shards(repository: Path, name: str) -> None:
    recipe = load_recipe(repository / "configs" / f"{name}.py")
    outline = outlines(recipe)[-1]
    model, state = outline.model, state_outline(recipe, outline)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count / 1e9 == pytest.approx(SIZES[name], rel=0.02)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}

    axes = logical_axes(model)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shardings = train.state_shardings(mesh, state, axes)
    assert str(jax.tree.structure(shardings)) == str(jax.tree.structure(state))
    treedef: Any
    leaves, treedef = jax.tree.flatten(state.params)
    for leaf, names in zip(leaves, treedef.flatten_up_to(axes), strict=True):
        spec = sharding.partition_spec(
            {"data": 1, "fsdp": 4, "tensor": 1}, tuple(names), leaf.shape
        )
        assert leaf.size < 1e6 or "fsdp" in jax.tree.leaves(tuple(spec)), (names, leaf.shape)


@pytest.mark.parametrize("name", ["bridge_4b", "oxe_8b"])
def test_a_step_of_the_large_recipes_has_shapes(repository: Path, name: str) -> None:
    recipe = load_recipe(repository / "configs" / f"{name}.py")
    outline = outlines(recipe)[-1]
    model, state = outline.model, state_outline(recipe, outline)
    stage = recipe.stages[-1]
    batch = assemble.batch_spec(recipe, stage, views=1, image_size=(256, 256))
    step = make_train_step(model, make_optimizer(recipe), stage, recipe)
    after, metrics = jax.eval_shape(step, state, batch)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
    assert all(jax.tree.leaves(same))
    assert metrics["loss"].shape == ()


@pytest.fixture(scope="module")
def prepared(repository: Path, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """A small run just before its first step: recipe, data, init, shapes, shardings."""
    recipe = load_recipe(repository / "configs" / "debug.py", [*OVERRIDES, f"data.path={data}"])
    workdir = tmp_path_factory.mktemp("run")
    store = CheckpointStore(workdir)
    info, source = train.open_data(recipe, workdir, store)
    store.close()
    lessons = train.make_lessons(recipe, info, source)
    init = partial(init_state, lessons[0].model, make_optimizer(recipe), recipe)
    shapes = jax.eval_shape(init, jax.random.key(recipe.seed))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shardings = train.state_shardings(mesh, shapes, logical_axes(lessons[0].model))
    return recipe, info, lessons, init, shapes, shardings


def test_lessons_follow_the_curriculum(prepared) -> None:
    _, _, lessons, *_ = prepared
    assert [(x.stage.name, x.start, x.end) for x in lessons] == [
        ("latent_1", 0, 4),
        ("action", 4, 8),
    ]
    assert [lesson.model.config.latent_slots for lesson in lessons] == [1, 3]
    for lesson in lessons:
        batch = next(lesson.batches(lesson.start))
        want = jax.tree.map(lambda x: (x.shape, x.dtype), lesson.spec)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == want
        assert list(lesson.batches(lesson.end)) == []


def test_batches_are_a_function_of_the_step(prepared) -> None:
    """The second stage goes on where the first one stopped, with the same order of samples."""
    _, _, (first, second), *_ = prepared
    ids = [batch.sample_id.tolist() for batch in first.batches(0)]
    assert len(ids) == 4
    assert [batch.sample_id.tolist() for batch in first.batches(2)] == ids[2:]
    straight = [batch.sample_id for batch in islice(first.loader.iterate(0), 8)]
    for expected, batch in zip(straight[4:], second.batches(4), strict=True):
        np.testing.assert_array_equal(batch.sample_id, expected)


def test_where_a_run_starts(prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Own checkpoint, else the parameters at `init.path`, else random ones."""
    recipe, info, _, _, shapes, shardings = prepared

    def init(key: jax.Array) -> Any:
        """Quicker to compile than the model's."""
        state = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes.replace(rng=None))
        return state.replace(rng=key)

    def first(workdir: Path, path: str = "") -> Any:
        wanted = dataclasses.replace(recipe, init=dataclasses.replace(recipe.init, path=path))
        store = CheckpointStore(workdir)
        state = train.first_state(wanted, store, init, shapes, shardings)
        store.close()
        return state

    random = first(tmp_path / "random")
    assert "starting from random parameters" in capsys.readouterr().err
    doubled = jax.tree.map(lambda x: 2 * x, random.params)
    other = CheckpointStore(tmp_path / "imported")
    other.save_params(doubled, RunInfo(recipe=recipe, statistics={}, tokenizer={}))
    other.close()

    for workdir, path in (("fresh", str(tmp_path / "imported")), ("imported", "")):
        warm = first(tmp_path / workdir, path)
        assert "starting from the parameters of" in capsys.readouterr().err
        assert int(warm.step) == 0
        jax.tree.map(np.testing.assert_array_equal, warm.params, doubled)
        jax.tree.map(np.testing.assert_array_equal, warm.teacher, doubled["vision"])

    adapted = dataclasses.replace(recipe, lora=LoraConfig(rank=2, alpha=6.0))
    kernel = doubled["text"]["layers"]["mlp"]["up_proj"]["kernel"]
    layers, width, features = kernel.shape
    low = {
        "a": np.full((layers, width, 2), 0.5, np.float32),
        "b": np.ones((layers, 2, features), np.float32),
    }
    factors = {"text": {"layers": {"mlp": {"up_proj": {"kernel": low}}}}}
    other = CheckpointStore(tmp_path / "adapted")
    other.save_params(
        doubled | {"lora": factors}, RunInfo(recipe=adapted, statistics={}, tokenizer={})
    )
    other.close()
    warm = first(tmp_path / "merged", str(tmp_path / "adapted"))
    assert "its low-rank factors are merged" in capsys.readouterr().err
    found = warm.params["text"]["layers"]["mlp"].pop("up_proj")["kernel"]
    np.testing.assert_array_equal(found, kernel + 3 * (2 * 0.5))
    doubled["text"]["layers"]["mlp"].pop("up_proj")
    jax.tree.map(np.testing.assert_array_equal, warm.params, doubled)

    own = CheckpointStore(tmp_path / "own")
    own.save(5, random.replace(step=jnp.int32(5)), info)
    own.close()
    resumed = first(tmp_path / "own", str(tmp_path / "imported"))
    assert "resuming at step 5" in capsys.readouterr().err
    assert int(resumed.step) == 5
    jax.tree.map(np.testing.assert_array_equal, resumed.params, random.params)


def test_a_run_without_data_is_refused(repository: Path, tmp_path: Path) -> None:
    recipe = load_recipe(repository / "configs" / "debug.py")
    with pytest.raises(ValueError, match=r"config\.data\.path is empty"):
        train.train(recipe, tmp_path)


def test_a_run_does_not_go_on_with_other_data_or_tokenizer(prepared, tmp_path: Path) -> None:
    """Their statistics and ids are part of the model."""
    recipe, info, *_ = prepared
    store = CheckpointStore(tmp_path)
    store.save(1, TrainState(*(jnp.zeros(()),) * 4, jax.random.key(0)), info)
    store.close()
    tokenizer = dataclasses.replace(recipe.tokenizer, path="another")
    other = dataclasses.replace(info, statistics={"another": info.statistics["lara_tabletop"]})
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match=r"config\.tokenizer\.path: .* with '', not 'another'"):
        train.open_data(dataclasses.replace(recipe, tokenizer=tokenizer), tmp_path, store)
    store.save(2, TrainState(*(jnp.zeros(()),) * 4, jax.random.key(0)), other)
    store.close()
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match=r"config\.data\.path: .* 'another', not 'lara_tabletop'"):
        train.open_data(recipe, tmp_path, store)
    store.close()


def test_a_run_goes_on_at_the_next_sample_of_the_same_stream(prepared, tmp_path: Path) -> None:
    """Also with another batch size; another order of the data has to be asked for."""
    recipe, info, *_ = prepared
    store = CheckpointStore(tmp_path)
    state = TrainState(*(jnp.zeros(()),) * 4, jax.random.key(0))
    store.save(2, state, dataclasses.replace(info, samples=2 * recipe.data.batch_size))
    store.close()

    def resumed(**changes: Any) -> Any:
        data = dataclasses.replace(recipe.data, **changes)
        changed = dataclasses.replace(recipe, data=data)
        store = CheckpointStore(tmp_path)
        try:
            return train.open_data(changed, tmp_path, store)
        finally:
            store.close()

    found, source = resumed(batch_size=1, num_threads=0)
    assert train.stream_step(recipe, found) == 2
    smaller = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, batch_size=1))
    assert train.stream_step(smaller, found) == 2 * recipe.data.batch_size
    with pytest.raises(ValueError, match="the data is not what this run has trained on so far"):
        resumed(filters=("pause",))
    found, source = resumed(filters=("pause",), allow_changed_stream=True)
    assert found.stream == source.fingerprint != info.stream


def test_published_sizes_need_their_tokenizer(repository: Path) -> None:
    recipe = load_recipe(repository / "configs" / "bridge_4b.py")
    with pytest.raises(ValueError, match=r"config\.tokenizer\.path is empty, but the 4b backbone"):
        assemble.load_recipe_tokenizer(recipe)
