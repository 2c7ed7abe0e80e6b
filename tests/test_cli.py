"""The command line: its verbs, its exit codes, one clear line for a wrong call."""

import importlib
from pathlib import Path

import pytest

from lara_jax.cli import VERBS, main


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb} " in printed for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_function(verb: str) -> None:
    module, function, line = VERBS[verb]
    assert callable(getattr(importlib.import_module(module), function))
    assert line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no verb 'trian'; there are train, "),
        (["train", "--config", "nothing.py", "--workdir", "W"], "no recipe at nothing.py"),
        (["train", "--config", "RECIPE", "--workdir", "W"], "config.data.path is empty"),
        (["train", "--config", "RECIPE", "--workdir", "W", "--steps=3"], "arguments: --steps=3"),
        (
            ["train", "--config", "RECIPE", "--workdir", "W", "--config.train.stps=3"],
            "did you mean config.train.steps?",
        ),
        (["checkpoint", "verify", "W"], "no checkpoint in"),
    ],
)
def test_a_wrong_call_is_one_line_and_code_2(
    repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    places = {"RECIPE": str(repository / "configs" / "debug.py"), "W": str(tmp_path / "run")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
