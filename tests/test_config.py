"""Recipes: what they say, what the command line may change, and how mistakes are told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lara_jax.config import (
    ModelConfig,
    Recipe,
    load_recipe,
    recipe_changes,
    recipe_from_dict,
    recipe_to_dict,
)
from lara_jax.curriculum import PAPER_ORDER, Stage, spans

RECIPES = sorted(path.stem for path in Path(__file__).parents[1].glob("configs/[!_]*.py"))


def load(repository: Path, name: str, *overrides: str) -> Recipe:
    return load_recipe(repository / "configs" / f"{name}.py", overrides)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json(repository: Path, name: str) -> None:
    recipe = load(repository, name)
    text = json.dumps(recipe_to_dict(recipe))
    assert recipe_from_dict(json.loads(text)) == recipe


def test_config_module_does_not_import_jax(repository: Path) -> None:
    code = (
        "import sys; from lara_jax.config import load_recipe; "
        "load_recipe('configs/debug.py'); print('jax' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True
    )
    assert run.stdout.strip() == "False", run.stderr


def test_overrides_are_read_as_the_type_they_replace(repository: Path) -> None:
    recipe = load(
        repository,
        "debug",
        "data.path=/data/a=b",
        "train.steps=1_000",
        "optimizer.clip_norm=2",
        "model.attend_padding=true",
        "model.latent_slots=6",
        "model.slots_per_component=(1, 2, 3)",
        "data.views=image_0,image_1",
        "stages.action.visual_weight=0.5",
        "train.stages=explicit,action",
    )
    assert recipe.data.path == "/data/a=b"
    assert recipe.train.steps == 1000
    assert recipe.optimizer.clip_norm == 2.0 and type(recipe.optimizer.clip_norm) is float
    assert recipe.model.attend_padding is True
    assert recipe.model.slots_per_component == (1, 2, 3)
    assert recipe.data.views == ("image_0", "image_1")
    assert [stage.name for stage in recipe.stages] == ["explicit", "action"]
    assert recipe.stages[1].visual_weight == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=3", "did you mean config.train.steps"),
        ("stages.action.visual_wieght=3", "did you mean config.stages.action.visual_weight"),
        ("train.steps=many", "config.train.steps must be int, got 'many'"),
        ("mesh.fsdp=2.5", "config.mesh.fsdp must be int"),
        ("teacher.enabled=1", "must be true or false"),
        ("model.latent_slots=33", "latent_slots must be 0 to 32, got 33"),
        ("model.slots_per_component=2,2,2", "sums to 6, but latent_slots is 3"),
        ("model.img_next_tokens=15", "square number, got 15"),
        ("model.box_decimals=5", "box_decimals must be 1 to 4, got 5"),
        ("model.backbone=5b", "must be one of debug, 2b, 4b, 8b; got '5b'"),
        ("data.views=(1, 2)", "config.data.views must be str"),
        ("train.accumulate_steps=3", "64 is not a multiple of train.accumulate_steps 3"),
        ("train.stages=explicit,sleep", "train.stages names"),
        ("teacher.enabled=false", "teacher.enabled is False"),
        ("stages.explicit.action_weight=1.0", "trains='full'"),
        ("seed", "--config.key=value"),
        ("seed=-1", "seed must be 0 to"),
    ],
)
def test_mistakes_are_named(repository: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(repository, "debug", override)
    assert message in str(error.value)


def test_a_missing_recipe_and_one_with_an_unknown_key(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        load_recipe(tmp_path / "nothing.py")
    (tmp_path / "odd.py").write_text(
        "from lara_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.stages.only = {'token_weight': 1.0}\n"
        "    config.train.stages = ('only',)\n"
        "    config.data.batchsize = 4\n"
        "    return config.lock()\n"
    )
    with pytest.raises(ValueError, match=r"config\.data\.batchsize.*config\.data\.batch_size"):
        load_recipe(tmp_path / "odd.py")
    (tmp_path / "broken.py").write_text("def get_config(:")
    with pytest.raises(ValueError, match=r"broken\.py cannot be read: SyntaxError"):
        load_recipe(tmp_path / "broken.py")


def test_changes_are_listed(repository: Path) -> None:
    old, new = load(repository, "debug"), load(repository, "debug", "train.steps=7")
    assert recipe_changes(old, new) == [f"train.steps: {old.train.steps} -> 7"]
    assert recipe_changes(old, old) == []


def test_dataclasses_are_frozen_and_checked() -> None:
    with pytest.raises(AttributeError):
        ModelConfig().latent_slots = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="component_order"):
        ModelConfig(component_order=("SUBTASK", "SUBTASK"))
    assert ModelConfig(component_order=("REASON",)).component_order == ("REASON",)


@pytest.mark.parametrize("steps", [1, 3, 7, 100, 50_000])
def test_every_step_has_exactly_one_stage(repository: Path, steps: int) -> None:
    stages = load(repository, "bridge_4b").stages
    spanned = spans(stages, steps)
    assert [start for _, start, _ in spanned] == [0, *(end for _, _, end in spanned[:-1])]
    assert spanned[-1][2] == steps
    assert all(start < end for _, start, end in spanned)
    order = [stages.index(stage) for stage, _, _ in spanned]
    assert order == sorted(order)


def test_bridge_has_the_steps_of_the_reference(repository: Path) -> None:
    recipe = load(repository, "bridge_4b")
    lengths = [end - start for _, start, end in spans(recipe.stages, recipe.train.steps)]
    assert lengths == [10_000, 5_000, 5_000, 10_000, 20_000]
    assert tuple(stage.name for stage in recipe.stages) == PAPER_ORDER
    assert [stage.reasoning_stage for stage in recipe.stages] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0, "token_weight": 1.0}, "share must be positive"),
        ({"reasoning_stage": 5, "token_weight": 1.0}, "0 to 4, got 5"),
        ({"trains": "head", "token_weight": 1.0}, "trains must be one of"),
        ({}, "loss weights"),
        ({"token_weight": -1.0, "action_weight": 1.0}, "loss weights"),
        ({"trains": "action_only", "token_weight": 1.0}, "needs an action_weight"),
        (
            {"trains": "action_only", "token_weight": 1.0, "action_weight": 1.0},
            "token_weight 1.0 .* would train nothing",
        ),
    ],
)
def test_a_stage_checks_itself(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(name="s", **values)
