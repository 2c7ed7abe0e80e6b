"""A step's time from published peaks: what it would take if nothing else were in the way.

    operation   max(FLOPs / peak, bytes / memory bandwidth); all, one after the other
    memory      all bytes, also of copies beside the computation, / memory bandwidth
    exchange    bytes that leave a device / bandwidth of all links, over ICI and DCN each

    step = max(operations, memory, overlapped exchanges) + exchanges that are waited for

It is a lower bound: no latency, all of a chip's links busy, every kernel at the limit.

Bytes that leave a device, for operands of b bytes in a group of n: (n - 1) b in an all-gather,
(n - 1) / n b in a reduce-scatter or all-to-all, twice that in an all-reduce, b in a permute. What
slices do together counts likewise, n being the number of slices.
"""

from dataclasses import dataclass

from lara_jax.aot.census import Census, Collective
from lara_jax.aot.chips import Chip


@dataclass(frozen=True)
class Sent:
    """Bytes that leave one device: inside a slice, and to other slices."""

    ici: float = 0.0
    dcn: float = 0.0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.ici + other.ici, self.dcn + other.dcn)

    def __mul__(self, factor: float) -> "Sent":
        return Sent(self.ici * factor, self.dcn * factor)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of a step, as the first lines of this file name them.

    Attributes:
      compute: FLOPs at the peak rate, alone.
      memory: bytes at the memory's bandwidth, alone.
      operations: each at its own limit.
      hidden: of exchanges that overlap with computation.
      exposed: of those that do not.
    """

    compute: float
    memory: float
    operations: float
    hidden: float
    exposed: float

    @property
    def step(self) -> float:
        """Of a whole step."""
        return max(self.operations, self.memory, self.hidden) + self.exposed


def sent(collective: Collective, devices: int, slices: int) -> Sent:
    """What a collective makes one device send, once.

    Args:
      collective: an exchange.
      devices: of a slice.
      slices: how many.
    """
    n = len(collective.groups[0]) if collective.groups else devices
    if collective.between_slices:
        n = slices
    factors = {
        "all-gather": n - 1,
        "collective-broadcast": 1,
        "collective-permute": 1,
        "all-reduce": 2 * (n - 1) / n,
    }
    moved = factors.get(collective.kind, (n - 1) / n) * collective.bytes
    return Sent(dcn=moved) if collective.between_slices else Sent(ici=moved)


def estimate(census: Census, chip: Chip, peak: float, devices: int, slices: int) -> Estimate:
    """The time of one run of a program.

    Args:
      census: what it does on a device.
      chip: the device.
      peak: FLOP/s of its matrix products.
      devices: of a slice.
      slices: how many.
    """
    times = {True: 0.0, False: 0.0}
    for one in census.collectives:
        out = sent(one, devices, slices) * one.times
        seconds = out.ici / chip.ici_bytes_per_second + out.dcn / chip.dcn_bytes_per_second
        times[one.overlapped] += seconds
    bandwidth = chip.hbm_bytes_per_second
    return Estimate(
        compute=census.flops / peak,
        memory=census.bytes / bandwidth,
        operations=sum(
            op.times * max(op.flops / peak, op.bytes / bandwidth)
            for op in census.operations
            if not op.copies
        ),
        hidden=times[True],
        exposed=times[False],
    )
