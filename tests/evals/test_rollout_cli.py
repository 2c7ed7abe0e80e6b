"""`lara eval`: what it prints and writes, and what it refuses."""

import importlib
import json
import queue
import subprocess
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mujoco")

from lara_jax.config import DataConfig
from lara_jax.evals import cli
from lara_jax.evals.tabletop.tasks import FAMILIES
from tests.serving.fakes import FakePolicy, contract, normalizer, running

KEYS = {
    "suite",
    "task",
    "episodes",
    "successes",
    "success_rate",
    "ci_low",
    "ci_high",
    "latent_slots",
    "latency_ms_p50",
}


class IdlePolicy:
    """Stays where it is; reads what `data` says."""

    data = DataConfig(resize_px=(16, 16))
    chunk = np.zeros((8, 7), np.float32)

    def __init__(self, latent_slots: int) -> None:
        self.latent_slots = latent_slots
        self.views = self.data.views
        self.recipe = types.SimpleNamespace(data=self.data)

    @classmethod
    def from_workdir(
        cls, workdir: Path, *, step: int | None, latent_slots: int | None, dataset: str | None
    ) -> "IdlePolicy":
        assert workdir.is_dir() and dataset is None and step in (None, 7)
        return cls(3 if latent_slots is None else latent_slots)

    def __call__(self, observations: Sequence[Any]) -> np.ndarray:
        for seen in observations:
            assert {seen[view].shape for view in self.views if "@" not in view} == {(16, 16, 3)}
        return np.tile(self.chunk, (len(observations), 1, 1))


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> type[IdlePolicy]:
    """A policy of a class of its own, in place of a trained one."""
    module = types.ModuleType("lara_jax.inference.policy")
    module.Policy = type("Mine", (IdlePolicy,), {})  # type: ignore[attr-defined]
    importlib.import_module("lara_jax.inference")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.Policy


def evaluate(tmp_path: Path, *options: str) -> int:
    return cli.main(["--workdir", str(tmp_path), *options])


