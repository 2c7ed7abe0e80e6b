"""The command line: its verbs, its exit codes, one clear line for a wrong call."""

import errno
import importlib
from collections.abc import Callable
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


def test_a_missing_extra_is_one_line_and_our_own_mistakes_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(message: str) -> Callable[..., None]:
        def function(*_: object) -> None:
            raise ImportError(message)

        return function

    monkeypatch.setattr("data_pipelines.cli.main", fail("install the extra (lara-jax[lerobot])"))
    assert main(["data", "index", "x"]) == 2
    assert capsys.readouterr().err == "lara data: install the extra (lara-jax[lerobot])\n"
    monkeypatch.setattr("data_pipelines.cli.main", fail("no module named 'data_pipelines.x'"))
    with pytest.raises(ImportError, match=r"data_pipelines\.x"):
        main(["data", "index", "x"])


def test_a_full_disk_is_one_line_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "page.html")

    monkeypatch.setattr("data_pipelines.cli.main", full)
    assert main(["data", "inspect", "x"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "lara data: [Errno 28] No space left on device: 'page.html'"
    ]


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
