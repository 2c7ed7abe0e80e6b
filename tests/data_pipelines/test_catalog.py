"""Where the datasets of a recipe lie, and which split of them is read."""

from pathlib import Path

import pytest

from data_pipelines import catalog
from data_pipelines.catalog import Entry
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


def test_datasets_of_a_mixture_are_found_by_name_or_alias(tmp_path: Path, definitions: str) -> None:
    fake(tmp_path, "lara_tabletop/1.0.0", "fmb/0.0.1")
    found = catalog.entries(str(tmp_path), mixture="mine:two", definitions=definitions)
    assert found == (
        Entry(path=f"{tmp_path}/lara_tabletop/1.0.0", weight=1.5),
        Entry(path=f"{tmp_path}/fmb/0.0.1", weight=0.5),
    )


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
    assert catalog.split_of(path, "train[:10]", held_out="val") == "train[:10]"
    assert catalog.split_of(path, "train", held_out="train[90%:]") == "train"

    record = [tabletop_record(0, 3)]
    both = {"train": [record], "val": [record]}
    path = str(write_directory(tmp_path / "two", "lara_tabletop", TABLETOP_FEATURES, both))
    assert catalog.split_of(path, "train", held_out="val") == "train"
    assert catalog.split_of(path, "val", held_out="val") == "val"
