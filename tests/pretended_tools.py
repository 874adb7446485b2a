"""Launchers run with stubs in place of the tools of clusters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Stub for gcloud, xpk, sbatch, srun and scontrol: logs its arguments and sbatch's standard input, then runs $ANSWER.
STUB = f"""#!{sys.executable}
import json, os, subprocess, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
text = sys.stdin.read() if name == "sbatch" else ""
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([name, *words] + [text] * bool(text)), file=calls)
exec(os.environ.get("ANSWER", ""))
"""


@pytest.fixture
def launch(tmp_path):
    """Run a launcher, or a program given as text, with stubs for the clusters' tools; returns result, calls, home."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name in ("gcloud", "xpk", "sbatch", "srun", "scontrol"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    (stubs / "python").symlink_to(sys.executable)
    counter = iter(range(1000))

    def run(script, *words, **environment):
        home = tmp_path / f"home{next(counter)}"
        home.mkdir()
        text = str(script) if isinstance(script, Path) else script
        command = ["bash", text, *words] if isinstance(script, Path) else ["bash", "-c", text]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LINA_", "SLURM_", "CUDA_VISIBLE"))}
        env |= {
            "PATH": f"{stubs}:{env['PATH']}",
            "HOME": str(home),
            "CALLS": str(home / "calls"),
            "PYTHON": sys.executable,
        }
        env |= {"TMPDIR": str(tmp_path), "LINA_POLL_SECONDS": "0"} | environment
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        lines = (home / "calls").read_text().splitlines() if (home / "calls").exists() else []
        return result, [json.loads(line) for line in lines], home

    return run
