"""Bytes over the two networks, times from published peaks, names of slices."""

import pytest

from lara_jax.aot.census import Census, Collective, Operation
from lara_jax.aot.chips import CHIPS, Topology, topology
from lara_jax.aot.compile import memory_wanted
from lara_jax.aot.roofline import Sent, estimate, sent


def collective(kind: str, *, overlapped: bool = False, times: int = 1, **more) -> Collective:
    given = {"bytes": 800, "groups": ()} | more
    return Collective(name="c", kind=kind, times=times, overlapped=overlapped, **given)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-gather", Sent(ici=7 * 800)),
        ("reduce-scatter", Sent(ici=700)),
        ("all-reduce", Sent(ici=1400)),
        ("all-to-all", Sent(ici=700)),
    ],
)
def test_sent_in_one_slice(kind, expected):
    assert sent(collective(kind), 8, 1) == expected


def test_sent_in_groups():
    halves = collective("all-reduce", groups=((0, 1, 2, 3), (4, 5, 6, 7)))
    assert sent(halves, 8, 1) == Sent(ici=1200)
    ring = collective("collective-permute", groups=((0, 1), (1, 0)))
    assert sent(ring, 8, 1) == Sent(ici=800)


def test_sent_between_slices():
    both = collective("all-reduce", between_slices=True)
    assert sent(both, 8, 2) == Sent(dcn=800)
    assert sent(both, 8, 4) == Sent(dcn=1200)


def test_estimate():
    chip = CHIPS["v5p"]
    second = int(chip.hbm_bytes_per_second)
    gather = int(chip.ici_bytes_per_second) // 7
    counted = Census(
        operations=[
            Operation(name="product", times=2, flops=1000, bytes=0),
            Operation(name="sum", times=1, flops=0, bytes=3 * second),
            Operation(name="copy", times=1, flops=0, bytes=second, copies=True),
        ],
        collectives=[
            collective("all-gather", bytes=gather, overlapped=True, times=6),
            collective("all-gather", bytes=gather),
        ],
    )
    found = estimate(counted, chip, 1000.0, 8, 1)
    assert found.compute == 2
    assert found.memory == pytest.approx(4)
    assert found.operations == pytest.approx(5)
    assert found.hidden == pytest.approx(6)
    assert found.exposed == pytest.approx(1)
    assert found.step == pytest.approx(6 + 1)


@pytest.mark.parametrize(
    ("name", "expected", "chips"),
    [
        ("v5p:4x4x4", Topology("v5p", "4x4x4"), 64),
        ("v5p-64", Topology("v5p", "2x4x4"), 32),
        ("v5e-256", Topology("v5e", "16x16"), 256),
        ("v5litepod-16", Topology("v5e", "4x4"), 16),
        ("tpu7x-64", Topology("tpu7x", "2x4x4"), 32),
    ],
)
def test_topology(name, expected, chips):
    assert topology(name) == expected
    assert topology(name).chips == chips


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:4x4x4", "v5p-7", "v6e-3", "v5p:4x4", ""])
def test_unknown_topology(name):
    with pytest.raises(ValueError, match="topology"):
        topology(name)


def test_memory_wanted():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    assert memory_wanted(message) == int(20.5 * 2**30)
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (64.00G) exceeds available HBM (15.75G)."
    )
    assert memory_wanted(message) == 64 * 2**30
    with pytest.raises(ValueError, match="the compiler failed: INTERNAL"):
        memory_wanted("INTERNAL: something else")
