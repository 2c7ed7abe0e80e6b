"""Compiles one after the other, each by a process of its own, kept in a folder.

libtpu reads its flags once, and they differ from platform to platform; a process gives its memory
back when it ends; and a compiler that crashes takes one candidate with it, not the search.

A report is kept under a digest of all that it depends on: the recipe, the slice, the compiler's
flags and versions, and this package's source.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lara_jax.aot.chips import Topology
from lara_jax.aot.compile import FLAGS, require_libtpu
from lara_jax.config import Recipe, load_recipe

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `lara aot` is to compile once.

    Attributes:
      config: the recipe's file.
      topology: of one slice.
      slices: how many.
      overrides: of the recipe, "section.key=value" each.
      what: "train" or "policy".
      stage: of the curriculum; None for the last one.
    """

    config: str
    topology: Topology
    slices: int = 1
    overrides: tuple[str, ...] = ()
    what: str = "train"
    stage: str | None = None

    @property
    def recipe(self) -> Recipe:
        """With the overrides."""
        return load_recipe(self.config, self.overrides)

    @property
    def devices(self) -> int:
        """Of all slices."""
        return self.topology.devices * self.slices

    def but(self, *overrides: str) -> "Job":
        """With further overrides."""
        return dataclasses.replace(self, overrides=(*self.overrides, *overrides))

    @property
    def arguments(self) -> list[str]:
        """Of `lara aot`."""
        words = ["--config", self.config, "--topology", self.topology.name]
        words += ["--num-slices", str(self.slices), "--what", self.what]
        words += ["--stage", self.stage] if self.stage else []
        return [*words, *(f"--config.{override}" for override in self.overrides)]


def compile_job(job: Job, cache: Path | None) -> dict[str, Any]:
    """What `lara aot --json` says of a job.

    Args:
      job: what to compile.
      cache: a folder of earlier reports, which this one joins; None for none.

    Returns:
      Its report; where there is none the job's topology and num_slices, fits = False and the error.

    Raises:
      ValueError: libtpu is not installed, or the recipe is wrong.
    """
    require_libtpu()
    kept = cache / f"{_digest(job)}.json" if cache else None
    if kept and kept.is_file():
        return json.loads(kept.read_text())
    command = [sys.executable, "-m", "lara_jax.cli", "aot", *job.arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        error = f"status {done.returncode}: {_told(done.stderr)}"
        slices = {"topology": job.topology.name, "num_slices": job.slices}
        return {**slices, "devices": job.devices, "fits": False, "error": error}
    report = json.loads(done.stdout)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(report))
        part.replace(kept)
    return report


def _told(stderr: str) -> str:
    """The line of an error: Python's, else the last one."""
    lines = stderr.strip().splitlines() or ["nothing was said"]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (errors or lines)[-1].removeprefix("lara aot: ")


def _digest(job: Job) -> str:
    values = {
        "recipe": dataclasses.asdict(job.recipe),
        "slice": [job.topology.name, job.slices, job.what, job.stage],
        "flags": [FLAGS.read_text(), os.environ.get("LIBTPU_INIT_ARGS", "")],
        "libraries": [importlib.metadata.version(name) for name in LIBRARIES],
        "source": [path.read_text() for path in sorted(PACKAGE.rglob("*.py"))],
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
