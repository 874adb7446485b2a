"""Entry points end with one line and an exit code that says why; output places are checked before they are needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lina_jax import output_files
from lina_jax.errors import UserError

PROGRAM = """
import errno
from absl import flags
from lina_jax import entry, errors
flags.DEFINE_integer("count", 1, "", lower_bound=1)
flags.DEFINE_multi_integer("label", [], "")
flags.DEFINE_float("share", 1.0, "")
flags.DEFINE_bool("raw", False, "")

def main(argv):
    if flags.FLAGS.count == 2:
        raise errors.UserError("two\\n  is not allowed")
    if flags.FLAGS.count == 3:
        raise errors.TrainingDiverged("stopped")
    if flags.FLAGS.count == 4:
        raise KeyboardInterrupt
    if flags.FLAGS.count == 5:
        raise KeyboardInterrupt("resume from step 7")
    if flags.FLAGS.count == 6:
        raise OSError(errno.ENOSPC, "No space left on device")
    if flags.FLAGS.count == 9:
        import pathlib
        pathlib.Path("~nobody-has-this-name/x").expanduser()
    if flags.FLAGS.count == 8:
        import jax
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\\nat length")
    if flags.FLAGS.count == 7:
        try:
            raise OSError(errno.ESTALE, "Stale file handle")
        except OSError as error:
            raise errors.UserError("cannot read a.arrayrecord") from error

entry.run(main)
"""


@pytest.mark.parametrize(
    ("argument", "code", "line"),
    [
        ("--count=2", 2, "error: two is not allowed"),
        ("--count=3", 1, "error: stopped"),
        ("--count=4", 130, "interrupted"),
        ("--count=5", 130, "interrupted; resume from step 7"),
        ("--count=6", 2, "error: [Errno 28] No space left on device"),
        ("--count=7", 75, "error: cannot read a.arrayrecord; run the same command again"),
        (
            "--count=8",
            2,
            "error: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.; use fewer images at once or, "
            "in training, a larger optim.accumulate",
        ),
        ("--count=9", 2, "error: a path begins with ~, but there is no such home directory"),
        ("--count=1e3", 2, "error: --count=1e3: expected a whole number"),
        ("--count=0", 2, "error: --count=0: 0 is not a positive integer"),
        ("--label=cat", 2, "error: --label=cat: expected a whole number"),
        ("--share=a: b", 2, "error: --share=a: b: expected a number"),
        ("--raw=maybe", 2, "error: --raw=maybe: expected true or false"),
        ("more", 2, "error: unexpected argument 'more': options are given as --name=value"),
    ],
)
def test_an_end_is_one_line_and_a_code(argument, code, line):
    result = subprocess.run([sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (code, line + "\n")


UNREAD = """
import os, sys
from lina_jax import entry
read, write = os.pipe()
os.close(read)
os.dup2(write, 2)

def main(argv):
    print("a line", file=sys.stderr, flush=True)
    print("done")

entry.run(main)
"""


def test_work_goes_on_when_nobody_reads_its_messages():
    result = subprocess.run([sys.executable, "-c", UNREAD], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "done\n")
    closed = ["bash", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, UNREAD.replace("os.dup2(write, 2)", "")]
    result = subprocess.run(closed, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "done")


WARNING = """
import logging
from absl import logging as absl_logging
from lina_jax import entry

def main(argv):
    absl_logging.warning("a warning")

logging.basicConfig()  # as importing orbax does
entry.run(main)
"""


def test_a_warning_is_one_line_whatever_libraries_have_set_up():
    result = subprocess.run([sys.executable, "-c", WARNING], capture_output=True, text=True, timeout=60)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 0 and line.endswith("a warning")


UNHEARD = """
import signal, threading
from lina_jax import entry

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it

class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def main(argv):
    Finalized()
    threading.Event().wait(300)

entry.run(main)
"""


def test_ctrl_c_is_heard_where_python_would_forget_it():
    """Python only prints errors raised in finalizers and in what jax runs at every garbage collection."""
    result = subprocess.run([sys.executable, "-c", UNHEARD], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_ctrl_c_while_a_command_imports_ends_it(tmp_path):
    """Libraries would swallow the exception in their callbacks, or report a module that could not be imported."""
    (tmp_path / "ml_collections.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    (tmp_path / "sitecustomize.py").write_text(listening)  # tests that run in the background ignore SIGINT
    command = [sys.executable, "-m", "lina_jax.train", "--help"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("argument", ["-h", "--help", "--helpfull"])
def test_help_is_no_failure(argument):
    result = subprocess.run([sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--count" in result.stdout


def test_the_package_tells_its_commands():
    command = [sys.executable, "-m", "lina_jax"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    told = {line.split()[2].removeprefix("lina_jax.") for line in result.stdout.splitlines() if "-m" in line}
    assert told == {"train", "sample", "evaluate", "prepare", "convert", "benchmark", "plan", "demo"}
    result = subprocess.run([*command, "train"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.startswith("error: unexpected argument 'train'")


def test_a_directory_that_cannot_be_made_is_named_with_its_flag(tmp_path, monkeypatch):
    output_files.check("out", tmp_path / "new" / "deep")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"^--out={path}: {tmp_path}/file is not a directory"):
            output_files.check("out", path)
    with pytest.raises(UserError, match=r"^--out=gs:/bucket/run: a URL; mount the bucket"):
        output_files.check("out", Path("gs://bucket/run"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=rf"^--out={tmp_path}/new: {tmp_path} cannot be written"):
        output_files.check("out", tmp_path / "new")


def test_a_json_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Otherwise a power failure may leave an empty file under that name."""
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: order.append("named") or replace(*names))
    output_files.write_json(tmp_path / "a.json", {"steps": 9})
    assert order == [(tmp_path / "a.json").stat().st_size, "named"]
