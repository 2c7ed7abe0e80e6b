"""Where the datasets of a recipe lie, and which split of them is read."""

import shutil
from pathlib import Path

import pytest

from data_pipelines import catalog
from data_pipelines.catalog import Entry
from data_pipelines.convert.step_shards import shard_count, write_records_index, write_shard
from data_pipelines.index.build import StaleIndex, build_index
from tests.data_pipelines.handmade import (
    TABLETOP_FEATURES,
    tabletop_record,
    write_directory,
    write_tabletop,
)

DEFINITIONS = """
[mixtures."mine:two"]
entries = [["lara_tabletop", 1.5], ["fmb_dataset", 0.5]]
"""


@pytest.fixture
def definitions(tmp_path: Path) -> str:
    file = tmp_path / "mine.toml"
    file.write_text(DEFINITIONS)
    return str(file)


def fake(root: Path, *names: str) -> None:
    """Version directories that are only looked for."""
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "dataset_info.json").touch()


def test_one_dataset_is_where_it_is_said_to_be() -> None:
    assert catalog.entries("gs://b/x/1.0.0") == (Entry(path="gs://b/x/1.0.0"),)


def test_one_dataset_may_go_by_another_definition() -> None:
    (entry,) = catalog.entries("/data/libero_10/1.0.0", name="libero_10_no_noops")
    assert entry.name == "libero_10_no_noops"
    with pytest.raises(
        ValueError, match=r"a name \('mine'\) is of one dataset; mixture 'lara:bridge' has"
    ):
        catalog.entries("/data", name="mine", mixture="lara:bridge")


def test_datasets_of_a_mixture_are_found_by_name_or_alias(tmp_path: Path, definitions: str) -> None:
    fake(tmp_path, "lara_tabletop/1.0.0", "fmb/0.0.1")
    found = catalog.entries(str(tmp_path), mixture="mine:two", definitions=definitions)
    assert found == (
        Entry(path=f"{tmp_path}/lara_tabletop/1.0.0", weight=1.5, name="lara_tabletop"),
        Entry(path=f"{tmp_path}/fmb/0.0.1", weight=0.5, name="fmb_dataset"),
    )


def test_a_dataset_may_lie_in_a_folder_of_another_name(tmp_path: Path) -> None:
    fake(tmp_path, "bridge_dataset/1.0.0")
    (entry,) = catalog.entries(str(tmp_path), mixture="lara:bridge")
    assert (entry.path, entry.name) == (f"{tmp_path}/bridge_dataset/1.0.0", "bridge_orig")


def test_two_datasets_of_a_mixture_are_not_one_folder(tmp_path: Path, definitions: str) -> None:
    fake(tmp_path, "bridge_dataset/1.0.0")
    Path(definitions).write_text(
        '[mixtures.m]\nentries = [["bridge_orig", 1.0], ["bridge_dataset", 1.0]]\n'
    )
    with pytest.raises(ValueError, match=r"'bridge_orig' and 'bridge_dataset' are both in"):
        catalog.entries(str(tmp_path), mixture="m", definitions=definitions)


def test_weights_that_are_given_again_are_told(tmp_path: Path, definitions: str) -> None:
    fake(tmp_path, "fmb/0.0.1")
    Path(definitions).write_text('[mixtures.m]\nentries = [["fmb", 2.0], ["fmb_dataset", 3.0]]\n')
    (entry,) = catalog.entries(str(tmp_path), mixture="m", definitions=definitions)
    assert (entry.weight, entry.ignored_weights) == (2.0, (3.0,))


def test_known_lerobot_sets_may_stand_in_a_mixture(tmp_path: Path, definitions: str) -> None:
    fake(tmp_path, "bridge_orig_lerobot", "libero_lara")
    Path(definitions).write_text(
        '[mixtures.m]\nentries = [["bridge_lara", 1.0], ["libero_franka", 1.0]]\n'
    )
    found = catalog.entries(str(tmp_path), mixture="m", definitions=definitions)
    assert [(entry.name, Path(entry.path).name) for entry in found] == [
        ("bridge_lara", "bridge_orig_lerobot"),
        ("libero_lara", "libero_lara"),
    ]


def test_the_version_is_the_published_one_or_the_only_one(tmp_path: Path, definitions: str) -> None:
    fake(tmp_path, "lara_tabletop", "fmb_dataset/0.0.1", "fmb_dataset/9.0.0")
    found = catalog.entries(str(tmp_path), mixture="mine:two", definitions=definitions)
    assert [entry.path for entry in found] == [
        f"{tmp_path}/lara_tabletop",
        f"{tmp_path}/fmb_dataset/0.0.1",
    ]


