"""A run that starts from other weights takes what its rules say, once, on any mesh and grid."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lina_jax import mesh, state, torch_layout, validation, warm_start
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config, InitFromConfig, MeshConfig
from lina_jax.errors import UserError
from lina_jax.models import attention
from lina_jax.train import train
from lina_jax.workdir import write_config

GATES = ("key_scale", "value_scale")


def save_run(workdir, plan, run) -> None:
    """Write a workdir whose checkpoint is `run`."""
    write_config(workdir, plan.config)
    checkpoints = Checkpoints(workdir, plan.config.checkpoint)
    checkpoints.save(run)
    checkpoints.close()


def flat(*trees):
    return {"/".join(path): np.asarray(leaf) for tree in trees for path, leaf in flatten_dict(tree).items()}


@pytest.fixture(scope="module")
def donor(tiny, rough, one_device, tmp_path_factory):
    """(workdir, plan, state) of a run on one device whose EMA is not its parameters."""
    plan = state.make_blueprint(tiny(), one_device)
    run = rough(plan)
    run = dataclasses.replace(run, step=run.step + 5, ema=jax.tree.map(lambda x: x + 1, run.params))
    workdir = tmp_path_factory.mktemp("donor") / "run"
    save_run(workdir, plan, run)
    return workdir, plan, jax.device_get(run)


@pytest.fixture
def begun(tiny, donor):
    """(state, report, plan) of a run that starts from `donor`, by default on fsdp=8, with `changes` of its config."""

    def begin(devices=None, changes=None, **init_from):
        config = tiny(**(changes or {}), init_from={"path": str(donor[0])} | init_from)
        plan = state.make_blueprint(config, devices or mesh.build(MeshConfig(data=1, fsdp=8)))
        return *warm_start.initialise(plan), plan

    return begin


def actions(report) -> dict[str, str]:
    return {array["name"]: array["action"] for array in report["arrays"]}


@pytest.mark.parametrize("ema", [True, False])
def test_all_arrays_come_to_another_mesh(begun, donor, identical, ema):
    """Bit for bit, sharded as in the new run, whose EMA equals its parameters and whose counters are 0."""
    run, report, plan = begun(ema=ema)
    want = donor[2].ema if ema else donor[2].params
    assert identical(run.params, want) and identical(run.ema, want) and identical(run.frozen, donor[2].frozen)
    assert set(actions(report).values()) == {"loaded"}
    assert (report["step"], report["weights"]) == (5, "ema" if ema else "raw")
    assert jax.tree.map(lambda x: x.sharding, run) == plan.shardings
    assert int(run.step) == int(run.updates) == 0


def test_the_loss_is_that_of_the_donor(begun, donor, batch_of):
    """If model and grid are the same; eight devices and one differ in the order of summation (measured 1e-7)."""

    def loss(plan, params, frozen):
        examples = np.arange(plan.config.batch_size)
        batch = jax.device_put(batch_of(plan.config), mesh.sharding(plan.mesh, "batch"))
        return np.asarray(validation.make_eval_step(plan)(params, frozen, batch, examples)[0]).sum()

    run, _, plan = begun(mesh.build(MeshConfig(data=2, fsdp=2, tensor=2)))
    np.testing.assert_allclose(
        loss(plan, run.params, run.frozen), loss(donor[1], donor[2].ema, donor[2].frozen), rtol=1e-6
    )


LARGER = {"model": {"image_grid": (8, 8), "condition_grid": (4, 4)}}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("rules", "action"), [("resolution", "restarted"), ("interpolate", "recomputed")])
def test_a_larger_grid_has_gates_of_its_own_and_all_else_of_the_donor(begun, donor, rules, action, large, monkeypatch):
    """Also if gates are sharded over devices: 80 tokens can be, the donor's 20 cannot."""
    monkeypatch.setattr(attention, "LARGE_TABLE", 1 if large else attention.LARGE_TABLE)
    run, report, _ = begun(changes=LARGER, rules=rules)
    ours, theirs = flat(run.params, run.frozen), flat(donor[2].ema, donor[2].frozen)
    for name, done in actions(report).items():
        if name.endswith(GATES):
            assert done == action
            want = np.ones(ours[name].shape) if rules == "resolution" else interpolated(theirs[name])
            np.testing.assert_allclose(ours[name], want, rtol=1e-6)
        else:
            assert done == "loaded" and np.array_equal(ours[name], theirs[name]), name
    assert "model.image_grid: (4, 4) -> (8, 8)" in report["config"]


