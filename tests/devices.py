"""Processes with several CPU devices."""

import os

# Eight devices on two busy cores may wait for each other longer than XLA's usual 40 seconds.
PATIENCE = (
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 "
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
)


def environment(count: int) -> dict[str, str]:
    """Environment variables for a process of its own with `count` devices.

    A device that waits for the others occupies a thread of XLA's pool, and may wait in several
    places of one step: a pool with as many threads as devices can have them all waiting.
    """
    devices = f"--xla_force_host_platform_device_count={count}"
    flags = f"{os.environ['XLA_FLAGS']} {devices} {PATIENCE}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "64"}
