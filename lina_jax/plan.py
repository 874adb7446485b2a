"""Plan a config for a TPU slice or GPU cluster that you do not have: does it fit, and how fast is a step?

python -m lina_jax.plan --config=configs/NAME.py[:preset] --topology=v5p:4x4x4 [--batch_per_chip=8] [--json]
    [--nosampling] [--detail=10] [--search [--search_compiles=6]] [--config.any.field=value ...]

Compiles the train step and the sampling step for the devices of the topology and prints a table: parameters, memory
per device by kind, collectives by mesh axis, and a roofline estimate of step time and MFU. With --json, stdout is one
JSON object and the table goes to stderr. --search tries remat policies (where kernels are the default, with and without
them), meshes and batch sizes. A config that does not fit is an answer, not an error. Needs `pip install '.[tpu]'`, for
GPUs `'.[plan-gpu]'`. docs/planning.md explains the figures.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from lina_jax import config as config_lib
from lina_jax import (
    config_file,
    decoding_schedule,
    entry,
    execution,
    flops,
    hlo,
    programs,
    roofline,
    search,
    state,
    topology,
)
from lina_jax import mesh as mesh_lib
from lina_jax.config import Config
from lina_jax.errors import UserError
from lina_jax.topology import Topology

GIB = 2**30
DAY = 86_400.0

Report = dict[str, Any]

# Keys that the JSON always has; null where a program does not fit.
ALWAYS = ("collective_bytes", "predicted_mfu", "predicted_step_s", "images_per_s")


def plan(config: Config, target: Topology, devices: Sequence[jax.Device], *, sampling: bool = True) -> Report:
    """The report, as JSON values: memory in bytes per device, times in seconds unless named otherwise.

    Raises UserError if the mesh does not fit the devices or the config.
    """
    mesh = mesh_lib.from_config(config, devices)
    blueprint = state.make_blueprint(config, mesh)
    report = {
        "topology": target.name
        + ":"
        + "x".join(map(str, target.shape))
        + (f"*{target.slices}" if target.slices > 1 else ""),
        "chips": target.chips,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        **execution.choices_of(blueprint.config.model),
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(blueprint.shapes.params)),
        "model_flops": config.batch_size * flops.training_flops(config.model, config.loss),
    }
    program, arguments = programs.train_step(config, mesh)
    memory = programs.state_bytes(blueprint) | {"batch": mesh_lib.device_bytes(arguments[1])}
    report |= _compiled("train step", program, arguments, target, mesh, memory)
    if seconds := report.get("predicted_step_s"):
        total = config.steps * seconds
        report |= {
            "predicted_mfu": report["model_flops"] / seconds / (len(devices) * target.chip.peak_flops),
            "images_per_s": config.batch_size / seconds,
            "steps": config.steps,
            "days": total / DAY,
            "chip_hours": total / 3600 * target.chips,
        }
    if sampling:
        report["sampling"] = _sampling(config, target, mesh)
    return report


def _sampling(config: Config, target: Topology, mesh: jax.sharding.Mesh) -> Report:
    images = config.batch_size
    program, arguments = programs.sampling_step(config, mesh, images)
    weights, frozen, *inputs = arguments
    memory = {
        "params": mesh_lib.device_bytes((weights, frozen)),
        "autoencoder": mesh_lib.device_bytes(program.trailing),
        "batch": mesh_lib.device_bytes(inputs),
    }
    steps = decoding_schedule.make_schedule(config)
    euler = float(steps.euler_steps.mean())
    made = _compiled("sampling step", program, arguments, target, mesh, memory, unknown_trips=euler)
    made |= execution.choices_of(execution.for_inference(config, mesh).model)
    if seconds := made.pop("predicted_step_s", None):
        needed = images * flops.sampling_flops(config.model, steps)
        made |= {
            "predicted_s": seconds,
            "images": images,
            "images_per_s": images / seconds,
            "model_flops": needed,
            "predicted_mfu": needed / seconds / (mesh.size * target.chip.peak_flops),
        }
    return made


def _compiled(
    name: str,
    program,
    arguments,
    target: Topology,
    mesh,
    memory: Mapping[str, int],
    *,
    unknown_trips: float = 1.0,
) -> Report:
    """Memory, FLOPs, collectives and time of the compiled program; if it is too large to compile, by how much."""
    print(f"compiling the {name} for {target.name} ...", file=sys.stderr, flush=True)
    capacity = target.chip.memory
    try:
        compiled = programs.compile_program(program, arguments, topology.compiler_options(target))
    except programs.OutOfMemory as error:
        memory = {**memory, "total": error.needed, "capacity": error.capacity}
        return {"fits": False, "headroom_bytes": error.capacity - error.needed, "memory_bytes": memory}
    memory = {
        **memory,
        "temporaries": compiled.temporaries,
        "outputs": compiled.outputs,
        "total": compiled.total,
        "capacity": capacity,
    }
    estimate = roofline.estimate(hlo.Module(compiled.text), target.chip, mesh, unknown_trips=unknown_trips)
    room = capacity - compiled.total
    if target.chip.torus:
        room = max(room, 0)  # TPU compilers refuse what does not fit, so this fits, whatever the parts add up to
    return {
        "fits": room >= 0,
        "headroom_bytes": room,
        "memory_bytes": memory,
        "compiled_flops": estimate.work.matmul_flops * mesh.size,
        "hbm_bytes": estimate.work.traffic,
        "collective_bytes": estimate.collective_bytes,
        "predicted_step_s": estimate.seconds,
        "seconds_by_bound": estimate.bound,
        "exposed_collectives": [
            {"name": c.name, "kind": c.kind, "axes": c.axes, "bytes": c.bytes, "times": c.times, "seconds": c.exposed,
             "source": c.source}
            for c in sorted(estimate.collectives, key=lambda c: -c.exposed)
            if c.exposed > 0
        ],
        "slowest": [
            {"name": name, "seconds": seconds, "source": source, **dataclasses.asdict(work)}
            for seconds, name, source, work in estimate.slowest
        ],
        "compile_s": compiled.seconds,
    }  # fmt: skip


def table(report: Report, detail: int = 0) -> str:
    """The report as text, with the `detail` costliest collectives and instructions."""
    rows = [
        f"{report['topology']}: {report['chips']} chips, mesh "
        + " x ".join(f"{axis}={n}" for axis, n in report["mesh"].items() if n > 1),
        f"global batch {report['batch_size']} ({report['batch_size'] / report['chips']:g} per chip), "
        f"{report['parameters']:,} trained parameters",
        *_recommended(report),
        "",
        f"train step: {_layers(report)}",
        *_rows(report, detail),
    ]
    if "predicted_mfu" in report:
        rows += [
            f"  step               {report['predicted_step_s'] * 1e3:.1f} ms, MFU {report['predicted_mfu']:.1%}",
            f"  FLOPs of a step    model {_flops(report['model_flops'])}, compiled {_flops(report['compiled_flops'])}",
            f"  images             {report['images_per_s']:,.0f}/s",
            f"  {report['steps']:,} steps  {report['days']:.1f} days, {report['chip_hours']:,.0f} chip-hours",
        ]
    if made := report.get("sampling"):
        rows += ["", f"sampling step: {_layers(made)}", *_rows(made, detail)]
        if "predicted_s" in made:
            rows += [
                f"  {made['images']} images     {made['predicted_s']:.2f} s, {made['images_per_s']:,.1f} images/s, "
                f"MFU {made['predicted_mfu']:.1%}",
                f"  FLOPs              model {_flops(made['model_flops'])}, compiled {_flops(made['compiled_flops'])}",
            ]
    return "\n".join(rows)


def _flops(count: float) -> str:
    return f"{count / 1e12:,.0f} T" if count >= 1e13 else f"{count / 1e9:,.0f} G"


def _layers(part: Report) -> str:
    return execution.described(**{name: part[name] for name in execution.FIELDS})


def _recommended(report: Report) -> list[str]:
    if "overrides" not in report:
        return []
    return [("recommended: " if report["fits"] else "nothing fits, nearest: ") + " ".join(report["overrides"])]


def _rows(part: Report, detail: int) -> list[str]:
    memory = dict(part["memory_bytes"])
    total, capacity = memory.pop("total"), memory.pop("capacity")
    room = part["headroom_bytes"]
    verdict = f"fits, {room / GIB:.2f} GiB free" if part["fits"] else f"does NOT fit, {-room / GIB:.2f} GiB too much"
    rows = [
        "  memory of a device " + ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in memory.items()) + " GiB",
        f"                     {total / GIB:.2f} of {capacity / GIB:.2f} GiB: {verdict}",
    ]
    for axes, kinds in sorted(part.get("collective_bytes", {}).items()):
        sizes = ", ".join(f"{kind} {size / GIB:.3f}" for kind, size in sorted(kinds.items()))
        rows.append(f"  over {axes or 'one device':<14}{sizes} GiB")
    if bounds := part.get("seconds_by_bound"):
        rows.append(
            "  time bound by      " + ", ".join(f"{k} {v * 1e3:.1f}" for k, v in sorted(bounds.items())) + " ms"
        )
    for found in part.get("exposed_collectives", [])[:detail]:
        rows.append(
            f"    {found['seconds'] * 1e3:8.2f} ms waits for {found['kind']} over {found['axes']} of "
            f"{found['bytes'] / 1e6:.1f} MB x {found['times']:g} ({found['name']}) {found['source']}"
        )
    for found in part.get("slowest", [])[:detail]:
        rows.append(
            f"    {found['seconds'] * 1e3:8.2f} ms {found['name']}: {found['matmul_flops'] / 1e9:.1f} GFLOP, "
            f"{found['vector_ops'] / 1e6:.0f} Mop, {found['traffic'] / 1e6:.1f} MB {found['source']}"
        )
    if "compile_s" in part:
        rows.append(f"  compiled in        {part['compile_s']:.0f} s")
    return rows


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    if values.config is None or not values.topology:
        raise UserError("--config=FILE.py[:PRESET] and --topology=CHIP:SHAPE (v5e:16x16, h200:8) are both needed")
    if values["search_compiles"].present and not values.search:
        raise UserError(f"--search_compiles={values.search_compiles}: belongs to --search, which is not given")
    target = topology.parse(values.topology)
    if values.batch_per_chip is not None:
        values.config.batch_size = values.batch_per_chip * target.chips
    config = config_lib.freeze(values.config)
    devices = topology.devices(target)
    if values.search:
        report = search.search(
            config,
            target,
            devices,
            lambda candidate: plan(candidate, target, devices, sampling=False),
            compiles=values.search_compiles,
            fixed_batch=values.batch_per_chip is not None,
        )
        if values.sampling and report["fits"]:
            best = search.recommended(config, report["recommended"], devices)
            report["sampling"] = _sampling(best, target, mesh_lib.from_config(best, devices))
    else:
        report = plan(config, target, devices, sampling=values.sampling)
    text = table(report, values.detail)
    if not values.json:
        print(text)
        return
    print(text, file=sys.stderr)
    for part in (report, report.get("sampling", {})):
        for name in ("exposed_collectives", "slowest"):
            if name in part:
                part[name] = part[name][: max(values.detail, 10)]
    print(json.dumps(dict.fromkeys(ALWAYS) | report))


if __name__ == "__main__":
    config_file.define_flag()
    flags.declare_key_flag("config")
    flags.DEFINE_string("topology", None, "CHIP:SHAPE, like v5e:16x16, v5p:4x4x4*2 (two slices), h200:8, h200:4x8")
    flags.DEFINE_integer(
        "batch_per_chip", None, "global batch, in images per chip; default: the config's", lower_bound=1
    )
    flags.DEFINE_bool("json", False, "print one JSON object on stdout, the table on stderr")
    flags.DEFINE_bool("sampling", True, "compile the sampling step too")
    flags.DEFINE_integer("detail", 0, "number of costliest collectives and instructions to list", lower_bound=0)
    flags.DEFINE_bool("search", False, "compare remat policies, kernels, meshes and batch sizes, and recommend")
    flags.DEFINE_integer("search_compiles", 6, "maximum number of programs that a search compiles", lower_bound=1)
    entry.run(main)
