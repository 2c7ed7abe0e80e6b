"""The optimised HLO text, read: products, bytes and exchanges times the loops' trips."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lara_jax.aot.census import Census, census
from lara_jax.aot.hlo import groups, parse
from tests.devices import environment

B, D, F = 8, 32, 48


def counted(function, *shapes) -> Census:
    """What the function does once compiled for this machine."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return census(parse(jax.jit(function).lower(*arguments).compile().as_text()))


def test_product():
    assert counted(jnp.dot, (B, D), (D, F)).flops == 2 * B * D * F


def test_product_over_a_batch():
    found = counted(lambda x, y: jnp.einsum("nbd,nfd->nbf", x, y), (5, B, D), (5, F, D))
    assert found.flops == 5 * 2 * B * D * F


def test_scan_counts_each_trip():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = counted(layers, (B, D), (7, D, D))
    assert found.flops == 7 * 2 * B * D * D
    assert not found.unknown_loops


def test_scan_in_a_scan_and_its_gradient():
    def slot(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def loop(w, x):
        return jax.lax.scan(lambda x, _: (slot(x, w), None), x, None, length=3)[0].sum()

    forward = 3 * 7 * 2 * B * D * D
    assert counted(loop, (7, D, D), (B, D)).flops == forward
    assert counted(jax.grad(loop), (7, D, D), (B, D)).flops == 3 * forward


def test_length_of_a_loop_that_nobody_knows():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    found = counted(until, (B, D), (D, D))
    assert found.flops == 2 * B * D * D
    assert len(found.unknown_loops) == 1


def test_a_loop_reads_the_slice_of_its_stacked_weights():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x * w, None), x, w)[0]

    stacked = 100 * D * D * 4
    found = counted(layers, (D, D), (100, D, D))
    # Each trip reads a layer and the state and writes the state; reading all would be 100 times it.
    assert 2 * stacked <= found.bytes <= 8 * stacked


def test_convolution_without_its_padding():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1,), [(1, 1)], dimension_numbers=("NHC", "HIO", "NHC")
        )

    # 10 places and a window of 3: the first and the last place see 2 of the 3.
    assert counted(convolve, (B, 10, D), (3, D, F)).flops == 2 * B * D * F * (10 * 3 - 2)


