"""The code behind the page: pictures appear set by set, a command redraws them, bad requests are refused."""

import re
import shlex
import subprocess
import sys
import types

import jax
import jax.monitoring
import numpy as np
import pytest
import tiny_dataset
from encoder_checkpoints import write_autoencoder, write_phi

from lina_jax import mesh, pictures, state
from lina_jax.demo_session import Studio
from lina_jax.errors import UserError

PROMPT = "a red 'circle' $x"


@pytest.fixture(scope="module")
def open_studio(one_device):
    """Studios on a machine with one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "build", lambda config, devices=None: one_device)
        yield Studio


@pytest.fixture(scope="module")
def workdir(tiny_text, one_device, rough, save_run, tmp_path_factory):
    plan = state.make_blueprint(
        tiny_text(model={"text_length": 40}, log={"preview_prompts": ("x" * 41, "a dot")}), one_device
    )
    return save_run(tmp_path_factory.mktemp("run"), plan, rough(plan))


@pytest.fixture(scope="module")
def studio(open_studio, workdir):
    return open_studio(workdir)


@pytest.fixture(scope="module")
def ask(studio):
    """Requests to the studio; keywords replace the default fields."""

    def make(**changes):
        return studio.request(**{"condition": PROMPT, "seed": 3, "steps": 4, "guidance": 1.7, "num": 3} | changes)

    return make


def finished(studio, request) -> np.ndarray:
    *_, last = studio.draw(request)
    return studio.pixels(last)


def test_pictures_appear_set_by_set(studio, ask):
    seen = [(progress, studio.pixels(progress)) for progress in studio.draw(ask())]
    whole = seen[-1][1]
    assert whole.shape == (3, 8, 8, 3)
    assert [(progress.step, progress.steps) for progress, _ in seen] == [(i + 1, len(seen)) for i in range(len(seen))]
    for progress, images in seen:
        exists = (progress.sets <= progress.step).repeat(2, axis=1).repeat(2, axis=2)  # tokens of 2 x 2 pixels
        np.testing.assert_array_equal(images[exists], whole[exists])
        assert set(images[~exists].ravel()) <= {127}  # latents of zero
        assert np.all(np.any(progress.sets == progress.step, axis=(1, 2)))
    assert len({sets.tobytes() for sets in seen[0][0].sets}) == 3  # each picture has an order of its own


def test_the_command_draws_the_same_bytes(studio, ask, run_module, tmp_path):
    request = ask()
    *words, out = shlex.split(studio.command(request))
    assert words[:3] == ["python", "-m", "lina_jax.sample"]
    assert out == "--out=drawn"
    result = run_module("sample", *words[3:], f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    for number, image in enumerate(finished(studio, request)):
        assert (tmp_path / f"{number:05d}.png").read_bytes() == pictures.png(image)


def test_pictures_depend_on_what_is_asked(studio, ask):
    first = finished(studio, ask())
    np.testing.assert_array_equal(finished(studio, ask(num=2)), first[:2])
    for change in ({"seed": 4}, {"condition": "a blue dot"}, {"guidance": 5.0}, {"steps": 8}):
        assert not np.array_equal(finished(studio, ask(**change)), first), change


def test_only_new_numbers_of_steps_compile(studio, ask):
    studio.compile(ask())
    compiled = []

    def note(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    other = ask(condition="two dots", seed=9, guidance=2.5, num=5)
    assert studio.ready(other)
    finished(studio, other)
    assert not compiled
    slower = ask(steps=5)
    assert not studio.ready(slower)
    studio.compile(slower)
    assert compiled
    assert studio.ready(slower)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": " "}, "prompt ' ' is blank"),
        ({"condition": None}, "prompt '' is blank"),
        ({"condition": 41 * "x"}, "has 41 bytes, more than model.text_length=40"),
        ({"condition": "caf\udce9"}, "is not UTF-8"),
        ({"seed": -1}, "--seed=-1: must be in [0, 2**31)"),
        ({"seed": 1.5}, "--seed=1.5: expected a whole number"),
        ({"seed": None}, "--seed=: expected a whole number"),
        ({"seed": float("nan")}, "--seed=nan: expected a whole number"),
        ({"steps": 0}, "--steps=0"),
        ({"steps": 17}, "--steps=17: at most 16, one for each token of a picture"),
        ({"guidance": None}, "--guidance: expected a number"),
        ({"guidance": -1}, "--guidance=-1.0: must be in [0, 3.4e+38]"),
        ({"num": 0}, "--num=0: must be at least 1"),
        ({"num": 65}, "--num=65: at most 64 pictures at once on this page"),
    ],
)
def test_what_cannot_be_drawn_is_named(ask, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ask(**changes)


def test_examples_are_captions_that_the_model_can_read(studio):
    assert 2 <= len(studio.examples) <= 6
    assert all(len(text.encode()) <= 40 for text in studio.examples)
    assert any(" on " in text for text in studio.examples)  # captions of the dataset


def test_classes_have_the_names_of_the_dataset(tiny, one_device, rough, save_run, open_studio, tmp_path):
    data = tiny_dataset.write(tmp_path / "data")
    plan = state.make_blueprint(tiny(model={"num_classes": 2}, data={"path": str(tmp_path / "gone")}), one_device)
    workdir = save_run(tmp_path / "run", plan, rough(plan))
    assert open_studio(workdir).class_names == []
    with pytest.raises(UserError, match=f"--data={tmp_path}/gone: .* does not exist"):
        open_studio(workdir, data=str(tmp_path / "gone"))
    studio = open_studio(workdir, data=str(data))
    assert (studio.class_names, studio.examples) == (["cat", "dog"], [])
    request = studio.request(1, 0, 2, 1.0, 1)
    assert "--label=1" in shlex.split(studio.command(request))
    assert finished(studio, request).shape == (1, 8, 8, 3)
    with pytest.raises(UserError, match="label 3: expected 0 to 1"):
        studio.request(3, 0, 2, 1.0, 1)


def test_frozen_encoders_are_taken_from_where_they_are_said_to_be(
    tiny, one_device, rough, save_run, open_studio, tmp_path
):
    write_autoencoder(tmp_path / "vae", scaling_factor=0.2)
    write_phi(tmp_path / "phi")
    model = {"condition": "text", "text_encoder": "features", "text_dim": 32, "latent_channels": 4}
    config = tiny(model=model, autoencoder={"kind": "sdxl", "stride": 2, "scaling_factor": 0.2})
    plan = state.make_blueprint(config, one_device)
    workdir = save_run(tmp_path / "run", plan, rough(plan))
    with pytest.raises(UserError, match="--autoencoder=DIR"):
        open_studio(workdir)
    where = {"autoencoder": str(tmp_path / "vae"), "text_encoder": str(tmp_path / "phi")}
    studio = open_studio(workdir, **where, ema=False)
    request = studio.request("a red circle", 0, 2, 3.0, 2)
    words = shlex.split(studio.command(request))
    assert {f"--{name}={path}" for name, path in where.items()} | {"--raw"} <= set(words)
    assert finished(studio, request).shape == (2, 16, 16, 3)


def test_an_unfinished_picture_shows_what_is_made_and_frames_the_latest():
    image = np.full((4, 4, 3), 50, np.uint8)
    shown = pictures.unfinished(image, np.array([[1, 2], [3, 4]]), 2)
    assert shown.shape == (256, 256, 3)
    assert np.all(shown[:128, :128] == 50)
    assert np.all(shown[:8, 128:] == pictures.FRAME)
    assert np.all(shown[10:118, 138:246] == 50)
    assert np.all(shown[128:] == pictures.BLANK)
    order = pictures.order(np.array([[1, 2], [3, 4]]), 2)
    assert order[0, 0].sum() < order[0, 1].sum()
    assert np.all(order[1] == pictures.BLANK)


def test_the_page_tells_the_time_of_drawing_alone(studio, ask, monkeypatch):
    """The clock advances by 1 s for each set drawn, by 10 s for each set decoded, and during pauses."""
    page = pytest.importorskip("lina_jax.demo_page", reason="needs the extra demo", exc_type=ImportError)
    now, drawn = [0.0], studio.draw(ask())

    def after(seconds, value):
        now[0] += seconds
        return value

    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: after(seconds, None))
    monkeypatch.setattr(page, "time", clock)
    monkeypatch.setattr(studio, "ready", lambda request: True)
    monkeypatch.setattr(studio, "draw", lambda request: (after(1, progress) for progress in drawn))
    pixels = studio.pixels
    monkeypatch.setattr(studio, "pixels", lambda progress: after(10, pixels(progress)))
    *_, (told, _) = page.show(studio, ask(), pause=100)
    assert re.fullmatch(r"set (\d) of \1: drawn in \1\.0 s", told), told


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], r"error: --workdir=DIR \(a training directory\) is needed"),
        (["--workdir=."], r"error: \. is not a training directory: it has no config.json"),
        (["--workdir=WORKDIR"], r"error: the page needs Gradio .*: pip install -e '\.\[demo\]'"),
    ],
)
def test_without_what_it_needs_it_ends_with_one_line(arguments, line, workdir):
    program = "import runpy, sys; sys.modules['gradio'] = None; runpy.run_module('lina_jax.demo', run_name='__main__')"
    command = [sys.executable, "-c", program, *(word.replace("WORKDIR", str(workdir)) for word in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert re.fullmatch(line, result.stderr.strip())
