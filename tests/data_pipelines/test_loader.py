"""The loader: the batch contract, determinism, exact resumption, evaluation, bad input."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest

from data_pipelines.episodes import StepSource, load_episodes
from data_pipelines.loader import Loader
from data_pipelines.stats import dataset_statistics, normalizers
from lara_jax import batch as contract
from lara_jax.batch import Batch
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines.handmade import write_tabletop

PREFIX, SUFFIX = 6, 4


def prompt(instruction: str, annotation: Annotation | None) -> dict[str, np.ndarray]:
    """Letters for tokens."""
    words = annotation.subtask if annotation else ""
    prefix = np.frombuffer(instruction[-PREFIX:].rjust(PREFIX).encode(), np.uint8)
    suffix = np.frombuffer(words[-SUFFIX:].ljust(SUFFIX).encode(), np.uint8)
    return {
        "prefix_ids": prefix.astype(np.int32),
        "prefix_mask": prefix != ord(" "),
        "suffix_ids": suffix.astype(np.int32),
        "suffix_mask": suffix != ord(" "),
        "loss_mask": suffix != ord(" "),
    }


def make(path: Path, **changes: Any) -> Loader:
    table = load_episodes(path, "train")
    action, state = normalizers(table.spec, dataset_statistics(table))
    settings: dict[str, Any] = {
        "source": StepSource(table, action_horizon=3),
        "prompt": prompt,
        "action_normalizer": action,
        "state_normalizer": state,
        "state_dim": 10,
        "batch_size": 5,
        "seed": 0,
        "num_threads": 0,
    }
    return Loader(**settings | changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """12 steps."""
    return write_tabletop(tmp_path)


@pytest.fixture
def loader(path: Path) -> Loader:
    return make(path)


def take(loader: Loader, count: int, start_step: int = 0) -> list[Batch]:
    return list(itertools.islice(loader.iterate(start_step), count))


def equal(ours: list[Batch], theirs: list[Batch]) -> bool:
    leaves = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def test_batches_keep_the_contract(loader: Loader) -> None:
    (batch,) = take(loader, 1)
    expected = contract.spec(
        batch_size=5,
        views=1,
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
    (batch,) = take(loader, 1)
    for b, index in enumerate(batch.sample_id):
        sample = loader.source[index]
        np.testing.assert_array_equal(batch.images[b], sample["images"])
        np.testing.assert_array_equal(batch.next_images[b], sample["next_images"])
        np.testing.assert_array_equal(batch.next_mask[b], sample["next_mask"])
        state = loader.state_normalizer.normalize(sample["state"])
        np.testing.assert_array_equal(batch.state[b], [*state, 0, 0])
        mask = sample["action_mask"]
        np.testing.assert_array_equal(batch.action_mask[b], mask)
        actions = loader.action_normalizer.normalize(sample["actions"])
        np.testing.assert_array_equal(batch.actions[b, mask], actions[mask])
        # Past the end: no motion as the model sees it, the last gripper position.
        np.testing.assert_array_equal(batch.actions[b, ~mask, :6], 0)
        np.testing.assert_array_equal(batch.actions[b, ~mask, 6], sample["actions"][mask][-1, 6])
        tokens = prompt(sample["instruction"], sample["annotation"])
        np.testing.assert_array_equal(batch.prefix_ids[b], tokens["prefix_ids"])
        np.testing.assert_array_equal(batch.suffix_ids[b], tokens["suffix_ids"])


def test_every_epoch_has_every_step_once_in_its_own_order(loader: Loader) -> None:
    ids = np.concatenate([batch.sample_id for batch in take(loader, 12)])
    epochs = ids.reshape(5, 12)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(12), (5, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_batch_depends_on_seed_and_step_alone(path: Path, loader: Loader) -> None:
    batches = take(loader, 8)
    for start in (0, 1, 5):
        assert equal(take(loader, 8 - start, start), batches[start:])
    assert equal(take(make(path, num_threads=3), 8), batches)
    assert equal(take(make(path, num_threads=2), 3, 5), batches[5:])
    assert not equal(take(make(path, seed=1), 8), batches)


def test_grain_agrees_that_checkpoints_restore(loader: Loader) -> None:
    few = loader.batches().slice(slice(6)).map(lambda batch: dict(batch.__dict__))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    grain.experimental.assert_equal_output_after_checkpoint(few.to_iter_dataset(options))


def test_an_evaluation_pass_counts_every_step_once(path: Path, loader: Loader) -> None:
    for batch_size, batches in ((5, 3), (6, 2), (50, 1)):
        found = list(make(path, batch_size=batch_size, num_threads=1).epoch())
        assert len(found) == batches
        assert all(batch.size == len(rows) == batch_size for batch, rows in found)
        counted = np.concatenate([batch.sample_id[rows] for batch, rows in found])
        np.testing.assert_array_equal(counted, np.arange(12))
        np.testing.assert_array_equal(found[-1][0].sample_id[~found[-1][1]], 11)


def test_real_batches(shared_dir: Path) -> None:
    loader = make(shared_dir / "data/bridge_dataset/1.0.0", batch_size=32, state_dim=8)
    batches = take(loader, 7)
    ids = np.concatenate([batch.sample_id for batch in batches])
    np.testing.assert_array_equal(np.sort(ids[:200]), np.arange(200))
    for batch in batches:
        assert batch.images.shape == (32, 1, 64, 64, 3)
        assert np.abs(batch.actions).max() <= 1
        assert np.isfinite(batch.state).all()


def test_bad_settings_are_named(path: Path, loader: Loader) -> None:
    with pytest.raises(ValueError, match="state is 8 wide, the model's state_dim is 7"):
        make(path, state_dim=7)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make(path, batch_size=0)
    with pytest.raises(ValueError, match=r"seed is -1; it must be in \[0, 2\*\*32\)"):
        make(path, seed=-1)
    with pytest.raises(ValueError, match=r"'train'.*steps=12\): fewer steps than a batch of 13"):
        make(path, batch_size=13).iterate()
    with pytest.raises(ValueError, match="start_step is -1"):
        loader.iterate(-1)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_prompt_that_does_not_fit_names_the_sample(loader: Loader, num_threads: int) -> None:
    def overflow(instruction: str, annotation: Annotation | None) -> dict[str, np.ndarray]:
        if annotation is not None and annotation.subtask == "subtask 4":
            raise ValueError("prefix of 300 tokens; 256 fit")
        return prompt(instruction, annotation)

    loader = dataclasses.replace(loader, prompt=overflow, num_threads=num_threads)
    with pytest.raises(
        ValueError, match="00001-of-00002, record 0, step 4: prefix of 300 tokens; 256 fit"
    ):
        take(loader, 3)


def test_neither_tensorflow_nor_torch_nor_a_device_is_needed(path: Path, repository: Path) -> None:
    program = f"""
import sys
from tests.data_pipelines.test_loader import make
next(make({str(path)!r}).iterate())
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was opened"
assert not {{"tensorflow", "torch"}} & set(sys.modules), "TensorFlow or torch was imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=repository)
