"""The Kubernetes manifest: from the same settings as Slurm's script, and held against the real schema."""

import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.launch import HERE
from kvcat_nemo.launch.job_settings import Settings
from kvcat_nemo.launch.jobset import jobset, merge, validate


def settings(**changes):
    values = {
        "command": ["nemo", "llm", "pretrain"],
        "run_dir": Path("/runs/first"),
        "nodes": 8,
        "image": "kvcat:1",
        "mounts": ["runs:/runs", "/local/data:/data"],
        "env": ["MODE=a", "MY_TOKEN"],
        "interface": "eth0",
    }
    return Settings(**values | changes)


def pod(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def variables(manifest):
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in pod(manifest)["containers"][0]["env"]}


def test_manifest_is_valid_and_says_what_was_asked():
    manifest = jobset(settings())
    validate(manifest)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 8 and job["completionMode"] == "Indexed"
    (container,) = pod(manifest)["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert container["command"][1:] == ["--", "nemo", "llm", "pretrain"]
    assert {m["mountPath"] for m in container["volumeMounts"]} == {"/dev/shm", "/runs", "/data"}
    assert pod(manifest)["securityContext"]["runAsNonRoot"] is True
    env = variables(manifest)
    assert env["KVCAT_MASTER_ADDR"] == "first-node-0-0.first"
    assert env["MODE"] == "a"
    assert env["MY_TOKEN"] == {"secretKeyRef": {"name": "first-env", "key": "MY_TOKEN"}}


def test_cpu_nodes_ask_for_no_gpu():
    manifest = jobset(settings(gpus_per_node=0))
    validate(manifest)
    assert "resources" not in pod(manifest)["containers"][0]
    assert variables(manifest)["KVCAT_PROCS_PER_NODE"] == "1"


@pytest.mark.parametrize(
    ("patch", "path"),
    [
        ({"spec": {"suspnd": True}}, "spec.suspnd"),
        ({"spec": {"failurePolicy": {"maxRestart": 3}}}, "spec.failurePolicy.maxRestart"),
        (
            {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"backofLimit": 1}}}]}},
            "spec.replicatedJobs[0].template.spec.backofLimit",
        ),
        (
            {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {"spec": {
                "containers": [{"name": "ranks", "comand": ["x"]}]}}}}}]}},
            "containers[0].comand",
        ),
    ],
)  # fmt: skip
def test_misspelt_fields_are_found(patch, path):
    manifest = merge(jobset(settings()), patch)
    with pytest.raises(ValueError, match="unknown field") as error:
        validate(manifest)
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("patch", "path"),
    [
        ({"spec": {"failurePolicy": {"maxRestarts": "many"}}}, "maxRestarts"),
        ({"spec": {"replicatedJobs": "node"}}, "replicatedJobs"),
    ],
)
def test_wrong_types_are_found(patch, path):
    with pytest.raises(ValueError, match=path):
        validate(merge(jobset(settings()), patch))


def test_a_sites_additions_are_merged():
    patch = {
        "metadata": {"labels": {"kueue.x-k8s.io/queue-name": "lab"}},
        "spec": {
            "replicatedJobs": [
                {
                    "name": "node",
                    "template": {"spec": {"template": {"spec": {"nodeSelector": {"gpu": "h100"}}}}},
                }
            ]
        },
    }
    manifest = merge(jobset(settings()), patch)
    validate(manifest)
    assert (
        pod(manifest)["nodeSelector"] == {"gpu": "h100"}
        and pod(manifest)["containers"][0]["image"] == "kvcat:1"
    )
    assert manifest["metadata"] == {"name": "first", "labels": {"kueue.x-k8s.io/queue-name": "lab"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "image=None"),
        ({"name": "First_Run"}, "name='First_Run'"),
        ({"mounts": ["runs:/elsewhere"]}, "run_dir=/runs/first"),
        ({"mounts": ["runs"]}, "mount='runs'"),
        ({"env": ["HF_TOKEN=abc"]}, "HF_TOKEN=…: that looks like a secret"),
        ({"env": ["URI=http://me:pw@host/"]}, "URI=…: that looks like a secret"),
        ({"nodes": 0}, "nodes=0"),
        ({"procs_per_node": 9}, "procs_per_node=9"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError) as error:
        jobset(settings(**changes))
    assert message in str(error.value) and "abc" not in str(error.value) and "me:pw" not in str(error.value)


def test_preempted_ranks_restart_uncounted():
    """Exit 75 is what the scripts use, and it reaches JobSet's uncounted rule through the job's failure reason."""
    from kvcat_nemo.runs import exit_codes

    lines = (HERE / "run_names.sh").read_text().splitlines()
    assert f"readonly KVCAT_EXIT_AGAIN={exit_codes.REQUEUE}" in lines
    assert f"readonly KVCAT_EXIT_PEER_DIED={exit_codes.PEER_DIED}" in lines
    manifest = jobset(settings())
    rules = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "ranks", "operator": "In", "values": [75]},
    }
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


OPTIONS = ["--run-dir", "/runs/first", "--nodes", "2", "--image", "img", "--interface", "eth0", "--max-stalled", "7",
           "--setup", "echo hi"]  # fmt: skip


def test_slurm_and_kubernetes_get_the_same_settings():
    """One command line: what both launchers hand to torchrun.sh is the same."""
    words = ["kvcat_tiny(base='/b')", *OPTIONS, "--dry-run", "trainer.max_steps=5"]
    done = CliRunner().invoke(main, ["launch", "k8s", *words, "--mount", "runs:/runs"])
    assert done.exit_code == 0, done.output
    manifest = yaml.safe_load(done.stdout)
    env = variables(manifest)
    slurm = subprocess.run(
        ["bash", str(HERE / "submit.sh"), *OPTIONS, "--dry-run", "--", "true"], capture_output=True, text=True
    )
    code = slurm.stdout.partition("# The batch script of a run")[0]
    names = ("KVCAT_RUN_DIR", "KVCAT_PROCS_PER_NODE", "KVCAT_MAX_STALLED", "KVCAT_SETUP", "KVCAT_INTERFACE")
    for name in names:
        bash = subprocess.run(
            ["bash", "-c", f'{code}\nprintf %s "${name}"'], capture_output=True, text=True
        ).stdout
        assert env[name] == bash, name
    command = pod(manifest)["containers"][0]["command"]
    assert command[command.index("--factory") + 1] == "kvcat_tiny(base='/b', dir='/runs', name='first')"
    assert command[-3:] == ["trainer.num_nodes=2", "trainer.devices=8", "trainer.max_steps=5"]
