"""Shared by the tests: fake devices, a tiny dataset, tiny configs and batches for them."""

import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pretended_tools import launch  # noqa: F401  (a fixture)

from lina_jax import drawing, mesh, optim, state, training_step, validation
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config, MeshConfig, default, freeze
from lina_jax.prepare import Settings, prepare
from lina_jax.train import train
from lina_jax.workdir import write_config

ROOT = Path(__file__).parent.parent
DEVICES = 8
FULLY_COMPILED = {"test_environment", "test_plan", "test_roofline", "test_search"}  # they read compiled programs

jax.config.update("jax_num_cpu_devices", DEVICES)  # before anything asks for a device
# Halves compile times on CPUs, here and in subprocesses: fusions go through XLA's older emitters (a jaxlib without them
# ignores the option), and code generation is not split over threads, since other tests use the other cores.
COMPILER = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{COMPILER} {os.environ.get('XLA_FLAGS', '')}".strip()  # read with the first device
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs that a shell starts in the background ignore Ctrl-C
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # subprocesses would compile the package each time
gc.disable()  # traced programs are millions of objects with little garbage: collecting once per file is enough


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """A compilation cache of this session alone: equal programs compile once in all its processes."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    directory.mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


@pytest.fixture(scope="module", autouse=True)
def garbage_collection():
    """Free the programs that a file has traced; what stays is not looked at again."""
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def quick_compile(request):
    """Compile without costly optimisations on CPUs: three times faster."""
    before = jax.config.read("jax_disable_most_optimizations")
    quickly = request.module.__name__ not in FULLY_COMPILED and jax.default_backend() == "cpu"
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory) -> Path:
    """Captioned scenes of 8 x 8 pixels: 64 for training and 8 for validation."""
    out = tmp_path_factory.mktemp("data") / "shapes"
    prepare(out, Settings(resolution=8, train=64, validation=8))
    return out


TINY = {
    "seed": 1,
    "steps": 6,
    "batch_size": 8,
    "model": {
        "condition": "class", "num_classes": 3, "text_encoder": "bytes", "text_length": 24, "text_words": 6,
        "text_dim": 16, "byte_layers": 1, "latent_channels": 3, "patch_size": 2, "image_grid": (4, 4),
        "condition_grid": (2, 2), "width": 32, "heads": 4, "condition_depth": 1, "image_depth": 2,
        "head_width": 32, "head_depth": 1, "conv_kernel": 3, "dtype": "float32", "scan_layers": False,
    },
    "autoencoder": {"kind": "identity", "stride": 1, "scaling_factor": 1.0},
    "data": {"threads": 1, "prefetch": 2},
    "loss": {"repeat": 2},
    "optim": {"learning_rate": 1e-3, "warmup_steps": 2},
    "sample": {"steps": 4, "euler_steps": 3, "guidance": 2.0, "stages": 2},
    "checkpoint": {"every": 3},
    "eval": {"every": 0, "examples": 6},
    "log": {"every": 1, "preview_every": 0, "preview_images": 0},
}  # fmt: skip


def tiny_config(**changes) -> Config:
    """Config of a model of about 59,000 parameters; `changes` as in tiny(steps=3, model={"width": 16})."""
    config = default()
    config.update(TINY)
    config.update(changes)
    return freeze(config)


@pytest.fixture(scope="session")
def tiny():
    return tiny_config


@pytest.fixture(scope="session")
def tiny_text(shapes_data):
    """Configs of text-conditional models that train on `shapes_data`."""

    def make(**changes) -> Config:
        data = {"path": str(shapes_data)} | changes.pop("data", {})
        return tiny_config(**changes | {"data": data, "model": {"condition": "text"} | changes.get("model", {})})

    return make


@pytest.fixture(scope="session")
def one_device():
    return mesh.build(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def text_plan(tiny_text, one_device):
    return state.make_blueprint(tiny_text(), one_device)


@pytest.fixture
def train_on_one_device(monkeypatch, one_device):
    """Meshes that `train` and other programs build have one device."""
    monkeypatch.setattr(mesh, "build", lambda config, devices=None: one_device)


@pytest.fixture(scope="module")
def traced_once():
    """Share programs and first states between a file's runs that are trained alike: tracing dominates tiny runs."""
    programs, default = {}, Config()

    def trained(config: Config) -> Config:
        """Without what no program depends on."""
        steps = config.steps if config.optim.schedule == "cosine" else 0
        others = {name: getattr(default, name) for name in ("data", "checkpoint", "eval", "log", "step_timeout")}
        return dataclasses.replace(config, steps=steps, **others)

    def sharing(make):
        def shared(plan: state.Blueprint):
            if plan.encoders.weights:  # programs hold on to these arrays
                return make(plan)
            key = make, trained(plan.config), plan.mesh
            if key not in programs:
                programs[key] = make(plan)
            return programs[key]

        return shared

    def sharing_state(init):
        def shared(plan: state.Blueprint):
            key = init, trained(plan.config), plan.mesh
            if key not in programs:
                programs[key] = jax.device_get(init(plan))
            return jax.device_put(programs[key], plan.shardings)

        return shared

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((training_step, "make_train_step"), (validation, "make_eval_step"), (drawing, "Stepper")):
            patch.setattr(owner, name, sharing(getattr(owner, name)))
        patch.setattr(state, "_abstract", functools.cache(state._abstract))  # most of the time to make a blueprint
        patch.setattr(state.Blueprint, "init", sharing_state(state.Blueprint.init))
        yield


