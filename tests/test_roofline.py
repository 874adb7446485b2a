"""Reading the text of compiled programs, and estimating seconds from it."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lina_jax import chips, device_groups, hlo, mesh, roofline
from lina_jax.chips import CHIPS
from lina_jax.config import MeshConfig
from lina_jax.models import sequence, tiles


def program(text: str) -> hlo.Module:
    return hlo.Module(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT {text}\n}}\n")


def collective(text: str) -> hlo.Instruction:
    return program(text).computations["main"]["all-reduce.1"]


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_are_read_in_each_of_the_compilers_spellings(written, groups):
    text = f"%all-reduce.1 = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={written}, to_apply=%add"
    assert device_groups.of(collective(text), devices=4) == groups


def test_room_for_what_a_loop_will_write_is_not_traffic():
    def traffic(target):
        called = program(f'%room.1 = f32[1024]{{0}} custom-call(), custom_call_target="{target}"')
        return roofline.count(called).traffic

    assert (traffic("AllocateBuffer"), traffic("Fill")) == (0, 4096)


def test_a_kernel_counts_what_its_author_states():
    stated = '{"custom_call_config":{"body":"TUw","cost_estimate":{"flops":"640","transcendentals":"0"}}}'
    target = f'custom_call_target="tpu_custom_call", backend_config={stated}'
    called = program(f"%kernel.1 = f32[8]{{0}} custom-call(), {target}")
    assert roofline.count(called).matmul_flops == 640


def test_a_kernel_for_gpus_counts_what_its_author_states():
    """As XLA prints it: as a quoted string within a quoted string."""
    stated = json.dumps(tiles.cost_metadata(bytes_accessed=40, flops=640, vector_ops=7)).replace('"', "\\22")
    target = f'custom_call_target="__gpu$xla.gpu.triton", backend_config={{serialized_metadata = "{stated}"}}'
    work = roofline.count(program(f"%kernel.1 = f32[8]{{0}} custom-call(), {target}"))
    assert (work.matmul_flops, work.vector_ops, work.traffic) == (640, 7, 40)


def compiled(function, *arguments) -> hlo.Module:
    return hlo.Module(jax.jit(function).lower(*arguments).compile().as_text())


def grid(**sizes):
    return mesh.build(MeshConfig(**sizes))


CHIP = CHIPS["h200"]  # not a torus: fake devices have no coordinates


def test_a_loop_counts_as_often_as_it_runs():
    def repeated(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

    module = compiled(repeated, jnp.ones((16, 32)), jnp.ones((32, 32)))
    found = roofline.estimate(module, CHIP, grid())
    assert found.work.matmul_flops == 5 * 2 * 16 * 32 * 32


def test_a_loop_whose_length_is_data_counts_as_told():
    def repeated(n, x, w):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)

    module = compiled(repeated, 3, jnp.ones((16, 32)), jnp.ones((32, 32)))
    found = roofline.estimate(module, CHIP, grid(), unknown_trips=2.5)
    assert found.work.matmul_flops == 2.5 * 2 * 16 * 32 * 32


FUSED_TEST = """
%inner (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%a, %limit), direction=LT
}

%test (state: (s32[], f32[8,8])) -> pred[] {
  %state = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %fused = pred[] fusion(%i), kind=kLoop, calls=%inner
}

%body (state.1: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %state.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %x.1 = f32[8,8]{1,0} get-tuple-element(%state.1), index=1
  %product = f32[8,8]{1,0} dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (s32[], f32[8,8]{1,0}) tuple(%i.1, %product)
}