def test_several_versions_are_refused(tmp_path: Path, definitions: str) -> None:
    fake(tmp_path, "lara_tabletop/1.0.0", "lara_tabletop/2.0.0", "fmb/0.0.1")
    with pytest.raises(ValueError, match=r"holds the versions 1\.0\.0, 2\.0\.0"):
        catalog.entries(str(tmp_path), mixture="mine:two", definitions=definitions)


def test_every_missing_dataset_is_named(tmp_path: Path) -> None:
    fake(tmp_path, "bridge_orig/1.0.0")
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 2 .*: fractal20220817_data;"):
        catalog.entries(str(tmp_path), mixture="openvla:bridge_rt_1")
    with pytest.raises(ValueError, match="unknown mixture 'openvla:bridge_rt'"):
        catalog.entries(str(tmp_path), mixture="openvla:bridge_rt")


def test_a_set_without_held_out_split_gives_five_percent(tmp_path: Path) -> None:
    path = str(write_tabletop(tmp_path / "one"))
    assert catalog.split_of(path, "train", held_out="val") == "train[:95%]"
    assert catalog.split_of(path, "val", held_out="val") == "train[95%:]"
    with pytest.raises(ValueError, match=r"the last 5 % of 'train' are held out, but 'train\[:10"):
        catalog.split_of(path, "train[:10]", held_out="val")
    assert catalog.split_of(path, "train[:10]", held_out="train[10:]") == "train[:10]"
    assert catalog.split_of(path, "train", held_out="train[90%:]") == "train"

    record = [tabletop_record(0, 3)]
    both = {"train": [record], "val": [record]}
    path = str(write_directory(tmp_path / "two", "lara_tabletop", TABLETOP_FEATURES, both))
    assert catalog.split_of(path, "train", held_out="val") == "train"
    assert catalog.split_of(path, "val", held_out="val") == "val"


def converted(path: Path, folder: Path) -> str:
    """A set that has nothing but step records and their index."""
    index = build_index(path, "train", workers=1)
    folder.mkdir(parents=True)
    shards = [
        write_shard(index, shard, str(folder), ["image"]) for shard in range(shard_count(index))
    ]
    write_records_index(folder / "lara_index/train", index, shards, str(folder), ["image"])
    return str(folder)


def test_a_converted_set_has_the_splits_of_its_indexes(tmp_path: Path) -> None:
    records = [tabletop_record(number, 2) for number in range(40)]
    place = converted(write_tabletop(tmp_path / "one", records), tmp_path / "out" / "steps")
    assert catalog.split_of(place, "train", held_out="val") == "train[:95%]"
    assert catalog.split_of(place, "val", held_out="val") == "train[95%:]"
    part = catalog.open_part(Entry(path=place), "train[95%:]")
    assert part.counts == {"episodes": 2, "rows": 4, "stored_steps": 4, "dropped_steps": 0}
    assert part.rows == slice(76, 80) and part.index.source == place
    with pytest.raises(ValueError, match=r"steps has no split 'val'; it has: train"):
        catalog.open_part(Entry(path=place), "val")
    (file,) = Path(place).glob("*array_record*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StaleIndex, match=r"array_record.* has \d+ bytes, it had"):
        catalog.open_part(Entry(path=place), "train")


def test_the_folder_of_an_index_answers_for_its_split_alone(tmp_path: Path) -> None:
    path = write_tabletop(tmp_path)
    folder = str(build_index(path, "train", workers=1).folder)
    assert catalog.split_of(folder, "val", held_out="val") == "train[95%:]"
    assert len(catalog.open_part(Entry(path=folder), "train").index) == 12
    with pytest.raises(ValueError, match="is the index of split 'train', not of 'val'"):
        catalog.open_part(Entry(path=folder), "val")
    file = next(path.glob("*.tfrecord*"))
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(StaleIndex, match=r"tfrecord.* has \d+ bytes"):
        catalog.open_part(Entry(path=folder), "train")
    shutil.move(folder, tmp_path / "elsewhere")
    shutil.rmtree(path)  # an index serves statistics without its data
    assert len(catalog.open_part(Entry(path=str(tmp_path / "elsewhere")), "train").index) == 12


def test_a_part_without_an_episode_is_refused(tmp_path: Path) -> None:
    path = str(write_tabletop(tmp_path))
    with pytest.raises(ValueError, match=r"lara_tabletop: 'train\[95%:\]' holds none of the 3 epi"):
        catalog.open_part(Entry(path=path), "train[95%:]")
