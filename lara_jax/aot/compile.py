"""Compiles a recipe's step for TPUs that are not there, and reports what it would cost.

    recipe --outline--> shapes --lower--> program --libtpu--> memory, optimised HLO --> Report

It is the program that `lara train` runs on such a slice: same state, shardings and donation, and
the compiler's flags of `launch/xla_flags.sh`. `what="policy"` is the call of
`lara_jax.inference.policy` with one observation, on one device, as that has it.
"""

import importlib.util
import math
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh

from lara_jax import assemble, sharding
from lara_jax.aot.census import Census, census
from lara_jax.aot.chips import Topology
from lara_jax.aot.hlo import parse
from lara_jax.aot.roofline import Estimate, Sent, estimate, sent
from lara_jax.config import Recipe
from lara_jax.flops import Flops, peak_flops, policy_flops, step_flops
from lara_jax.inference.policy import act
from lara_jax.optimizer import make_optimizer, trained_paths
from lara_jax.outline import Outline, outlines, state_outline
from lara_jax.train import state_shardings
from lara_jax.train_step import logical_axes, make_train_step

FLAGS = Path(__file__).parents[2] / "launch" / "xla_flags.sh"
ENVIRONMENT = "bash launch/make_env.sh .venv-tpu requirements/tpu.txt"
WHATS = ("train", "policy")

# libtpu asks its machine which TPU it has; this tells it, so that it need not ask.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind: how many run in a step, how many of them overlap with computation,
    and the bytes that they make a device send."""

    count: int
    overlapped: int
    sent: Sent


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device: in use at the worst moment, of arguments, and of temporaries.

    Where the program does not fit the compiler tells the first number only.
    """

    peak: int
    arguments: int | None
    temporaries: int | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a program would cost.

    Attributes:
      topology: of a slice.
      slices: how many.
      devices: of all slices that the program runs on.
      stage: of the curriculum.
      mesh: devices along each axis.
      rows: of the whole batch.
      remat: the recipe's policy.
      memory: of one device.
      fits: whether it can run.
      analytic: operations counted from sizes, over all devices.
      peak: FLOP/s of one device.
      slots: of thoughts.
      seconds: that compiling took.
      census: what one device does in a step; None where it does not fit.
      estimate: of the step's time; None likewise.
      traffic: by kind of collective.
      flags: of the compiler.
    """

    topology: Topology
    slices: int
    devices: int
    stage: str
    mesh: dict[str, int]
    rows: int
    remat: str
    memory: Memory
    fits: bool
    analytic: Flops
    peak: float
    slots: int
    seconds: float
    census: Census | None
    estimate: Estimate | None
    traffic: dict[str, Traffic]
    flags: str

    @property
    def mfu(self) -> float | None:
        """Model FLOPs at the estimated time against the devices' peak, 0 to 1."""
        if self.estimate is None:
            return None
        return self.analytic.model / (self.estimate.step * self.peak * self.devices)

    def json(self) -> dict[str, Any]:
        """Plain values; bytes and FLOPs are of one device."""
        counted, took = self.census, self.estimate
        total = sum((kind.sent for kind in self.traffic.values()), Sent())
        collectives = {
            name: {
                "count": kind.count,
                "overlapped": kind.overlapped,
                "ici_bytes": round(kind.sent.ici),
                "dcn_bytes": round(kind.sent.dcn),
            }
            for name, kind in self.traffic.items()
        }
        return {
            "topology": self.topology.name,
            "num_slices": self.slices,
            "devices": self.devices,
            "stage": self.stage,
            "mesh": self.mesh,
            "batch_size": self.rows,
            "remat": self.remat,
            "latent_slots": self.slots,
            "peak_memory_bytes": self.memory.peak,
            "argument_bytes": self.memory.arguments,
            "temporary_bytes": self.memory.temporaries,
            "hbm_bytes": round(self.topology.chip.hbm_bytes),
            "fits": self.fits,
            "flops": counted and counted.flops,
            "analytic_flops": self.analytic.hardware / self.devices,
            "model_flops": self.analytic.model / self.devices,
            "hbm_traffic_bytes": counted and counted.bytes,
            "estimated_step_seconds": took and took.step,
            "samples_per_second": took and self.rows / took.step,
            "seconds": took
            and {
                name: getattr(took, name)
                for name in ("compute", "memory", "operations", "hidden", "exposed")
            },
            "mfu": self.mfu,
            "collective_bytes": counted and round(total.ici + total.dcn),
            "collectives": collectives,
            "unknown_loops": counted and counted.unknown_loops,
            "compile_seconds": self.seconds,
            "flags": self.flags,
        }