PROGRAM = """\
HloModule by_hand, is_scheduled=true

%start (p.0: bf16[32,128]) -> (bf16[32,128], bf16[128,128]) {
  %p.0 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[128,128]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[32,128]{1,0}, bf16[128,128]{1,0:S(1)}) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (p.1: f32[64,32], p.2: f32[32,16]) -> f32[64,16] {
  %p.1 = f32[64,32]{1,0} parameter(0)
  %p.2 = f32[32,16]{1,0:S(1)} parameter(1)
  ROOT %convolution.1 = f32[64,16]{1,0} convolution(%p.1, %p.2), dim_labels=bf_io->bf
}

%done (p.3: bf16[32,128]) -> bf16[128,128] {
  %p.3 = bf16[32,128]{1,0} parameter(0)
  %all-gather.2 = bf16[128,128]{1,0} all-gather(%p.3), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
  ROOT %custom-call.2 = bf16[128,128]{1,0} custom-call(%all-gather.2), \
custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p.4: f32[64,16]) -> f32[16,16] {
  %p.4 = f32[64,16]{1,0} parameter(0)
  %all-reduce.1 = f32[64,16]{1,0} all-reduce(%p.4), channel_id=8, replica_groups={{0,1,2,3}}
  %constant.9 = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[16,16]{1,0} dynamic-slice(%all-reduce.1, %constant.9, %constant.9)
}

%body (state.1: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %state.1 = (s32[]{:T(128)}, f32[64,32]{1,0}, /*index=2*/f32[32,16]{1,0:S(1)}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%counter.1, %one)
  %x.1 = f32[64,32]{1,0} get-tuple-element(%state.1), index=1
  %w.1 = f32[32,16]{1,0:S(1)} get-tuple-element(%state.1), index=2
  %small = bf16[32,128]{1,0} constant({...})
  %fusion.1 = (bf16[32,128]{1,0}, bf16[128,128]{1,0:S(1)}) fusion(%small), kind=kCustom, \
calls=%start
  %fusion.2 = f32[64,16]{1,0} fusion(%x.1, %w.1), kind=kOutput, calls=%meanwhile
  %get-tuple-element.9 = bf16[32,128]{1,0} get-tuple-element(%fusion.1), index=0
  %fusion.3 = bf16[128,128]{1,0} fusion(%get-tuple-element.9), kind=kCustom, calls=%done
  %fusion.4 = f32[16,16]{1,0} fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[64,32]{1,0}, f32[32,16]{1,0:S(1)}) tuple(%next, %x.1, %w.1)
}

%condition (state.2: (s32[], f32[64,32])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, f32[64,32]{1,0}, f32[32,16]{1,0:S(1)}) parameter(0)
  %counter.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %compare.1 = pred[]{:T(512)} compare(%counter.2, %limit), direction=LT
}

ENTRY %main (x: f32[64,32]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %w = f32[32,16]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %zero = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)S(2)} copy(%zero)
  %state = (s32[]{:T(128)}, f32[64,32]{1,0}, f32[32,16]{1,0:S(1)}) tuple(%copy.1, %x, %w)
  %while.1 = (s32[]{:T(128)}, f32[64,32]{1,0}, f32[32,16]{1,0:S(1)}) while(%state), \
condition=%condition, body=%body
  ROOT %out = f32[64,32]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_a_tpu_program():
    found = census(parse(PROGRAM))
    assert found.flops == 5 * 2 * 64 * 32 * 16
    gather, scatter = found.collectives
    # Started, gone on with and ended: one exchange, under the cover of the product.
    assert (gather.kind, gather.times, gather.overlapped) == ("all-gather", 5, True)
    assert gather.bytes == 2 * 32 * 128
    assert gather.groups == ((0, 1, 2, 3),)
    assert (scatter.kind, scatter.times, scatter.overlapped) == ("reduce-scatter", 5, False)
    assert scatter.bytes == 4 * 64 * 16


def test_values_in_fast_memory_cost_nothing():
    product = next(op for op in census(parse(PROGRAM)).operations if op.name == "fusion.2")
    assert product.bytes == 4 * (64 * 32 + 64 * 16)


def test_nothing_overlaps_an_exchange_that_ends_at_once():
    swapped = PROGRAM.split("\n")
    at = next(i for i, row in enumerate(swapped) if "calls=%meanwhile" in row)
    swapped[at : at + 3] = [*swapped[at + 1 : at + 3], swapped[at]]
    found = census(parse("\n".join(swapped)))
    assert not found.collectives[0].overlapped


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x={1}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), a=1", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, a=1", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("replica_groups={}, a=1", ()),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups(text, expected):
    assert groups(f"channel_id=1, {text}") == expected


def test_unknown_notation_of_groups():
    with pytest.raises(ValueError, match="unknown notation"):
        groups("replica_groups=mesh['a'=4] {'a':(1)2}")


SLICES = """\
HloModule slices, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[64,32], y: f32[8]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %after-all = token[] after-all()
  %send = (f32[64,32]{1,0}, u32[], token[]) send(%x, %after-all), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[64,32]{1,0}, u32[], token[]) recv(%after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %all-reduce.2 = f32[8]{0} all-reduce(%y), channel_id=3, replica_groups={}, to_apply=%add
  %send-done = token[] send-done(%send)
  %recv-done = (f32[64,32]{1,0}, token[]) recv-done(%recv)
  ROOT %out = f32[64,32]{1,0} get-tuple-element(%recv-done), index=0
}
"""


def test_what_slices_do_together():
    between, inside = census(parse(SLICES)).collectives
    assert (between.kind, between.bytes, between.between_slices) == ("all-reduce", 8192, True)
    assert not between.overlapped
    assert (inside.kind, inside.bytes, inside.between_slices) == ("all-reduce", 32, False)
    work = "%work = f32[8]{0} fusion(%y), kind=kLoop, calls=%add\n  %send-done"
    between, _ = census(parse(SLICES.replace("%send-done", work, 1))).collectives
    assert between.overlapped


def test_an_unknown_exchange_between_slices():
    with pytest.raises(ValueError, match="send does GOSSIP between slices; known: ALL_GATHER"):
        census(parse(SLICES.replace("ALL_REDUCE", "GOSSIP")))


WRAPPED = """\
HloModule wrapped, is_scheduled=true

%exchange (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %all-to-all = f32[8,4]{1,0} all-to-all(%p), replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %start = ((f32[8,4]{1,0}), f32[8,4]{1,0}) async-start(%x), calls=%exchange
  %small = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %done = f32[8,4]{1,0} async-done(%start)
}
"""


def test_a_wrapped_exchange():
    found = census(parse(WRAPPED))
    (exchange,) = found.collectives
    assert (exchange.kind, exchange.bytes, exchange.overlapped) == ("all-to-all", 128, True)
    assert found.flops == 2 * 8 * 8 * 4
    assert {op.name: op.copies for op in found.operations} == {"all-to-all": True, "small": False}


def test_text_without_an_entry():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule nothing")


SHARDED = """
import json
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lara_jax.aot.census import census
from lara_jax.aot.hlo import parse

mesh = Mesh(jax.devices(), ("rows",))
split = NamedSharding(mesh, PartitionSpec(None, "rows"))
x, w = (jax.ShapeDtypeStruct(s, "float32", sharding=split) for s in ((8, 32), (48, 32)))
product = jax.jit(lambda x, w: x @ w.T, out_shardings=NamedSharding(mesh, PartitionSpec()))
found = census(parse(product.lower(x, w).compile().as_text()))
exchanges = [(one.kind, one.bytes, one.overlapped) for one in found.collectives]
print(json.dumps({"flops": found.flops, "exchanges": exchanges}))
"""


def test_exchanges_of_a_sharded_product():
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, env=environment(4), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found == {"flops": 2 * B * F * (D // 4), "exchanges": [["all-reduce", 4 * B * F, False]]}
