"""On a real Slurm: three nodes in network namespaces. A job of two is preempted in four ways and ends as if nothing had been."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcat_nemo.runs.metrics_file import TIMED
from tests.launch.slurm_cluster import SlurmCluster, missing

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STANDIN = Path(__file__).with_name("standin.py")

# For all tests here together, from the cluster's start: what has not come by then does not come.
SECONDS = float(os.environ.get("KVCAT_SLURM_TEST_SECONDS", "1200"))

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.timeout(SECONDS + 60),
]


STEPS, SAVE_EVERY = 60, 10
# Measured against the previous step's window, which a new process does not have.
FRESH = {"flipped", "flipped/group0", "flipped/group1"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if why := missing():
        print(f"\nSKIPPED: the Slurm tests did not run: {why}", file=sys.__stderr__, flush=True)
        pytest.skip(f"no Slurm cluster: {why}")
    made = SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster")
    made.deadline = time.monotonic() + SECONDS
    try:
        made.up()
        yield made
    finally:
        made.down()
    assert made.leftovers() == []


def launch(cluster, run_dir, *words):
    """Submit, from the run's parent folder; the job's number."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    environment = cluster.environment | {
        "PATH": f"{BIN}:{cluster.environment['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
        "NEMORUN_HOME": str(run_dir.parent / ".nemo_run"),
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [str(w) for w in words],
        cwd=run_dir.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def submit(cluster, run_dir, *options, command):
    common = ("--nodes", 2, "--gpus-per-node", 0, "--interface", "eth0", "--min-disk-gb", 1, "--exit-wait", 8)
    words = ("bash", ROOT / "launch" / "submit.sh", "--run-dir", run_dir, *common, *options, "--", *command)
    return launch(cluster, run_dir, *words)


def job(cluster, number):
    return dict(
        word.split("=", 1)
        for word in cluster.run("scontrol", "show", "job", number, "--oneliner").split()
        if "=" in word
    )


