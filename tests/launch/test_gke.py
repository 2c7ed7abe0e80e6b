"""GKE: XPK's command lines and the plain JobSet."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.launch.conftest import Launch, Programs, refused, words

JOBSET = ["lara-4b", "--image", "host/lara:1", "--accelerator", "v5p", "--topology", "4x4x4"]
COMMAND = ["lara", "train", "--config", "configs/bridge_4b.py", '--config.x=it\'s "$y"']


@pytest.fixture(scope="session")
def schema(repository: Path) -> jsonschema.Draft202012Validator:
    """What a JobSet may be."""
    text = (repository / "tests/launch/jobset_schema.yaml").read_text()
    return jsonschema.Draft202012Validator(yaml.safe_load(text))


def test_xpk_run(launch: Launch) -> None:
    run = launch(
        *("gke_xpk.sh", "run", "lara-4b", "--cluster", "c", "--tpu-type", "v5litepod-256"),
        *(
            "--num-slices",
            "2",
            "--image",
            "host/lara:1",
            "--zone",
            "z",
            "--dry-run",
            "--",
            *COMMAND,
        ),
    )
    [line] = words(run.stdout)
    environment = line.pop(8)
    assert environment.startswith("--env=LIBTPU_INIT_ARGS=--xla_")
    assert "fuse_all_reduce=true" in environment
    assert "data_parallel_all_reduce_opt=true" in environment
    assert line == [
        *("xpk", "workload", "create", "--workload=lara-4b", "--cluster=c"),
        *("--tpu-type=v5litepod-256", "--num-slices=2", "--docker-image=host/lara:1"),
        *("--max-restarts=50", "--restart-on-exit-codes=1"),
        *("--termination-grace-period-seconds=300", "--zone=z"),
        "--command=exec lara train --config configs/bridge_4b.py '--config.x=it'\\''s \"$y\"'",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "cluster --cluster c --tpu-type tpu7x-4x4x4 --num-slices 2 --reservation r",
            "xpk cluster create --cluster=c --tpu-type=tpu7x-4x4x4 --num-slices=2 --reservation=r",
        ),
        ("status a --cluster c", "xpk workload list --cluster=c --filter-by-job=a"),
        ("delete a --cluster c", "xpk workload delete --workload=a --cluster=c"),
        (
            "logs a --follow",
            "kubectl logs --all-containers --prefix --tail=1000 --follow "
            "--selector=jobset.sigs.k8s.io/jobset-name=a,jobset.sigs.k8s.io/job-index=0,"
            "batch.kubernetes.io/job-completion-index=0",
        ),
    ],
)
def test_xpk_is_called_as_printed(
    launch: Launch, programs: Programs, arguments: str, expected: str
) -> None:
    run = launch("gke_xpk.sh", *arguments.split(), "--dry-run")
    assert words(run.stdout) == [expected.split()]
    assert programs.calls() == []
    assert launch("gke_xpk.sh", *arguments.split()).returncode == 0
    assert programs.calls() == [expected.split()]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["frob"], ["'frob'", "cluster run status logs delete"]),
        (["run", "A_b"], ["'A_b'", "lower-case"]),
        (["run", "a", "--tpu-type", "v5p-8"], ["--cluster is missing"]),
        (["run", "a", "--cluster", "c"], ["--tpu-type is missing"]),
        (["run", "a", "--cluster", "c", "--tpu-type", "h100-8"], ["'h100-8'", "v5litepod-N"]),
        (["run", "a", "--cluster", "c", "--tpu-type", "v4-8"], ["--image is missing"]),
        (
            ["run", "a", "--cluster", "c", "--tpu-type", "v4-8", "--image", "i"],
            ["the command is missing"],
        ),
        (
            ["run", "a", "--cluster", "c", "--tpu-type", "v4-8", "--num-slices", "two"],
            ["'two'", "whole number"],
        ),
        (
            ["cluster", "--cluster", "c", "--tpu-type", "v4-8"],
            ["--spot, --on-demand, --reservation", "there are 0"],
        ),
        (["logs", "a", "--spot"], ["--spot", "logs", "cluster"]),
    ],
)
def test_wrong_calls_of_xpk_are_named(
    launch: Launch, arguments: list[str], parts: list[str]
) -> None:
    refused(launch("gke_xpk.sh", *arguments, "--dry-run"), parts)


def test_a_jobset_says_what_was_asked_for(
    launch: Launch, schema: jsonschema.Draft202012Validator
) -> None:
    run = launch(
        *("jobset.py", *JOBSET, "--slices", "2", "--queue", "q", "--spot", "--dry-run"),
        *("--", *COMMAND),
    )
    assert run.returncode == 0, run.stderr
    jobset = yaml.safe_load(run.stdout)
    schema.validate(jobset)
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    [job] = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 16
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    [container] = pod["containers"]
    assert container["command"] == COMMAND
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    [variable] = container["env"]
    assert variable["name"] == "LIBTPU_INIT_ARGS"
    # The cluster's business: GKE's webhook and JAX's cluster detection.
    assert "MEGASCALE" not in json.dumps(jobset)
    assert "COORDINATOR" not in json.dumps(jobset)


@pytest.mark.parametrize(
    ("accelerator", "topology", "more", "hosts", "chips", "label"),
    [
        ("v4", "2x2x4", [], 4, 4, "tpu-v4-podslice"),
        ("v5e", "16x16", [], 64, 4, "tpu-v5-lite-podslice"),
        ("v5e", "2x4", [], 2, 4, "tpu-v5-lite-podslice"),
        ("v5e", "2x4", ["--chips-per-host", "8"], 1, 8, "tpu-v5-lite-podslice"),
        ("v6e", "1x1", [], 1, 1, "tpu-v6e-slice"),
        ("tpu7x", "4x4x8", [], 32, 4, "tpu7x"),
    ],
)
def test_a_topology_is_so_many_hosts(
    launch: Launch,
    schema: jsonschema.Draft202012Validator,
    accelerator: str,
    topology: str,
    more: list[str],
    hosts: int,
    chips: int,
    label: str,
) -> None:
    run = launch(
        *("jobset.py", "a", "--image", "i", "--accelerator", accelerator, "--topology", topology),
        *(*more, "--dry-run", "--", "lara"),
    )
    jobset = yaml.safe_load(run.stdout)
    schema.validate(jobset)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == hosts
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label


def test_the_schema_refuses_what_kubernetes_would(
    launch: Launch, schema: jsonschema.Draft202012Validator
) -> None:
    jobset = yaml.safe_load(launch("jobset.py", *JOBSET, "--dry-run", "--", "lara").stdout)
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    del jobset["spec"]["replicatedJobs"][0]["name"]
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    container["containers"][0]["env"][0]["value"] = 1
    found = {error.validator for error in schema.iter_errors(jobset)}
    assert found == {"additionalProperties", "enum", "required", "type"}


def test_kubectl_gets_the_manifest(launch: Launch, programs: Programs, tmp_path: Path) -> None:
    dry = launch("jobset.py", *JOBSET, "--dry-run", "--", *COMMAND)
    assert programs.calls() == []
    got = tmp_path / "manifest"
    (programs.folder / "kubectl").write_text(
        f'#!/bin/bash\necho "$@" >"{got}"\ncat >>"{got}"\nexit 7\n'
    )
    real = launch("jobset.py", *JOBSET, "--", *COMMAND)
    assert real.returncode == 7
    assert got.read_text() == "apply -f -\n" + dry.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["Lara", *JOBSET[1:]], ["'Lara'", "lower-case"]),
        ([*JOBSET[:-1], "4x4"], ["'4x4'", "v5p", "3 numbers"]),
        ([*JOBSET[:-1], "2x3x1"], ["'2x3x1'", "6 chips", "hosts of 4"]),
        ([*JOBSET, "--chips-per-host", "8"], ["is 8", "[4]"]),
        ([*JOBSET, "--slices", "0"], ["--slices is 0", "at least 1"]),
        ([*JOBSET[:-1], "2x2x1", "--slices", "2"], ["2x2x1 is one host"]),
    ],
)
def test_wrong_jobsets_are_named(launch: Launch, arguments: list[str], parts: list[str]) -> None:
    refused(launch("jobset.py", *arguments, "--dry-run", "--", "lara"), parts)


def test_a_jobset_needs_a_command(launch: Launch) -> None:
    refused(launch("jobset.py", *JOBSET, "--dry-run"), ["the command is missing"])