@pytest.fixture(scope="session")
def config(tiny_text) -> Config:
    """Config of the run in `finished`: with Muon, whose optimizer state includes AdamW's."""
    previews = {"preview_images": 2, "preview_every": 3, "preview_prompts": ("a red circle",)}
    return tiny_text(optim={"name": "muon"}, log=previews, eval={"every": 3, "examples": 6})


@pytest.fixture(scope="session")
def train_alone(one_device):
    """`train` on one device, for fixtures that outlive `train_on_one_device`."""

    def run(config: Config, workdir: Path) -> state.TrainState:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mesh, "build", lambda config, devices=None: one_device)
            return train(config, workdir)

    return run


@pytest.fixture(scope="module")  # per module, to compile as the module's tests do
def finished(config, tmp_path_factory, train_alone) -> tuple[Path, state.TrainState]:
    """Workdir of an uninterrupted run of six steps, and its last state on the host."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, jax.device_get(train_alone(config, workdir))


def rough_state(plan: state.Blueprint, seed: int = 0) -> state.TrainState:
    """A state before the first step with all parameters random.

    At initialisation the head predicts exactly zero, so most gradients would vanish.
    """
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        around = 1.0 if "scale" in path[-1].key else 0.0  # scales of norms and gates
        return (around + 0.12 * rng.standard_normal(leaf.shape)).astype(np.float32)

    params, frozen = (jax.tree_util.tree_map_with_path(drawn, t) for t in (plan.shapes.params, plan.shapes.frozen))
    params, frozen = jax.device_put((params, frozen), (plan.shardings.params, plan.shardings.frozen))
    return jax.device_put(state.fresh_state(params, frozen, plan.optimizer), plan.shardings)


@pytest.fixture(scope="session")
def rough():
    return rough_state


def adam_moment(run: state.TrainState, name: str = "mu"):
    """Adam's first moment ("mu") or second ("nu") of each parameter; with b1 = 0 the first is the gradient."""
    return optax.tree.get(run.opt_state, name)


@pytest.fixture(scope="session")
def moment():
    return adam_moment


# Its state is the last gradient. Optimizers are half of what there is to compile in a step of a tiny model.
KEEPS_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, _, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


@contextlib.contextmanager
def gradients_alone():
    """Blueprints made within are of training steps without an optimizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "optimizer", lambda *_: KEEPS_GRADIENT)
        yield


@pytest.fixture
def no_optimizer():
    with gradients_alone():
        yield


@pytest.fixture(scope="session")
def first_step():
    """(config, devices) -> (loss, gradient) of the first step from a rough state."""

    def step(config: Config, devices):
        with gradients_alone():
            plan = state.make_blueprint(config, devices)
        run, metrics = training_step.make_train_step(plan)(rough_state(plan), random_batch(config))
        return float(metrics["loss"]), jax.device_get(run.opt_state)

    return step


def write_run(directory: Path, plan: state.Blueprint, run: state.TrainState) -> Path:
    """Write a training directory with one checkpoint; returns `directory`."""
    write_config(directory, plan.config)
    checkpoints = Checkpoints(directory, plan.config.checkpoint)
    checkpoints.save(run)
    checkpoints.wait()
    checkpoints.close()
    return directory


@pytest.fixture(scope="session")
def save_run():
    return write_run


def random_batch(config: Config, seed: int = 0) -> state.Batch:
    """A batch of noise, random labels and random text of random lengths."""
    rng, model, size = np.random.default_rng(seed), config.model, config.batch_size
    return {
        "image": rng.integers(0, 256, (size, *model.latent_size, 3), np.uint8),
        "label": rng.integers(0, model.num_classes, size).astype(np.int32),
        "text": rng.integers(0, 256, (size, model.text_length), np.uint8),
        "text_length": rng.integers(0, model.text_length + 1, size).astype(np.int32),
    }


@pytest.fixture(scope="session")
def batch_of():
    return random_batch


def relative_error(got, want) -> float:
    """|got - want| / |want| over whole trees, in the Euclidean norm."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    error = sum(np.sum(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64))) for a, b in pairs)
    return float(np.sqrt(error / sum(np.sum(np.square(np.asarray(b, np.float64))) for _, b in pairs)))


@pytest.fixture(scope="session")
def error_between():
    return relative_error


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.fixture(scope="session")
def identical():
    """Whether two trees hold the same bits."""
    return same_bits


@pytest.fixture(scope="session")
def one_device_env(compiled_programs) -> dict[str, str]:
    """The environment of a process that sees one device, and compiles quickly."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(compiled_programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="session")
def run_module(one_device_env):
    """Run `python -m lina_jax.NAME ...` on one device; start=True returns the process instead of its result."""

    def run(name: str, *args: str, start: bool = False, prefix: tuple[str, ...] = ()):
        command = [*prefix, sys.executable, "-m", f"lina_jax.{name}", *args]
        if start:
            return subprocess.Popen(
                command, cwd=ROOT, env=one_device_env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
            )
        return subprocess.run(command, cwd=ROOT, env=one_device_env, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def config_file(tmp_path):
    """Write a config as the file that --config takes."""

    def write(config: Config) -> str:
        path = tmp_path / "experiment.py"
        path.write_text(
            "import ml_collections\n\n\ndef get_config():\n"
            f"    return ml_collections.ConfigDict({dataclasses.asdict(config)!r})\n"
        )
        return str(path)

    return write


@pytest.fixture(scope="session")
def load_preset():
    """The frozen config of 'FILE:PRESET', or of 'FILE' alone, in configs/."""

    def load(name: str) -> Config:
        name, _, preset = name.partition(":")
        spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return freeze(module.get_config(*([preset] if preset else [])))

    return load
