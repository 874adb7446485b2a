"""Train LINA.

python -m lina_jax.train --config=configs/NAME.py[:preset] --workdir=DIR [--config.any.field=value ...]

Run the same command again to resume from the last checkpoint. Ctrl-C stops a run, after finishing a save that is under
way; SIGTERM makes it save and stop (exit code 75). With several processes (docs/many_hosts.md), only the first writes
logs and pictures. WORKDIR holds config.json, data.json (digests of the training data), checkpoints/, metrics.jsonl (a
resumed run adds rows for the steps that it repeats), TensorBoard events/, previews/, compiled/ programs, measuring/
(features of pictures until their quality is known), init_from.json if the run started from other weights
(config.init_from), damaged/ checkpoints and profile/ if there are any, lock (one run at a time) and, at the end,
loss.png.

Any field of the config can be overridden, for example --config.steps=500 --config.model.width=256
--config.model.image_grid=8,8. lina_jax/config.py says what each field means and what may change when a run resumes.
"""

import contextlib
import dataclasses
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from clu import parameter_overview
from tqdm import tqdm

from lina_jax import config as config_lib
from lina_jax import (
    config_fields,
    config_file,
    data,
    drawing,
    entry,
    execution,
    hosts,
    kernel_check,
    metrics,
    output_files,
    periodic,
    platforms,
    plots,
    preemption,
    profiling,
    state,
    training_step,
    warm_start,
)
from lina_jax import mesh as mesh_lib
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config
from lina_jax.encoders import load_encoders
from lina_jax.errors import Preempted, TrainingDiverged, UserError
from lina_jax.workdir import check_config, check_data, saved_steps, set_aside_logs, write_config, write_data


def train(config: Config, workdir: Path, *, allow_config_change: bool = False) -> state.TrainState:
    """Train up to step `config.steps`, from the workdir's last checkpoint if there is one.

    Measurements that were due at that checkpoint and are not recorded come first. Raises UserError for mistakes that
    the user can fix (config and data are checked before anything is written), TrainingDiverged after
    `optim.max_skipped` steps in a row with a non-finite loss or gradient, and Preempted once a run that was asked to
    stop has saved.
    """
    run = _set_up(config, workdir, allow_config_change)
    train_state, checkpoints, first = run.state, run.checkpoints, int(run.state.step)
    if first >= config.steps and not run.overdue:
        checkpoints.close()
        _conclude(config, workdir, first, idle=True)
        return train_state
    _introduce(config, workdir, run)

    writer, throughput = metrics.Writer(workdir), metrics.Throughput(config, first)
    train_step = training_step.make_train_step(run.blueprint)
    batches = device_batches(config, run.blueprint, run.records, first)
    hidden = jax.process_index() != 0 or not sys.stderr.isatty()
    progress = tqdm(total=config.steps, initial=first, unit="step", disable=hidden)
    watchdog, notice = preemption.Watchdog(config.step_timeout), preemption.Notice()
    profile = profiling.Profile(config, workdir, first)
    pending = None  # metrics of the previous step, fetched while the next one runs
    report = functools.partial(_report, config, writer, throughput, progress, run.records)

    def limit(what: str, field: str, seconds: float) -> contextlib.AbstractContextManager:
        return watchdog.time_limit(seconds, f"{what} took over {seconds:g} s ({field})")

    limit_save = functools.partial(limit, "a save", "checkpoint.timeout", config.checkpoint.timeout)
    limit_measuring = functools.partial(limit, "measuring", "eval.timeout", config.eval.timeout)

    def save(train_state: state.TrainState) -> None:
        with limit_save(), preemption.defer_interrupt("a save"):
            checkpoints.save(train_state)

    def finish() -> None:
        with limit_save(), preemption.defer_interrupt("a save"):
            checkpoints.close()

    try:
        # Contexts exit from right to left: whatever ends the run, a save under way finishes, and SIGTERM waits.
        with run.lock, notice, watchdog, contextlib.ExitStack() as cleanup, closing(writer), progress, profile:
            cleanup.callback(finish)
            if not run.resumed:
                save(train_state)
            with limit_measuring():
                _measure(run.measurements, run.overdue, first, train_state, writer, save)
            save_due = False  # whether a checkpoint is due that has not been saved
            for step in range(first + 1, config.steps + 1):
                batch = next(batches)
                if step == first + 1:
                    # Without the barrier, a process that compiles faster would wait in a collective: at most 30 s on
                    # CPUs.
                    _say("compiling the train step: takes minutes at most, or seconds if it is in WORKDIR/compiled")
                    train_step.compile(train_state, batch)
                    hosts.barrier("train step")
                    throughput.restart()
                    watchdog.restart()
                profile.before(step, train_state)
                train_state, scalars = train_step(train_state, batch)
                checkpoints.check()
                if pending:
                    report(*pending)
                    watchdog.restart()
                pending = step, scalars
                last = step == config.steps
                preempted = notice.reached() and not last
                save_due = save_due or periodic.falls_on(step, config.checkpoint.every)
                due = periodic.due(config, step)
                if save_due or last or preempted or due:
                    skipped = report(*pending)
                    pending = None
                    with throughput.paused():
                        # Steps skipped in a row share one state; saving it again would push out earlier checkpoints.
                        # Measuring quality may take hours: a run that is killed meanwhile resumes from this save.
                        if last or preempted or ((save_due or "quality" in due) and not skipped):
                            save(train_state)
                            save_due = False
                        if preempted:
                            raise _preempted(step)
                        with limit_measuring():
                            _measure(run.measurements, due, step, train_state, writer, save)
    except KeyboardInterrupt:
        step = max(saved_steps(workdir), default=0)
        raise KeyboardInterrupt(f"run the same command to resume from step {step}") from None
    _conclude(config, workdir, config.steps)
    return train_state


