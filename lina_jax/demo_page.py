"""The page of `lina_jax.demo`: its Gradio components, and the HTML of a drawing."""

import base64
import html
import os
import socket
import threading
import time
from collections.abc import Iterator

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported

import fastapi
import gradio as gr
import numpy as np
import uvicorn

from lina_jax import pictures
from lina_jax.demo_session import MOST_IMAGES, DrawnStep, Request, Studio
from lina_jax.errors import UserError

_STYLE = """
.drawings { display: flex; flex-wrap: wrap; gap: 14px; }
.drawings figure { margin: 0; display: flex; gap: 6px; align-items: flex-end; }
.drawings img { image-rendering: pixelated; border: 1px solid #ccc; }
.drawings img.picture { width: 172px; }
.drawings img.large { width: auto; max-width: 100%; image-rendering: auto; }
.drawings img.order { width: 40px; }
.mistake { color: #b3261e; font-weight: 600; }
"""
# Fonts of the reader's system: Gradio's own would be fetched from a server.
_THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
_LOCAL = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def build(studio: Studio) -> gr.Blocks:
    config = studio.config
    with gr.Blocks(title=f"LINA: {studio.workdir}", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"## {html.escape(str(studio.workdir))}, step {studio.checkpoint}\n"
            "Tokens are generated in random order, set by set. The latest set is framed. Beside each picture: the "
            "order, from dark to light."
        )
        with gr.Row(equal_height=True):
            condition = _condition(studio)
            with gr.Column(scale=1, min_width=120):
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", elem_id="stop")
        if studio.examples:
            gr.Examples([[text] for text in studio.examples], [condition], label="For example")
        with gr.Row():
            seed = gr.Number(0, label="Seed", elem_id="seed")
            most = config.model.image_tokens
            steps = gr.Number(min(config.sample.steps, most), label=f"Steps, 1 to {most}", elem_id="steps")
            guidance = gr.Number(config.sample.guidance, label="Guidance, 1 = none", elem_id="guidance")
            num = gr.Number(4, label=f"Pictures, 1 to {MOST_IMAGES}", elem_id="num")
            pause = gr.Slider(0, 1, 0.1, step=0.05, label="Pause, seconds", elem_id="pause")
        status = gr.HTML(elem_id="status", min_height=24)
        drawings = gr.HTML(elem_id="drawings")
        command = gr.Textbox(
            label="Command that reproduces these pictures", elem_id="command", interactive=False, buttons=["copy"]
        )

        def draw(*values) -> Iterator[tuple]:
            *filled_in, seconds = values
            try:
                request = studio.request(*filled_in)
            except UserError as error:
                yield _mistake(str(error)), gr.skip(), gr.skip()
                return
            for status, shown in show(studio, request, seconds):
                yield status, shown or gr.skip(), studio.command(request)

        fields = [condition, seed, steps, guidance, num, pause]
        asked = button.click(lambda: "queued", None, status, queue=False, show_progress="hidden")
        drawn = asked.then(draw, fields, [status, drawings, command], show_progress="hidden", api_name="draw")
        stop.click(lambda: "stopped", None, status, cancels=[drawn], queue=False, show_progress="hidden")
    # One drawing at a time: the others wait.
    return blocks.queue(default_concurrency_limit=1)


def _condition(studio: Studio) -> gr.components.Component:
    if studio.config.model.condition == "text":
        first = studio.examples[0] if studio.examples else ""
        return gr.Textbox(first, label="Prompt", elem_id="prompt", max_lines=1, scale=6)
    last = studio.config.model.num_classes - 1
    if len(studio.class_names) != last + 1:
        return gr.Number(0, label=f"Class, 0 to {last}", elem_id="class", scale=6)
    choices = [(f"{number}: {name}", number) for number, name in enumerate(studio.class_names)]
    return gr.Dropdown(choices, value=0, label="Class", elem_id="class", scale=6)


def show(studio: Studio, request: Request, pause: float) -> Iterator[tuple[str, str]]:
    """Yield (status, images) as HTML while sets are drawn, with `pause` seconds after each set shown.

    Sets are skipped where showing takes longer than drawing, as with a large autoencoder. The last status reports the
    drawing time, without showing and pauses.
    """
    if not studio.ready(request):
        yield "compiling: the first run with this number of pictures and steps takes a while", ""
        studio.compile(request)
    shown_at, took = 0.0, 0.0
    for progress, drawing in _timed(studio.draw(request)):
        finished = progress.step == progress.steps
        if not finished and time.monotonic() - shown_at < took:
            continue
        begun = time.monotonic()
        images = studio.pixels(progress)
        shown = _figures(images, progress, finished)
        shown_at = time.monotonic()
        took = shown_at - begun
        status = f"set {progress.step} of {progress.steps}"
        yield (f"{status}: drawn in {drawing:.1f} s" if finished else status), shown
        if not finished:
            time.sleep(pause)


def _timed(drawing: Iterator[DrawnStep]) -> Iterator[tuple[DrawnStep, float]]:
    """Each step with the seconds of drawing up to it."""
    seconds, begun = 0.0, time.monotonic()
    for progress in drawing:
        seconds += time.monotonic() - begun
        yield progress, seconds
        begun = time.monotonic()


def _figures(images: np.ndarray, progress: DrawnStep, finished: bool) -> str:
    figures = []
    for number, (image, sets) in enumerate(zip(images, progress.sets, strict=True)):
        shown = image if finished else pictures.unfinished(image, sets, progress.step)
        large = " large" if min(image.shape[:2]) >= pictures.SMALLEST_SHOWN else ""
        text = f"picture {number} after set {progress.step} of {progress.steps}"
        figures.append(
            f"<figure>{_image(shown, 'picture' + large, text)}"
            f"{_image(pictures.order(sets, progress.step), 'order', f'order of picture {number}')}</figure>"
        )
    return f'<div class="drawings">{"".join(figures)}</div>'


def _image(image: np.ndarray, kind: str, text: str) -> str:
    encoded = base64.b64encode(pictures.png(image)).decode()
    return f'<img class="{kind}" alt="{text}" src="data:image/png;base64,{encoded}">'


def _mistake(message: str) -> str:
    return f'<span class="mistake">{html.escape(message)}</span>'


class _OnlyLocal:
    """Middleware that restricts browsers to this server, whatever Gradio's files refer to."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _LOCAL)]
            await send(message)

        await self._app(scope, receive, with_policy)


def serve(blocks: gr.Blocks, door: socket.socket) -> None:
    """Serve the page on the listening socket `door` until Ctrl-C."""
    app = gr.mount_gradio_app(
        fastapi.FastAPI(),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=_THEME,
        css=_STYLE,
    )
    host, port = door.getsockname()[:2]
    server = uvicorn.Server(uvicorn.Config(_OnlyLocal(app), log_level="warning"))
    # In a thread: otherwise uvicorn would handle Ctrl-C, and wait for browsers to disconnect.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    print(f"http://{'localhost' if host == '127.0.0.1' else host}:{port}  (Ctrl-C to stop)", flush=True)
    while thread.is_alive():
        thread.join(0.5)  # a signal just before a wait without timeout would not end it