def interpolated(gates):
    """Gates (layers, tokens, heads) of 2 x 2 condition and 4 x 4 image tokens, for twice as many rows and columns."""
    parts = []
    for part, side in ((gates[:, :4], 2), (gates[:, 4:], 4)):
        grid = part.reshape(len(part), side, side, -1)
        at = np.clip((np.arange(2 * side) + 0.5) / 2 - 0.5, 0, side - 1)  # pixel centres, on the donor's grid
        low, share = np.minimum(at.astype(int), side - 2), at - np.minimum(at.astype(int), side - 2)
        for axis in (1, 2):
            weight = np.expand_dims(share, [i for i in range(4) if i != axis])
            grid = np.take(grid, low, axis) * (1 - weight) + np.take(grid, low + 1, axis) * weight
        parts.append(grid.reshape(len(part), -1, grid.shape[-1]))
    return np.concatenate(parts, axis=1)


def test_condition_gates_stay_where_their_grid_stays(begun, donor):
    run, _, _ = begun(changes={"model": {"image_grid": (8, 8)}}, rules="interpolate")
    for name, gate in flat(donor[2].ema).items():
        if name.endswith(GATES):
            assert np.array_equal(flat(run.params)[name][:, :4], gate[:, :4])


def test_arrays_that_are_not_taken_are_those_of_a_fresh_run(begun, donor, one_device):
    run, report, plan = begun(
        one_device, include=["head/*", "*norm*"], exclude=["head/blocks/*"], restart=["head/out/*"], checkpoint=5
    )
    fresh = flat(plan.init().params, plan.init().frozen)
    taken = flat(donor[2].ema) | flat(donor[2].frozen)
    for name, array in flat(run.params, run.frozen).items():
        loaded = (name.startswith("head/") or "norm" in name) and not name.startswith(("head/blocks/", "head/out/"))
        assert actions(report)[name] == (
            "loaded" if loaded else "restarted" if name.startswith("head/out/") else "skipped"
        )
        assert np.array_equal(array, (taken if loaded else fresh)[name]), name


def test_the_first_list_that_fits_decides(donor):
    """In the order exclude, include, restart, recompute."""
    plan = donor[1]
    model = plan.config.model, {path: leaf.shape for path, leaf in flatten_dict(plan.shapes.params).items()}
    lists = {"exclude": ("head/*",), "include": ("head/*", "*/attention/*"), "restart": ("*_scale",)}
    rules = InitFromConfig(path="donor", **lists, recompute=("*/attention/key_scale",))
    done = {"/".join(path): decision.action for path, decision in warm_start.decide(rules, model, model).items()}
    for name, action in done.items():
        included = "/attention/" in name and not name.startswith("head/")
        assert action == ("skipped" if not included else "restarted" if name.endswith("_scale") else "loaded"), name
    assert set(done.values()) == {"skipped", "restarted", "loaded"}