@pytest.mark.usefixtures("policy")
def test_one_family_is_one_json_object_and_a_gif(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gif = tmp_path / "rollout.gif"
    options = ["--suite", "tabletop", "--episodes", "3", "--latent-slots", "1", "--parallel", "2"]
    options += ["--gif", str(gif), "--gif-episodes", "1", "--step", "7"]
    assert evaluate(tmp_path, *options, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert set(result) >= KEYS
    assert result["suite"] == "tabletop" and result["task"] == "place"
    assert result["split"] == "eval" and result["steps_mean"] == 60
    assert result["episodes"] == 3 and result["successes"] == 0 and result["success_rate"] == 0
    assert result["latent_slots"] == 1 and result["latency_ms_p50"] > 0
    with Image.open(gif) as animation:
        assert animation.size == (256, 296)  # one episode, though three were run


@pytest.mark.usefixtures("policy")
def test_several_families_are_a_line_each_and_one_for_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--families", "place,order", "--split", "eval_colours", "--episodes", "1"]
    out = tmp_path / "results"
    assert evaluate(tmp_path, *options, "--json", "--out", str(out)) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["task"] for line in lines] == ["place", "order", "all"]
    assert [line["episodes"] for line in lines] == [1, 1, 2]
    assert [line["steps_mean"] for line in lines] == [60, 120, 90]
    kept = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    assert [(line["task"], line["episode"]) for line in kept] == [("place", 0), ("order", 0)]
    assert kept[0]["phase"] == "not reached" and kept[1]["phase"] == "move 1: not reached"
    assert not kept[0]["success"] and kept[0]["steps"] == 60
    assert kept[0]["instruction"].startswith("put the ")


def test_the_episodes_of_a_cut_off_evaluation_are_told(tmp_path: Path) -> None:
    with (
        pytest.raises(
            ChildProcessError, match=r"worker 0 died; finished episodes are in .*s\.jsonl"
        ),
        cli.episodes_file(tmp_path) as file,
    ):
        assert file is not None
        file.write("one\n")
        raise ChildProcessError("worker 0 died")
    assert (tmp_path / "episodes.jsonl").read_text() == "one\n"


def arguments(**changed: Any) -> Any:
    given = {"families": None, "split": None, "image_size": None, "seed": 0} | changed
    return types.SimpleNamespace(**given)


def test_the_tabletop_is_as_the_policy_wants_it() -> None:
    views = ("wrist", "primary", "primary@-2")
    suite = cli.tabletop(arguments(families="all"), views, (96, 96))
    assert suite.tasks == tuple(FAMILIES)
    env = suite.make_env("place")
    observation, _ = env.reset(seed=suite.trial("place", 0).seed)
    assert observation["primary"].shape == observation["wrist"].shape == (96, 96, 3)
    assert cli.tabletop(arguments(image_size=24), views, ()).image_size_px == 24


@pytest.mark.parametrize(
    ("changed", "views", "size", "message"),
    [
        ({"families": "place,fold"}, (), (64, 64), "unknown family 'fold', allowed: place, stack"),
        ({"families": "place,place"}, (), (64, 64), "twice"),
        ({"split": "test"}, (), (64, 64), "unknown split 'test', allowed: val, eval, eval_colours"),
        ({"split": "train"}, (), (64, 64), "unknown split 'train'"),
        ({}, ("image_0@-1",), (64, 64), r"view 'image_0@-1', but .* cameras are: primary, wrist"),
        ({}, (), (), "give --image-size"),
        ({}, (), (64, 96), r"64 x 96 px.*give --image-size"),
        ({"image_size": 8}, (), (64, 64), "16"),
    ],
)
def test_the_tabletop_refuses(
    changed: dict[str, Any], views: tuple[str, ...], size: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cli.tabletop(arguments(**changed), ("primary", *views), size)


def serving(**changes: Any) -> dict[str, Any]:
    """What `running` needs to serve a policy for the tabletop at 16 px."""
    state = normalizer(["q99"] * 8, -1.0, 1.0)
    return {"contract": contract(views=("primary",), image_px=(16, 16), state=state)} | changes


def test_a_policy_server_says_what_its_policy_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    with running(**serving()) as server:
        options = ["--server", server.url, "--episodes", "1", "--html", str(page), "--json"]
        assert cli.main(options) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["task"], result["episodes"], result["latent_slots"]) == ("place", 1, 3)
    assert server.policy.calls[0][0].startswith("put the ")
    assert server.url in page.read_text() and "furthest phase" in page.read_text()


def test_a_server_that_is_lost_costs_the_episode_under_way_only(tmp_path: Path) -> None:
    """The first episode takes 15 calls; the server goes in the middle of the second."""
    urls: queue.Queue[str] = queue.Queue()
    enough = threading.Event()

    class Leaving(FakePolicy):
        def __call__(self, observations: Sequence[Any]) -> np.ndarray:
            if len(self.calls) == 20:
                enough.set()
            return super().__call__(observations)

    def serve() -> None:
        with running(Leaving(), **serving()) as server:
            urls.put(server.url)
            enough.wait(60)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    options = ["--server", urls.get(timeout=60), "--server-timeout", "0.5", "--parallel", "1"]
    with pytest.raises(ConnectionError, match=r"no answer .* tries: .*finished episodes are in "):
        cli.main([*options, "--episodes", "2", "--out", str(tmp_path)])
    thread.join(60)
    (line,) = (tmp_path / "episodes.jsonl").read_text().splitlines()
    assert (json.loads(line)["episode"], json.loads(line)["steps"]) == (0, 60)


def test_a_simulator_needs_no_jax_beside_a_server(repository: Path) -> None:
    code = (
        "import sys, lara_jax.evals.cli, lara_jax.evals.tabletop.suite, lara_jax.serving.client\n"
        "assert not {'jax', 'flax', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "kitchen"), "unknown suite 'kitchen', available: tabletop, offline"),
        (("--episodes", "0"), "--episodes must be at least 1, got 0"),
        (("--workers", "0"), "--workers must be at least 1, got 0"),
        (("--samples", "3"), "--samples does not go with --suite tabletop"),
        (("--suite", "offline", "--html", "page.html"), "--html does not go with --suite offline"),
        (("--server", "ws://a:1"), "either --workdir, .* or --server"),
        (("--token-file", "token"), "--token-file does not go with --workdir"),
        (("--server", "ws://a:1", "--step", "3"), "--step does not go with --server"),
    ],
)
def test_main_refuses(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cli.main(["--workdir", "nowhere", *options])


def test_an_action_that_is_not_finite_is_refused(tmp_path: Path, policy: type[IdlePolicy]) -> None:
    policy.chunk = np.full((8, 7), np.inf)
    with pytest.raises(ValueError, match=r"place episode 0, step 0: .*must be finite"):
        evaluate(tmp_path, "--episodes", "1")
