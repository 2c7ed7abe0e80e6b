"""A dataset that we wrote, through the `rlds` package: it sees what our own reader sees.

`rlds` 0.1.8 imports TensorFlow and dm-reverb, so this runs in an environment of its own, in which
the package itself has its oldest company (NumPy 1.26, protobuf 4)::

    PYTHON=python3.11 bash launch/make_env.sh --alone .venv-rlds requirements/rlds.txt
    .venv-rlds/bin/python -m pytest tests/rlds_package
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

rlds = pytest.importorskip(
    "rlds", reason="rlds is not installed (requirements/rlds.txt, an environment of its own)"
)
import tensorflow as tf  # noqa: E402
import tensorflow_datasets as tfds  # noqa: E402

from data_pipelines.rlds import writer  # noqa: E402
from data_pipelines.rlds.directory import Directory, Feature  # noqa: E402
from tests.data_pipelines.protobuf_reader import read_split  # noqa: E402

pytestmark = pytest.mark.slow

transformations = rlds.transformations
LENGTHS = (4, 1, 7)  # steps of the episodes


def step_feature(key: str, kind: str, *shape: int, dtype: str = "string") -> Feature:
    return Feature(key=f"steps/{key}", kind=kind, shape=shape, dtype=dtype, per_step=True)


FEATURES = (
    step_feature("observation/image", "image", 16, 24, 3, dtype="uint8"),
    step_feature("observation/state", "tensor", 8, dtype="float32"),
    step_feature("action", "tensor", 7, dtype="float32"),
    step_feature("boxes", "tensor", 2, 4, dtype="float32"),
    step_feature("count", "tensor", dtype="int32"),
    step_feature("language_instruction", "text"),
    *(step_feature(key, "tensor", dtype="bool") for key in ("is_first", "is_last", "is_terminal")),
    *(step_feature(key, "tensor", dtype="float32") for key in ("reward", "discount")),
    Feature(key="episode_metadata/file_path", kind="text"),
)


def made_episode(number: int, steps: int) -> dict[str, Any]:
    random = np.random.default_rng(number)
    boxes = random.random((steps, 2, 4)).astype(np.float32)
    boxes[:, 1] = np.nan  # not visible
    t = np.arange(steps)
    return {
        "steps/observation/image": random.integers(0, 256, (steps, 16, 24, 3), np.uint8),
        "steps/observation/state": random.normal(size=(steps, 8)).astype(np.float32),
        "steps/action": random.normal(size=(steps, 7)).astype(np.float32),
        "steps/boxes": boxes,
        "steps/count": 10 * number + t,
        "steps/language_instruction": [f"größe {number}.{step}" for step in t],
        "steps/is_first": t == 0,
        "steps/is_last": t == steps - 1,
        "steps/is_terminal": t == steps - 1,
        "steps/reward": random.random(steps).astype(np.float32),
        "steps/discount": np.ones(steps, np.float32),
        "episode_metadata/file_path": f"made/{number}",
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The version directory: three episodes in two shards."""
    episodes = (made_episode(number, steps) for number, steps in enumerate(LENGTHS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "EPISODES_PER_SHARD", 2)
        yield writer.write_dataset(
            tmp_path_factory.mktemp("rlds"),
            name="tiny_set",
            version="1.0.0",
            description="Made up.",
            features=FEATURES,
            splits={"train": (writer.encode_episode(FEATURES, episode) for episode in episodes)},
        )


@pytest.fixture(scope="module")
def ours(path: Path) -> list[dict[str, np.ndarray]]:
    """Each episode as our reader gives it: arrays over the steps, by key below "steps/"."""
    directory = Directory.read(path)
    episodes = []
    for example in read_split(directory, "train"):
        values = {}
        for feature in FEATURES:
            key = feature.key.removeprefix("steps/")
            if feature.kind == "tensor":
                values[key] = example.array(feature.key)
            elif feature.kind == "text":
                values[key] = np.array(example.encoded(feature.key), object)
            else:  # TensorFlow's decoder uses libjpeg's fast transform
                jpegs = example.encoded(feature.key)
                values[key] = np.stack([simplejpeg.decode_jpeg(x, fastdct=True) for x in jpegs])
        episodes.append(values)
    return episodes


@pytest.fixture
def episodes(path: Path) -> tf.data.Dataset:
    """The episodes as TFDS and TensorFlow read them."""
    return tfds.builder_from_directory(path).as_dataset(split="train", shuffle_files=False)


def flat(step: dict[str, Any]) -> dict[str, np.ndarray]:
    """A step's (or a batch's) tensors by flat key."""
    observation = {f"observation/{key}": value for key, value in step["observation"].items()}
    rest = {key: value for key, value in step.items() if key != "observation"}
    return {key: value.numpy() for key, value in (observation | rest).items()}


def assert_steps_equal(steps: tf.data.Dataset, expected: list[dict[str, np.ndarray]]) -> None:
    """Every step (or batch of steps) has exactly the expected keys and values."""
    found = [flat(step) for step in steps]
    assert len(found) == len(expected)
    for step, wanted in zip(found, expected, strict=True):
        assert step.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(step[key], value, err_msg=key)


def rows(episode: dict[str, np.ndarray], numbers: Any) -> dict[str, Any]:
    """The step features of some steps of one of our episodes."""
    return {key: value[numbers] for key, value in episode.items() if not key.startswith("episode_")}


def test_every_step_is_what_our_reader_gives(
    episodes: tf.data.Dataset, ours: list[dict[str, np.ndarray]]
) -> None:
    assert [len(episode["action"]) for episode in ours] == list(LENGTHS)
    for theirs, episode in zip(episodes, ours, strict=True):
        file_path = theirs["episode_metadata"]["file_path"].numpy()
        assert [file_path] == list(episode["episode_metadata/file_path"])
        steps = range(len(episode["action"]))
        assert_steps_equal(theirs[rlds.STEPS], [rows(episode, step) for step in steps])


def windows(length: int, size: int, shift: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, shift)]


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        pytest.param(
            lambda steps: transformations.batch(steps, size=3, shift=1),
            lambda episode: [rows(episode, w) for w in windows(len(episode["action"]), 3, 1)],
            id="sliding windows",
        ),
        pytest.param(
            lambda steps: transformations.batch(steps, size=2, shift=2),
            lambda episode: [rows(episode, w) for w in windows(len(episode["action"]), 2, 2)],
            id="batches",
        ),
        pytest.param(
            lambda steps: transformations.truncate_after_condition(
                steps, lambda step: step["count"] % 10 >= 2
            ),
            lambda episode: [rows(episode, t) for t in range(min(3, len(episode["action"])))],
            id="truncated after the third step",
        ),
        pytest.param(
            lambda steps: transformations.shift_keys(steps, ["observation"], 1),
            lambda episode: [
                {**rows(episode, t), **observation_at(episode, t + 1)}
                for t in range(len(episode["action"]) - 1)
            ],
            id="next observation beside each action",
        ),
        pytest.param(
            lambda steps: transformations.map_steps(
                steps,
                lambda step: transformations.add_alignment_to_step(
                    step, transformations.AlignmentType.SAR
                ),
            ),
            lambda episode: [
                {**rows(episode, t), "alignment": transformations.AlignmentType.SAR.value}
                for t in range(len(episode["action"]))
            ],
            id="alignment noted in each step",
        ),
        pytest.param(
            lambda steps: transformations.concatenate(steps, steps),
            lambda episode: 2 * [rows(episode, t) for t in range(len(episode["action"]))],
            id="concatenated with itself",
        ),
    ],
)
def test_transformations_of_the_steps(
    episodes: tf.data.Dataset,
    ours: list[dict[str, np.ndarray]],
    transform: Callable[[tf.data.Dataset], tf.data.Dataset],
    expected: Callable[[dict[str, np.ndarray]], list[dict[str, Any]]],
) -> None:
    transformed = transformations.apply_nested_steps(episodes, transform)
    for theirs, episode in zip(transformed, ours, strict=True):
        assert_steps_equal(theirs[rlds.STEPS], expected(episode))


