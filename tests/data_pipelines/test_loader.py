"""The loader: the batch contract, one stream for any hosts, kills, evaluation, bad input."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest

from data_pipelines.index.format import Index
from data_pipelines.loader import Loader, Position
from data_pipelines.mixture import MixtureSource
from data_pipelines.sampling import StepSource
from lara_jax import batch as contract
from lara_jax.batch import Batch
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines.small_index import PREFIX, SUFFIX, make_index, normalizers, prompt

# How often each step of five sets comes up in an epoch of the mixture, which has 24 positions.
FIVE = {"a": ((4, 2), 1), "b": ((3,), 2), "c": ((5, 4), 1 / 3), "d": ((6,), 2 / 3), "e": ((5,), 1)}
DRAWS = (6, 6, 3, 4, 5)


def make_five(folder: Path) -> None:
    """Indexes of five sets: one of larger frames, one of narrower actions, one without a wrist."""
    for name, (episodes, _) in FIVE.items():
        make_index(
            folder / name,
            name,
            episodes,
            sizes={"image": (32, 48) if name == "b" else (16, 24)}
            | ({} if name == "c" else {"hand": (16, 24)}),
            roles={"primary": "image"} | ({} if name == "c" else {"wrist": "hand"}),
            annotated=name == "d",
            **({"action_dim": 5, "state_dim": 4} if name == "e" else {}),
        )


def five(folder: Path, **changes: Any) -> Loader:
    """A loader of them."""
    indexes = [Index.open(folder / name / "index") for name in FIVE]
    sources = tuple(
        StepSource(
            index=index,
            views=("primary", "wrist"),
            action_horizon=3,
            image_size=(16, 24),
            action_dim=7,
        )
        for index in indexes
    )
    weights = tuple(weight for _, weight in FIVE.values())
    settings: dict[str, Any] = {
        "source": MixtureSource(sources=sources, weights=weights, seed=5),
        "prompt": prompt,
        "normalizers": normalizers(*indexes),
        "state_dim": 10,
        "batch_size": 8,
        "num_threads": 0,
    }
    return Loader(**settings | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("five")
    make_five(folder)
    return folder


@pytest.fixture
def loader(folder: Path) -> Loader:
    return five(folder)


def take(loader: Loader, count: int, start_step: int = 0) -> list[Batch]:
    iterator = loader.iterate(start_step)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def together(loaders: list[Loader], count: int, start_step: int = 0) -> list[Batch]:
    """Global batches of the loaders of all hosts."""
    parts = [take(loader, count, start_step) for loader in loaders]
    return [
        jax.tree.map(lambda *rows: np.concatenate(rows), *hosts)
        for hosts in zip(*parts, strict=True)
    ]


def hosts(loader: Loader, count: int) -> list[Loader]:
    return [dataclasses.replace(loader, host=(number, count)) for number in range(count)]


def equal(ours: list[Batch], theirs: list[Batch]) -> bool:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def ids(batch: Batch) -> list[list[int]]:
    return np.stack([batch.dataset, batch.sample_id], axis=1).tolist()


def test_batches_keep_the_contract(loader: Loader) -> None:
    (batch,) = take(loader, 1)
    expected = contract.spec(
        batch_size=8,
        views=2,
        image_size=(16, 24),
        state_dim=10,
        action_horizon=3,
        action_dim=7,
        prefix_tokens=PREFIX,
        suffix_tokens=SUFFIX,
    )
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))
    found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    assert found == expected


def test_a_row_is_its_sample_normalised_padded_and_tokenised(loader: Loader) -> None:
    seen = set()
    for batch in take(loader, 9):
        for b, (dataset, row) in enumerate(ids(batch)):
            source = loader.source.sources[dataset]
            sample = source[row]  # without filters, samples are rows
            action_normalizer, state_normalizer = loader.normalizers[source.name]
            for name in ("images", "next_images", "view_mask", "next_mask", "action_mask"):
                np.testing.assert_array_equal(getattr(batch, name)[b], sample[name])
            state = state_normalizer.normalize(sample["state"])
            np.testing.assert_array_equal(batch.state[b, : len(state)], state)
            np.testing.assert_array_equal(batch.state[b, len(state) :], 0)
            own = len(source.absolute)
            inside = sample["action_mask"][:, 0]
            actions = action_normalizer.normalize(sample["actions"][:, :own])
            np.testing.assert_array_equal(batch.actions[b, inside, :own], actions[inside])
            # Past the end: no motion as the model sees it, the last gripper position.
            np.testing.assert_array_equal(batch.actions[b, ~inside, : own - 1], 0)
            np.testing.assert_array_equal(
                batch.actions[b, ~inside, own - 1], actions[~inside, own - 1]
            )
            np.testing.assert_array_equal(batch.actions[b, :, own:], 0)
            tokens = prompt(sample["instruction"], sample["annotation"])
            np.testing.assert_array_equal(batch.prefix_ids[b], tokens["prefix_ids"])
            np.testing.assert_array_equal(batch.suffix_ids[b], tokens["suffix_ids"])
            seen.add((dataset, bool(inside.all())))
    assert seen == set(itertools.product(range(5), (False, True)))


@pytest.mark.parametrize("looked_up_together", [1, 20, 1024])
def test_a_batch_is_its_samples_one_by_one(
    loader: Loader, looked_up_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipelines.loader._TOGETHER", looked_up_together)
    names = ("images", "next_images", "view_mask", "next_mask", "action_mask")
    for number, batch in enumerate(take(loader, 5)):
        for b in range(loader.batch_size):
            sample = loader.source[number * loader.batch_size + b]
            assert ids(batch)[b] == [sample["dataset"], sample["sample_id"]]
            for name in names:
                np.testing.assert_array_equal(getattr(batch, name)[b], sample[name])
            assert batch.annotated[b] == (sample["annotation"] is not None)


def test_batches_in_use_share_no_memory(loader: Loader) -> None:
    kept = take(loader, 12)
    images = [batch.images.copy() for batch in kept]
    again = take(loader, 12)  # uses again what is free by now: nothing that is in `kept`
    for batch, other, pixels in zip(kept, again, images, strict=True):
        np.testing.assert_array_equal(batch.images, pixels)
        np.testing.assert_array_equal(other.images, pixels)


def test_without_next_frames_all_else_is_the_same(loader: Loader) -> None:
    sources = tuple(dataclasses.replace(s, next_frames=False) for s in loader.source.sources)
    without = dataclasses.replace(loader.source, sources=sources)
    for batch, full in zip(
        take(dataclasses.replace(loader, source=without), 2), take(loader, 2), strict=True
    ):
        expected = full.replace(next_images=full.images, next_mask=np.zeros_like(full.next_mask))
        assert equal([batch], [expected])


@pytest.mark.parametrize(
    ("count", "threads", "workers"),
    [
        *((count, threads, 0) for count in (1, 2, 4, 8) for threads in (0, 4)),
        pytest.param(1, 0, 2, marks=pytest.mark.slow),
        pytest.param(2, 4, 1, marks=pytest.mark.slow),
    ],
)
def test_hosts_threads_and_workers_change_nothing(
    loader: Loader, count: int, threads: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = take(loader, 6)[2:]
    monkeypatch.setattr("data_pipelines.loader._TOGETHER", 20)  # some batches, not all of them
    other = dataclasses.replace(loader, num_threads=threads, num_workers=workers)
    assert equal(together(hosts(other, count), 4, 2), expected)


def test_a_batch_depends_on_the_mixture_and_the_step_alone(folder: Path, loader: Loader) -> None:
    batches = take(loader, 6)
    for start in (0, 1, 5):
        assert equal(take(loader, 6 - start, start), batches[start:])
    other = dataclasses.replace(loader, source=dataclasses.replace(loader.source, seed=6))
    assert not equal(take(other, 6), batches)


def test_grain_agrees_that_checkpoints_restore(loader: Loader) -> None:
    for changes in ({}, {"num_threads": 2, "host": (1, 2)}):
        dataset = dataclasses.replace(loader, **changes).dataset(batches=4)
        grain.experimental.assert_equal_output_after_checkpoint(dataset)


def test_the_stream_may_be_cut_into_other_batches(loader: Loader) -> None:
    position = loader.position(3)
    other = dataclasses.replace(loader, batch_size=12)
    assert position == other.position(2)
    start = position.steps(other.batch_size)
    found = [step for batch in take(loader, 6) for step in ids(batch)]
    again = [step for batch in take(other, 2, start) for step in ids(batch)]
    assert again == found[24:48]


def train(folder: Path, stop_step: int) -> None:
    """A run: logs every batch, saves its position after every third, hangs at a step's log."""
    loader, saved = five(folder, num_threads=2), folder / "position.json"
    start = 0
    if saved.exists():
        position = Position(**json.loads(saved.read_text()))
        position.check(loader.source.fingerprint)
        start = position.steps(loader.batch_size)
    with open(folder / "log", "a") as log:
        for step, batch in enumerate(loader.iterate(start), start):
            print(json.dumps([step, ids(batch)]), file=log, flush=True)
            if step == stop_step:
                print("waiting", flush=True)
                sys.stdin.read()
            if step % 3 == 2:
                partial = saved.with_suffix(".partial")
                partial.write_text(json.dumps(dataclasses.asdict(loader.position(step + 1))))
                os.replace(partial, saved)