def test_a_softmax_model_with_another_head_gives_what_it_has(tiny, rough, one_device, tmp_path):
    """As when starting from NOVA: arrays of attention, and those of another shape, are not taken."""
    nova = tiny(
        model={"attention": "softmax", "depthwise_conv": False, "kv_gate": "none", "head_width": 16, **LARGER["model"]}
    )
    plan = state.make_blueprint(nova, one_device)
    run = rough(plan)
    save_run(tmp_path / "nova", plan, run)
    config = tiny(init_from={"path": str(tmp_path / "nova"), "rules": "nova"})
    begun, report = warm_start.initialise(state.make_blueprint(config, one_device))
    done, ours, theirs = actions(report), flat(begun.params, begun.frozen), flat(run.params, run.frozen)
    for name in ours:
        fits = name in theirs and theirs[name].shape == ours[name].shape
        assert (done[name] == "loaded") == (fits and "/attention/" not in name), name
        if done[name] == "loaded":
            assert np.array_equal(ours[name], theirs[name])
    assert done["decoder/runs/from_01/mlp/fc1/kernel"] == "loaded"
    assert done["head/patch_embed/kernel"] == "skipped"


def published(config: Config):
    """((model, shapes by path), {published name of a tensor: path of its array})."""
    plan = state.make_blueprint(config, mesh.mesh_for_weights(config.model))
    shapes = flatten_dict(plan.shapes.params) | flatten_dict(plan.shapes.frozen)
    keys = {entry.key: entry.path for entry in torch_layout.entries(config.model)}
    return (config.model, {path: leaf.shape for path, leaf in shapes.items()}), keys


@pytest.mark.parametrize(("small", "large"), [("t2i:256", "t2i:512"), ("t2i:512", "t2i:1024")])
def test_the_published_resolution_rule_by_published_names(small, large, load_preset):
    config = load_preset(large)
    ours, keys = published(config)
    decisions = warm_start.decide(config.init_from, ours, published(load_preset(small))[0])
    restarted = {path for path, decision in decisions.items() if decision.action == "restarted"}
    assert restarted == {path for key, path in keys.items() if "key_scale" in key or "value_scale" in key}
    assert {d.action for path, d in decisions.items() if path not in restarted} == {"loaded"}


def test_the_published_rule_of_nova_by_published_names(load_preset):
    config = load_preset("t2i:256")
    nova = dataclasses.replace(load_preset("t2i:1024").model, attention="softmax", depthwise_conv=False, kv_gate="none")
    ours, keys = published(config)
    theirs, _ = published(dataclasses.replace(config, model=nova))
    decisions = warm_start.decide(config.init_from, ours, theirs)
    loaded = {path for path, decision in decisions.items() if decision.action == "loaded"}
    assert loaded == {path for key, path in keys.items() if "attn" not in key}


def test_a_chain_over_resolutions_and_meshes(begun, donor, tmp_path):
    """As in the published recipe: each run starts from the one before, with more tokens and on another mesh."""
    before, path = donor[2], donor[0]
    for side, sizes in ((4, {"data": 2, "fsdp": 2, "tensor": 2}), (8, {"data": 1, "fsdp": 2, "sequence": 4})):
        run, report, plan = begun(
            mesh.build(MeshConfig(**sizes)),
            {"model": {"image_grid": (2 * side, 2 * side), "condition_grid": (side, side)}},
            path=str(path), rules="resolution" if side == 4 else "interpolate",
        )  # fmt: skip
        assert jax.tree.map(lambda x: x.sharding, run) == plan.shardings
        ours, theirs = flat(run.params, run.frozen), flat(before.ema, before.frozen)
        loaded = [name for name, action in actions(report).items() if action == "loaded"]
        assert len(loaded) == len(ours) - 2
        assert all(np.array_equal(ours[name], theirs[name]) for name in loaded)
        if side == 4:
            path, before = tmp_path / "larger", jax.device_get(run)
            save_run(path, plan, run)


