"""launch/tpu_pod.sh and launch/detached.sh: the run goes on when a pod is preempted, disconnected or shut down."""

import json
import re
import shlex
from pathlib import Path

import pytest
from pretended_cloud import CLOUD, TPU_POD

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"


def verbs_of(calls: list[list[str]]) -> list[str]:
    """The VERB (describe, create, scp, ...) of each gcloud [alpha] compute tpus THINGS VERB."""
    return [call[5 if "alpha" in call else 4] for call in calls]


def starts_on_pod(calls: list[list[str]]) -> list[list[str]]:
    return [call for call in calls if call[4] == "ssh" and "launch/detached.sh" in call[-1]]


@pytest.mark.parametrize("first", [None, "255", "1"], ids=["undisturbed", "connection_lost", "gcloud_fails"])
def test_a_preempted_tpu_pod_is_made_anew_and_the_run_goes_on(first, launch):
    """The workers really run here; the command is killed, then asks to be run again."""
    again = "echo >>../runs; case $(wc -l <../runs) in 1) kill -KILL $$ ;; 2) exit 75 ;; esac"
    words = [*TPU_POD, "--requirements=", "--", "bash", "-c", again]
    result, calls, home = launch(LAUNCH / "tpu_pod.sh", *words, ANSWER=CLOUD, **({"FIRST": first} if first else {}))
    assert result.returncode == 0, result.stderr
    verbs = verbs_of(calls)
    assert verbs.count("create") == len(starts_on_pod(calls)) == (2 if first else 1)
    assert verbs.count("delete") == (1 if first else 0)
    assert (home / "runs").read_text().count("\n") == 3
    log = (home / "run-1" / "run-1.log").read_text()
    assert "ended with 137: restart 1 of" in log and "ended with 75: restart 2 of at most 100" in log


# The pod holds the record of an earlier run that ended with 1, the code of gcloud's own failures.
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
    words = [*TPU_POD, "--requirements=", "--", "bash", "-c", "echo >>../runs"]
    environment = {"ANSWER": EARLIER + CLOUD, "TROUBLE": json.dumps(trouble), **({"FIRST": first} if first else {})}
    result, calls, home = launch(LAUNCH / "tpu_pod.sh", *words, **environment)
    assert result.returncode == 0 and "ERROR: the network" in result.stderr, result.stderr
    assert verbs_of(calls).count("create") == (3 if first else 1)
    assert (home / "runs").read_text() == "\n"


# What docs/pods.md says to run on each worker.
STOP = re.search(r"--command='(kill .*)'", (ROOT / "docs" / "pods.md").read_text())[1].replace("RUN", "run-1")
# Shuts the worker down before the second round, that is, the second ssh.
SHUT_DOWN = f"""
home = os.environ["HOME"]
if "ssh" in words:
    if not os.path.exists(home + "/go"):
        os.mkfifo(home + "/go")
    elif not os.path.exists(home + "/down"):
        while not os.path.exists(home + "/up"): pass
        open(home + "/down", "w").close()
        subprocess.run(["bash", "-c", {STOP!r}], cwd=home, check=True)
        while not os.path.exists(home + "/run-1/run-1.code"): pass
"""


def test_a_worker_whose_machine_was_shut_down_is_started_in_the_next_round(launch):
    """It ends with 75, which no connection reports."""
    again = "echo >>../runs; [ $(wc -l <../runs) -ge 2 ] || { trap 'exit 75' TERM; touch ../up; read <../go; }"
    words = [*TPU_POD, "--requirements=", "--max_restarts=1", "--", "bash", "-c", again]
    environment = {"ANSWER": SHUT_DOWN + CLOUD, "LINA_FOLLOW_SECONDS": "0.01"}
    result, calls, home = launch(LAUNCH / "tpu_pod.sh", *words, **environment)
    assert result.returncode == 0, result.stderr
    assert len(starts_on_pod(calls)) >= 2 and (home / "runs").read_text() == "\n\n"


# The command waits until this opens the FIFO.
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
    """A new round finds a lost worker: gcloud does not report one while another connection lasts."""
    words = [*TPU_POD, "--requirements=", "--", "bash", "-c", "echo >>../runs; read <../go || true"]
    environment = {"ANSWER": IN_THE_SECOND_ROUND + CLOUD, "LINA_FOLLOW_SECONDS": "0.01"}
    result, calls, home = launch(LAUNCH / "tpu_pod.sh", *words, **environment)
    assert result.returncode == 0, result.stderr
    assert len(starts_on_pod(calls)) >= 2 and (home / "runs").read_text() == "\n"


@pytest.mark.parametrize(("code", "said"), [("75", "ran\n"), ("3", "")])
def test_a_process_that_has_the_number_of_a_worker_by_now_is_not_it(code, said, launch):
    """As after a machine restart: a run that ended with 75 is started again; otherwise its code is returned at once."""
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
    result, calls, _ = launch(LAUNCH / "tpu_pod.sh", *TPU_POD, "--", "train", **environment)
    assert result.returncode == 1 and "ERROR: the network" in result.stderr
    assert len(calls) == 1


def test_ctrl_c_leaves_a_tpu_pod_alone(launch):
    answer = 'import signal\nif "ssh" in words: os.kill(os.getppid(), signal.SIGINT); sys.exit(1)\n' + CLOUD
    words = [*TPU_POD, "--", "train"]
    command = shlex.join(["env", "--default-signal=INT", "bash", str(LAUNCH / "tpu_pod.sh"), *words])
    result, calls, _ = launch(command, ANSWER=answer)
    assert result.returncode == 130 and len(starts_on_pod(calls)) == 1


def test_a_mistake_on_a_tpu_pod_ends_there(launch):
    words = [*TPU_POD, "--requirements=", "--", "bash", "-c", "echo a mistake; exit 2"]
    result, calls, _ = launch(LAUNCH / "tpu_pod.sh", *words, ANSWER=CLOUD)
    assert result.returncode == 2 and "a mistake" in result.stdout
    assert len(starts_on_pod(calls)) == 1


# One worker is at work (124) and waits for another, which has ended with 78.
ONE_FAILED = """
if "ssh" in words:
    if "launch/detached.sh" in words[-1]: sys.exit(124)
    print("run-1/run-1.code:78")
    sys.exit()
"""


def test_a_worker_that_is_not_to_start_again_is_not_waited_for(launch):
    result, calls, _ = launch(LAUNCH / "tpu_pod.sh", *TPU_POD, "--", "train", ANSWER=ONE_FAILED + CLOUD)
    assert result.returncode == 78
    assert len(starts_on_pod(calls)) == 1


def test_restarts_of_a_tpu_pod_are_counted(launch):
    words = [*TPU_POD, "--requirements=", "--max_restarts=0", "--", "bash", "-c", "exit 137"]
    result, calls, _ = launch(LAUNCH / "tpu_pod.sh", *words, ANSWER=CLOUD)
    assert result.returncode == 75 and "--max_restarts=0 reached" in result.stderr
    assert len(starts_on_pod(calls)) == 1
