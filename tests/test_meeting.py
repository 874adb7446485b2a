"""Processes that wait for each other can be told to stop."""

import os
import signal
import socket
import subprocess
import sys

PROGRAM = """
import signal, threading
import jax
from lina_jax import errors, hosts

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it

def main(argv):
    with hosts.together({}):
        if jax.process_index() == 0:
            print("waiting", flush=True)
            hosts.meet("what the other never comes to")
        threading.Event().wait()

hosts.define_flags()
errors.run(main)
"""


def test_ctrl_c_is_heard_where_a_process_waits_for_the_others():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    place = [f"--coordinator=localhost:{port}", "--processes=2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *place, f"--process_id={i}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        assert processes[0].stdout.readline() == "waiting\n"
        processes[0].send_signal(signal.SIGINT)
        ends = [(process.communicate(timeout=100)[1], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert ends == [("interrupted\n", 130), ("process 0: interrupted\n", 130)]
