"""Plans: names of topologies and chips, errors of compilers, and real steps compiled for absent TPUs and GPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from lina_jax import chips, mesh, programs, topology, xla_flags
from lina_jax.chips import CHIPS
from lina_jax.config import MeshConfig
from lina_jax.errors import UserError

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
        ("v9:4x4", "'v9' is unknown, expected one of v4, v5e"),
        ("v5e:4x4x4", "a slice of v5e has 2 dimensions, not 3"),
        ("v6e:32x32", "a slice of v6e has at most 16x16 chips (four: v6e:16x16*4)"),
        ("h200:2x8*2", "GPUs are h200:GPUS or h200:NODESxGPUS"),
        ("h200:4x1", "nodes with a single GPU cannot be planned"),
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
    with pytest.raises(UserError, match=r"^the program needs 16.12M of 16.00M on-chip memory .*xla_flags.py.*\)$"):
        programs.compile_program(program, (), {})


def test_the_abstract_batch_is_what_records_give(tiny, batch_of):
    config = tiny(model={"condition": "text"})
    where = mesh.build(MeshConfig(data=-1))
    real = {name: array for name, array in batch_of(config).items() if name != "label"}
    abstract = programs.batch(config, where)
    assert {n: (x.shape, x.dtype) for n, x in abstract.items()} == {n: (x.shape, x.dtype) for n, x in real.items()}


@pytest.mark.parametrize("condition", ["class", "text"])
def test_the_sampling_step_takes_what_the_plan_says(condition, tiny):
    config = tiny(model={"condition": condition})
    program, arguments = programs.sampling_step(config, mesh.build(MeshConfig(data=4, fsdp=2)), images=16)
    (images,) = jax.tree.leaves(program.lower(*arguments).out_info)
    assert images.shape == (16, *config.model.latent_size, 3)


def python(*args: str, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "XLA_"))}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=ROOT, env=env | environment, capture_output=True, text=True, timeout=500)


def run_plan(*args: str) -> subprocess.CompletedProcess:
    return python("-m", "lina_jax.plan", *args, JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1")  # compiles faster


needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs pip install 'lina_jax[tpu]'")


@needs_libtpu
@pytest.mark.parametrize("place", ["v5e:1x1", "v6e:1x1"])
def test_a_single_chip_is_a_slice(place):
    done = python("-c", f"import jax\nfrom lina_jax.topology import *\nprint(len(devices(parse({place!r}))))")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@needs_libtpu
def test_what_the_user_sets_of_libtpu_is_theirs():
    program = (
        "import os\nfrom lina_jax.topology import *\ndevices(parse('v5e:1x1'))\nprint(os.environ['LIBTPU_INIT_ARGS'])\n"
        "print(*compiler_options(parse('v5e:1x1')))"
    )
    done = python("-c", program, LIBTPU_INIT_ARGS="--xla_tpu_scoped_vmem_limit_kib=16384")
    flags, options = done.stdout.splitlines()
    assert flags == "--xla_tpu_scoped_vmem_limit_kib=16384"
    ours = {flag.split("=")[0] for flag in xla_flags.of_tpu("v5e")}
    assert ours - {f"--{name}" for name in options.split()} == {"--xla_tpu_scoped_vmem_limit_kib"}


# (topology, preset): the mesh axes with several devices, at the published batch size.
MESHES = {
    ("v5e:16x16", "imagenet256_c2i:w1536"): {"data": 8, "fsdp": 32},
    ("v5e:16x16", "t2i:512"): {"data": 2, "fsdp": 32, "sequence": 4},
    ("v5e:16x16", "t2i:4096"): {"fsdp": 4, "sequence": 64},
    ("v5p:4x4x4", "t2i:256"): {"data": 4, "fsdp": 16},
    ("v5p:4x4x4", "t2i:1024"): {"fsdp": 16, "sequence": 4},
    ("v5p:4x4x4", "t2i:2048"): {"fsdp": 16, "sequence": 4},
    ("v5p:4x4x4*2", "t2i:1024"): {"replica": 2, "fsdp": 8, "sequence": 8},
    ("v5p:8x8x16", "t2i:256"): {"data": 8, "fsdp": 32, "sequence": 4},
}
MESH_OF = """
import dataclasses, json, runpy, sys
from lina_jax import config, mesh, topology
for place, preset in json.loads(sys.argv[1]):
    file, name = preset.split(":")
    chosen, where = config.freeze(runpy.run_path(f"configs/{file}.py")["get_config"](name)), topology.parse(place)
    axes = dataclasses.replace(chosen.mesh, replica=where.slices)
    shape = mesh.from_config(dataclasses.replace(chosen, mesh=axes), topology.devices(where)).shape
    print(json.dumps({axis: size for axis, size in shape.items() if size > 1}))
"""


@needs_libtpu
def test_presets_find_their_meshes_on_slices():
    done = python("-c", MESH_OF, json.dumps(list(MESHES)))
    assert done.returncode == 0, done.stderr
    assert dict(zip(MESHES, map(json.loads, done.stdout.splitlines()), strict=True)) == MESHES


@needs_libtpu
def test_a_search_recommends_flags_and_plans_samples_with_them(tiny, config_file):
    where = (f"--config={config_file(tiny(batch_size=8))}", "--topology=v5e:2x2")
    done = run_plan(*where, "--search", "--search_compiles=1", "--batch_per_chip=2", "--detail=1")
    assert done.returncode == 0, done.stderr
    assert "1 of 1: batch 8, remat" in done.stderr and " fits, " in done.stderr
    _, _, recommended, _, train, *rows = done.stdout.splitlines()
    assert recommended.startswith("recommended: --config.batch_size=8 ") and train.startswith("train step: remat ")
    sampling = next(number for number, row in enumerate(rows) if row.startswith("sampling step: remat none"))
    for part in (rows[:sampling], rows[sampling:]):
        assert sum(" GFLOP, " in row for row in part) == 1  # the costliest instruction


@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="needs pip install 'lina_jax[plan-gpu]'")
def test_both_steps_of_a_model_compile_for_a_node_of_gpus(tiny, config_file):
    open_fields = {"remat": "auto", "scan_layers": None, "attention_kernel": "auto"}
    config = tiny(model={"dtype": "bfloat16", **open_fields}, batch_size=16)
    done = run_plan(f"--config={config_file(config)}", "--topology=h200:8", "--config.mesh.fsdp=8", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"] and report["sampling"]["fits"] and report["collective_bytes"]["fsdp"]
    layers = [(part["remat"], part["scan_layers"], part["attention_kernel"]) for part in (report, report["sampling"])]
    assert layers == [("none", False, "pallas"), ("none", True, "pallas")]
    assert 0 < report["predicted_mfu"] < 1


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
    # The compiler may pad and recompute, which adds to it; if it is much less, matmuls were not seen.
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
    assert report["predicted_mfu"] is report["predicted_step_s"] is report["images_per_s"] is None
    assert report["collective_bytes"] is None
    assert report["headroom_bytes"] < 0


@pytest.mark.skipif(bool(importlib.util.find_spec("libtpu")), reason="libtpu is installed")
def test_without_the_compiler_one_line_names_the_extra(tiny, config_file):
    done = run_plan(f"--config={config_file(tiny())}", "--topology=v5e:2x2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --topology=v5e: its compiler is not installed; pip install")
