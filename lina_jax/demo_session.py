"""A trained model that draws on request, step by step: the back end of the `demo` page."""

import collections
import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from lina_jax import drawing, reading, tf_example
from lina_jax import mesh as mesh_lib
from lina_jax.decoding_schedule import Schedule
from lina_jax.errors import UserError
from lina_jax.generate import DecodingState, Stepper

MOST_IMAGES = 64  # per request
_EXAMPLES = 6


@dataclasses.dataclass(frozen=True)
class Request:
    """What the model is asked to draw; `condition` is a prompt or a class number."""

    condition: str | int
    seed: int
    steps: int
    guidance: float
    num: int


@dataclasses.dataclass(frozen=True)
class DrawnStep:
    """N images after a decoding step; `sets` (N, rows, columns) holds the step, from 1, that draws each token."""

    step: int
    steps: int
    sets: np.ndarray
    states: Sequence[DecodingState]


class Studio:
    """A model that draws one request after the other, and reuses compiled programs."""

    def __init__(
        self,
        workdir: Path,
        *,
        data: str = "",
        batch_size: int = 1,
        ema: bool = True,
        checkpoint: int | None = None,
        autoencoder: str = "",
        text_encoder: str = "",
        mesh: str = "",
    ):
        """`data` provides class names and captions. Raises UserError if there is no model, or it cannot draw."""
        if batch_size < 1:
            raise UserError(f"--batch_size={batch_size}: must be at least 1")
        config = drawing.drawable_config(workdir, autoencoder, text_encoder)
        self._blueprint, self._params, self._frozen, self.checkpoint = drawing.load(
            workdir, config, ema=ema, step=checkpoint, mesh_config=mesh_lib.parse(mesh)
        )
        self.config, self._batch_size, self._stepper = self._blueprint.config, batch_size, Stepper(self._blueprint)
        try:
            self.class_names, captions = _class_names_and_captions(
                data or config.data.datasets[0][0], config.data.validation_split
            )
        except (UserError, OSError, RuntimeError) as error:
            if data:
                raise UserError(f"--data={data}: {error}") from error
            self.class_names, captions = [], []  # the run's own dataset is not here
        texts = (*captions, *config.log.preview_prompts) if config.model.condition == "text" else ()
        self.examples = [text for text in dict.fromkeys(texts) if self._readable(text)][:_EXAMPLES]
        self._ready: set[tuple] = set()
        given = {"autoencoder": autoencoder, "text_encoder": text_encoder, "mesh": mesh}
        self._flags = {name: value for name, value in given.items() if value}
        self.workdir, self._weights = workdir, [] if ema else ["--raw"]

    def request(self, condition: object, seed: object, steps: object, guidance: object, num: object) -> Request:
        """The request that the page's fields make. Raises UserError if the model cannot draw it."""
        seed, steps, num = (_whole(*pair) for pair in (("seed", seed), ("steps", steps), ("num", num)))
        if guidance is None:
            raise UserError("--guidance: expected a number")
        drawing.check_seed(seed)
        if num > MOST_IMAGES:
            raise UserError(f"--num={num}: at most {MOST_IMAGES} pictures at once on this page")
        tokens = self.config.model.image_tokens
        if steps > tokens:
            raise UserError(f"--steps={steps}: at most {tokens}, one for each token of a picture")
        drawing.sample_settings(self.config, {"steps": steps, "guidance": float(guidance)})
        drawing.check_num(num)
        if self.config.model.condition == "class":
            condition = _whole("label", condition)
            drawing.encode_conditions(self.config, [condition])
        else:
            condition = condition or ""
            drawing.check_prompt(self.config, condition)
        return Request(condition, seed, steps, float(guidance), num)

    def command(self, request: Request) -> str:
        """The command line that draws the same images, byte for byte, on this kind of device."""
        what = "label" if self.config.model.condition == "class" else "prompt"
        given = {
            "workdir": self.workdir, what: request.condition, "num": request.num, "seed": request.seed,
            "steps": request.steps, "guidance": request.guidance, "checkpoint": self.checkpoint,
            "batch_size": self._batch_size, **self._flags, "out": "drawn",
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in given.items()]
        return shlex.join(["python", "-m", "lina_jax.sample", *words[:-1], *self._weights, words[-1]])

    def sampler(self, request: Request) -> drawing.Sampler:
        settings = drawing.sample_settings(self.config, {"steps": request.steps, "guidance": request.guidance})
        batch_size = drawing.batch_for(self._blueprint, request.num, self._batch_size)
        return drawing.Sampler(self._blueprint, settings, batch_size, self._stepper)

    def ready(self, request: Request) -> bool:
        """Whether all programs for this request are compiled."""
        return _shapes(self.sampler(request)) in self._ready

    def compile(self, request: Request) -> None:
        """Compile all programs for this request, by drawing one batch that nobody sees."""
        sampler = self.sampler(request)
        (last,) = collections.deque(self._batches(sampler, request)[0], maxlen=1)
        jax.block_until_ready(self._stepper.pixels(last))
        self._ready.add(_shapes(sampler))

    def draw(self, request: Request) -> Iterator[DrawnStep]:
        """Yield the images after each completed step; all batches advance side by side."""
        sampler = self.sampler(request)
        rows, columns = self.config.model.image_grid
        for states in zip(*self._batches(sampler, request), strict=True):
            jax.block_until_ready([state.tokens for state in states])
            rank = np.concatenate([np.asarray(state.rank) for state in states])[: request.num]
            sets = _sets(sampler.schedule, rank).reshape(request.num, rows, columns)
            yield DrawnStep(states[0].step, len(sampler.schedule.predicted), sets, states)

    def pixels(self, drawn: DrawnStep) -> np.ndarray:
        """uint8 images (N, H, W, 3); tokens that are not drawn yet are zero."""
        made = [np.asarray(self._stepper.pixels(state)) for state in drawn.states]
        return np.concatenate(made)[: len(drawn.sets)]

    def _batches(self, sampler: drawing.Sampler, request: Request) -> list[Iterator[DecodingState]]:
        return sampler.batches(self._params, self._frozen, [request.condition] * request.num, request.seed)

    def _readable(self, prompt: str) -> bool:
        try:
            drawing.check_prompt(self.config, prompt)
        except UserError:
            return False
        return True


def _shapes(sampler: drawing.Sampler) -> tuple:
    """The shapes that programs are compiled for, as a key."""
    steps = sampler.schedule
    return sampler.batch_size, steps.sigmas.shape[1], *map(steps.shape, steps.stages)


def _sets(steps: Schedule, rank: np.ndarray) -> np.ndarray:
    """The step, from 1, that draws the tokens of these ranks."""
    return 1 + np.searchsorted(np.cumsum(steps.predicted), rank, side="right")


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int | float) or not float(value).is_integer():
        raise UserError(f"--{name}={'' if value is None else value}: expected a whole number")
    return int(value)


def _class_names_and_captions(directory: str, split: str) -> tuple[list[str], list[str]]:
    """(class names, some captions) of a dataset. Raises UserError, OSError or RuntimeError if it cannot be read."""
    opened, captions = reading.open_split(directory, split), []
    for number in range(min(len(opened), _EXAMPLES)):
        with contextlib.suppress(ValueError):  # a bad record
            captions.append(str(tf_example.parse(opened[number])["caption"] or b"", "utf-8"))
    return list(reading.label_names(directory)), [caption for caption in captions if caption]
