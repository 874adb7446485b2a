"""GenEval's images are where its judge looks for them, whatever was drawn before; reports show what was measured."""

import base64
import io
import json
import math
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from lina_jax import drawing, geneval, mesh, report, state
from lina_jax.config import MeshConfig
from lina_jax.errors import UserError
from lina_jax.workdir import write_config

LINES = [
    '{"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a circle"}',
    '{"tag": "colors", "prompt": "a red circle"}',
    '{"tag": "counting", "prompt": "two crosses"}',
]


@pytest.fixture(scope="module")
def plan(tiny_text, one_device):
    return state.make_blueprint(tiny_text(), one_device)


@pytest.fixture(scope="module")
def weights(plan, rough):
    run = rough(plan)
    return run.params, run.frozen


@pytest.fixture
def prompts(plan, tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return geneval.read_prompts(path, None, plan.config)


@pytest.fixture
def draw(plan, weights):
    def drawn(prompts, out, *, plan=plan, per_device=4, seed=0, images=2):
        placed = jax.device_put(weights, (plan.shardings.params, plan.shardings.frozen))
        options = {"seed": seed, "images": images, "facts": {"step": 7}}
        return geneval.Drawing(plan, plan.config.sample, prompts, out, **options).draw(placed, per_device)

    return drawn


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_folders_are_those_of_the_benchmark(draw, prompts, tmp_path):
    found, shown, names = draw(prompts, tmp_path / "out")
    made = files(tmp_path / "out")
    assert set(made) == {"settings.json"} | {
        f"{i:05d}/{name}" for i in range(3) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    }
    assert [made[f"{i:05d}/metadata.jsonl"].decode() for i in range(3)] == [line + "\n" for line in LINES]
    assert found["prompts"] == 3 and found["images_per_prompt"] == 2
    assert names == ["a circle", "a red circle", "two crosses"]
    np.testing.assert_array_equal(shown[2], np.asarray(Image.open(tmp_path / "out" / "00002" / "samples" / "0000.png")))


def test_pictures_are_those_of_the_sampler(draw, prompts, plan, weights, tmp_path):
    """Image k of prompt i has number 2 i + k of the seed."""
    draw(prompts, tmp_path / "out", seed=5)
    texts = [prompt.text for prompt in prompts for _ in range(2)]
    images = drawing.Sampler(plan, plan.config.sample, 4)(*weights, texts, seed=5)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/00001/samples/0001.png")), images[3])


def test_what_is_absent_is_drawn_again_on_other_devices_in_their_way(draw, prompts, tiny_text, tmp_path):
    draw(prompts, tmp_path / "out")
    before = files(tmp_path / "out")
    for name in ("00000/samples/0001.png", "00002/samples/0000.png"):
        (tmp_path / "out" / name).unlink()
    kept = tmp_path / "out" / "00001" / "samples" / "0000.png"
    written = kept.stat().st_mtime_ns
    draw(
        prompts,
        tmp_path / "out",
        plan=state.make_blueprint(tiny_text(model={"remat": "full"}), mesh.build(MeshConfig(sequence=2))),
    )
    assert files(tmp_path / "out") == before
    assert kept.stat().st_mtime_ns == written


def test_pictures_of_another_seed_are_not_mixed(draw, prompts, tmp_path):
    draw(prompts, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds pictures that differ in seed: choose another --out, or remove it"):
        draw(prompts, tmp_path / "out", seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("")
    with pytest.raises(UserError, match="holds files that this command did not write"):
        draw(prompts, tmp_path / "mine")


def test_a_run_that_was_killed_as_it_began_begins_again(draw, prompts, tmp_path, monkeypatch):
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(os, "replace", _killed)
        killed.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # nor does it clean up
        draw(prompts[:1], tmp_path / "out", images=1)
    assert len(list((tmp_path / "out").iterdir())) == 1
    draw(prompts[:1], tmp_path / "out", images=1)


def _killed(*_):
    raise KeyboardInterrupt


def test_pictures_of_other_encoders_are_not_mixed(draw, prompts, tiny_text, one_device, tmp_path):
    draw(prompts[:1], tmp_path / "out", images=1)
    for group, other in (("autoencoder", {"path": "x"}), ("autoencoder", {"tile": 8}), ("text_encoder", {"path": "x"})):
        plan = state.make_blueprint(tiny_text(**{group: other}), one_device)
        with pytest.raises(UserError, match=f"pictures that differ in {group}: choose another --out, or remove it"):
            draw(prompts[:1], tmp_path / "out", images=1, plan=plan)


def test_pictures_of_other_settings_are_noticed_before_anything_is_drawn(draw, prompts, plan, tmp_path):
    options = {"images": 1, "facts": {"step": 7}}
    geneval.Drawing(plan, plan.config.sample, prompts, tmp_path / "out", seed=0, **options)
    assert not (tmp_path / "out").exists()
    draw(prompts, tmp_path / "out", images=1)
    with pytest.raises(UserError, match="holds pictures that differ in seed"):
        geneval.Drawing(plan, plan.config.sample, prompts, tmp_path / "out", seed=1, **options)


def test_all_processes_see_the_folders_before_they_draw(draw, prompts, tmp_path, monkeypatch):
    """Otherwise some could write to disks of their own, and all but process 0 would wait in a collective too early."""
    seen = []

    def check_shared(what, look):
        seen.append((what, look(), len(list(tmp_path.glob("out/*/samples"))), len(list(tmp_path.rglob("*.png")))))

    monkeypatch.setattr(geneval.hosts, "check_shared", check_shared)
    draw(prompts, tmp_path / "out")
    assert seen == [(str(tmp_path / "out" / "settings.json"), "there", 3, 0)]


def test_threads_are_as_many_as_the_process_has_processors(draw, prompts, tmp_path, monkeypatch):
    threads, pool = [], geneval.ThreadPoolExecutor
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5, 6}, raising=False)
    monkeypatch.setattr(geneval, "ThreadPoolExecutor", lambda count: threads.append(count) or pool(count))
    draw(prompts[:1], tmp_path / "out", images=1)
    assert threads == [3]


def test_rewritten_prompts_are_drawn_and_the_metadata_stays(plan, tmp_path):
    (tmp_path / "metadata.jsonl").write_text("\n".join(LINES))
    (tmp_path / "rewritten.txt").write_text('one\n\n{"prompt": "two"}\nthree\n')
    given = tmp_path / "metadata.jsonl", str(tmp_path / "rewritten.txt"), plan.config
    prompts = geneval.read_prompts(*given)
    assert [prompt.text for prompt in prompts] == ["one", "two", "three"]
    assert [prompt.line for prompt in prompts] == LINES
    (tmp_path / "rewritten.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"rewritten.txt: 1 prompts, .*metadata.jsonl has 3"):
        geneval.read_prompts(*given)
    (tmp_path / "rewritten.txt").write_text('one\n\n{"prompt": " "}\nthree\n')
    with pytest.raises(UserError, match=r"rewritten.txt, line 3: prompt ' ' is blank"):
        geneval.read_prompts(*given)
    for wrong in ('{"tag": "x"}', '{"prompt": null}'):
        (tmp_path / "metadata.jsonl").write_text("\n" + LINES[0] + f"\n \n{wrong}\n")
        with pytest.raises(UserError, match=r"metadata.jsonl, line 4: expected a JSON object with"):
            geneval.read_prompts(tmp_path / "metadata.jsonl", None, plan.config)


def test_strips_end_with_the_picture(plan, weights):
    rows = report.decode_strips(plan, plan.config.sample, *weights, seed=0)
    assert rows.images.shape[:1] + rows.images.shape[2:] == (4, 8, 8, 3) and rows.names == ["a picture"] * 4
    images = drawing.Sampler(plan, plan.config.sample, 4)(*weights, rows.names, seed=0)
    np.testing.assert_array_equal(rows.images[:, -1], images)
    empty = [np.mean(np.all(moment == 127, axis=-1)) for moment in rows.images.swapaxes(0, 1)]  # zero tokens are gray
    assert empty[0] > 0.5 and empty == sorted(empty, reverse=True) and empty[-1] < 0.1


@pytest.mark.parametrize(("names", "told"), [(["cat", "dog", "newt"], "2: newt"), ([], "class 2")])
def test_samples_are_those_of_the_sampler_by_class(names, told, tiny, rough, one_device, monkeypatch):
    monkeypatch.setattr(report.reading, "label_names", lambda path: names)
    plan = state.make_blueprint(tiny(), one_device)
    weights = (run := rough(plan)).params, run.frozen
    rows = report.draw_samples(plan, plan.config.sample, *weights, seed=5)
    labels = list(range(len(rows.names)))
    assert rows.images.shape[:2] == (min(8, plan.config.model.num_classes), 4) and rows.names[2] == told
    images = drawing.Sampler(plan, plan.config.sample, 4)(*weights, [label for label in labels for _ in range(4)], 5)
    np.testing.assert_array_equal(rows.images.reshape(images.shape), images)


def test_a_report_is_one_file_that_tells_what_is_there_and_what_is_not(plan, tmp_path):
    write_config(tmp_path / "run", plan.config)
    measured = {"quality/fid": 12.0, "quality/fid_standard_error": 0.4, "quality/recall": None}
    rows = [{"step": n, "loss": 1 / n, **(measured if n > 2 else {})} for n in range(1, 5)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = np.full((3, 8, 8, 3), 200, np.uint8)
    result = {
        "overall": 0.5, "single_object": 0.75, "counting": 0.25, "examples": {"single_object": 12, "counting": 12},
        "step": 4, "weights": "ema", "sample": {"steps": 4},
        "validation": {"loss": math.nan, "loss_standard_error": math.nan},  # of a run that diverged
        "quality": {
            "fid": {"value": 12.3456, "standard_error": 0.421}, "images": 100, "reference": {"file": "<b>.npz"},
            "not_measured": {"precision": "the reference has no images (arr_0)"},
        },
    }  # fmt: skip
    drawn = report.Rows("Samples", "of <classes>", images[None], ["0: cat"])
    report.write(tmp_path / "report", tmp_path / "run", result, [("Scenes", images, ["a", "b", "c"])], [drawn])
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["index.html"]
    page = (tmp_path / "report" / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in re.findall(r"base64,([^\"]+)", page)]
    assert len(sizes) == 4 and min(min(size) for size in sizes) > 100  # two curves, two grids
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    for told in (
        "12.35 ± 0.42", "0.75 of 12 (0.47 to 0.91)", "0.500 ± 0.080", "step 4", "the reference has no images",
        "&lt;b&gt;.npz", "nan", "of &lt;classes&gt;", "biased upwards", "Recall not requested", "model.width",
    ):  # fmt: skip
        assert told in text, told
