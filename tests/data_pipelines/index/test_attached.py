"""Annotation files and the indexes they were attached to: who belongs to whom, and for how long."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.annotate import annotate
from data_pipelines.annotate.readers import EpisodeName, open_provider
from data_pipelines.convert.rlds_shards import definition
from data_pipelines.index import cli, writer
from data_pipelines.index.build import attach_annotations, build_index, open_index
from data_pipelines.index.format import Index
from data_pipelines.oxe.registry import spec_named
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines.handmade import (
    TABLETOP_FEATURES,
    tabletop_record,
    write_directory,
    write_tabletop,
)


def subtasks(index: Index) -> list[str]:
    """Of the first row of each episode."""
    found = [index.annotation(int(row)) for row in index.episodes["first_row"]]
    return [annotation.subtask if annotation else "" for annotation in found]


def without_keys(path: Path, splits: Mapping[str, list[Any]]) -> Path:
    """A lara_tabletop directory whose episodes all have the same, empty, key."""
    features = dict(TABLETOP_FEATURES)
    del features["episode_metadata/file_path"]
    for shards in splits.values():
        for record in (record for shard in shards for record in shard):
            del record["episode_metadata/file_path"]
    return write_directory(path / "1.0.0", "lara_tabletop", features, splits)


SHARDS = ((4, 0, 3), (0, 5))  # steps of each episode


def with_empty(first: int = 0) -> list[list[Any]]:
    lengths = [
        [(first + 10 * s + n, steps) for n, steps in enumerate(x)] for s, x in enumerate(SHARDS)
    ]
    return [[tabletop_record(seed, steps) for seed, steps in shard] for shard in lengths]


def test_numbers_count_episodes_without_steps(tmp_path: Path) -> None:
    """A file that knows episodes by number counts all of them, as they are stored."""
    path = without_keys(tmp_path, {"train": with_empty()})
    captions, boxes = tmp_path / "captions.jsonl", tmp_path / "boxes.jsonl"
    steps = [n for shard in SHARDS for n in shard]
    captions.write_text(
        "".join(
            json.dumps({"episode_index": n, "steps": {"0": {"subtask": f"of {n}"}}}) + "\n"
            for n in range(5)
        )
    )
    lines = [
        {"episode_index": n, "num_steps": length, "dense_labels": {}}
        for n, length in enumerate(steps)
    ]
    boxes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = build_index(path, "train", annotations=open_provider(f"lara:{captions}"), workers=1)
    assert index.episodes["number"].tolist() == [0, 2, 4]
    assert subtasks(index) == ["of 0", "of 2", "of 4"]
    both = open_provider(f"lara:{captions},{boxes}")
    assert subtasks(attach_annotations(index, both)) == ["of 0", "of 2", "of 4"]
    boxes.write_text(boxes.read_text().replace('"num_steps": 3', '"num_steps": 6'))
    with pytest.raises(
        ValueError, match=r"boxes.jsonl, line 3.*the line has 6 steps, the episode 3"
    ):
        attach_annotations(index, open_provider(f"lara:{captions},{boxes}"))


def test_annotate_and_back_by_number(tmp_path: Path) -> None:
    path = without_keys(tmp_path, {"train": with_empty(), "val": with_empty(5)})
    for split in ("train", "val"):
        build_index(path, split, workers=1)
        assert annotate.main([str(path), "--split", split, "--out", f"{tmp_path}/{split}"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "train").read_text().splitlines()]
    assert [(line["key"], line["number"]) for line in lines] == [("", 0), ("", 2), ("", 4)]
    assert lines[0]["provenance"]["dataset"] == "lara_tabletop"
    assert lines[0]["provenance"]["split"] == "train"
    index = build_index(path, "train", annotations=open_provider(f"own:{tmp_path}/train"))
    assert index.filter_counts["no_annotation"] == 0
    assert subtasks(index) == [line["steps"]["0"]["subtask"] for line in lines]
    with pytest.raises(ValueError, match=r"split 'val'.* has split 'train', the episode 'val'"):
        cli.main([str(path), "--annotations", f"own:{tmp_path}/train"])
    assert open_index(path, "val").header.annotations == {"fingerprint": "records"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stored_steps": 5}, r"line 1.*has stored_steps 5, the episode 4"),
        ({"dataset": "kuka"}, r"line 1.*has dataset 'kuka', the episode 'lara_tabletop'"),
        ({"split": "val"}, r"line 1.*has split 'val', the episode 'train'"),
        ({"split": None}, r"line 1.*has split None, the episode 'train'"),
    ],
)
@pytest.mark.parametrize("keyed", [True, False])
def test_a_line_of_another_episode_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str, keyed: bool
) -> None:
    path = write_tabletop(tmp_path) if keyed else without_keys(tmp_path, {"train": with_empty()})
    origin = {"dataset": "lara_tabletop", "split": "train", "stored_steps": 4}
    line = {
        "schema": 1,
        "key": "episode_0" if keyed else "",
        "number": 0,
        "steps": {"0": {"subtask": "lift"}},
        "provenance": origin | change,
    }
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(line) + "\n")
    index = build_index(path, "train", workers=1)
    if keyed and "split" in change:  # a key says enough, in whatever split
        assert subtasks(attach_annotations(index, open_provider(f"own:{file}")))[0] == "lift"
        return
    with pytest.raises(ValueError, match=message):
        attach_annotations(index, open_provider(f"own:{file}"))


TOO = definition(spec_named("lara_tabletop"), "tabletop_too")


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize(("made", "read"), [(None, "tabletop_too"), ("tabletop_too", None)])
def test_annotations_are_of_the_data_whatever_definition_reads_them(
    tmp_path: Path, keyed: bool, made: str | None, read: str | None
) -> None:
    """One set under two names, in one index and in two."""
    path = write_tabletop(tmp_path) if keyed else without_keys(tmp_path, {"train": with_empty()})
    toml, file = tmp_path / "mine.toml", tmp_path / "own.jsonl"
    toml.write_text(TOO)
    named = ["--name", "tabletop_too", "--definitions", str(toml)]
    options = {None: [], "tabletop_too": named}
    assert cli.main([str(path)]) == 0
    assert annotate.main([str(path), "--out", str(file), *options[made]]) == 0
    for out in ([], ["--out", str(tmp_path / "new")]):
        call = [str(path), "--annotations", f"own:{file}", *out]
        assert cli.main([*call, *options[read]]) == 0
    for folder in (path / "lara_index/train", tmp_path / "new/train"):
        index = Index.open(folder)
        assert index.header.own_name == "lara_tabletop"
        assert index.header.annotations["from"] == f"own:{file}"
    opened = build_index(
        path, "train", name=read, definitions=toml, annotations=open_provider(f"own:{file}")
    )
    assert opened.spec.name == opened.header.dataset == (read or "lara_tabletop")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["provenance"]["dataset"] for line in lines} == {"lara_tabletop"}


def test_an_index_with_annotations_that_another_definition_does_not_take(
    annotated: tuple[Path, Path], tmp_path: Path
) -> None:
    """The episodes have another key by it: the message names the way out, and it is one."""
    path, file = annotated
    toml = tmp_path / "mine.toml"
    other = 'episode_key = ["episode_metadata/success"]'
    toml.write_text(re.sub(r"^episode_key = .*$", other, TOO, flags=re.MULTILINE))
    call = [str(path), "--name", "tabletop_too", "--definitions", str(toml)]
    folder = path / "lara_index/train"
    with pytest.raises(
        ValueError,
        match=rf"own:{file} cannot be attached: .*none of 3 episodes matches.*; name others "
        rf"\(--annotations\), or delete {folder}, if it has them, to do without",
    ):
        cli.main(call)
    assert Index.open(folder).header.annotations["from"] == f"own:{file}"
    shutil.rmtree(folder)
    assert cli.main(call) == 0


def test_a_key_of_several_episodes_is_none(tmp_path: Path) -> None:
    records = [tabletop_record(seed, 3) for seed in range(2)]
    records[1]["episode_metadata/file_path"] = records[0]["episode_metadata/file_path"]
    index = build_index(write_tabletop(tmp_path, records), "train", workers=1)
    line = {"schema": 1, "key": "episode_0", "number": 0, "steps": {"0": {"subtask": "lift"}}}
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"none of 2 episodes matches, .*\(key ''\)"):
        attach_annotations(index, open_provider(f"own:{file}"))


@pytest.fixture
def annotated(tmp_path: Path) -> tuple[Path, Path]:
    """A directory with annotations attached to one of three episodes, and their file."""
    path, file = write_tabletop(tmp_path / "set"), tmp_path / "own.jsonl"
    line = {"schema": 1, "key": "episode_1", "number": 1, "steps": {"1": {"subtask": "lift"}}}
    file.write_text(json.dumps(line) + "\n")
    build_index(path, "train", annotations=open_provider(f"own:{file}"), workers=1)
    return path, file


def test_what_matches_and_what_does_not_is_reported(
    annotated: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, file = annotated
    monkeypatch.chdir(file.parent)  # the file is noted from the root on
    assert cli.main([str(path), "--annotations", "own:own.jsonl", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["annotations"]
    assert (found["from"], found["episodes"], found["rows"]) == (f"own:{file}", 1, 1)
    assert f"1 episodes and 1 rows have some from own:{file}; 2 episodes and 11 rows have" in err


def touched(path: Path) -> None:
    """Adds an episode, so that the index is stale."""
    other = write_tabletop(path.parent / "other", [tabletop_record(7, 2), tabletop_record(1, 3)])
    shard = "lara_tabletop-train.tfrecord-00000-of-0000{}"
    shutil.copy(other / shard.format(1), path / shard.format(2))


def test_an_index_made_anew_keeps_what_was_attached(annotated: tuple[Path, Path]) -> None:
    path, _ = annotated
    before = open_index(path, "train").header
    touched(path)
    index = build_index(path, "train", workers=1)
    assert len(index) == 10
    assert index.header.annotations == before.annotations
    annotation = index.annotation(3)
    assert annotation is not None and annotation.subtask == "lift"


@pytest.mark.parametrize("damage", ["gone", "malformed", "of others"])
def test_an_index_is_not_made_anew_without_what_was_attached(
    annotated: tuple[Path, Path], damage: str
) -> None:
    path, file = annotated
    touched(path)
    digest = Index.open(path / "lara_index/train").header.digest
    text = file.read_text()
    file.write_text({"malformed": "{", "of others": text.replace("episode_1", "x")}.get(damage, ""))
    if damage == "gone":
        file.unlink()
    with pytest.raises(ValueError, match=r"own\.jsonl"):
        build_index(path, "train", workers=1)
    assert Index.open(path / "lara_index/train").header.digest == digest
    file.write_text(text)
    assert subtasks(build_index(path, "train", workers=1)) == ["", "", ""]
    assert open_index(path, "train").header.annotations["rows"] == 1


class Deadly:
    """Annotations in whose middle the process is killed, as by `kill -9`."""

    fingerprint = description = "deadly"

    def episode(self, name: EpisodeName) -> Mapping[int, Annotation] | None:
        if name.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {0: Annotation(subtask="lift")}


class Harmless(Deadly):
    def episode(self, name: EpisodeName) -> Mapping[int, Annotation] | None:
        return {0: Annotation(subtask="lift")}


def die_in_the_middle(path: Path) -> None:
    build_index(path, "train", annotations=Deadly())


def die_while_replacing(path: Path) -> None:
    """Killed when the old index has lost its name and the new one has not got it yet."""
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target).endswith(".train.old"):
            os.kill(os.getpid(), signal.SIGKILL)

    writer.os.replace = killed  # type: ignore[assignment]
    build_index(path, "train", annotations=Harmless())


@pytest.mark.parametrize("victim", [die_in_the_middle, die_while_replacing])
def test_a_killed_attach_leaves_the_old_index(
    annotated: tuple[Path, Path], victim: Callable[[Path], None]
) -> None:
    path, file = annotated
    folder = path / "lara_index/train"
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    child = multiprocessing.get_context("spawn").Process(target=victim, args=(path,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    index = build_index(path, "train", workers=1)
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before
    assert index.header.annotations["from"] == f"own:{file}"
    assert subtasks(build_index(path, "train", annotations=Harmless())) == ["lift"] * 3
    left = sorted(entry.name for entry in folder.parent.iterdir())
    assert left == [".train.lock", "train"]


BOX, OTHER = (0.125, 0.25, 0.5, 0.75), (0.5, 0.5, 0.75, 1.0)
ABSENT = (np.nan,) * 4


def boxes_of(tmp_path: Path, first: tuple[float, ...], second: tuple[float, ...]) -> Any:
    record = tabletop_record(0, 2)
    record["steps/reasoning/boxes"][1] = (first, second)
    annotation = build_index(write_tabletop(tmp_path, [record]), "train", workers=1).annotation(1)
    assert annotation is not None
    return annotation.boxes


@pytest.mark.parametrize(
    ("first", "second", "boxes"),
    [
        (BOX, OTHER, (BOX, OTHER)),
        (BOX, ABSENT, (BOX,)),
        (ABSENT, OTHER, ()),  # a destination without its object would be taken for one
        (ABSENT, ABSENT, ()),
    ],
)
def test_absent_boxes_of_records(tmp_path: Path, first: Any, second: Any, boxes: Any) -> None:
    assert boxes_of(tmp_path, first, second) == boxes


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0.8, 0.8, 0.2, 0.2), "is inverted"),
        ((0.1, np.nan, 0.2, 0.2), "a box is 4 numbers"),
        ((0.1, 0.1, np.inf, 0.2), "a box is 4 numbers"),
        ((0.1, 0.1, 1.2, 0.2), "outside the image"),
    ],
)
@pytest.mark.parametrize("at", [0, 1])
def test_bad_boxes_of_records(tmp_path: Path, box: Any, message: str, at: int) -> None:
    pair = (box, BOX) if at == 0 else (BOX, box)
    with pytest.raises(ValueError, match=rf"record 0: step 1, box {at}: .*{message}"):
        boxes_of(tmp_path, *pair)
