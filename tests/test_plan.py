"""Plans: programs are read as they are written, seconds follow from them, and real steps compile for absent TPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lina_jax import chips, device_groups, hlo, mesh, programs, roofline, topology
from lina_jax.chips import CHIPS
from lina_jax.config import MeshConfig
from lina_jax.errors import UserError
from lina_jax.models import sequence, tiles

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "name", "shape", "slices", "count"),
    [
        ("v5e:16x16", "v5e", (16, 16), 1, 256),
        ("v5p:4x4x4", "v5p", (4, 4, 4), 1, 64),
        ("v5p:4x4x4*2", "v5p", (4, 4, 4), 2, 128),
        ("h200:8", "h200", (1, 8), 1, 8),
        ("h200:4x8", "h200", (4, 8), 1, 32),
    ],
)
def test_a_topology_is_chips_in_a_shape(text, name, shape, slices, count):
    parsed = topology.parse(text)
    assert (parsed.name, parsed.shape, parsed.slices, parsed.chips) == (name, shape, slices, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e", "expected CHIP:SHAPE"),
        ("v5e:4x0", "expected CHIP:SHAPE"),
        ("v9:4x4", "'v9' is not known, only v4, v5e"),
        ("v5e:4x4x4", "a slice of v5e has 2 dimensions, not 3"),
        ("h200:2x8*2", "GPUs are h200:GPUS or h200:NODESxGPUS"),
        ("h200:4x1", "nodes of one GPU cannot be planned"),
    ],
)
def test_what_is_no_topology_is_refused(text, message):
    with pytest.raises(UserError, match="--topology") as error:
        topology.parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6e", "v6e"), ("NVIDIA H200", "h200")],
)
def test_devices_are_known_by_what_they_call_themselves(kind, name):
    assert chips.of_kind(kind) is CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe"])
def test_an_unknown_device_has_no_peak(kind):
    assert chips.of_kind(kind) is None


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
    """As XLA prints it: in quotation marks of quotation marks."""
    stated = json.dumps(tiles.stated(bytes_accessed=40, flops=640, vector_ops=7)).replace('"', "\\22")
    target = f'custom_call_target="__gpu$xla.gpu.triton", backend_config={{serialized_metadata = "{stated}"}}'
    work = roofline.count(program(f"%kernel.1 = f32[8]{{0}} custom-call(), {target}"))
    assert (work.matmul_flops, work.vector_ops, work.traffic) == (640, 7, 40)


def compiled(function, *arguments) -> hlo.Module:
    return hlo.Module(jax.jit(function).lower(*arguments).compile().as_text())


def grid(**sizes):
    return mesh.build(MeshConfig(**sizes))


CHIP = CHIPS["h200"]  # a chip without a torus: fake devices have no coordinates


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
    """As XLA:GPU leaves it where it has peeled an iteration off."""
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


# As TPUs write matrix products: (window, result, left, right, labels, multiply-adds).
CONVOLUTIONS = [
    ("", "f32[4,6]", "f32[4,5]", "f32[5,6]", "bf_io->bf", 4 * 6 * 5),
    ("{size=1}", "f32[2,4,6]", "f32[2,4,5]", "f32[1,5,6]", "0bf_0io->0bf", 2 * 4 * 6 * 5),
    # Three outputs from one input by a kernel of three with padding: each meets the input once.
    ("{size=3 pad=2_2 rhs_reversal=1}", "f32[4,3,6]", "f32[4,1,5]", "f32[3,5,6]", "b0f_0io->b0f", 3 * 4 * 6 * 5),
    # A batch of two as a dilated axis: each place of the kernel meets one of the two.
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
    hidden = beside.seconds - beside.bound["collectives"]  # the product
    assert alone.seconds == alone.bound["collectives"] == alone.collectives[0].seconds
    assert hidden > 0
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
    assert alone.work.traffic == 512 * 1024 * 2  # read; what is written stays on the chip
    assert alone.seconds == pytest.approx(512 * 1024 * 2 / rate)
    hidden = beside.bound["matmul"]
    assert beside.seconds == pytest.approx(max(alone.seconds, hidden))


def test_an_instruction_takes_the_longest_of_its_three_times():
    share = roofline.ATTAINED["cuda"]
    work = hlo.Work(matmul_flops=1e12, vector_ops=1.0, traffic=1e9)
    assert roofline.instruction_seconds(work, CHIP) == (1e12 / (share["matmul"] * CHIP.peak_flops), "matmul")
    work = hlo.Work(matmul_flops=1e9, vector_ops=1.0, traffic=1e12)
    assert roofline.instruction_seconds(work, CHIP) == (1e12 / (share["memory"] * CHIP.memory_bandwidth), "memory")


def torus(*extent: int, slices: int = 1) -> list[SimpleNamespace]:
    """Devices of slices of a torus."""
    places = [(x, y, z) for x in range(extent[0]) for y in range(extent[1]) for z in range(extent[2])]
    return [SimpleNamespace(coords=place, slice_index=s) for s in range(slices) for place in places]


def gather_seconds(members, chip: chips.Chip, extent: tuple[int, ...], kind: str = "all-gather") -> float:
    return roofline.collective_seconds(kind, 1e9, members, [d.slice_index for d in members], chip, extent)


def test_a_closed_ring_has_two_links_an_open_one_has_one():
    chip, size = CHIPS["v5p"], 1e9
    share = roofline.ATTAINED["tpu"]["link"]
    ring = [d for d in torus(4, 4, 4) if d.coords[1:] == (0, 0)]
    closed = gather_seconds(ring, chip, (4, 4, 4))
    assert closed == pytest.approx(size * 3 / 4 / (2 * share * chip.link) + 2 * roofline.HOP)
    open_ = gather_seconds(torus(2, 1, 1), chip, (2, 4, 4))
    assert open_ == pytest.approx(size / 2 / (share * chip.link) + 2 * roofline.HOP)
    assert gather_seconds(ring, chip, (4, 4, 4), "all-reduce") == pytest.approx(2 * closed)


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


def test_between_slices_each_device_sends_its_part_over_the_slow_link():
    chip, both = CHIPS["v5p"], torus(4, 4, 4, slices=2)
    across, within = (gather_seconds(members, chip, (4, 4, 4)) for members in (both, both[:64]))
    slow = 1e9 / 64 / 2 / (roofline.ATTAINED["tpu"]["link"] * chip.slow_link) + roofline.SLOW_LATENCY
    assert across == pytest.approx(within + slow)


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
        "the total memory required for HLO temporaries (20.5G) exceeds available HBM (15.75G).",
    ],
)
def test_a_message_of_the_compiler_says_how_much_memory_is_missing(message):
    error = programs._out_of_memory(message)
    assert (error.needed, error.capacity) == (20.5 * 2**30, 15.75 * 2**30)


def test_other_errors_of_the_compiler_are_not_about_memory():
    assert programs._out_of_memory("INTERNAL: something else") is None


def test_too_little_memory_on_chip_is_one_line_that_names_the_flags():
    def compile(**options):
        message = (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 16.12M of 16.00M vmem. Exceeded\n\nx"
        )
        raise jax.errors.JaxRuntimeError(message)

    program = SimpleNamespace(lower=lambda: SimpleNamespace(compile=compile))
    with pytest.raises(UserError, match=r"^the program needs 16.12M of 16.00M memory on chip .*xla_flags.py.*\)$"):
        programs.compile_program(program, (), {})


def test_the_abstract_batch_is_what_records_give(tiny, batch_of):
    config = tiny(model={"condition": "text"})
    where = grid(data=-1)
    real = {name: array for name, array in batch_of(config).items() if name != "label"}
    abstract = programs.batch(config, where)
    assert {n: (x.shape, x.dtype) for n, x in abstract.items()} == {n: (x.shape, x.dtype) for n, x in real.items()}


@pytest.mark.parametrize("condition", ["class", "text"])
def test_the_sampling_step_takes_what_the_plan_says(condition, tiny):
    config = tiny(model={"condition": condition})
    program, arguments = programs.sampling_step(config, grid(data=4, fsdp=2), images=16)
    (images,) = jax.tree.leaves(program.lower(*arguments).out_info)
    assert images.shape == (16, *config.model.latent_size, 3)


def run_plan(*args: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "XLA_"))}
    command = [sys.executable, "-m", "lina_jax.plan", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs pip install 'lina_jax[tpu]'")


@needs_libtpu
def test_the_step_of_a_model_compiles_for_a_tpu_and_json_stands_alone(tiny, config_file):
    config = tiny(model={"scan_layers": True}, batch_size=8)
    where = ("--topology=v5e:2x2", "--config.mesh.fsdp=2")
    done = run_plan(f"--config={config_file(config)}", *where, "--json", "--nosampling")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"]
    assert report["mesh"]["fsdp"] == report["mesh"]["data"] == 2
    assert report["collective_bytes"]
    assert 0 < report["predicted_mfu"] < 1
    # The compiler may pad and recompute; that much less, and products were not seen.
    assert report["compiled_flops"] > 0.8 * report["model_flops"]
    memory = report["memory_bytes"]
    parts = ("params", "optimizer", "ema", "batch", "temporaries")
    assert memory["total"] >= sum(memory[part] for part in parts)  # tiles are padded
    assert "train step" in done.stderr


@needs_libtpu
def test_a_model_that_does_not_fit_is_an_answer(tiny, config_file):
    config = tiny(model={"width": 8192, "head_width": 8192, "num_classes": 200_000}, batch_size=4)
    done = run_plan(f"--config={config_file(config)}", "--topology=v5e:2x2", "--json", "--nosampling")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not report["fits"]
    assert report["headroom_bytes"] < 0


@pytest.mark.skipif(bool(importlib.util.find_spec("libtpu")), reason="libtpu is installed")
def test_without_the_compiler_one_line_names_the_extra(tiny, config_file):
    done = run_plan(f"--config={config_file(tiny())}", "--topology=v5e:2x2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --topology=v5e: its compiler is not installed; pip install")