ENTRY %main (x: f32[8,8]) -> (s32[], f32[8,8]) {
  %x = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,8]{1,0}) tuple(%zero, %x)
  ROOT %loop = (s32[], f32[8,8]{1,0}) while(%start), condition=%test, body=%body
}
"""


def test_a_loop_counts_as_often_as_a_fused_comparison_says():
    """XLA:GPU leaves such a condition when it has peeled off an iteration."""
    assert roofline.count(hlo.Module(FUSED_TEST), unknown_trips=25).matmul_flops == 7 * 2 * 8**3


def test_of_branches_the_longest_counts():
    def either(p, x, w):
        return jax.lax.cond(p, lambda x: jnp.tanh(x @ w) @ w, lambda x: x, x)

    module = compiled(either, True, jnp.ones((16, 32)), jnp.ones((32, 32)))
    assert roofline.estimate(module, CHIP, grid()).work.matmul_flops == 2 * 2 * 16 * 32 * 32


def test_a_branch_that_rarely_runs_does_not_count():
    def either(p, x, w):
        rarely = jax.named_scope(sequence.RARELY)(lambda x: jnp.tanh(x @ w) @ w)
        return jax.lax.cond(p, lambda x: jnp.tanh(x @ w), rarely, x)

    module = compiled(either, True, jnp.ones((16, 32)), jnp.ones((32, 32)))
    assert roofline.estimate(module, CHIP, grid()).work.matmul_flops == 2 * 16 * 32 * 32
    assert roofline.count(module).matmul_flops == 2 * 16 * 32 * 32


@pytest.mark.parametrize(("axis", "along"), [("data", "data"), (("data", "fsdp"), "data,fsdp")])
def test_a_sum_over_the_mesh_is_an_all_reduce_over_its_axes(axis, along):
    where = grid(data=2, fsdp=2, tensor=2)
    x = jax.device_put(jnp.ones((8, 64)), NamedSharding(where, PartitionSpec(axis)))
    module = compiled(lambda x: jnp.sum(x, axis=0), x)
    found = roofline.estimate(module, CHIP, where)
    assert found.collective_bytes == {along: {"all-reduce": 64 * 4}}


def test_of_an_exchange_the_whole_array_counts():
    where = grid(fsdp=8)
    rows, columns = (NamedSharding(where, PartitionSpec(*cut)) for cut in (("fsdp", None), (None, "fsdp")))
    x = jax.device_put(jnp.ones((64, 64)), rows)
    text = jax.jit(lambda x: x, out_shardings=columns).lower(x).compile().as_text()
    assert roofline.estimate(hlo.Module(text), CHIP, where).collective_bytes == {"fsdp": {"all-to-all": 64 * 64 * 4}}


def test_what_is_exchanged_while_others_compute_counts_once():
    text = """ENTRY %main (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  %s = ((f32[1024]{0}), f32[1024]{0}) all-to-all-start(%p), replica_groups={{0,1,2,3}}
  ROOT %d = f32[1024]{0} all-to-all-done(%s)
}
"""
    module = hlo.Module(text)
    scope = {i.name: i for i in module.instructions(module.entry)}
    assert hlo.collective_bytes(scope["s"], scope) == 4096


def test_a_gather_in_a_loop_counts_each_time():
    where = grid(data=1, fsdp=4, tensor=2)
    w = jax.device_put(jnp.ones((3, 64, 64)), NamedSharding(where, PartitionSpec(None, "fsdp")))
    x = jax.device_put(jnp.ones((8, 64)), NamedSharding(where, PartitionSpec("fsdp")))

    def layers(x, w):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(where, PartitionSpec()))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, w)[0]

    found = roofline.estimate(compiled(layers, x, w), CHIP, where)
    assert found.collective_bytes["fsdp"]["all-gather"] == 3 * 64 * 64 * 4


def test_a_slice_of_a_large_array_is_read_that_far():
    def one_row(x, i):
        return jnp.tanh(jax.lax.dynamic_index_in_dim(x, i, keepdims=False))

    found = roofline.estimate(compiled(one_row, jnp.ones((1000, 64)), 3), CHIP, grid())
    assert found.work.traffic < 4 * 64 * 4  # rows of 64 floats: one is read, one written


# Matmuls as compilers for TPUs write them: (window, result, left, right, labels, multiply-adds).
CONVOLUTIONS = [
    ("", "f32[4,6]", "f32[4,5]", "f32[5,6]", "bf_io->bf", 4 * 6 * 5),
    ("{size=1}", "f32[2,4,6]", "f32[2,4,5]", "f32[1,5,6]", "0bf_0io->0bf", 2 * 4 * 6 * 5),
    # Three outputs from one input by a kernel of size three with padding: each output uses the input once.
    ("{size=3 pad=2_2 rhs_reversal=1}", "f32[4,3,6]", "f32[4,1,5]", "f32[3,5,6]", "b0f_0io->b0f", 3 * 4 * 6 * 5),
    # A batch of two as a dilated axis: each tap of the kernel meets one of the two.
    ("{size=2 stride=1 lhs_dilate=2}", "f32[2,4,6]", "f32[2,4,5]", "f32[2,5,6]", "0bf_0io->0bf", 2 * 4 * 6 * 5),
]


@pytest.mark.parametrize(("window", "result", "left", "right", "labels", "products"), CONVOLUTIONS)
def test_products_written_as_convolutions_count_without_padding(window, result, left, right, labels, products):
    text = (
        f"ENTRY %main (a: {left}, b: {right}) -> {result} {{\n  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n"
        f"  ROOT %c = {result} convolution(%a, %b), {f'window={window}, ' if window else ''}dim_labels={labels}\n}}\n"
    )
    module = hlo.Module(text)
    assert module.work(module.computations["main"]["c"], "main").matmul_flops == 2 * products


OVERLAP = """
ENTRY %main (p: bf16[1024,1024], q: bf16[8,8]) -> bf16[1024,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  %ar = bf16[1024,1024]{1,0} all-reduce-start(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
MIDDLE  ROOT %done = bf16[1024,1024]{1,0} all-reduce-done(%ar)
}
"""
PRODUCT = "  %dot = bf16[1024,1024]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"


def test_a_collective_is_waited_for_as_far_as_computation_does_not_hide_it():
    alone = roofline.estimate(hlo.Module(OVERLAP.replace("MIDDLE", "")), CHIP, grid())
    beside = roofline.estimate(hlo.Module(OVERLAP.replace("MIDDLE", PRODUCT)), CHIP, grid())
    hidden = beside.seconds - beside.bound["collectives"]  # by the matmul
    assert alone.seconds == alone.bound["collectives"] == alone.collectives[0].seconds
    assert hidden > 0
    assert beside.seconds == pytest.approx(alone.seconds)


SPARSE_CORE = """
%gather (x: bf16[128,1024]) -> bf16[1024,1024] {
  %x = bf16[128,1024]{1,0} parameter(0)
  ROOT %ag = bf16[1024,1024]{1,0} all-gather(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p: bf16[1024,1024], s: bf16[128,1024]) -> bf16[1024,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  %s = bf16[128,1024]{1,0} parameter(1)
  %begun = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%gather
BEFORE  %running = ((bf16[128,1024]{1,0}), bf16[1024,1024]{1,0}) call-update(%begun, %s)
BESIDE  ROOT %done = bf16[1024,1024]{1,0} call-done(%running)
}
"""


def test_a_sparse_core_gathers_from_when_it_has_its_operands():
    def estimate(before="", beside=""):
        return roofline.estimate(
            hlo.Module(SPARSE_CORE.replace("BEFORE", before).replace("BESIDE", beside)), CHIP, grid()
        )

    alone, before, beside = estimate(), estimate(before=PRODUCT), estimate(beside=PRODUCT)
    (gather,) = alone.collectives
    assert (gather.kind, gather.bytes) == ("all-gather", 2 * 2**20)
    assert alone.seconds == alone.bound["collectives"] == gather.seconds
    assert before.bound["collectives"] == gather.seconds
    assert beside.seconds == pytest.approx(alone.seconds)


PERMUTE = """
ENTRY %main (p: bf16[1024,1024]) -> bf16[1024,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  ROOT %cp = bf16[1024,1024]{1,0} collective-permute(%p), source_target_pairs=PAIRS
}
"""


def test_all_devices_wait_for_the_slowest_group_of_a_collective(monkeypatch):
    monkeypatch.setattr(mesh, "nodes", lambda devices: [device.id // 4 for device in devices])  # two nodes

    def seconds(pairs):
        return roofline.estimate(hlo.Module(PERMUTE.replace("PAIRS", pairs)), CHIP, grid()).seconds

    across = seconds("{{3,4}}")
    assert across > seconds("{{0,1}}")
    assert seconds("{{0,1},{3,4}}") == across


TWO_AT_ONCE = """
ENTRY %main (p: bf16[1024,1024]) -> bf16[1024,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  %a = bf16[1024,1024]{1,0} all-reduce-start(%p), replica_groups=FIRST, to_apply=%add
  %b = bf16[1024,1024]{1,0} all-reduce-start(%p), replica_groups=SECOND, to_apply=%add
  %a_done = bf16[1024,1024]{1,0} all-reduce-done(%a)
  ROOT %b_done = bf16[1024,1024]{1,0} all-reduce-done(%b)
}
"""


def test_collectives_within_and_between_nodes_have_links_of_their_own(monkeypatch):
    monkeypatch.setattr(mesh, "nodes", lambda devices: [device.id // 4 for device in devices])  # two nodes
    near, far = "{{0,1,2,3},{4,5,6,7}}", "{{0,4},{1,5},{2,6},{3,7}}"

    def took(first, second):
        module = hlo.Module(TWO_AT_ONCE.replace("FIRST", first).replace("SECOND", second))
        found = roofline.estimate(module, CHIP, grid())
        return found.seconds, [each.seconds for each in found.collectives]

    for kind in (near, far):
        seconds, each = took(kind, kind)
        assert seconds == pytest.approx(sum(each))
    seconds, each = took(near, far)
    assert seconds == pytest.approx(max(each))
    for kind in (near, far):  # a collective of all devices uses both
        seconds, each = took(kind, "{{0,1,2,3,4,5,6,7}}")
        assert seconds == pytest.approx(sum(each))


PREFETCH = """
ENTRY %main (p: bf16[1024,1024]) -> bf16[512,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  %start = ((bf16[1024,1024]{1,0}), bf16[512,1024]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:512], [0:1024]}
MIDDLE  ROOT %done = bf16[512,1024]{1,0:S(1)} slice-done(%start)
}
"""


def test_a_slice_fetched_ahead_is_waited_for_as_far_as_computation_does_not_hide_it():
    alone = roofline.estimate(hlo.Module(PREFETCH.replace("MIDDLE", "")), CHIP, grid())
    beside = roofline.estimate(hlo.Module(PREFETCH.replace("MIDDLE", PRODUCT)), CHIP, grid())
    rate = roofline.ATTAINED["cuda"]["memory"] * CHIP.memory_bandwidth
    assert alone.work.traffic == 512 * 1024 * 2  # read from HBM; the result stays on the chip
    assert alone.seconds == pytest.approx(512 * 1024 * 2 / rate)
    hidden = beside.bound["matmul"]
    assert beside.seconds == pytest.approx(max(alone.seconds, hidden))


def torus(*extent: int, slices: int = 1) -> list[SimpleNamespace]:
    """The devices of `slices` slices, each a torus of this extent."""
    places = [(x, y, z) for x in range(extent[0]) for y in range(extent[1]) for z in range(extent[2])]
    return [SimpleNamespace(coords=place, slice_index=s) for s in range(slices) for place in places]


def gather_seconds(members, chip: chips.Chip, extent: tuple[int, ...], kind: str = "all-gather", stated=0) -> float:
    return roofline.collective_seconds(kind, 1e9, members, [d.slice_index for d in members], chip, extent, stated)


def test_a_closed_ring_has_two_links_an_open_one_has_one():
    chip, size = CHIPS["v5p"], 1e9
    share = roofline.ATTAINED["tpu"]["link"]
    ring = [d for d in torus(4, 4, 4) if d.coords[1:] == (0, 0)]
    closed = gather_seconds(ring, chip, (4, 4, 4))
    assert closed == pytest.approx(size * 3 / 4 / (2 * share * chip.link) + 2 * roofline.HOP)
    open_ = gather_seconds(torus(2, 1, 1), chip, (2, 4, 4))
    assert open_ == pytest.approx(size / 2 / (share * chip.link) + 2 * roofline.HOP)
    assert gather_seconds(ring, chip, (4, 4, 4), "all-reduce") == pytest.approx(2 * closed)


def test_a_gather_takes_no_more_rings_than_the_compiler_states_and_the_torus_has():
    chip, plane = CHIPS["v5p"], [d for d in torus(4, 4, 4) if d.coords[2] == 0]
    every = gather_seconds(plane, chip, (4, 4, 4))
    assert gather_seconds(plane, chip, (4, 4, 4), stated=4) == every
    one_way = 1e9 * 15 / 16 / (roofline.ATTAINED["tpu"]["link"] * chip.link)
    assert gather_seconds(plane, chip, (4, 4, 4), stated=1) - every == pytest.approx(one_way * 3 / 4)
    small = torus(2, 2, 4)
    assert gather_seconds(small, chip, (2, 2, 4), stated=6) == gather_seconds(small, chip, (2, 2, 4))


@pytest.mark.parametrize(
    ("name", "extent", "rings"),
    [
        ("v5p", (4, 4, 4), [True, True, True]),
        ("v4", (4, 4, 8), [True, True, True]),
        ("v5p", (2, 2, 4), [False, False, False]),
        ("tpu7x", (2, 4, 4), [False, False, False]),
        ("v5e", (16, 16), [True, True]),
        ("v6e", (8, 16), [False, True]),
    ],
)
def test_rings_close_in_slices_of_whole_cubes_and_along_full_axes(name, extent, rings):
    assert [CHIPS[name].closed(extent, axis) for axis in range(len(extent))] == rings


def test_sixteen_chips_gather_over_open_lines():
    line = [d for d in torus(2, 2, 4) if d.coords[:2] == (0, 0)]
    rate = roofline.ATTAINED["tpu"]["link"] * CHIPS["v5p"].link
    assert gather_seconds(line, CHIPS["v5p"], (2, 2, 4)) == pytest.approx(1e9 * 3 / 4 / rate + 4 * roofline.HOP)


def test_an_exchange_goes_around_a_ring_but_straight_through_a_switch():
    """In a ring of four, a link carries one whole piece and two halves.

    A device sends a piece to each of the others; the piece for the opposite device goes half each way around.
    """
    chip, ring = CHIPS["v5p"], [d for d in torus(4, 4, 4) if d.coords[1:] == (0, 0)]
    rate, part = roofline.ATTAINED["tpu"]["link"] * chip.link, 1e9 / 4 / 4
    exchanged = gather_seconds(ring, chip, (4, 4, 4), "all-to-all")
    assert exchanged == pytest.approx(2 * part / rate + 2 * roofline.HOP)
    plane = [d for d in torus(4, 4, 4) if d.coords[2] == 0]  # sixteen pieces per device; both axes work at once
    exchanged = gather_seconds(plane, chip, (4, 4, 4), "all-to-all")
    assert exchanged == pytest.approx(1e9 / 16 / 2 / rate + 4 * roofline.HOP)
    switched, gpus = CHIPS["h200"], torus(8, 1, 1)
    rate, part = roofline.ATTAINED["cuda"]["link"] * switched.link, 1e9 / 8 / 8
    assert gather_seconds(gpus, switched, (), "all-to-all") == pytest.approx(7 * part / rate + roofline.GPU_LATENCY)


def test_between_slices_each_device_sends_its_part_over_the_slow_link():
    chip, both = CHIPS["v5p"], torus(4, 4, 4, slices=2)
    across, within = (gather_seconds(members, chip, (4, 4, 4)) for members in (both, both[:64]))
    slow = 1e9 / 64 / 2 / (roofline.ATTAINED["tpu"]["link"] * chip.slow_link) + roofline.SLOW_LATENCY
    assert across == pytest.approx(within + slow)
