"""Profiler traces of chosen training steps."""

from pathlib import Path

import jax

from lina_jax.config import Config
from lina_jax.state import TrainState


class Profile:
    """Traces `log.profile_steps` steps, starting with `log.profile_start`, into WORKDIR/profile.

    A context manager: the trace is kept whatever ends the run meanwhile. A run that resumes within these steps traces
    nothing.
    """

    def __init__(self, config: Config, workdir: Path, first: int):
        """`first` is the step that the run resumes from, or 0."""
        # JAX names traces by host and second: those of several processes on one host would have the same name.
        several = jax.process_count() > 1
        self._directory = workdir / "profile" / (f"process{jax.process_index()}" if several else "")
        self._start, self._stop = config.log.profile_start, config.log.profile_start + config.log.profile_steps
        self._wanted = first < self._start < self._stop
        self._tracing = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._tracing:
            jax.profiler.stop_trace()

    def before(self, step: int, train_state: TrainState) -> None:
        """To be called before each step, with the state that the previous step returned."""
        if not self._wanted or step not in (self._start, self._stop):
            return
        jax.block_until_ready(train_state)  # else the trace would contain part of a step that still runs
        if step == self._start:
            jax.profiler.start_trace(str(self._directory))
        else:
            jax.profiler.stop_trace()
        self._tracing = step == self._start
