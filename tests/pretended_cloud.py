"""A fake gcloud for the tests of launch/tpu_pod.sh: code for the fixture `launch`, and flags that ask for a pod."""

TPU_POD = ["--name=run-1", "--topology=v5e:16x16", "--zone=us-a", "--project=p", "--extra=--spot --network=n"]

# There is no queued resource at first; one that is created is active at once. FIRST: the first ssh meets a preemption,
# and gcloud exits with this code. TROUBLE: {verb: [numbers of its calls, from 1, that only fail]}. PRETEND: if it is
# set, ssh runs nothing.
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