def compile_recipe(
    recipe: Recipe,
    topology: Topology,
    *,
    slices: int = 1,
    what: str = "train",
    stage: str | None = None,
) -> Report:
    """Compiles and examines a recipe's step.

    Args:
      recipe: the run's settings; its mesh is laid out over all devices, `data` over the slices.
      topology: of one slice.
      slices: joined by the data-centre network.
      what: "train", or "policy" on one device.
      stage: of the curriculum; None for the last one.

    Raises:
      ValueError: libtpu is not installed or does not know the topology; an unknown stage; a mesh
        or batch that does not split over the devices; a policy on several slices.
    """
    if what == "policy" and slices > 1:
        raise ValueError(f"a policy call runs on one device, so not on {slices} slices")
    flags = set_environment(topology, slices)
    devices = find_devices(topology, slices)
    outline, parts = stage_outline(recipe, stage), None
    if what == "train":
        mesh = sharding.make_mesh(
            recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor, devices=devices
        )
        lowered, rows = _lower_train(recipe, outline, mesh), outline.batch.size
        trained = trained_paths(recipe, state_outline(recipe, outline).params, [outline.stage])
        parts = outline.model.config, outline.stage, outline.batch
        analytic = step_flops(recipe, *parts, trained=trained)
    else:
        mesh = sharding.make_mesh(1, 1, 1, devices=devices[:1])
        lowered, rows = _lower_policy(recipe, outline, mesh), 1
        analytic = policy_flops(recipe, outline.model.config, outline.rows(1))
    begun = time.perf_counter()
    compiled, memory = _compile(lowered)
    seconds = time.perf_counter() - begun
    used = list(mesh.devices.flat)
    kind, dtype = used[0].device_kind, recipe.model.compute_dtype
    peak = peak_flops(kind, dtype)
    if peak is None:
        raise ValueError(f"the peak of devices of kind {kind!r} is not known (lara_jax.flops)")
    counted = census(parse(compiled.as_text())) if compiled else None
    return Report(
        topology=topology,
        slices=slices,
        devices=len(used),
        stage=outline.stage.name,
        mesh=dict(mesh.shape),
        rows=rows,
        remat=recipe.model.remat,
        memory=memory,
        fits=counted is not None,
        analytic=analytic,
        peak=peak,
        slots=outline.model.config.latent_slots,
        seconds=seconds,
        census=counted,
        estimate=estimate(counted, topology.chip, peak, len(used) // slices, slices)
        if counted
        else None,
        traffic=_traffic(counted, len(used) // slices, slices) if counted else {},
        flags=flags,
    )


def set_environment(topology: Topology, slices: int) -> str:
    """Sets what libtpu and JAX read when they first look for devices.

    Returns:
      the compiler's flags.

    Raises:
      ValueError: libtpu is not installed, or the package is not in a checkout.
    """
    require_libtpu()
    if not FLAGS.is_file():
        raise ValueError(
            f"the compiler's flags are in {FLAGS}, which is not there: install the package from a "
            "checkout (pip install -e .)"
        )
    command = ["bash", str(FLAGS), topology.platform, str(slices)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    variables = dict(line.split("=", 1) for line in lines.splitlines())
    os.environ.update(variables)
    for name, value in NO_TPU.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    return variables["LIBTPU_INIT_ARGS"]


def require_libtpu() -> None:
    """Says how to get libtpu where it is missing.

    Raises:
      ValueError: it is.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "this environment has no libtpu, which compiles for TPUs; make one beside it with "
            f"`{ENVIRONMENT}` and call .venv-tpu/bin/lara"
        )


def find_devices(topology: Topology, slices: int) -> list[Any]:
    """The devices of so many slices, which can be compiled for but not run on.

    Raises:
      ValueError: libtpu does not know the topology.
    """
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **more)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"libtpu has no topology {topology.name!r} in {slices} slices: {first}"
        ) from error
    return list(found.devices)


def stage_outline(recipe: Recipe, stage: str | None = None) -> Outline:
    """A stage of a recipe by name; the last one for None.

    Raises:
      ValueError: there is none of that name.
    """
    found = {outline.stage.name: outline for outline in outlines(recipe)}
    if stage is None:
        return list(found.values())[-1]
    if stage not in found:
        raise ValueError(f"no stage {stage!r} in the recipe; there are {', '.join(found)}")
    return found[stage]


def state_size(recipe: Recipe, stage: str | None = None) -> Callable[[tuple[int, int, int]], int]:
    """The bytes that the state that trains takes on one device of a (data, fsdp, tensor) mesh."""
    outline = stage_outline(recipe, stage)
    shapes, axes = state_outline(recipe, outline), logical_axes(outline.model)

    def size(sizes: tuple[int, int, int]) -> int:
        mesh: Any = AbstractMesh(sizes, sharding.MESH_AXES)
        where = state_shardings(mesh, shapes, axes)
        parts = jax.tree.map(lambda x, at: math.prod(at.shard_shape(x.shape)), shapes, where)
        return sum(
            x.dtype.itemsize * part
            for x, part in zip(jax.tree.leaves(shapes), jax.tree.leaves(parts), strict=True)
        )

    return size


def _lower_train(recipe: Recipe, outline: Outline, mesh: Mesh) -> Any:
    """As `lara_jax.train` jits it."""
    shapes = state_outline(recipe, outline)
    where = state_shardings(mesh, shapes, logical_axes(outline.model))
    rows = sharding.batch_sharding(mesh, outline.batch, recipe.train.accumulate_steps)
    step = make_train_step(outline.model, make_optimizer(recipe), outline.stage, recipe)
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            step,
            in_shardings=(where, rows),
            out_shardings=(where, sharding.replicated(mesh)),
            donate_argnums=0,
        )
        return jitted.trace(shapes, outline.batch).lower(lowering_platforms=("tpu",))


def _lower_policy(recipe: Recipe, outline: Outline, mesh: Mesh) -> Any:
    """As `lara_jax.inference.policy` calls it, with one observation."""
    params = state_outline(recipe, outline).params
    batch, key = outline.rows(1), jax.eval_shape(lambda: jax.random.key(0))
    whole = sharding.replicated(mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), (params, batch, key)
    )
    settings = outline.model, assemble.image_config(recipe), recipe.augment
    return act.trace(*settings, *shapes).lower(lowering_platforms=("tpu",))


def _compile(lowered: Any) -> tuple[Any, Memory]:
    """The program, or None where it does not fit, and its memory."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return None, Memory(peak=memory_wanted(str(error)), arguments=None, temporaries=None)
    sizes = compiled.memory_analysis()
    return compiled, Memory(
        peak=sizes.peak_memory_in_bytes,
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
    )


def memory_wanted(message: str) -> int:
    """The bytes that a program which does not fit would need, from the compiler's error.

    Where temporaries alone do not fit, the compiler tells these only.

    Raises:
      ValueError: the compiler failed for another reason.
    """
    found = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise ValueError(f"the compiler failed: {message[:2000]}")
    return round(float(found[1]) * UNITS[found[2]])


def _traffic(counted: Census, devices: int, slices: int) -> dict[str, Traffic]:
    """Collectives by kind."""
    found: dict[str, Traffic] = {}
    for one in counted.collectives:
        old = found.get(one.kind, Traffic(count=0, overlapped=0, sent=Sent()))
        found[one.kind] = Traffic(
            count=old.count + one.times,
            overlapped=old.overlapped + one.times * one.overlapped,
            sent=old.sent + sent(one, devices, slices) * one.times,
        )
    return found