@dataclasses.dataclass
class _Run:
    """A run that is ready to begin."""

    blueprint: state.Blueprint
    records: data.Records  # of the training split
    measurements: periodic.Measurements
    overdue: list[str]  # measurements that were due at the state's step, but are not recorded
    lock: contextlib.AbstractContextManager  # of the workdir, held by process 0
    checkpoints: Checkpoints
    state: state.TrainState  # to train on
    resumed: bool  # whether a checkpoint has the state
    warm_report: dict[str, Any] | None  # which arrays came from where, if the run starts from other weights


def _set_up(config: Config, workdir: Path, allow_config_change: bool) -> _Run:
    """Check everything, open the data, and restore or start the state; see `train` for the errors raised."""
    if (steps := config.log.profile_steps) and not config.log.profile_start:
        raise UserError(f"log.profile_steps={steps}: set log.profile_start, too, to the first step to trace")
    mesh = mesh_lib.from_config(config)
    output_files.check("workdir", workdir)
    if jax.process_index() == 0:
        output_files.check_renames("workdir", workdir)
    check_config(workdir, config, allow_changes=allow_config_change)
    encoders = load_encoders(config, mesh)
    train_records = data.open_records(config, config.data.train_split, encoders.text)
    valid_records = data.open_records(config, config.data.validation_split, encoders.text)
    hosts.check_same("data", {"training data": train_records.manifest, "validation data": valid_records.manifest})
    check_data(workdir, train_records.manifest, allow_changes=allow_config_change)

    blueprint = state.make_blueprint(kernel_check.resolve_kernel(config, mesh), mesh, encoders)
    hosts.check_same("layers", execution.choices_of(blueprint.config.model))
    measurements = periodic.Measurements(blueprint, valid_records, workdir)
    hosts.check_shared(f"checkpoints in {workdir}", lambda: saved_steps(workdir))
    lock, checkpoints, train_state, resumed, warm_report = _restore_or_start(blueprint, workdir)
    overdue = periodic.overdue(config, workdir, int(train_state.step))
    return _Run(
        blueprint=blueprint, records=train_records, measurements=measurements, overdue=overdue, lock=lock,
        checkpoints=checkpoints, state=train_state, resumed=resumed, warm_report=warm_report,
    )  # fmt: skip


