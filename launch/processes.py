"""Start the processes of one run on this machine, and end them together.

For launch/local.sh, which documents and checks the arguments. Exit code: 0, or that of the first process that failed
(128 + the signal's number if a signal killed it).
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import sys

RESTART = 75  # "run me again": saved on preemption, ended by its watchdog, or a peer is gone


def restarts_on(code: int) -> bool:
    """Whether to restart a run that ended with this code; launch/arguments.sh explains the rule."""
    return code == RESTART or (code > 128 and code not in (128 + signal.SIGINT, 128 + signal.SIGTERM))


def main() -> int:
    arguments = _parse()
    if arguments.dry_run:
        for command in _commands(arguments):
            print(shlex.join(command), "&")
        print("wait")
        return 0

    processes = Processes(arguments.name, arguments.grace)
    for restarts in range(arguments.max_restarts + 1):
        if restarts:
            processes.report(f"restart {restarts} of at most {arguments.max_restarts}")
        code = processes.run(_commands(arguments))
        if not restarts_on(code) or processes.stopped:
            return code
    processes.report(f"ended with {code} after {restarts} restarts, the maximum allowed")
    return code


class Processes:
    """The running processes, by their ids; signals to this process go to all of them."""

    def __init__(self, name: str, grace: float):
        self.name, self.grace = name, grace
        self.running: dict[int, int] = {}  # process id -> number in the run
        self.stopped = 0  # the signal that stopped this process
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a closed terminal, unless nohup started us
            signal.signal(signal.SIGHUP, lambda *_: self._stop(signal.SIGTERM, None))
        signal.signal(signal.SIGALRM, self._kill)

    def run(self, commands: list[list[str]]) -> int:
        """Run all commands until they have ended; the first that fails ends the others. Returns its code, else 0."""
        for number, command in enumerate(commands):
            if self.stopped:
                break
            # A session each: Ctrl-C reaches them through us alone, and their children can be killed with them.
            process = os.posix_spawnp(
                command[0],
                command,
                os.environ,
                file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
                setsid=True,
                setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGPIPE],
            )
            self.running[process] = number
        if self.stopped:  # the process started last may have missed the signal
            self._end(self.stopped)
        failed = {0: 0, signal.SIGINT: 128 + signal.SIGINT}.get(self.stopped, RESTART)
        while self.running:
            process, status = os.wait()
            if process not in self.running:  # a background job of --setup: `exec` made it our child
                continue
            number = self.running.pop(process)
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code
            if code:
                self.report(f"process {number} ended with {code}")
            if self.stopped == signal.SIGTERM and code == 128 + signal.SIGTERM:
                code = RESTART  # it had no signal handler yet, and has nothing to save
            if code and not failed:
                failed = code
                self._end(signal.SIGTERM)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return failed

    def report(self, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody may be reading any longer
            print(f"{self.name}: {line}", file=sys.stderr, flush=True)

    def _stop(self, number: int, _) -> None:
        self.stopped = number
        self._end(number)

    def _end(self, number: int) -> None:
        """Send a signal to all processes, and SIGKILL to those that are still running after the grace period."""
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        signal.setitimer(signal.ITIMER_REAL, max(self.grace, 1e-3))

    def _kill(self, *_) -> None:
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)


def _commands(arguments: argparse.Namespace) -> list[list[str]]:
    """The command line of each process: its devices, the command, and the flags that say which process it is."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = arguments.port or free.getsockname()[1]
    gpus = arguments.gpus.split(",")
    share = arguments.devices
    commands = []
    for number in range(arguments.processes):
        devices = [f"CUDA_VISIBLE_DEVICES={','.join(gpus[number * share : (number + 1) * share])}"]
        if not arguments.gpus:
            devices = ["JAX_PLATFORMS=cpu", f"JAX_NUM_CPU_DEVICES={share}"]
        who = [f"--coordinator=localhost:{port}", f"--processes={arguments.processes}", f"--process_id={number}"]
        commands.append(["env", *devices, *arguments.words, *who])
    return commands


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--name", required=True)
    parser.add_argument("--gpus", default="")
    for name in ("processes", "devices", "port", "max_restarts"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("words", nargs="+")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