def test_a_run_that_goes_on_does_not_begin_again(tiny_text, rough, one_device, train_on_one_device, tmp_path, capsys):
    """Even if the donor is gone."""
    config = tiny_text(steps=1, eval={"every": 0, "examples": 8}, init_from={"path": str(tmp_path / "donor")})
    plan = state.make_blueprint(config, one_device)
    save_run(tmp_path / "donor", plan, rough(plan))
    train(config, tmp_path / "run")
    assert "EMA of step 0, rules all: loaded" in capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "init_from.json").read_text())
    assert set(actions(report).values()) == {"loaded"}
    shutil.rmtree(tmp_path / "donor")
    assert int(train(config, tmp_path / "run").step) == 1
    assert json.loads((tmp_path / "run" / "init_from.json").read_text()) == report


@pytest.mark.parametrize(
    ("changes", "init_from", "parts"),
    [
        ({}, {"path": "/no/such/run"}, ["init_from.path=/no/such/run: no such directory"]),
        ({}, {"path": "."}, ["not a training directory with checkpoints", "--from_torch"]),
        ({}, {"checkpoint": 7}, ["no checkpoint of step 7", "its steps are [5]"]),
        ({}, {"exclude": ["head/*", "haed/*"], "restart": ["gates"]},
         ["exclude: no array name matches 'haed/*'", "restart: no array name matches 'gates'"]),
        ({}, {"exclude": ["*"]}, ["the rules of init_from select none of its "]),
        ({}, {"recompute": ["head/out/*"]}, ["head/out/bias: no gate, cannot be recomputed", "head/out/kernel: no"]),
        (LARGER, {}, ["decoder/runs/from_01/attention/key_scale: (1, 20, 4) in the source, (1, 80, 4) here",
                      "decoder/runs/from_01/attention/value_scale: (1, 20, 4) in the source"]),
        ({"model": {"image_grid": (2, 8)}}, {},
         ["/key_scale: (1, 20, 4) in the source, (1, 20, 4) here (grids ((2, 2), (4,"]),
        ({"model": {"kv_gate": "key", "rotary": True, "heads": 1, "num_classes": 4}}, {},
         ["value_scale: only in the source", "time_embed/mlp/fc1/bias: only in the source",
          "label_embed/table: (4, 32) in the source, (5,"]),
        ({"model": {"kv_gate": "decoupled"}}, {},
         ["key_scale_gamma: not in the source", "key_scale: only in the source"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_listed_at_once(begun, changes, init_from, parts):
    with pytest.raises(UserError) as caught:
        begun(changes=changes, **init_from)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_run_that_cannot_begin_leaves_nothing(tiny_text, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        train(tiny_text(init_from={"path": str(tmp_path / "none")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_imported_weights_are_a_donor_and_no_workdir_that_can_have_one(tiny, donor, tmp_path, identical):
    workdir, plan, run = donor
    write_config(tmp_path / "import", plan.config)
    checkpoints = Checkpoints(tmp_path / "import", plan.config.checkpoint)
    checkpoints.save_weights(run.params, run.frozen)
    checkpoints.close()
    config = tiny(init_from={"path": str(tmp_path / "import")})
    begun, report = warm_start.initialise(state.make_blueprint(config, mesh.build(MeshConfig(data=1, fsdp=8))))
    assert identical(begun.params, run.params) and report["weights"] == "raw"
    with pytest.raises(UserError, match="holds imported weights"):
        warm_start.is_pending(tiny(init_from={"path": str(workdir)}), tmp_path / "import")


def test_the_table_tells_every_array(begun):
    _, report, _ = begun(changes=LARGER, rules="resolution")
    first, *lines = warm_start.table(report).splitlines()
    assert first.startswith("init_from ") and "EMA of step 5, rules resolution: loaded " in first
    assert "restarted 2 arrays (640 numbers)" in first
    assert sum(line.startswith(("  loaded ", "  restarted ")) for line in lines) == len(report["arrays"])
    assert any(line.split() == ["restarted", "decoder/runs/from_01/attention/key_scale", "1", "x", "80", "x", "4",
                                "(source", "1", "x", "20", "x", "4)"] for line in lines)  # fmt: skip
