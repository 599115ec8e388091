"""Every value that reaches a script, a directive, a manifest or an environment: checked by one table, and quoted."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcat_nemo.cli import main
from kvcat_nemo.launch.job_settings import Settings
from kvcat_nemo.launch.jobset import jobset, validate
from kvcat_nemo.launch.values import check_environment, check_value, forms

LAUNCH = Path(__file__).parents[2] / "launch"
BIN = Path(sys.executable).parent
STANDIN = Path(__file__).with_name("standin.py")

HOSTILE = [
    "", " ", "a b", "-x", "--help", "a\nb", "a\n#SBATCH --exclusive", "x\r", "x\t", "a\x1b[0m", "$(touch pwned)", "`touch pwned`",
    "a;touch pwned", "a|b", "a&b", "a'b", 'a"b', "a\\b", "a#b", "#SBATCH", "a[$(touch pwned)]", "0x10", "1e3", "-1", "08", "1.5",
    "99999999999999999999", "9" * 400, "٣", "ünï", "…", "a\u2028b", "*", "~", "!", "a,b", "a:b", "a/b", "../x", "/", "a%j", "",
]  # fmt: skip
GOOD = {
    "run-dir": ["/a 'b' \"c\" ünï 100% #x;$(y)", "runs/a", "-x"],
    "nodes": ["1", "08", "64"],
    "gpus-per-node": ["0", "8"],
    "time": ["30", "04:00:00", "1-00:00:00"],
    "partition": ["gpu", "a,b_c", "p-1.x"],
    "account": ["lab", "lab@x", "a.b-c"],
    "constraint": ["a&b", "[rack1|rack2]", "(knl|skl)*2", "gpu:a100"],
    "exclude": ["n1", "n[1-3,7],rack2-[01-09]"],
    "image": [
        "kvcat:1", "nvcr.io/nvidia/nemo:25.11", "nvcr.io#nvidia/nemo:25.11", "docker://reg.example:5000/a/b", "/shared/my images/k.sqsh",
        "docker://$oauthtoken@nvcr.io#nvidia/nemo:25.11", "reg.example/a@sha256:" + "0a" * 32, "reg.example/a:1@sha256:" + "0a" * 32, "./k.sqsh",
    ],
    "mount": ["/a:/b", "/a b:/c:ro"],
    "setup": ["source '/a b/activate'", "a\nb\tc", "$(x) `y` ; z"],
    "interface": ["eth0", "^docker0,lo", "=ib0", "eth0.5"],
    "ib-hca": ["mlx5_0:1,mlx5_1", "^mlx5_2"],
    "master-addr": ["node1", "10.0.0.1", "fe80::1%eth0"],
}  # fmt: skip


def python_takes(option, value):
    try:
        check_value(option, value)
    except ValueError as error:
        assert str(error).count("\n") == 0 and str(error).startswith(f"--{option}=")
        return True, str(error)
    return False, ""


def shell_refuses(pairs):
    """What the shell says to each pair, in one process."""
    script = f"""source {LAUNCH}/common.sh
