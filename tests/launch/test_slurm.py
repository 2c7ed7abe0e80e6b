"""`launch/slurm.sbatch`: what a job runs, and when it goes back to the queue."""

import inspect
import re
from pathlib import Path

import jax._src.distributed
import pytest
from jax._src.clusters import slurm_cluster

from tests.launch.conftest import Launch, Programs, refused, words

JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_ON_NODE": "192",
    "SLURM_NTASKS_PER_NODE": "8",
}
COMMAND = ["lara", "train", "--config", "it's $x"]


def step(tasks: int, cpus: int) -> list[str]:
    """The srun of a job of four nodes."""
    return [
        *("srun", "--nodes=4", f"--ntasks={4 * tasks}", f"--ntasks-per-node={tasks}"),
        *(f"--cpus-per-task={cpus}", "--gpu-bind=none", "--kill-on-bad-exit=1", "--label"),
        *COMMAND,
    ]


def test_a_process_per_gpu(launch: Launch) -> None:
    run = launch("slurm.sbatch", "--dry-run", *COMMAND, **JOB)
    assert run.returncode == 0, run.stderr
    *exports, srun, requeue = words(run.stdout)
    assert srun == step(8, 24)
    assert requeue == ["scontrol", "requeue", "17"]
    names = [line[1].split("=")[0] for line in exports if line[0] == "export"]
    assert names[:3] == ["XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "NCCL_DEBUG"]
    assert "JAX_LOCAL_DEVICE_IDS" not in names


def test_a_process_per_node(launch: Launch) -> None:
    run = launch("slurm.sbatch", "--dry-run", *COMMAND, **JOB, LARA_PROCESS_PER="node")
    *exports, srun, _ = words(run.stdout)
    assert srun == step(1, 192)
    assert ["export", "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7"] in exports


def test_jax_reads_what_the_job_relies_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "JAX_LOCAL_DEVICE_IDS" in inspect.getsource(jax._src.distributed)
    for name, value in {
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "gpu[03-06]",
        "SLURM_NTASKS": "32",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    cluster = slurm_cluster.SlurmCluster
    assert cluster.is_env_present()
    assert cluster.get_coordinator_address(None, None) == f"gpu03:{65535 - 4096 + 1 + 17}"
    assert (cluster.get_process_count(), cluster.get_process_id()) == (32, 9)
    assert cluster.get_local_process_id() == 1


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [
        ("0", None, False),
        ("1", None, True),
        ("2", None, False),
        ("137", "19", True),
        ("1", "20", False),
    ],
)
def test_a_stopped_job_goes_back_to_the_queue(
    launch: Launch, programs: Programs, status: str, restarts: str | None, requeued: bool
) -> None:
    programs.write("srun", status=int(status))
    more = {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
    run = launch("slurm.sbatch", *COMMAND, **JOB, **more)
    assert run.returncode == int(status)
    expected = [step(8, 24)]
    if requeued:
        expected.append(["scontrol", "requeue", "17"])
    assert programs.calls() == expected


def test_sbatch_is_told_to_warn_and_to_requeue(repository: Path) -> None:
    text = (repository / "launch/slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH (--\S+)$", text, re.MULTILINE)
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append", "--exclusive"} <= set(options)
    # sbatch reads no further than the first command.
    assert text.index("set -euo") > text.rindex("#SBATCH")


@pytest.mark.parametrize(
    ("arguments", "variables", "parts"),
    [
        (["--dry-run"], {}, ["the command is missing"]),
        (["--nodes=2", "lara"], {}, ["'--nodes=2'", "before launch/slurm.sbatch"]),
        (["lara"], {}, ["no SLURM job", "--dry-run"]),
        (["lara"], {"SLURM_JOB_ID": "1"}, ["SLURM_GPUS_ON_NODE", "--gpus-per-node"]),
        (["--dry-run", "lara"], {"LARA_PROCESS_PER": "core"}, ["'core'", "gpu node"]),
        (["--dry-run", "lara"], {"LARA_MAX_REQUEUES": "many"}, ["'many'", "whole number"]),
        (["--dry-run", "lara"], {"SLURM_NTASKS_PER_NODE": "1"}, ["is 1", "8 GPUs"]),
        (["--dry-run", "lara"], {"SLURM_SUBMIT_DIR": "/"}, ["/", "repository's root"]),
    ],
)
def test_wrong_calls_are_named(
    launch: Launch, arguments: list[str], variables: dict[str, str], parts: list[str]
) -> None:
    refused(launch("slurm.sbatch", *arguments, **variables), parts)