def _restore_or_start(
    blueprint: state.Blueprint, workdir: Path
) -> tuple[contextlib.AbstractContextManager, Checkpoints, state.TrainState, bool, dict[str, Any] | None]:
    """(lock of the workdir, its checkpoints, state to train on, whether a checkpoint has it, report of a warm start).

    The state is that of the last checkpoint, else one that starts from the weights of `config.init_from`, else a fresh
    one. Only process 0 holds the lock. Nothing is written before the weights of a warm start have been read.
    """
    config, seconds = blueprint.config, blueprint.config.checkpoint.timeout
    read_limit = functools.partial(
        preemption.time_limit, seconds, f"reading weights took over {seconds:g} s (checkpoint.timeout)"
    )
    warm_state, warm_report = None, None
    if warm_start.is_pending(config, workdir):
        with read_limit():
            warm_state, warm_report = warm_start.initialise(blueprint)
    workdir_lock = output_files.lock("workdir", workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    platforms.cache_programs(workdir / "compiled")
    checkpoints = Checkpoints(workdir, config.checkpoint)
    resumed = checkpoints.latest_step() is not None
    if resumed:
        with read_limit():
            train_state = checkpoints.restore(blueprint)
    else:
        train_state = warm_state or blueprint.init()
    return workdir_lock, checkpoints, train_state, resumed, warm_report


def device_batches(
    config: Config, blueprint: state.Blueprint, source: data.Records, first: int
) -> Iterator[state.Batch]:
    """Global batches on the mesh, after step `first`; each process reads the rows that its devices hold."""
    rows = mesh_lib.local_rows(blueprint.mesh, config.batch_size)
    batches = data.training_batches(
        source,
        global_batch=config.batch_size,
        rows=rows,
        seed=config.seed,
        start_step=first,
        prefetch=config.data.prefetch,
        workers=config.data.workers,
    )

    def next_batch() -> state.Batch:
        return mesh_lib.make_global_batch(blueprint.mesh, config.batch_size, rows, next(batches))

    pool = ThreadPoolExecutor(1, "device_prefetch")  # one thread keeps batches in order
    try:
        ahead = deque(pool.submit(next_batch) for _ in range(config.data.device_prefetch))
        while True:
            batch = ahead.popleft().result()
            ahead.append(pool.submit(next_batch))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _measure(
    measurements: periodic.Measurements,
    names: list[str],
    step: int,
    train_state: state.TrainState,
    writer: metrics.Writer,
    save: Callable[[state.TrainState], None],
) -> None:
    """Take these measurements. Raises Preempted, after saving, if the run is to stop; a resumed run takes the rest."""
    if not names:
        return
    try:
        measurements.take(names, step, train_state, writer)
    except Preempted:
        save(train_state)
        raise _preempted(step) from None
    hosts.barrier(f"measured {step}")  # process 0 works alone at the end, longer than a collective would wait for it


def _preempted(step: int) -> Preempted:
    return Preempted(f"run the same command to resume from step {step}")


def _say(line: str) -> None:
    """Print a line to stderr in process 0, above the progress bar if there is one."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)


def _introduce(config: Config, workdir: Path, run: _Run) -> None:
    """Write what a workdir holds besides checkpoints and logs, and print what is about to be trained, and how."""
    if not run.resumed:
        set_aside_logs(workdir)
    write_config(workdir, config)
    write_data(workdir, run.records.manifest)
    written = workdir / "config.json"
    hosts.check_shared(str(written), lambda: "there" if written.exists() else "absent")
    if run.warm_report and jax.process_index() == 0:
        output_files.write_json(workdir / "init_from.json", run.warm_report)
        print(warm_start.table(run.warm_report), file=sys.stderr)
    blueprint, first = run.blueprint, int(run.state.step)
    if not first:
        _say(parameter_overview.get_parameter_overview(blueprint.shapes.params, include_stats=False))
    _say(
        f"mesh {dict(blueprint.mesh.shape)} on {jax.devices()[0].device_kind}; batch {config.batch_size}; "
        f"{execution.described(**execution.choices_of(blueprint.config.model))}; "
        + (f"resuming from step {first}" if first else "starting")
        + f" to step {config.steps}"
    )
    if config.log.preview_images and (missing := drawing.missing_encoder(config)):
        _say(f"no previews: {missing}")


def _report(config: Config, writer, throughput, progress, source: data.Records, step: int, scalars) -> int:
    """Log a finished step; returns the number of steps skipped in a row. Raises TrainingDiverged if it is too high."""
    scalars = {name: value.item() for name, value in jax.device_get(scalars).items()}
    progress.update()
    in_a_row = scalars.pop("skipped_in_a_row")
    if in_a_row >= config.optim.max_skipped:
        raise TrainingDiverged(
            f"step {step}: loss or gradient was not finite for {in_a_row} steps in a row (optim.max_skipped); "
            "the parameters are those from before these steps, and the last checkpoint is intact"
        )
    if in_a_row:
        logging.warning("step %d skipped: loss %s, gradient norm %s", step, scalars["loss"], scalars["grad_norm"])
    if not (periodic.falls_on(step, config.log.every) or step == config.steps):
        return in_a_row
    scalars |= throughput.rates(step)
    scalars |= hosts.summed("records", {"bad_records": source.skipped, "truncated_captions": source.truncated})
    writer.scalars(step, scalars)
    shown = f"loss {scalars['loss']:.4f}  {scalars['images_per_s']:.1f} images/s"
    progress.set_postfix_str(shown)
    if progress.disable and jax.process_index() == 0:
        print(f"step {step}/{config.steps}  {shown}  lr {scalars['learning_rate']:.2e}", file=sys.stderr, flush=True)
    return in_a_row


def _conclude(config: Config, workdir: Path, step: int, *, idle: bool = False) -> None:
    """Plot the loss of a finished run, and print where everything is, or that there was nothing to do (`idle`)."""
    if jax.process_index() != 0:
        return
    if step == config.steps:
        with output_files.new_file(workdir / "loss.png") as partial:
            plots.losses(workdir / "metrics.jsonl", partial)
    if idle:
        print(f"{workdir} is already at step {step}, steps={config.steps}: nothing to do", file=sys.stderr)
        return
    print(f"finished at step {step}: checkpoints/, loss.png and metrics.jsonl are in {workdir}", file=sys.stderr)


def main(argv: Sequence[str]) -> None:
    del argv
    preemption.exit_on_sigterm()
    values = flags.FLAGS
    if values.config is None or not values.workdir:
        raise UserError("--config=configs/NAME.py[:preset] and --workdir=DIR are both needed")
    config = config_lib.freeze(values.config)
    facts = {"--workdir": values.workdir, **config_fields.flatten(config)}
    with hosts.distributed_run(facts, preemption=True):
        train(config, Path(values.workdir).expanduser(), allow_config_change=values.allow_config_change)
        preemption.ignore_sigterm()


if __name__ == "__main__":
    config_file.define_flag()
    flags.declare_key_flag("config")
    flags.DEFINE_string("workdir", None, "directory for checkpoints, logs and pictures")
    flags.DEFINE_bool("allow_config_change", False, "continue in a workdir that was trained with another config")
    hosts.define_flags()
    flags.adopt_module_key_flags(hosts)  # listed by --help
    entry.run(main)
