"""`lara serve`: wrong calls, start and stop as a process, and a real policy behind it."""

import contextlib
import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lara_jax import cli
from lara_jax.checkpoint import CheckpointStore
from lara_jax.inference.policy import Policy
from lara_jax.serving import access
from lara_jax.serving.cli import contract_of, main
from lara_jax.serving.client import PolicyClient
from tests.inference.test_policy import RECIPE, info, observation, params, statistics
from tests.serving.fakes import running

# `lara serve` with a policy that needs no compilation.
CHILD = """
import sys
from types import SimpleNamespace
import numpy as np
from lara_jax import cli
from lara_jax.inference import policy
from tests.inference.test_policy import RECIPE, statistics
from tests.serving.fakes import FakePolicy

class Stub(FakePolicy):
    recipe, statistics, views, latent_slots = RECIPE, statistics(), ("primary",), 3

    def __init__(self):
        super().__init__(horizon=RECIPE.model.action_horizon)

    @classmethod
    def from_workdir(cls, workdir, **options):
        print("loading", workdir, options, flush=True)
        return cls()

policy.Policy = Stub
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines: --token-file is needed"),
        (["--host", "::"], "--token-file is needed"),
        (["--host", "robot.local"], "--token-file is needed"),
        (["--tls-cert", "cert.pem"], "--tls-cert and --tls-key go together"),
        (["--idle-seconds", "0"], "idle_seconds must be above 0"),
        (["--max-connections", "1000"], "max_connections is 1000"),
    ],
)
def test_wrong_calls_are_told_in_a_line(arguments, told, capsys):
    assert cli.main(["serve", "--workdir", "none", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_workdir_that_is_not_there(capsys, tmp_path):
    assert cli.main(["serve", "--workdir", str(tmp_path / "none"), "--port", "0"]) == 2
    assert "none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--port", "0"])


@pytest.mark.parametrize("token", ["", "short", "0123456789 abcdef", "0123456789abcdéf"])
def test_a_token_must_be_a_secret(token, tmp_path):
    path = tmp_path / "token"
    path.write_text(token)
    with pytest.raises(ValueError, match="at least 16 printable ASCII characters"):
        access.read_token(path)


def test_what_counts_as_loopback(token_file):
    inside = ["127.0.0.1", "127.8.8.8", "::1", "localhost"]
    outside = ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org", ""]
    assert [access.is_loopback(host) for host in inside + outside] == [True] * 4 + [False] * 5
    assert access.read_token(token_file) == "0123456789abcdef"


def test_starts_answers_and_stops(repository: Path, token_file: Path):
    command = [sys.executable, "-c", CHILD, "serve", "--workdir", "runs/x", "--port", "0"]
    options = ["--token-file", str(token_file), "--latent-slots", "2", "--image-size", "48", "64"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen([*command, *options], cwd=repository, **pipes)
        )
        stack.callback(process.kill)
        ready = process.stderr.readline()
        assert ready.startswith("lara serve: ready on ws://127.0.0.1:"), process.stderr.read()
        with PolicyClient(
            ready.split()[-1], token="0123456789abcdef", timeout_seconds=20
        ) as client:
            assert client.metadata["image_px"] == [48, 64]
            seen = observation() | {"primary": np.zeros((48, 64, 3), np.uint8)}
            assert client([seen] * 3).shape == (3, 8, 7)
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert errors == ""
    assert "'latent_slots': 2" in output and "'dataset': None" in output


def with_data(**changes) -> SimpleNamespace:
    """A policy of a recipe whose data section is another."""
    data = dataclasses.replace(RECIPE.data, **changes)
    recipe = dataclasses.replace(RECIPE, data=data)
    return SimpleNamespace(recipe=recipe, statistics=statistics(), views=data.views, latent_slots=3)


def test_the_contract_of_a_policy():
    contract = contract_of(with_data(views=("primary", "wrist")), missing_state="mean")
    assert contract.dataset == "lara_tabletop" and contract.views == ("primary", "wrist")
    assert contract.image_px == (64, 64) and not contract.any_image_size
    assert (contract.action_horizon, contract.latent_slots, contract.missing_state) == (
        8,
        3,
        "mean",
    )
    assert contract.action.statistics == statistics().action
    assert contract.state.statistics == statistics().state
    assert contract_of(with_data(), image_px=(96,)).image_px == (96, 96)
    assert contract_of(with_data(), image_px=(96, 64)).image_px == (96, 64)
    resized = contract_of(with_data(frame_px=(128, 96)))
    assert resized.image_px == (128, 96) and resized.any_image_size
    with pytest.raises(ValueError, match="brings every frame to 128 x 96"):
        contract_of(with_data(frame_px=(128, 96)), image_px=(64,))
    with pytest.raises(ValueError, match="give --image-size"):
        contract_of(with_data(resize_px=()))
    with pytest.raises(ValueError, match="one side, or height and width"):
        contract_of(with_data(), image_px=(1, 2, 3))


@pytest.mark.slow
def test_a_checkpoint_acts_over_the_socket_as_in_the_process(tmp_path: Path):
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        store.save_params(params(), info())
    served, alone = (Policy.from_workdir(tmp_path) for _ in range(2))
    seen = [observation(0), observation(1), observation(2)]
    expected = [alone(pair) for pair in (seen[:2], [seen[2], seen[2]])]
    with (
        running(served, contract=contract_of(served), batch_size=2) as run,
        PolicyClient(run.url, timeout_seconds=300) as client,
    ):
        chunks = client(seen)
        np.testing.assert_array_equal(chunks[:2], expected[0])
        np.testing.assert_array_equal(chunks[2], expected[1][0])
        with pytest.raises(ValueError, match="prefix_tokens allows"):
            client([seen[0] | {"instruction": "move " * 150}])
        assert client(seen[:1]).shape == (1, 8, 7)
