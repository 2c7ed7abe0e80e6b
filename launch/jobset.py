#!/usr/bin/env python3
"""Fills in `launch/jobset.yaml` and hands it to kubectl: one JobSet, one training run.

    python launch/jobset.py lara-4b --image IMAGE --accelerator v5p --topology 4x4x4 --slices 2 \
        -- lara train --config configs/bridge_4b.py --workdir gs://bucket/runs/bridge_4b

`--dry-run` prints the manifest. Without it the manifest goes to `kubectl apply`; from then on the
run is kubectl's: `kubectl get jobset`, `kubectl logs`, `kubectl delete jobset`. Needs nothing but
Python, bash and kubectl.

A topology says how many hosts there are: the product of its sides is the number of chips, and a
host holds four of them (one where the topology is a single chip; 2x4 of v5e and v6e also comes as
one host of eight, `--chips-per-host 8`).

Sources: GKE, "About TPUs in GKE" (accelerators, machine types, topologies); XPK,
src/xpk/core/system_characteristics.py (the same as a table).
"""

import argparse
import json
import math
import re
import string
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Platform of xla_flags.sh: GKE's name of the accelerator, sides of a topology.
ACCELERATORS = {
    "v4": ("tpu-v4-podslice", 3),
    "v5e": ("tpu-v5-lite-podslice", 2),
    "v5p": ("tpu-v5p-slice", 3),
    "v6e": ("tpu-v6e-slice", 2),
    "tpu7x": ("tpu7x", 3),
}


def hosts_of(accelerator: str, topology: str, chips_per_host: int | None) -> tuple[int, int]:
    """Hosts of a slice and chips of a host.

    Args:
      accelerator: a key of `ACCELERATORS`.
      topology: chips along each side: "4x4x4".
      chips_per_host: None for what GKE gives unless asked.

    Raises:
      ValueError: there is no such slice.
    """
    _, sides = ACCELERATORS[accelerator]
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (sides - 1), topology):
        raise ValueError(
            f"--topology is {topology!r}; for {accelerator} it must be {sides} numbers joined by x"
        )
    chips = math.prod(int(side) for side in topology.split("x"))
    per_host = chips_per_host or min(chips, 4)
    allowed = [1] if chips == 1 else [4]
    if accelerator in ("v5e", "v6e") and topology == "2x4":
        allowed.append(8)
    if per_host not in allowed:
        raise ValueError(
            f"--chips-per-host is {per_host}; for {accelerator} {topology} it must be one of "
            f"{allowed}"
        )
    if chips % per_host:
        raise ValueError(
            f"--topology is {topology!r}, {chips} chips; it must fill hosts of {per_host}"
        )
    return chips // per_host, per_host


def environment(accelerator: str, slices: int) -> list[dict[str, str]]:
    """The platform's variables from `xla_flags.sh`, as Kubernetes lists them."""
    printed = subprocess.run(
        ["bash", str(HERE / "xla_flags.sh"), accelerator, str(slices)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    pairs = [line.split("=", 1) for line in printed.splitlines()]
    return [{"name": name, "value": value} for name, value in pairs]


def manifest(arguments: argparse.Namespace) -> str:
    """The JobSet as YAML.

    Raises:
      ValueError: an argument is not allowed.
    """
    name = arguments.name
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise ValueError(
            f"NAME is {name!r}; it must be lower-case letters, digits and dashes, at most 40, a "
            "letter first"
        )
    for option, given, least in (
        ("--slices", arguments.slices, 1),
        ("--max-restarts", arguments.max_restarts, 0),
    ):
        if given < least:
            raise ValueError(f"{option} is {given}; it must be at least {least}")
    if not arguments.command:
        raise ValueError("the command is missing: jobset.py NAME ... -- COMMAND...")
    hosts, chips_per_host = hosts_of(
        arguments.accelerator, arguments.topology, arguments.chips_per_host
    )
    if arguments.slices > 1 and hosts == 1:
        raise ValueError(
            f"--slices is {arguments.slices}, but {arguments.topology} is one host: GKE joins only "
            "slices of several hosts"
        )
    label, _ = ACCELERATORS[arguments.accelerator]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": arguments.topology,
    }
    if arguments.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    values: dict[str, object] = {
        "name": name,
        "labels": {"kueue.x-k8s.io/queue-name": arguments.queue} if arguments.queue else {},
        "max_restarts": arguments.max_restarts,
        "slices": arguments.slices,
        "hosts": hosts,
        "chips_per_host": chips_per_host,
        "service_account": arguments.service_account,
        "node_selector": selector,
        "image": arguments.image,
        "command": arguments.command,
        "environment": environment(arguments.accelerator, arguments.slices),
    }
    template = string.Template((HERE / "jobset.yaml").read_text())
    # JSON is YAML, and quotes whatever a command contains.
    return template.substitute({key: json.dumps(value) for key, value in values.items()})


def parser() -> argparse.ArgumentParser:
    """The arguments; what follows `--` is the command."""
    made = argparse.ArgumentParser(
        prog="jobset.py", description="One training run on GKE's TPUs as a JobSet."
    )
    made.add_argument("name", help="of the JobSet")
    made.add_argument("--image", required=True, help="built by launch/docker/build.sh tpu")
    made.add_argument("--accelerator", required=True, choices=ACCELERATORS)
    made.add_argument("--topology", required=True, help="of one slice, in chips: 4x4x4")
    made.add_argument("--slices", type=int, default=1, help="joined by the data-centre network")
    made.add_argument("--chips-per-host", type=int, help="8 for 2x4 of v5e and v6e as one host")
    made.add_argument("--max-restarts", type=int, default=50)
    made.add_argument("--queue", help="a LocalQueue of Kueue, where the cluster has Kueue")
    made.add_argument("--service-account", default="default", help="with access to the buckets")
    made.add_argument("--spot", action="store_true", help="on spot node pools only")
    made.add_argument("--dry-run", action="store_true", help="print the manifest")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Renders, and applies unless told not to. Returns the exit status: 2 on a wrong call."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    arguments = parser().parse_args(words[:split])
    arguments.command = words[split + 1 :]
    try:
        text = manifest(arguments)
    except ValueError as error:
        print(f"jobset.py: {error}", file=sys.stderr)
        return 2
    if arguments.dry_run:
        print(text, end="")
        return 0
    return subprocess.run(
        ["kubectl", "apply", "-f", "-"], input=text, text=True, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