def wait(cluster, number, reached, run_dir):
    """Until reached(job) holds; the job's output and Slurm's logs of it are in the message when it does not."""
    while True:
        now = job(cluster, number)
        if reached(now):
            return now
        ended = now["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "COMPLETED")
        if time.monotonic() > cluster.deadline or ended:
            said = f"{output(run_dir)}\n{cluster.said_of(number)}"
            raise AssertionError(f"{now['JobState']} after {now['RunTime']}:\n{said}")
        time.sleep(0.1)


def state(*states):
    return lambda now: now["JobState"] in states


def output(run_dir):
    return "".join(f.read_text() for f in sorted(run_dir.glob("launch/slurm-*.out")))


# --- training ---


def metrics(run_dir):
    from kvcat_nemo.nemo.mlflow_logger import MetricsFile
    from kvcat_nemo.runs.layout import METRICS_FILE

    return MetricsFile.lines(run_dir / "kvcat" / METRICS_FILE)


def steps_done(run_dir):
    file = run_dir / "kvcat" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((int(re.search(r'"step": (\d+)', x)[1]) for x in lines if x.endswith("}")), default=0)


def train(cluster, run_dir, *options):
    """With `kvcat launch slurm`, whose check before the start is the real one."""
    kvcat = (
        BIN / "python", "-c", "from kvcat_nemo.cli import main; main()", "launch", "slurm", "kvcat_tiny", "--run-dir", run_dir,
        "--nodes", 2, "--gpus-per-node", 0, "--interface", "eth0", "--min-disk-gb", 1, "--no-plan",
        *options, "trainer.strategy.tensor_model_parallel_size=2", f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS // 2}", f"log.ckpt.every_n_train_steps={SAVE_EVERY}",
    )  # fmt: skip
    return launch(cluster, run_dir, *kvcat)


def until_step(cluster, number, run_dir, restart, step):
    """Wait until the restart-th restart has trained to a step."""

    def reached(now):
        on = now["JobState"] == "RUNNING" and int(now["Restarts"]) == restart
        return on and steps_done(run_dir) >= step

    wait(cluster, number, reached, run_dir)


def until_asked(cluster, number, run_dir, times):
    """Wait until the launcher has asked the ranks to stop, for the times-th time."""
    wait(cluster, number, lambda now: output(run_dir).count("asking all ranks") >= times, run_dir)


def elapsed(text):
    """Seconds of Slurm's [D-]HH:MM:SS."""
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def until_restart(cluster, number, run_dir, restart):
    wait(cluster, number, lambda now: int(now["Restarts"]) >= restart, run_dir)


@pytest.mark.nemo
def test_preempted_four_ways_and_finished_as_if_unbroken(cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    straight, broken = root / "straight" / "run", root / "broken" / "run"
    number = train(cluster, straight)
    wait(cluster, number, state("COMPLETED"), straight)

    number = train(cluster, broken, "--time", 30, "--signal-seconds", 100)
    reached = []

    def note():
        """How far training got, and the newest checkpoint, before the next start changes either."""
        saved = max(
            int(p.name.removeprefix("step=")) for p in broken.glob("checkpoints/step=*") if p.is_dir()
        )
        reached.append((steps_done(broken), saved))

    # The time limit. Slurm looks at it twice a minute and sends the signal up to a minute early; steps are quicker.
    until_step(cluster, number, broken, 0, 7)
    with cluster.frozen():
        minutes = elapsed(job(cluster, number)["RunTime"]) // 60 + 3
        cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")
        until_asked(cluster, number, broken, 1)
    until_restart(cluster, number, broken, 1)
    note()
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    # A signal.
    until_step(cluster, number, broken, 1, reached[-1][0] + 7)
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    until_restart(cluster, number, broken, 2)
    note()
    # A higher partition wants the nodes.
    until_step(cluster, number, broken, 2, reached[-1][0] + 7)
    with cluster.frozen():
        urgent = cluster.run(
            "sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--time=1", "--output=/dev/null",
            "--wrap=sleep 1",
        )  # fmt: skip
        until_asked(cluster, number, broken, 3)
    until_restart(cluster, number, broken, 3)
    note()
    wait(cluster, urgent.strip(), state("RUNNING", "COMPLETING", "COMPLETED"), broken)  # it had the nodes
    # A lost node: after a save, so that steps are lost with it.
    until_step(cluster, number, broken, 3, reached[-1][0] + SAVE_EVERY + 3)
    hosts = cluster.run("scontrol", "show", "hostnames", job(cluster, number)["NodeList"]).split()
    cluster.lose_node(hosts[1])
    until_restart(cluster, number, broken, 4)
    note()
    done = wait(cluster, number, state("COMPLETED"), broken)
    assert hosts[1] not in cluster.run("scontrol", "show", "hostnames", done["NodeList"]).split()
    cluster.return_node(hosts[1])

    text = output(broken)
    done_steps = [done for done, _ in reached]
    assert 0 < done_steps[0] < done_steps[1] < done_steps[2] < done_steps[3] < STEPS, text
    # Who was asked lost nothing; a lost node takes with it what came after the last save.
    assert all(done == saved for done, saved in reached[:3]) and reached[3][0] > reached[3][1], reached
    assert text.count("got SIGUSR1 (time limit or preemption): asking all ranks") >= 3
    assert (
        text.count("stopped and saved; queued again") >= 2
    )  # Slurm itself may be first to take the nodes back

    def comparable(run_dir):
        return [{k: v for k, v in line.items() if k not in TIMED | FRESH} for line in metrics(run_dir)]

    assert [x["step"] for x in metrics(broken) if x["kind"] == "train"] == list(range(1, STEPS + 1))
    assert comparable(broken) == comparable(straight)
    _one_mlflow_run(broken)
    _nodes_were_checked(straight, 1)
    _nodes_were_checked(broken, 5)


def _nodes_were_checked(run_dir, starts):
    """Before every start, `kvcat train doctor` summed a number over the attempt's two nodes."""
    attempts = [
        line.split("\t")
        for line in (run_dir / "launch" / "attempts.tsv").read_text().splitlines()
        if not line.startswith("submitted")
    ]
    assert len(attempts) == starts
    for name, _, _, nodes, _ in attempts:
        health = run_dir / "launch" / f"attempt-{name}" / "health"
        first, second = nodes.split()
        said = (health / f"{first}.log").read_text()
        assert f"2 ranks on 2 host(s) ({first}, {second}) over gloo" in said and "BROKEN" not in said, said
        assert [(health / node).read_text() for node in (first, second)] == ["ok\n", "ok\n"]


def _one_mlflow_run(run_dir):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    for name in ("train/loss/total", "train/keep_rate"):
        steps = [m.step for m in client.get_metric_history(run.info.run_id, name)]
        assert steps == list(range(1, STEPS + 1)), name


# --- the launcher alone, with a stand-in for training ---


def test_a_rank_that_fails_on_one_node_is_named(cluster, tmp_path):
    run = tmp_path / "run"
    number = submit(cluster, run, command=(sys.executable, STANDIN, 30, "--fail", "1:4:9"))
    done = wait(cluster, number, state("FAILED"), run)
    text = output(run)
    second = cluster.run("scontrol", "show", "hostnames", done["NodeList"]).split()[1]
    assert f"node {second}: rank 1 was the first to fail, with exit code 9" in text
    assert "| something broke here" in text and done["Restarts"] == "0"


def test_a_folder_of_any_name_is_one_folder(cluster, tmp_path):
    """sbatch reads its directives by rules of its own: quotes, comments, and patterns that begin with %."""
    run = tmp_path / "a 'b' \"c\" ünï 100% %j $(touch pwned) #x;`y`"
    number = submit(cluster, run, "--exclude", f"{cluster.nodes[2]}", command=(sys.executable, STANDIN, 3))
    wait(cluster, number, state("COMPLETED"), run)
    assert "kvcat launch: finished" in output(run) and (run / "kvcat" / "finished.json").is_file()
    assert len(list(run.glob("launch/attempt-001/rank-*.log"))) == 2
    assert [p.name for p in tmp_path.iterdir()] == [run.name]


def test_a_sick_node_is_named_before_the_start(cluster, tmp_path):
    run = tmp_path / "run"
    check = f"test $(uname -n) != {cluster.nodes[1]} || {{ echo the fan is loose; false; }}"
    number = submit(cluster, run, "--health-command", check, command=("touch", tmp_path / "started"))
    wait(cluster, number, state("FAILED"), run)
    assert f"node {cluster.nodes[1]}: check failed" in output(run) and "the fan is loose" in output(run)
    assert f"node {cluster.nodes[1]} did not pass the check" in output(run)
    assert f"node {cluster.nodes[0]} did" not in output(run)
    assert not (tmp_path / "started").exists()


def test_a_node_that_hangs_in_the_check_is_named(cluster, tmp_path):
    run = tmp_path / "run"
    check = f"test $(uname -n) != {cluster.nodes[1]} || sleep 600"
    options = ("--health-command", check, "--health-seconds", 5)
    number = submit(cluster, run, *options, command=("touch", tmp_path / "started"))
    wait(cluster, number, state("FAILED"), run)
    said = "did not pass the check before the start (see above; without a reason: no answer in time)"
    assert f"node {cluster.nodes[1]} {said}" in output(run)
    assert f"node {cluster.nodes[0]} did" not in output(run) and not (tmp_path / "started").exists()


def refused(cluster, run_dir, *options):
    """The job's output; nothing of it was started."""
    number = train(cluster, run_dir, "--exit-wait", 8, *options)
    done = wait(cluster, number, state("FAILED"), run_dir)
    assert done["ExitCode"] == "1:0" and done["Restarts"] == "0"
    assert not list(run_dir.glob("launch/attempt-*/rank-*")) and not (run_dir / "kvcat").exists()
    return output(run_dir)


@pytest.mark.nemo
def test_the_doctor_names_a_node_that_is_not_fit(cluster, tmp_path):
    first, second = cluster.nodes[:2]
    with cluster.without_shared_memory(second):
        text = refused(cluster, tmp_path / "run")
    assert f"node {second}: check failed (kvcat train doctor" in text
    assert re.search(r"BROKEN shared memory +/dev/shm: 0.0 GB free, 1 GB wanted", text)
    assert f"node {second} did not pass the check" in text and f"node {first}" not in text
    # The nodes do reach each other, and said so.
    said = (tmp_path / f"run/launch/attempt-001/health/{first}.log").read_text()
    assert f"2 ranks on 2 host(s) ({first}, {second}) over gloo" in said


DOCTOR = 'kvcat train doctor --dir "$KVCAT_RUN_DIR" --disk-gb 1 --timeout 6'


@pytest.mark.nemo
def test_the_doctor_names_a_node_that_does_not_reach_the_others(cluster, tmp_path):
    first, second = cluster.nodes[:2]
    with cluster.firewall(second, "20000-30001"):  # the rendezvous; Slurm's own ports are others
        text = refused(cluster, tmp_path / "run", "--health-command", DOCTOR)
    assert f"node {first}: others do not answer" in text and f"rank 1 (host {second}) did not start" in text
    assert f"rank 0 does not answer at {first}:" in text
    assert f"node {second} did not pass the check" in text and f"node {first} did not" not in text


def test_preempted_in_the_check_before_the_start(cluster, tmp_path):
    """Slurm's signal ends the check too; that is no fault of a node."""
    run = tmp_path / "run"
    check = f"test -e {tmp_path}/checked-$(uname -n) || {{ touch {tmp_path}/checked-$(uname -n); sleep 60; }}"
    number = submit(cluster, run, "--health-command", check, command=(sys.executable, STANDIN, 3))
    wait(cluster, number, lambda now: len(list(tmp_path.glob("checked-*"))) == 2, run)
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    cluster.run("scancel", "--signal=USR1", number)  # and its step, as preemption does
    done = wait(cluster, number, state("COMPLETED"), run)
    text = output(run)
    assert done["Restarts"] == "1" and "got SIGUSR1 before the start; queued again" in text
    assert "did not pass" not in text


def test_a_node_lost_in_the_check_before_the_start_is_left(cluster, tmp_path):
    """Again where Slurm kills the job itself: one that is queued again and started within the same second is refused by its node, whose
    list of revoked credentials counts in seconds ("Job credential revoked")."""
    for number in range(3):
        try:
            lose_a_node_in_the_check(cluster, tmp_path / f"try-{number}")
            return
        except AssertionError as error:
            if "Job credential revoked" not in str(error) or number == 2:
                raise


def lose_a_node_in_the_check(cluster, tmp_path):
    tmp_path.mkdir()
    run = tmp_path / "run"
    check = f"test -e {tmp_path}/checked || {{ sleep 2; touch {tmp_path}/checked; sleep 60; }}"
    options = ("--health-command", check, "--health-seconds", 10)
    number = submit(cluster, run, *options, command=(sys.executable, STANDIN, 3))
    wait(cluster, number, lambda now: (tmp_path / "checked").exists(), run)
    lost = cluster.run("scontrol", "show", "hostnames", job(cluster, number)["NodeList"]).split()[1]
    cluster.lose_node(lost)
    try:
        done = wait(cluster, number, state("COMPLETED"), run)
    finally:
        cluster.return_node(lost)
    assert done["Restarts"] == "1"
    assert lost not in cluster.run("scontrol", "show", "hostnames", done["NodeList"]).split()


def test_restarts_without_progress_end(cluster, tmp_path):
    run = tmp_path / "run"
    fails = (sys.executable, STANDIN, 30, "--fail", "0:2:3")
    number = submit(cluster, run, "--restart-on-failure", "--max-stalled", 1, command=fails)
    done = wait(cluster, number, state("FAILED"), run)
    assert done["Restarts"] == "2"  # the first try, one more, and the refusal
    assert "2 attempts in a row saved nothing new" in output(run)


def test_deaf_ranks_do_not_keep_the_job_from_its_queue(cluster, tmp_path):
    run = tmp_path / "run"
    deaf = (sys.executable, STANDIN, 5000, "--deaf", "--save-every", 5)
    number = submit(cluster, run, "--signal-seconds", 20, "--stop-seconds", 3, command=deaf)
    wait(cluster, number, lambda now: (run / "checkpoints" / "step=5").exists(), run)
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    wait(cluster, number, lambda now: now["Restarts"] == "1", run)
    assert "did not stop within 3 s; queued again" in output(run)
    cluster.run("scancel", number)
    wait(cluster, number, state("CANCELLED"), run)


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    run = tmp_path / "run"
    number = submit(cluster, run, command=(sys.executable, STANDIN, 5000))
    wait(cluster, number, lambda now: "rank 0 step 5" in output(run), run)
    cluster.run("scancel", number)
    done = wait(cluster, number, state("CANCELLED"), run)
    time.sleep(3)
    assert job(cluster, number)["JobState"] == "CANCELLED" and done["Restarts"] == "0"
    # It was asked first, and saved.
    assert len(list(run.glob("checkpoints/step=*"))) == 1


def test_commands_of_the_docs_work_here(cluster):
    """The Slurm commands that docs/cluster.md tells to type are valid on a real cluster."""
    from tests.launch.test_cluster_docs import of, slurm_commands

    assert len(slurm_commands()) >= 8
    for words in slurm_commands():
        words = [word.replace("node17", cluster.nodes[0]) for word in words]
        done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True, timeout=30)
        # There is no job 1234 here.
        assert done.returncode == 0 or "invalid job id" in done.stderr.lower(), (words, done.stderr)
    known = cluster.run("srun", "--help")
    checked = False
    for words in of("srun"):
        if "doctor" in words:
            words = [re.sub("node1([78])", lambda m: cluster.nodes[int(m[1]) - 7], word) for word in words]
            environment = cluster.environment | {"PATH": f"{BIN}:{cluster.environment['PATH']}"}
            done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
            both = f"2 ranks on 2 host(s) ({cluster.nodes[0]}, {cluster.nodes[1]}) over gloo"
            assert done.returncode == 0 and both in done.stdout, done.stdout + done.stderr
            checked = True
        # What the others run is not here: their options are.
        options = [word for word in words if word.startswith("--")]
        assert options and all(re.search(rf"{option}\b", known) for option in options), words
    assert checked
    cluster.wait_idle(*cluster.nodes)
