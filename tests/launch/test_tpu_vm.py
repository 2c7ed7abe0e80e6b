"""`launch/tpu_vm.sh`: the gcloud commands it prints and runs, and what workers then do."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.launch.conftest import Launch, Programs, refused, words

QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
EVERYWHERE = ["--node=all", "--worker=all", "--batch-size=all"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "create pod --accelerator-type v5p-64 --spot",
            "create pod --accelerator-type=v5p-64 --runtime-version=v2-alpha-tpuv5 --node-id=pod "
            "--spot",
        ),
        (
            "create pod --accelerator-type v5litepod-256 --node-count 2 --reserved --zone z "
            "--project p -- --internal-ips",
            "create pod --accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite "
            "--node-count=2 --node-prefix=pod --reserved --internal-ips --zone=z --project=p",
        ),
        (
            "create pod --topology 2x2x4 --type v4",
            "create pod --type=v4 --topology=2x2x4 --runtime-version=tpu-ubuntu2204-base "
            "--node-id=pod",
        ),
        (
            "create pod --accelerator-type v6e-16 --runtime-version other",
            "create pod --accelerator-type=v6e-16 --runtime-version=other --node-id=pod",
        ),
        ("status pod --zone z", "describe pod --format=value(state.state) --zone=z"),
        ("delete pod -- --quiet", "delete pod --force --quiet"),
    ],
)
def test_a_request_is_one_gcloud_command(launch: Launch, arguments: str, expected: str) -> None:
    before, dashes, after = arguments.partition(" -- ")
    run = launch("tpu_vm.sh", *before.split(), "--dry-run", *(dashes + after).split())
    assert run.returncode == 0, run.stderr
    assert words(run.stdout) == [[*QUEUED, *expected.split()]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["workers"],
            "hostname; systemctl show lara --property=ActiveState,NRestarts,ExecMainStatus",
        ),
        (["stop"], "sudo systemctl stop lara"),
    ],
)
def test_all_workers_are_asked(launch: Launch, arguments: list[str], expected: str) -> None:
    run = launch("tpu_vm.sh", *arguments, "pod", "--dry-run", "--tunnel-through-iap")
    assert words(run.stdout) == [
        [*QUEUED, "ssh", "pod", *EVERYWHERE, f"--command={expected}", "--tunnel-through-iap"]
    ]


def test_logs_are_of_one_worker(launch: Launch) -> None:
    run = launch(
        "tpu_vm.sh", "logs", "pod", "--follow", "--node", "1", "--worker", "3", "--dry-run"
    )
    [line] = words(run.stdout)
    assert line[5:8] == ["pod", "--node=1", "--worker=3"]
    assert "journalctl --unit=lara" in line[-1]
    assert line[-1].endswith("--follow")


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "pod", "--accelerator-type", "v5p-8", "--node-count", "3"],
        ["sync", "pod", "--revision", "HEAD"],
        ["sync", "pod", "--pip", "lara-jax[tpu]==0.1.0"],
        ["logs", "pod"],
        ["run", "pod", "--accelerator-type", "v5p-8", "--", "lara", "train", "--config", "it's $x"],
        ["delete", "pod"],
    ],
)
def test_a_dry_run_prints_what_would_run(
    launch: Launch, programs: Programs, tmp_path: Path, arguments: list[str]
) -> None:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    dry = launch(
        "tpu_vm.sh", *arguments[:split], "--dry-run", *arguments[split:], TMPDIR=str(tmp_path)
    )
    assert dry.returncode == 0, dry.stderr
    assert programs.calls() == []
    real = launch("tpu_vm.sh", *arguments, TMPDIR=str(tmp_path))
    assert real.returncode == 0, real.stderr
    assert programs.calls() == [line for line in words(dry.stdout) if line[0] == "gcloud"]


def on_worker(programs: Programs, home: Path, run: subprocess.CompletedProcess[str]) -> None:
    """Does what a dry run's ssh would do on a worker whose home is `home`."""
    [line] = [line for line in words(run.stdout) if "ssh" in line]
    [command] = [word.removeprefix("--command=") for word in line if word.startswith("--command=")]
    subprocess.run(
        ["bash", "-c", command],
        env={"HOME": str(home), "PATH": f"{programs.folder}:/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        check=True,
        cwd=home,
    )


def test_a_worker_starts_the_very_command(
    launch: Launch, programs: Programs, tmp_path: Path
) -> None:
    given = ["lara", "train", '--config.prompt=it\'s "$HOME"; rm x', "--config.list=(1, 2)"]
    run = launch(
        "tpu_vm.sh", "run", "pod", "--accelerator-type", "v5litepod-8", "--dry-run", "--", *given
    )
    on_worker(programs, tmp_path, run)
    [call] = programs.calls()
    assert call[:3] == ["sudo", "systemd-run", "--unit=lara"]
    assert call[call.index("--") + 1 :] == ["/usr/bin/env", *given]
    assert f"--working-directory={tmp_path}/lara_jax" in call
    assert "--property=RestartPreventExitStatus=2" in call
    [flags] = [word for word in call if word.startswith("--setenv=LIBTPU_INIT_ARGS=")]
    assert "fuse_all_reduce=true" in flags
    assert "data_parallel" not in flags


def test_slices_get_their_flags(launch: Launch) -> None:
    run = launch(
        *("tpu_vm.sh", "run", "pod", "--accelerator-type", "v5p-8", "--node-count", "2"),
        *("--dry-run", "--", "lara"),
    )
    assert "--xla_tpu_enable_data_parallel_all_reduce_opt=true" in run.stdout


def archive(path: Path, names: list[str]) -> None:
    """Writes a revision with these files; its make_env.sh notes how it was called."""
    files = dict.fromkeys(names, b"") | {
        "launch/make_env.sh": b'echo "$PYTHON $*" >>made; touch .venv',
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_a_worker_holds_the_revision_that_was_sent_last(
    launch: Launch, programs: Programs, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    (home / ".local/bin").mkdir(parents=True)
    uv = home / ".local/bin/uv"
    uv.write_text('#!/bin/bash\n[ "$2" != find ] || echo the-python\n')
    uv.chmod(0o755)
    run = launch("tpu_vm.sh", "sync", "pod", "--revision", "HEAD", "--dry-run")
    for names in (["a.py", "sub/b c.py"], ["a.py"]):
        archive(home / "lara_jax.tar.gz", names)
        on_worker(programs, home, run)
        (home / "lara_jax/runs").mkdir(exist_ok=True)
    there = {path.name for path in (home / "lara_jax").rglob("*") if path.is_file()}
    assert there == {"a.py", "make_env.sh", ".sent", ".venv", "made"}
    assert (home / "lara_jax/runs").is_dir()
    made = (home / "lara_jax/made").read_text().splitlines()
    assert made == ["the-python .venv requirements/tpu.txt requirements/cloud.txt"] * 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["frob"], ["'frob'", "create status sync run logs workers stop delete"]),
        (["create"], ["NAME is ''"]),
        (["create", "Pod"], ["'Pod'", "lower-case"]),
        (["create", "pod"], ["--accelerator-type is missing"]),
        (["create", "pod", "--accelerator-type", "v5e-16"], ["'v5e-16'", "v5litepod-N"]),
        (["create", "pod", "--accelerator-type", "tpu7x-8"], ["'tpu7x-8'", "GKE only"]),
        (["create", "pod", "--type", "v7", "--topology", "4x4"], ["'v7'", "v4 v5litepod v5p v6e"]),
        (["create", "pod", "--type", "v4", "--topology", "4by4"], ["'4by4'", "2x2x4"]),
        (["create", "pod", "--accelerator-type", "v4-8", "--node-count", "0"], ["'0'", "from 1"]),
        (["create", "pod", "--accelerator-type", "v4-8", "--spot", "--reserved"], ["exclude"]),
        (["create", "pod", "--zone"], ["--zone needs a value"]),
        (["create", "pod", "--zone", "--spot"], ["--zone needs a value"]),
        (["logs", "pod", "--spot"], ["--spot", "logs", "create"]),
        (["logs", "pod", "--worker", "all"], ["'all'", "from 0"]),
        (["create", "pod", "--preemptible"], ["'--preemptible'", "--help"]),
        (["run", "pod", "--accelerator-type", "v4-8"], ["the command is missing"]),
        (["sync", "pod", "--revision", "nosuch"], ["'nosuch'", "revision"]),
        (["sync", "pod", "--revision", "HEAD", "--pip", "lara-jax"], ["exclude"]),
    ],
)
def test_wrong_calls_are_named(
    launch: Launch, programs: Programs, arguments: list[str], parts: list[str]
) -> None:
    refused(launch("tpu_vm.sh", *arguments), parts)
    assert programs.calls() == []