def test_two_kills_and_other_hosts_take_each_step_as_often_as_the_weights_say(
    tmp_path: Path, repository: Path
) -> None:
    make_five(tmp_path)
    # Three epochs are 9 batches. The kills come when 4 and 7 are logged and 3 and 6 are saved.
    for stop_step in (3, 6):
        program = (
            f"from pathlib import Path; from tests.data_pipelines.test_loader import train; "
            f"train(Path({str(tmp_path)!r}), {stop_step})"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=repository,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None and child.stdout.readline() == "waiting\n"
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [step for step, _ in lines] == [0, 1, 2, 3, 3, 4, 5, 6]
    log = dict(lines)
    assert all(log[step] == batch for step, batch in lines)  # what was done twice was the same

    position = Position(**json.loads((tmp_path / "position.json").read_text()))
    loader = five(tmp_path)
    position.check(loader.source.fingerprint)
    start = position.steps(loader.batch_size)
    assert (position.samples, start) == (48, 6)
    for step, batch in enumerate(together(hosts(loader, 4), 3, start), start):
        assert log.setdefault(step, ids(batch)) == ids(batch)

    assert sorted(log) == list(range(9))
    times = Counter(tuple(step) for batch in log.values() for step in batch)
    expected = {
        (dataset, row): 3 * weight
        for dataset, (episodes, weight) in enumerate(FIVE.values())
        for row in range(sum(episodes))
    }
    assert loader.source.draws == DRAWS
    assert times == expected


def test_another_stream_is_refused_unless_allowed(loader: Loader) -> None:
    position = loader.position(2)
    position.check(loader.source.fingerprint)
    other = dataclasses.replace(loader.source, seed=6).fingerprint
    with pytest.raises(ValueError, match=r"not what this run has trained on.*Restore the settings"):
        position.check(other)
    position.check(other, allow_changed=True)
    with pytest.raises(ValueError, match=r"batch_size is 5; .* after 16 samples"):
        position.steps(5)


def test_a_batch_of_chosen_steps_is_the_one_that_the_stream_makes(loader: Loader) -> None:
    streamed = next(loader.iterate(2))
    places = loader.source.locate(np.arange(loader.batch_size) + 2 * loader.batch_size)
    chosen = loader.batch_of(*places)
    for field in dataclasses.fields(streamed):
        np.testing.assert_array_equal(getattr(chosen, field.name), getattr(streamed, field.name))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_prompt_that_does_not_fit_names_the_sample(loader: Loader, num_threads: int) -> None:
    def overflow(instruction: str, annotation: Annotation | None) -> dict[str, np.ndarray]:
        if annotation is not None and annotation.subtask == "task 4":
            raise ValueError("prefix of 300 tokens; 256 fit")
        return prompt(instruction, annotation)

    loader = dataclasses.replace(loader, prompt=overflow, num_threads=num_threads)
    match = r"d/frames\.bin, record 0, step 4: prefix of 300 tokens; 256 fit"
    with pytest.raises(ValueError, match=match):
        take(loader, 9)


def test_bad_settings_are_named(loader: Loader) -> None:
    one = loader.source.sources[0]
    rare = dataclasses.replace(loader.source, weights=(1, 1, 1, 1, 0.01))
    wrong = loader.normalizers | {"e": loader.normalizers["a"]}
    for changes, message in (
        ({"state_dim": 7}, "dataset 'a': its state is 8 wide, the model's state_dim is 7"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 9, "host": (0, 2)}, "batch_size is 9; .* multiple of .* hosts, 2"),
        ({"host": (2, 2)}, "host 2 of 2"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"normalizers": {}}, "dataset 'a' has no normalizers; there are some for none"),
        ({"normalizers": wrong}, "'e': actions and states are 5 and 4 wide, .* 7 and 8"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(loader, **changes)
    with pytest.raises(ValueError, match="start_step is -1"):
        loader.iterate(-1)
    with pytest.raises(ValueError, match=r"dataset 'e': with weight 0\.01 none of its 5"):
        dataclasses.replace(loader, source=rare).iterate()
    # Fewer steps than a batch are no matter: the stream is endless.
    few = MixtureSource(sources=(one,), weights=(1,))
    (batch,) = take(dataclasses.replace(loader, source=few, batch_size=18), 1)
    assert set(Counter(batch.sample_id.tolist()).values()) == {3}


def test_neither_tensorflow_nor_torch_nor_a_device_is_needed(
    folder: Path, repository: Path
) -> None:
    program = f"""
import sys
from pathlib import Path
from tests.data_pipelines.test_loader import five
next(five(Path({str(folder)!r})).iterate())
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was opened"
assert not {{"tensorflow", "torch"}} & set(sys.modules), "TensorFlow or torch was imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=repository)