while (($#)); do ( require "--$1" "$2" ) > /dev/null 2> "$OUT" && echo yes || {{ [[ $(wc -l < "$OUT") == 1 ]] && echo no || echo lines; }}
shift 2; done"""
    words = [word for pair in pairs for word in pair]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], env=os.environ | {"OUT": f"/tmp/kvcat-{os.getpid()}"}, capture_output=True, text=True
    )  # fmt: skip
    Path(f"/tmp/kvcat-{os.getpid()}").unlink(missing_ok=True)
    assert not done.stderr
    return [
        answer != "yes" for answer in done.stdout.split() if answer != "lines" or pytest.fail("two lines")
    ]


def test_python_and_the_shell_give_the_same_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    pairs = [(option, value) for option in forms() for value in HOSTILE]
    pairs += [(form.option, form.example) for form in forms().values()]
    pairs += [(option, value) for option, values in GOOD.items() for value in values]
    python = [python_takes(*pair)[0] for pair in pairs]
    shell = shell_refuses(pairs)
    assert [p for p, a, b in zip(pairs, python, shell, strict=True) if a != b] == []
    for (option, value), refused in zip(pairs, python, strict=True):
        good = value == forms()[option].example or value in GOOD.get(option, ())
        assert not (refused and good), (option, value)
    for option, form in forms().items():
        refused = {v for (o, v), r in zip(pairs, python, strict=True) if o == option and r}
        if form.pattern is None:
            assert {"x\r", "a\x1b[0m"} <= refused
        else:
            assert {"a\nb", "a\n#SBATCH --exclusive", "x\r", "x\t", "a\\b"} <= refused, option
        if option not in ("run-dir", "setup", "health-command"):
            assert {
                "$(touch pwned)",
                "`touch pwned`",
                "a;touch pwned",
                "-x",
                "a b",
                "#SBATCH",
                "a[$(touch pwned)]",
                "a'b",
            } <= refused, option
    assert not list(tmp_path.iterdir())


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
        min_size=20,
        max_size=60,
    )
)
def test_python_and_the_shell_agree_on_any_text(texts):
    pairs = [(option, text) for text, option in zip(texts, list(forms()) * 3, strict=False)]
    assert [python_takes(*pair)[0] for pair in pairs] == shell_refuses(pairs)


# --- the batch script ---


def fake(folder, name, text):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Stand-ins: sbatch takes the script, srun runs what it is told, for one node."""
    tools = tmp_path_factory.mktemp("tools")
    fake(tools, "sbatch", "echo 7")
    fake(
        tools,
        "scontrol",
        'if [[ $1 == show && $2 == hostnames ]]; then echo localhost; else echo "JobState=RUNNING"; fi',
    )
    fake(tools, "srun", 'while (($#)) && [[ $1 != bash ]]; do shift; done\nexec "${@:-true}"')
    return os.environ | {
        "PATH": f"{tools}:{BIN}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost",
        "SLURMD_NODENAME": "localhost", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def submit(environment, *words, **options):
    words = ["bash", str(LAUNCH / "submit.sh"), *map(str, words)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, **options)


OPTIONS = {
    "--partition", "--account", "--qos", "--constraint", "--exclude", "--run-dir", "--gpus-per-node", "--signal-seconds", "--job-name",
    "--image", "--mount", "--nodes", "--time", "--interface", "--ib-hca", "--master-port", "--stop-seconds", "--env", "--setup",
    "--health-command", "--cpus-per-node", "--procs-per-node", "--max-stalled", "--health-seconds", "--min-disk-gb", "--exit-wait",
}  # fmt: skip


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_no_option_adds_a_line_or_runs_anything(option, slurm, tmp_path):
    """In the job's script nothing but what was given, or nothing at all; a run at submit would leave a file."""
    values = [
        "x\n#SBATCH --exclusive",
        "x\ntouch pwned",
        "a[$(touch pwned)]",
        "$(touch pwned)",
        "`touch pwned`",
        "-p\rtouch pwned",
    ]
    for n, value in enumerate(values):
        value = f"X={value}" if option == "--env" else value
        words = {"--run-dir": f"r{n}", option: value}
        flat = [word for pair in words.items() for word in pair]
        done = submit(slurm, *flat, "--", "true", cwd=tmp_path)
        folder = tmp_path / words["--run-dir"]
        assert not (tmp_path / "pwned").exists() and not list(tmp_path.rglob("pwned")), value
        if done.returncode:
            assert done.returncode == 2 and not folder.exists(), done.stderr
            assert done.stderr.count("\n") == 1 and f"{option}=" in done.stderr, done.stderr
            continue
        text = (folder / "launch" / "job.sbatch").read_text()
        head = text.partition("KVCAT_COMMAND")[0]
        assert "#SBATCH --exclusive" not in head.splitlines(), value
        name = {
            "--env": "X",
            "--setup": "KVCAT_SETUP",
            "--health-command": "KVCAT_HEALTH_COMMAND",
            "--run-dir": "KVCAT_RUN_DIR",
        }[option]
        said = subprocess.run(
            ["bash", "-c", f'{head}\nprintf %s "${name}"'], capture_output=True, cwd=tmp_path
        )
        wanted = str(folder) if option == "--run-dir" else value.removeprefix("X=")
        assert said.stdout.decode() == wanted and not said.stderr
        shutil.rmtree(folder)


def test_every_option_of_the_shell_is_in_the_table():
    text = (LAUNCH / "submit.sh").read_text()
    said = set(re.findall(r"^ +(--[a-z-]+(?: \| --[a-z-]+)*)\) [a-z_]+\+?=[$(]", text, re.M))
    assert {option for line in said for option in line.split(" | ")} == OPTIONS
    assert {o.removeprefix("--") for o in OPTIONS} - {"env"} <= set(forms())


WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30).filter(
    lambda w: not re.search("(?i)pass|tok|key|secr|auth|cred|pwd|basic|bear|-u|@", w)
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(WORD, min_size=1, max_size=20),
    st.dictionaries(st.sampled_from("ABCDEFGH"), WORD, max_size=5),
    WORD,
)
def test_any_text_comes_through_the_script(slurm, tmp_path_factory, words, variables, comment):
    """Command, environment and set-up, written by submit.sh and run by bash: word for word what was given."""
    root = tmp_path_factory.mktemp("any")
    fake(
        root,
        "shown",
        f'printf "%s\\0" "$@" > {root}/words\nfor n in {" ".join(variables)}; do printf "%s\\0" "${{!n}}"; done > {root}/variables',
    )
    fake(
        root,
        "srun",
        'while (($#)) && [[ $1 != bash ]]; do shift; done\n[[ ${2:-} == */torchrun.sh ]] || exit 0\nshift 3; exec "$@"',
    )
    environment = slurm | {"PATH": f"{root}:{slurm['PATH']}"}
    setup = ": " + "".join(c for c in comment if c.isalnum() or c in " \n\t")
    done = submit(
        environment, "--run-dir", root / "r", *(f"--env={k}={v}" for k, v in variables.items()), "--setup", setup, "--", "shown", *words
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = subprocess.run(
        ["bash", str(root / "r/launch/job.sbatch")], env=environment, capture_output=True, timeout=60
    )
    assert (root / "words").read_bytes() == b"".join(w.encode() + b"\0" for w in words), job.stderr
    assert (root / "variables").read_bytes() == b"".join(v.encode() + b"\0" for v in variables.values())


@pytest.mark.multiprocess
def test_a_folder_of_any_name_works_to_the_end(slurm, tmp_path):
    """submit.sh, the batch script, the check before the start, torchrun and two ranks, all of them the real ones."""
    run = tmp_path / "a 'b' \"c\" ünï 100% $(touch pwned) #x;`y`"
    done = submit(
        slurm | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}, "--run-dir", run, "--gpus-per-node", 0, "--procs-per-node", 2, "--min-disk-gb", 0,
        "--", sys.executable, STANDIN, 3, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    directives = [
        line for line in (run / "launch/job.sbatch").read_text().splitlines() if line.startswith("#SBATCH")
    ]
    assert "#SBATCH --job-name=a__b___c____n___100____touch_pwned___x__y_" in directives
    assert (
        f'#SBATCH --output="{str(run).replace("%", "%%").replace(chr(34), chr(92) + chr(34))}/launch/slurm-%j.out"'
        in directives
    )
    job = subprocess.run(
        ["bash", str(run / "launch" / "job.sbatch")], env=slurm, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )  # fmt: skip
    assert job.returncode == 0 and "finished" in job.stdout, job.stdout + job.stderr
    assert (run / "kvcat" / "finished.json").is_file() and len(
        list(run.glob("launch/attempt-001/rank-*.log"))
    ) == 2
    assert [p.name for p in tmp_path.iterdir()] == [run.name]


# --- the environment ---


@pytest.mark.parametrize("script", ["torchrun.sh", "health.sh", "rank.sh", "slurm.sbatch"])
def test_the_launchers_hold_their_environment_against_the_table(script, tmp_path):
    """Numbers stand in bash's arithmetic, which runs what it finds in a subscript; words stand in the names of files."""
    good = {
        "KVCAT_RUN_DIR": "r", "KVCAT_ATTEMPT_DIR": "a", "KVCAT_LAUNCH_DIR": str(LAUNCH), "KVCAT_MASTER_ADDR": "n1", "RANK": "0",
        "SLURM_JOB_ID": "7", "KVCAT_STOP_FILE": "s",
    }  # fmt: skip
    text = (LAUNCH / script).read_text().replace("\\\n", " ")
    asked = re.search(r"^(?:require_variables (.*)|require (RANK) .*)$", text, re.M)
    names = subprocess.run(
        ["bash", "-c", f"echo {asked[1] or asked[2]}"], capture_output=True, text=True
    ).stdout.split()
    own = {"KVCAT_EXIT_AGAIN", "KVCAT_NODES"} if script == "slurm.sbatch" else {"KVCAT_EXIT_AGAIN"}
    counted = {
        n for line in re.findall(r"\(\(.*?\)\)", text) for n in re.findall(r"[A-Z]+(?:_[A-Z]+)+|RANK", line)
    }
    assert counted - own <= set(names)
    for name in set(names) - {"KVCAT_RUN_DIR"}:
        done = subprocess.run(
            ["bash", str(LAUNCH / script), "--", "true"], env=os.environ | good | {name: "a[$(touch pwned)]"}, cwd=tmp_path,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2 and f"{name}=a[$(touch pwned)]: give " in done.stderr, (name, done.stderr)
        assert not list(tmp_path.iterdir())


def test_an_attempts_name_leads_nowhere_else(tmp_path):
    (tmp_path / "exit").mkdir()
    done = subprocess.run(
        ["bash", str(LAUNCH / "torchrun.sh"), "--", "true"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"KVCAT_RUN_DIR": str(tmp_path / "r"), "KVCAT_ATTEMPT": "/../../.."},
    )  # fmt: skip
    assert done.returncode == 2 and "KVCAT_ATTEMPT=/../../..: give a word" in done.stderr
    assert (tmp_path / "exit").is_dir()


@pytest.mark.parametrize("pair", ["KVCAT_MAX_STALLED=a[0]", "KVCAT_RUN_DIR=/x", "KVCAT_NODES"])
def test_env_does_not_set_what_options_set(pair, slurm, tmp_path):
    done = submit(
        slurm | {"KVCAT_NODES": "1"}, "--run-dir", tmp_path / "r", "--env", pair, "--dry-run", "--", "true"
    )
    assert done.returncode == 2 and "the launcher sets that itself" in done.stderr
    with pytest.raises(ValueError, match="the launcher sets that itself"):
        Settings(command=["x"], run_dir=Path("/r"), env=[pair])


def test_executors_of_nemo_run_ask_too(monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "gpu\n#SBATCH --exclusive")
    with pytest.raises(ValueError, match="SBATCH_PARTITION=gpu.n#SBATCH --exclusive: a line break"):
        check_environment(os.environ, "SBATCH_ACCOUNT", "SBATCH_PARTITION")
    text = (Path(__file__).parents[2] / "kvcat_nemo/nemo/executors.py").read_text()
    assert 'check_environment(os.environ, "SBATCH_ACCOUNT", "SBATCH_PARTITION")' in text


# --- kvcat launch ---

EVASIONS = [
    "trainer.devices=3", "trainer.devices+=3", "trainer.devices-=3", "trainer.devices*=3", "trainer.devices/=3", "trainer.devices|=3",
    "trainer.devices&=3", "trainer.devices =3", "trainer.devices += 3", "trainer.devices\t=3", "trainer..devices=3", "[trainer].devices=3",
    "trainer[].devices=3", "trainer.devices[0]=3", "trainer.num_nodes=2", "trainer=other", "trainer|=other", "log.log_dir=/x", "log.name+=x",
    "log=default_log", "log..name=x", "trainer=@x.yaml", "@x.yaml", "trainer.devices", "--factory=x", "--yaml=x.yaml", "-nx=3",
    "trainer.devices==3", "run.executor=slurm", "run.executor.nodes=2", "running=1", "trainer.devices=3\n", " trainer.devices=3",
]  # fmt: skip


@pytest.mark.parametrize(
    "how", [["local"], ["slurm"], ["k8s", "--image", "i", "--mount", "r:/r"]], ids=lambda how: how[0]
)
def test_no_override_evades_the_layout(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for override in EVASIONS:
        words = ["launch", *how, "kvcat_tiny", "--run-dir", "/r/x", "--dry-run", "--", override]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 1 and "Error: " in done.output, (override, done.output)
        assert done.output.count("\n") == 1 and "+ " not in done.output.removeprefix("Error: ")[:2], (
            done.output
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "a\nb"], "--partition=a\\nb: a line break"),
        (["--partition", "-p"], "--partition=-p: give names of partitions"),
        (["--account", "$(id)"], "--account=$(id): give"),
        (["--qos", "a b"], "--qos=a b"),
        (["--constraint", "`id`"], "--constraint=`id`"),
        (["--exclude", "n1;id"], "--exclude=n1;id"),
        (["--name", "a b"], "--job-name=a b"),
        (["--time", "1\n2"], "--time=1\\n2"),
        (["--run-dir", "a\nb"], "a\\nb: a line break"),
        (["--run-dir", "a\\b"], "without a backslash"),
        (["--run-dir", "a,b"], "nemo-run parts arguments at commas"),
        (["--run-dir", "a'\"b"], "both kinds of quotes"),
        (["--image", "-i"], "--image=-i"),
        (["--image", "i", "--mount", "a"], "--mount=a"),
        (["--interface", "eth0 --x"], "--interface=eth0 --x"),
        (["--ib-hca", "a;b"], "--ib-hca=a;b"),
        (["--setup", "a\rb"], "--setup=a\\rb: a line break"),
        (["--env", "A B=1"], "env=A B: give a variable's name"),
        (["--signal-seconds", "3"], "--signal-seconds=3: give a whole number of at least 10"),
    ],
)  # fmt: skip
def test_the_command_refuses_before_anything_is_built(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["launch", "slurm", "kvcat_tiny", *options])
    assert done.exit_code == 1 and message in done.output, done.output
    assert not list(tmp_path.iterdir())


ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@settings(max_examples=50, deadline=None)
@given(st.lists(ANY, min_size=1, max_size=5), ANY)
def test_any_text_comes_through_the_manifest(words, value):
    """As YAML, and as Kubernetes fills it in: $(NAME) of ours is text, and two dollars would be one."""
    try:
        wanted = Settings(
            command=words,
            run_dir=Path("/r/x"),
            image="i",
            mounts=["r:/r"],
            env=[f"A={value}"],
            setup="echo $(B) $$",
        )
    except ValueError as error:
        assert "secret" in str(error)
        return
    text = yaml.safe_dump(jobset(wanted), sort_keys=False, width=200)
    container = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert [expanded(w) for w in container["command"][2:]] == words
    env = {e["name"]: expanded(e.get("value", "")) for e in container["env"]}
    assert env["A"] == value and env["KVCAT_SETUP"] == "echo $(B) $$"


def expanded(text):
    """Kubernetes' expansion (k8s.io/kubernetes/third_party/forked/golang/expansion), with every variable set to `FILLED`."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda m: "$" if m[1] == "$" else "FILLED", text)


def test_a_manifest_of_a_strange_folder_is_valid():
    wanted = Settings(command=["x"], run_dir=Path("/r/a 'b' ü"), name="x", image="i", mounts=["r:/r"])
    manifest = yaml.safe_load(yaml.safe_dump(jobset(wanted)))
    validate(manifest)
