"""Published numbers of TPU chips, by JAX device, and names of slices.

A JAX device is a chip on v5e, v5p and v6e (v5p's two cores work as one), and half a chip on TPU7x.
Rates of matrix products are in `lara_jax.flops`.

Sources: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, "System architecture". They give the
links' bandwidth in both directions together (v5e 400, v5p 1200, v6e 800, TPU7x 1200 GB/s a chip);
the half of it leaves a chip. v5e and v6e give a host's network cards (2 x 100 Gbit/s,
4 x 200 Gbit/s) for 8 chips, which agrees with a pod's 6.4 and 25.6 Tbit/s for 256; v5p and TPU7x
the gigabits a chip, 50 and 100. The page of v6e rounds both bandwidths of memory, to 800 and 1600.
What a program is granted is what libtpu's errors say ("exceeds available HBM (15.75G)").
"""

import math
import re
from dataclasses import dataclass

GIB = 2**30

# Sides of a slice by its number of chips, as Google Cloud offers them.
TORUS_2D = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
TORUS_3D = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
}


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What one JAX device has.

    Attributes:
      hbm_bytes: main memory.
      granted_bytes: of it, or of what is really there, what the compiler lets a program have.
      hbm_bytes_per_second: its bandwidth.
      ici_bytes_per_second: what leaves the device over all links to its neighbours together.
      dcn_bytes_per_second: its share of the host's network to other slices.
      sides: of slices, by number of chips.
      cores: that a slice's short name counts for one chip ("v5p-64" has 32 chips).
      devices: of one chip.
    """

    hbm_bytes: float
    granted_bytes: float
    hbm_bytes_per_second: float
    ici_bytes_per_second: float
    dcn_bytes_per_second: float
    sides: dict[int, str]
    cores: int = 1
    devices: int = 1


CHIPS = {
    "v5e": Chip(
        hbm_bytes=16 * GIB,
        granted_bytes=15.75 * GIB,
        hbm_bytes_per_second=819e9,
        ici_bytes_per_second=200e9,
        dcn_bytes_per_second=2 * 100e9 / 8 / 8,
        sides=TORUS_2D,
    ),
    "v5p": Chip(
        hbm_bytes=95 * GIB,
        granted_bytes=95.74 * GIB,
        hbm_bytes_per_second=2765e9,
        ici_bytes_per_second=600e9,
        dcn_bytes_per_second=50e9 / 8,
        sides=TORUS_3D,
        cores=2,
    ),
    "v6e": Chip(
        hbm_bytes=32 * GIB,
        granted_bytes=31.25 * GIB,
        hbm_bytes_per_second=1638e9,
        ici_bytes_per_second=400e9,
        dcn_bytes_per_second=4 * 200e9 / 8 / 8,
        sides=TORUS_2D,
    ),
    "tpu7x": Chip(
        hbm_bytes=192 * GIB / 2,
        granted_bytes=94.75 * GIB,
        hbm_bytes_per_second=7380e9 / 2,
        ici_bytes_per_second=600e9 / 2,
        dcn_bytes_per_second=100e9 / 8 / 2,
        sides=TORUS_3D,
        cores=2,
        devices=2,
    ),
}


@dataclass(frozen=True)
class Topology:
    """A slice: "v5p" and "4x4x4"."""

    platform: str
    sides: str

    @property
    def chip(self) -> Chip:
        """What one of its devices has."""
        return CHIPS[self.platform]

    @property
    def name(self) -> str:
        """As libtpu knows it: "v5p:4x4x4"."""
        return f"{self.platform}:{self.sides}"

    @property
    def chips(self) -> int:
        """How many it has."""
        return math.prod(int(side) for side in self.sides.split("x"))

    @property
    def devices(self) -> int:
        """How many JAX devices they are."""
        return self.chips * self.chip.devices


def slices_of(name: str, slices: int = 1) -> tuple[Topology, int]:
    """A topology and how many slices of it: "2xv5e-256", or so many of another name.

    Raises:
      ValueError: as `topology`.
    """
    found = re.fullmatch(r"([1-9]\d*)x([a-z].*)", name)
    return (topology(found[2]), int(found[1])) if found else (topology(name), slices)


def topology(name: str) -> Topology:
    """A slice by libtpu's name ("v5p:4x4x4") or by Google Cloud's ("v5p-128", "v5litepod-16").

    Raises:
      ValueError: another name, a platform that is not in the table, or a size that is not offered.
    """
    found = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+){1,2})|-(\d+))", name)
    platform = found[1].replace("v5litepod", "v5e") if found else ""
    if found is None or platform not in CHIPS:
        raise ValueError(
            f"topology {name!r} is unknown; give a platform of {', '.join(CHIPS)} and the sides of "
            "a slice, as in v5e:4x4 or v5p:4x4x4, or its short name, as in v5e-16 or v5p-128"
        )
    chip, sides = CHIPS[platform], found[2]
    if found[3]:
        sides = chip.sides.get(int(found[3]) // chip.cores, "")
        if not sides or int(found[3]) % chip.cores:
            sizes = ", ".join(f"{platform}-{chips * chip.cores}" for chips in chip.sides)
            raise ValueError(
                f"topology {name!r} has no size that is offered; choose one of {sizes}"
            )
    dimensions = len(next(iter(chip.sides.values())).split("x"))
    if len(sides.split("x")) != dimensions:
        raise ValueError(
            f"topology {name!r} needs {dimensions} sides, as in {platform}:"
            f"{list(chip.sides.values())[2]}"
        )
    return Topology(platform, sides)
