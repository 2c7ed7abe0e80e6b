"""A recipe's data: which steps a run reads, what it is told of the rest, what it refuses."""

import csv
import shutil
from pathlib import Path

import pytest

from data_pipelines.index.cli import main as index_main
from lara_jax import assemble, data, train
from lara_jax.checkpoint import digest, load_info
from lara_jax.config import Recipe, load_recipe
from tests.data_pipelines.handmade import (
    TABLETOP_FEATURES,
    tabletop_record,
    write_directory,
    write_tabletop,
)
from tests.soak import tiny

DEFINITIONS = """
[datasets.joints]
control_hz = 20
cameras = { front = "observation/image" }
roles = { primary = "front" }
action = ["action"]
state = ["observation/state"]
action_encoding = "JOINT_POS"

[mixtures."mine:same"]
entries = [["lara_tabletop", 2.0]]

[mixtures."mine:both"]
entries = [["lara_tabletop", 2.0], ["joints", 1.0]]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of two datasets, 12 and 9 steps, one of them with a failed episode."""
    write_tabletop(tmp_path / "lara_tabletop")
    records = [tabletop_record(7, 5), tabletop_record(8, 4)]
    write_directory(tmp_path / "joints" / "2.0.0", "joints", TABLETOP_FEATURES, {"all": [records]})
    (tmp_path / "mine.toml").write_text(DEFINITIONS)
    return tmp_path


def recipe(repository: Path, root: Path, *overrides: str) -> Recipe:
    toml = next(folder for folder in (root, *root.parents) if (folder / "mine.toml").is_file())
    common = (f"data.path={root}", f"data.definitions={toml}/mine.toml", "model.action_horizon=3")
    return load_recipe(repository / "configs" / "debug.py", [*common, *overrides])