def observation_at(episode: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    return {key: episode[key][step] for key in episode if key.startswith("observation/")}


def test_map_nested_steps(episodes: tf.data.Dataset, ours: list[dict[str, np.ndarray]]) -> None:
    mapped = transformations.map_nested_steps(
        episodes, lambda step: {"doubled": 2 * step["action"], "last": step["is_last"]}
    )
    for theirs, episode in zip(mapped, ours, strict=True):
        steps = list(theirs[rlds.STEPS])
        assert len(steps) == len(episode["action"])
        for step, action, last in zip(steps, episode["action"], episode["is_last"], strict=True):
            np.testing.assert_array_equal(step["doubled"], 2 * action)
            assert bool(step["last"]) == bool(last)


def test_length_and_final_step(
    episodes: tf.data.Dataset, ours: list[dict[str, np.ndarray]]
) -> None:
    for theirs, episode in zip(episodes, ours, strict=True):
        assert int(transformations.episode_length(theirs[rlds.STEPS])) == len(episode["action"])
        last = flat(transformations.final_step(theirs[rlds.STEPS]))
        for key, value in rows(episode, -1).items():
            np.testing.assert_array_equal(last[key], value, err_msg=key)


def test_mean_and_std(episodes: tf.data.Dataset, ours: list[dict[str, np.ndarray]]) -> None:
    """Theirs divide the variance by N - 1."""
    mean, std = transformations.mean_and_std(
        episodes, lambda step: ({"action": step["action"]}, {"action": True})
    )
    actions = np.concatenate([episode["action"] for episode in ours])
    np.testing.assert_allclose(mean["action"], actions.mean(0), atol=1e-5)
    np.testing.assert_allclose(std["action"], actions.std(0, ddof=1), atol=1e-5)
