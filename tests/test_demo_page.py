"""The page of `lina_jax.demo` in a browser; needs pip install -e '.[test,test-demo]' and Chromium with its driver."""

import base64
import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest
import tiny_dataset

from lina_jax import mesh, state
from lina_jax.demo_session import Studio

pytest.importorskip("gradio", reason="needs the extra test-demo")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra test-demo")
waiting = pytest.importorskip("selenium.webdriver.support.wait", reason="needs the extra test-demo")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs Chromium and chromedriver on the path")

PATIENCE_S = 120
# Records the alternative text of every picture that the page shows.
REMEMBER = """
window.seen = [];
new MutationObserver(() => {
  const shown = document.querySelector('#drawings img.picture');
  if (shown && window.seen.at(-1) !== shown.alt) window.seen.push(shown.alt);
}).observe(document.body, {subtree: true, childList: true, attributes: true});
"""


@pytest.fixture(scope="module")
def workdir(tiny_text, one_device, rough, save_run, tmp_path_factory):
    plan = state.make_blueprint(tiny_text(log={"preview_prompts": ("a red circle",)}), one_device)
    return save_run(tmp_path_factory.mktemp("run"), plan, dataclasses.replace(rough(plan), step=jnp.int32(7)))


@pytest.fixture(scope="module")
def server(workdir, one_device_env):
    """The running demo as (process, address); Ctrl-C ends it."""
    command = [sys.executable, "-m", "lina_jax.demo", f"--workdir={workdir}", "--port=0"]
    process = subprocess.Popen(
        command, env=one_device_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    line = process.stdout.readline()
    if not line.startswith("http://localhost:"):
        process.kill()
        pytest.fail(process.stderr.read())
    yield process, line.split()[0]
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (130, "interrupted\n")


@pytest.fixture(scope="module")
def browser(server):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1240,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(PATIENCE_S)
    try:
        driver.get(server[1])
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(browser):
    return Page(browser)


class Page:
    def __init__(self, browser):
        self.browser = browser

    def find(self, selector: str):
        return self.wait(lambda: self.browser.find_elements("css selector", selector))[0]

    def wait(self, what):
        return waiting.WebDriverWait(self.browser, PATIENCE_S, 0.05).until(lambda _: what())

    def fill_in(self, name: str, text: str) -> None:
        field = self.find(f"#{name} input")
        field.send_keys(webdriver.Keys.CONTROL, "a")
        field.send_keys(webdriver.Keys.BACKSPACE, text)

    def status(self) -> str:
        return self.find("#status").text

    def draw(self, **fields: str) -> list[bytes]:
        """Fill in the fields and press the button; returns the finished pictures."""
        for name, text in fields.items():
            self.fill_in(name, text)
        before = self.status()
        self.find("#draw").click()
        self.wait(lambda: self.status() != before)
        self.wait(lambda: "drawn in" in self.status())
        return self.pictures()

    def pictures(self) -> list[bytes]:
        sources = [image.get_attribute("src") for image in self.browser.find_elements("css selector", "img.picture")]
        return [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]


def test_a_prompt_is_drawn_set_by_set_and_by_its_command_again(page, run_module, tmp_path):
    page.wait(lambda: page.find("#prompt input").get_attribute("value") == "a red circle")  # an example
    page.browser.execute_script(REMEMBER)
    drawn = page.draw(prompt="a 'red' dot", num="2", steps="8", guidance="1.5", seed="5")
    seen = page.browser.execute_script("return window.seen")
    total = seen[-1].split()[-1]
    assert seen == [f"picture 0 after set {i + 1} of {total}" for i in range(int(total))]
    assert len(seen) > 4
    assert len(page.browser.find_elements("css selector", "img.order")) == 2
    words = shlex.split(page.find("#command textarea, #command input").get_attribute("value"))
    assert {"--prompt=a 'red' dot", "--num=2", "--seed=5", "--steps=8", "--guidance=1.5", "--checkpoint=7"} < set(words)
    result = run_module("sample", *words[3:-1], f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert drawn == [(tmp_path / f"0000{i}.png").read_bytes() for i in range(2)]


def test_another_seed_draws_other_pictures(page):
    fields = {"prompt": "a dot", "num": "1", "steps": "4"}
    first = page.draw(**fields, seed="1")
    assert page.draw(**fields, seed="2") != first
    assert page.draw(**fields, seed="1") == first


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("prompt", " ", "blank: say what to draw"),
        (
            "prompt",
            "a ${1 + 1} {{value}} <b>large</b> dot",
            "prompt 'a ${1 + 1} {{value}} <b>large</b> dot' has 37 bytes",
        ),
        ("seed", "-1", "--seed=-1: must be in [0, 2**31)"),
        ("steps", "1.5", "--steps=1.5: expected a whole number"),
        ("num", "", "--num=: expected a whole number"),
    ],
)
def test_a_mistake_is_named_on_the_page_and_can_be_mended(page, server, name, text, message):
    good = {"prompt": "a dot", "num": "1", "steps": "4", "seed": "1"}
    before = page.draw(**good)
    page.fill_in(name, text)
    page.find("#draw").click()
    page.wait(lambda: message in page.status())
    assert "Traceback" not in page.browser.page_source
    assert page.pictures() == before
    assert page.draw(**good) == before
    assert server[0].poll() is None


def test_nothing_is_asked_of_anyone_else(page, server):
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith((server[1], "data:"))] == []


def test_classes_are_chosen_by_name(tiny, one_device, rough, save_run, tmp_path, monkeypatch):
    from lina_jax import demo_page as page  # imported here, since it needs Gradio

    monkeypatch.setattr(mesh, "build", lambda config, devices=None: one_device)
    plan = state.make_blueprint(tiny(model={"num_classes": 2}), one_device)
    workdir = save_run(tmp_path / "run", plan, rough(plan))

    def component(data: str) -> dict:
        made = page.build(Studio(workdir, data=data)).get_config_file()["components"]
        return next(c for c in made if c["props"].get("elem_id") == "class")

    named = component(str(tiny_dataset.write(tmp_path / "data")))
    assert named["type"] == "dropdown"
    assert [tuple(choice) for choice in named["props"]["choices"]] == [("0: cat", 0), ("1: dog", 1)]
    unnamed = component("")
    assert (unnamed["type"], unnamed["props"]["label"]) == ("number", "Class, 0 to 1")