def test_a_mixture_comes_from_its_folder_and_says_what_it_reads(
    repository: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe(repository, root, "data.mixture=mine:same", "data.eval_split=train[2:]")
    source = data.open_mixture(run, "train")
    assert [len(s) for s in source.sources] == [12] and source.draws == (24,)
    said = capsys.readouterr().err
    assert "lara_tabletop: 12 steps, 3 episodes of train, weight 2; 0 stored steps" in said
    held_out = data.open_mixture(run, run.data.eval_split)
    assert [len(s) for s in held_out.sources] == [5]
    statistics = data.statistics_of(source)
    assert statistics["lara_tabletop"].steps == 12
    assert data.statistics_from_dict(data.statistics_to_dict(statistics)) == statistics


def test_other_action_spaces_are_refused_unless_asked_for(repository: Path, root: Path) -> None:
    (root / "joints/2.0.0/dataset_info.json").write_text(
        (root / "joints/2.0.0/dataset_info.json").read_text().replace('"all"', '"train"')
    )
    file = next((root / "joints/2.0.0").glob("*.tfrecord*"))
    file.rename(file.with_name(file.name.replace("-all.", "-train.")))
    overrides = ("data.mixture=mine:both", "data.eval_split=train[1:]")
    with pytest.raises(ValueError, match="lara_tabletop EEF_POS, joints JOINT_POS"):
        data.open_mixture(recipe(repository, root, *overrides), "train")
    allowed = recipe(repository, root, *overrides, "data.mixed_action_spaces=true")
    assert data.open_mixture(allowed, "train").draws == (24, 9)


def test_filters_and_slow_datasets_are_reported(
    repository: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("data.filters=no_annotation,failed", "data.chunk_hz=10", "data.eval_split=train")
    run = recipe(repository, root / "lara_tabletop" / "1.0.0", *overrides[1:])
    data.open_mixture(run, "train")
    assert "slower than chunk_hz, it keeps its 5 Hz" in capsys.readouterr().err
    run = recipe(
        repository, root / "lara_tabletop" / "1.0.0", "data.chunk_hz=2", "data.eval_split=train"
    )
    data.open_mixture(run, "train")
    said = capsys.readouterr().err
    assert "1.67 actions a second in a chunk, 3 of its steps each" in said
    run = recipe(repository, root / "lara_tabletop" / "1.0.0", overrides[0], overrides[2])
    data.open_mixture(run, "train")
    assert "0 more are left out by no_annotation, failed" in capsys.readouterr().err


def test_what_is_not_there_is_named(repository: Path, root: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.data\.path is empty"):
        data.open_mixture(load_recipe(repository / "configs" / "debug.py"), "train")
    with pytest.raises(ValueError, match="has no split 'test'; it has: train"):
        data.open_mixture(recipe(repository, root / "lara_tabletop" / "1.0.0"), "test")
    views = recipe(repository, root / "lara_tabletop" / "1.0.0", "data.views=wrist")
    with pytest.raises(ValueError, match="'lara_tabletop' has none of the views wrist"):
        data.open_mixture(views, "train")


NAMES = """
[datasets.my_arm]
control_hz = 5
cameras = { front = "observation/image" }
roles = { primary = "front" }
action = ["action[0:6]", "action[6:7] | invert"]
state = ["observation/state"]

[mixtures."mine:named"]
entries = [["lara_tabletop", 1.0], ["my_arm", 2.0], ["my_arm", 3.0]]
"""


def test_each_set_of_a_mixture_is_read_under_its_own_name(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of my_arm call it lara_tabletop."""
    (tmp_path / "mine.toml").write_text(NAMES)
    write_tabletop(tmp_path / "lara_tabletop")
    write_tabletop(tmp_path / "my_arm", [tabletop_record(10, 6), tabletop_record(11, 5)])
    run = recipe(repository, tmp_path, "data.mixture=mine:named", "data.eval_split=train[1:]")
    source = data.open_mixture(run, "train")
    assert [s.name for s in source.sources] == ["lara_tabletop", "my_arm"]
    statistics = data.statistics_of(source)
    assert {name: of.steps for name, of in statistics.items()} == {
        "lara_tabletop": 12,
        "my_arm": 11,
    }
    gripper = tabletop_record(10, 6)["steps/action"][:, 6]
    assert source.sources[1].index.actions[:6, 6].tolist() == (1 - gripper).tolist()
    said = capsys.readouterr().err
    assert "the mixture names it again, with weight 3, which is ignored" in said


def test_what_is_held_out_is_said_and_never_trained_on(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [tabletop_record(number, 2 if number else 0) for number in range(41)]
    path = write_tabletop(tmp_path, records)
    (tmp_path / "mine.toml").write_text("")
    train = data.open_mixture(recipe(repository, path), "train")
    assert train.sources[0].episodes == slice(0, 38)
    said = capsys.readouterr().err
    assert "76 steps, 38 episodes of train[:95%], weight 1" in said
    assert "as it has no split 'val', the other 2 episodes are held out" in said
    assert "1 more episodes of the split have no step" in said
    held_out = data.open_mixture(recipe(repository, path), "val")
    assert held_out.sources[0].episodes == slice(38, 40)
    assert "4 steps, 2 episodes of train[95%:]" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"the last 5 % of 'train' are held out, but 'train\[50%:"):
        data.open_mixture(recipe(repository, path, "data.split=train[50%:]"), "train[50%:]")


def test_indexes_may_lie_in_a_folder_of_their_own(repository: Path, tmp_path: Path) -> None:
    path = write_tabletop(tmp_path / "data")
    (tmp_path / "mine.toml").write_text("")
    run = recipe(repository, path, f"data.index_dir={tmp_path}/i", "data.eval_split=train[1:]")
    with pytest.raises(FileNotFoundError, match=r"run `lara data index .* --name lara_tabletop"):
        data.open_mixture(run, "train")
    assert index_main([str(path), "--out", f"{tmp_path}/i/lara_tabletop"]) == 0
    (source,) = data.open_mixture(run, "train").sources
    assert source.index.folder == tmp_path / "i/lara_tabletop/train"
    assert not (path / "lara_index").exists()


def test_a_known_lerobot_set_in_a_mixture(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="LeRobot data sets need the extra lerobot")
    from tests.data_pipelines.lerobot.sets import write_bridge

    (tmp_path / "mine.toml").write_text(
        '[mixtures.m]\nentries = [["bridge_lara", 1.0], ["lara_tabletop", 1.0]]\n'
    )
    write_bridge(tmp_path / "oxe_bridge")
    write_tabletop(tmp_path / "lara_tabletop")
    overrides = ("data.mixture=m", "data.frame_px=(16,24)", "data.eval_split=train[1:]")
    source = data.open_mixture(recipe(repository, tmp_path, *overrides), "train")
    assert list(data.statistics_of(source)) == ["bridge_lara", "lara_tabletop"]
    assert source.sources[0].index.spec.control_hz == 5


# Both datasets, then one of them, then both again.
STAGES = (
    "data.mixture=mine:both",
    "data.mixed_action_spaces=True",
    "data.eval_split=train[1:]",
    "data.batch_size=4",
    "train.stages=pretrain,explicit,action",
    "train.steps=6",
    "stages.pretrain.steps=2",
    "stages.explicit.steps=2",
    "stages.explicit.datasets=lara_tabletop",
    "stages.action.steps=2",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    "log.every_steps=1",
)


@pytest.fixture
def alike(root: Path) -> Path:
    """Both datasets with a split "train"."""
    shutil.rmtree(root / "joints")
    records = [[tabletop_record(7, 5), tabletop_record(8, 4)]]
    write_directory(root / "joints" / "2.0.0", "joints", TABLETOP_FEATURES, {"train": records})
    return root


def trained_on(workdir: Path) -> dict[str, set[str]]:
    """The datasets of each stage."""
    found: dict[str, set[str]] = {}
    with (workdir / "datasets.csv").open() as stream:
        for row in csv.DictReader(stream):
            found.setdefault(row["stage"], set()).add(row["dataset"])
    return {stage: {n for n in names if n[0] != "("} for stage, names in found.items()}


def test_a_stage_may_take_some_of_the_datasets(
    repository: Path, alike: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.use_tiny_model(monkeypatch.setattr)
    both = {"lara_tabletop", "joints"}
    whole, parted = alike / "whole", alike / "parted"
    state = train.train(recipe(repository, alike, *STAGES), whole)
    assert trained_on(whole) == {"pretrain": both, "explicit": {"lara_tabletop"}, "action": both}
    streams = {step: load_info(whole, step).stream for step in (2, 4, 6)}
    assert streams[2] == streams[6] != streams[4]

    # Stopped inside the stage that takes one, it goes on alike; not with another one.
    train.train(recipe(repository, alike, *STAGES), parted)
    for step in (4, 5, 6):
        shutil.rmtree(parted / "checkpoints" / str(step))
    other = "stages.explicit.datasets=joints"
    with pytest.raises(ValueError, match="not what this run has trained on"):
        train.train(recipe(repository, alike, *STAGES, other), parted)
    again = train.train(recipe(repository, alike, *STAGES), parted)
    assert digest(again.params) == digest(state.params)

    wrong = "stages.explicit.datasets=kuka"
    with pytest.raises(
        ValueError, match=r"explicit\.datasets names 'kuka'; the run has: joints, l"
    ):
        train.train(recipe(repository, alike, *STAGES, wrong), alike / "wrong")


def test_a_run_keeps_the_action_tokens_of_the_one_it_starts_from(
    repository: Path,
    alike: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny.use_tiny_model(monkeypatch.setattr)
    common = [*STAGES, "train.stages=explicit", "train.steps=2", "stages.explicit.datasets="]
    train.train(recipe(repository, alike, *common), alike / "first")
    start = f"init.path={alike / 'first'}"
    more = [*common, "seed=7", "data.mixture=", f"data.path={alike}/lara_tabletop/1.0.0"]
    train.train(recipe(repository, alike, *more), alike / "unlike")
    train.train(recipe(repository, alike, *more, start), alike / "second")
    assert f"action tokens are those of {alike / 'first'}" in capsys.readouterr().err
    first, unlike, second = (
        assemble.fast_from_text(load_info(alike / name).tokenizer).backend.to_str()
        for name in ("first", "unlike", "second")
    )
    assert first == second != unlike
    longer = [*more, start, "model.action_horizon=4"]
    train.train(recipe(repository, alike, *longer), alike / "longer")
    assert "are for chunks of (3, 7) and not used" in capsys.readouterr().err
