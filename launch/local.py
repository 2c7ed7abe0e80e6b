"""Several processes on this machine, as one run.

    python launch/local.py -n N [--devices-per-process D] [--restarts R] [--dry-run] -- COMMAND...
    python launch/local.py -n 2 -- lara train --config configs/debug.py --workdir runs/debug

The processes find each other as they would on a cluster (`lara_jax.cluster`). Each has its share of
the GPUs in CUDA_VISIBLE_DEVICES, or of the machine; without GPUs, or with --devices-per-process, it
has CPU devices.

When one of them fails or is killed, the others notice and end; what is left after `LEFT_SECONDS` is
killed. Then all are started again, --restarts times, and go on from their last checkpoint. A wrong
call (exit status 2) is not repeated. SIGTERM and Ctrl-C ask all of them to save and end; the second
time they are killed.

Each line of output has the number of its process in front. Ends with the status of the process that
failed first, 0 when there is none.
"""

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

WRONG_CALL = 2
# More than the heartbeats of `lara_jax.cluster` need to tell that a process is gone.
LEFT_SECONDS = 45.0
POLL_SECONDS = 0.1
# XLA's CPU devices wait 40 s for each other, which many of them on few cores may exceed; one that
# waits occupies a thread of XLA's pool, which has as many as NPROC says.
CPU_FLAGS = (
    "--xla_force_host_platform_device_count={}",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
)
CPU_THREADS = 64


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What each of the processes computes on.

    Attributes:
      gpus: names of the GPUs of each process; () for CPU devices.
      cpu_devices: of each process.
    """

    gpus: tuple[str, ...] = ()
    cpu_devices: int = 1

    def variables(self, processes: int, number: int) -> dict[str, str]:
        """Of the environment of one process."""
        if self.gpus:
            share = len(self.gpus) // processes
            own = self.gpus[number * share : (number + 1) * share]
            return {"CUDA_VISIBLE_DEVICES": ",".join(own)}
        flags = " ".join(CPU_FLAGS).format(self.cpu_devices)
        return {
            "JAX_PLATFORMS": "cpu",
            "NPROC": str(CPU_THREADS),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        }


class Group:
    """The processes of one start."""

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]]) -> None:
        self._processes = [
            # Ctrl-C in a terminal must reach this program only.
            subprocess.Popen(
                command,
                env={**os.environ, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            for variables in environments
        ]
        self._threads = [
            threading.Thread(target=_prefix, args=(f"[{number}] ", source, target))
            for number, process in enumerate(self._processes)
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        for thread in self._threads:
            thread.start()

    def statuses(self) -> list[int | None]:
        """Exit status of each; minus the signal's number for a killed one, None while it runs."""
        return [process.poll() for process in self._processes]

    def send(self, number: int) -> None:
        """A signal to all that run, and to the processes they have started."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def kill(self) -> None:
        """Ends all that run, also stopped ones, and waits for them."""
        self.send(signal.SIGKILL)
        for thread in (*self._processes, *self._threads):
            thread.wait() if isinstance(thread, subprocess.Popen) else thread.join()


class Stops:
    """SIGTERM and SIGINT of this program: how many there were."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


def follow(group: Group, stops: Stops) -> int:
    """Waits until all processes have ended.

    Returns:
      0 if all did their work, else the status of the first that failed.
    """
    failed: dict[int, int] = {}
    passed_on, kill_at = 0, float("inf")
    while True:
        statuses = group.statuses()
        left = ", ".join(str(number) for number, status in enumerate(statuses) if status is None)
        for number, status in enumerate(statuses):
            if status and number not in failed:
                failed[number] = status
                kill_at = min(kill_at, time.monotonic() + LEFT_SECONDS)
                say(f"process {number} {ending(status)}; still running: {left or 'none'}")
        if not left:
            group.kill()
            return next(iter(failed.values()), 0)
        if stops.count > passed_on:
            passed_on = stops.count
            say(f"asked to stop: {'killing all' if passed_on > 1 else 'all save and end'}")
            group.send(signal.SIGKILL if passed_on > 1 else signal.SIGTERM)
        if time.monotonic() > kill_at:
            say(f"killing what has not ended: process {left}")
            group.kill()
        time.sleep(POLL_SECONDS)


def ending(status: int) -> str:
    """In words: how a process ended."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def find_devices(processes: int, cpu_devices: int | None) -> Devices:
    """The devices to share out.

    Args:
      processes: how many share them.
      cpu_devices: of each process, where it is CPU devices that are asked for.

    Raises:
      ValueError: the GPUs cannot be shared out evenly.
    """
    if cpu_devices is not None or os.environ.get("JAX_PLATFORMS") == "cpu":
        return Devices(cpu_devices=cpu_devices or 1)
    gpus = _visible_gpus()
    if len(gpus) % processes:
        raise ValueError(f"{len(gpus)} GPUs ({','.join(gpus)}) are no multiple of -n {processes}")
    return Devices(gpus=gpus)


def _visible_gpus() -> tuple[str, ...]:
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(named.split(",")) if named else ()
    if shutil.which("nvidia-smi") is None:
        return ()
    ask = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return tuple(subprocess.run(ask, check=True, stdout=subprocess.PIPE, text=True).stdout.split())


def environments(processes: int, devices: Devices) -> list[dict[str, str]]:
    """What the environment of each process has besides this program's; a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        {
            "JAX_COORDINATOR_ADDRESS": address,
            "LARA_PROCESS_COUNT": str(processes),
            "LARA_PROCESS_ID": str(number),
            **devices.variables(processes, number),
        }
        for number in range(processes)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command in this file's docstring."""
    parser = argparse.ArgumentParser(
        usage="python launch/local.py -n N [OPTIONS] -- COMMAND...", allow_abbrev=False
    )
    parser.add_argument("-n", type=_positive, required=True, help="how many processes")
    parser.add_argument("--devices-per-process", type=_positive, help="CPU devices, not GPUs")
    parser.add_argument("--restarts", type=int, default=10, help="after a failure (default 10)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("command", nargs="+", help="what each process runs")
    args = parser.parse_args(argv)
    try:
        devices = find_devices(args.n, args.devices_per_process)
    except ValueError as error:
        parser.error(str(error))
    if args.dry_run:
        for variables in environments(args.n, devices):
            settings = [f"{name}={value}" for name, value in variables.items()]
            print(shlex.join(["env", *settings, *args.command]))
        return 0
    stops = Stops()
    for restart in range(args.restarts + 1):
        if restart:
            say(f"starting all processes again, {restart} of {args.restarts} times")
        status = follow(Group(args.command, environments(args.n, devices)), stops)
        if status in (0, WRONG_CALL) or stops.count:
            break
    return status if status >= 0 else 128 - status


def say(line: str) -> None:
    """On standard error, told from what the processes say."""
    print(f"local.py: {line}", file=sys.stderr, flush=True)


def _prefix(prefix: str, source: IO[bytes], target: IO[str]) -> None:
    """Passes lines on until the source ends; a progress bar's end with a carriage return."""
    rest = b""
    while piece := source.read1(1 << 16):  # type: ignore[attr-defined]
        *lines, rest = (rest + piece).replace(b"\r", b"\r\n").split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            target.write(f"{prefix}{text}" if text.endswith("\r") else f"{prefix}{text}\n")
        target.flush()
    if rest:
        target.write(f"{prefix}{rest.decode(errors='replace')}\n")
        target.flush()


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
