"""Every command of docs/cluster.md is run, or parsed by what would run it. Slurm's own run in test_slurm.py."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from kvcat_nemo.cli import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cluster.md"
BIN = Path(sys.executable).parent


def commands():
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


SLURM = {"squeue", "scancel", "scontrol", "sinfo"}
FILES = {"tail", "cat", "ls", "grep", "df", "du", "torchfrtrace"}
IMAGE = {"docker", "enroot"}
OTHERS = {"kvcat", "nemo", "srun", "kubectl", "apt-get", "python"}


def slurm_commands():
    return [words for words in commands() if words[0] in SLURM]


def of(*names):
    return [words for words in commands() if words[0] in names]


def test_every_command_is_of_a_kind_that_is_checked():
    assert len(commands()) >= 30
    assert {words[0] for words in commands()} == SLURM | FILES | IMAGE | OTHERS


@pytest.mark.parametrize("words", of("kvcat"), ids=lambda w: " ".join(w)[:60])
def test_kvcat_commands(words, tmp_path, monkeypatch):
    """Parsed, and where something would be launched, run with --dry-run."""
    from click.testing import CliRunner

    words = [w.replace("/shared", str(tmp_path)) if w.startswith("/shared") else w for w in words]
    monkeypatch.chdir(tmp_path)
    for name in ("hf/Llama-3.1-8B", "corpus"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    if words[1] == "launch":
        if words[2] == "k8s":  # its run folder lies in a pod
            words = [w.replace(str(tmp_path), "/shared") for w in words]
        # In a process of its own: the scripts write to the real standard output.
        code = "from kvcat_nemo.cli import main; main()"
        again = [w for w in words[1:] if w != "--dry-run"]
        at = 2  # after `launch KIND`
        done = subprocess.run(
            [sys.executable, "-c", code, *again[:at], "--dry-run", *again[at:]],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "torchrun" in done.stdout
        return
    if words[1:3] == ["train", "doctor"] and "doctor" not in main.get_command(None, "train").commands:
        pytest.fail("docs/cluster.md tells to run kvcat train doctor, which does not exist")
    command, rest = main, words[1:]
    while isinstance(command, click.Group):
        _, command, rest = command.resolve_command(click.Context(command), rest)
    command.make_context(command.name, list(rest))
    assert CliRunner().invoke(main, [*words[1:3], "--help"]).exit_code == 0


@pytest.mark.parametrize("words", of(*FILES), ids=lambda w: " ".join(w)[:60])
def test_commands_on_files(words, tmp_path):
    """Run on a run folder as the launchers leave it."""
    attempt = tmp_path / "runs" / "llama" / "launch" / "attempt-001"
    (attempt / "nccl").mkdir(parents=True)
    (attempt / "nccl" / "trace-0").touch()
    (attempt.parent / "slurm-1234.out").write_text("kvcat launch: lost node(s): node17; queued again\n")
    (attempt.parent / "attempts.tsv").write_text("001\t2026-01-01T00:00:00\t1234\tnode1 node2\t0-0\n")
    for name in ("kvcat", "checkpoints"):
        (tmp_path / "runs" / "llama" / name).mkdir()
    (tmp_path / "runs" / "llama" / "kvcat" / "metrics.jsonl").write_text("{}\n")
    words = [w.replace("/shared", str(tmp_path)) for w in words]
    if words[0] == "torchfrtrace":  # needs dumps of NCCL, so a GPU: its options are parsed
        from torch.distributed.flight_recorder.components.config_manager import JobConfig

        parsed = JobConfig().parser.parse_args(words[1:])
        assert parsed.prefix == "trace-" and parsed.trace_dir == str(attempt / "nccl")
        return
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_traces_are_written_where_the_docs_look():
    assert (
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$KVCAT_ATTEMPT_DIR/$RUN_NCCL/trace-"
        in (ROOT / "launch/torchrun.sh").read_text()
    )


@pytest.mark.parametrize("words", of(*IMAGE), ids=" ".join)
def test_image_commands(words):
    dockerfile = (ROOT / "Dockerfile").read_text()
    if words[0] == "docker" and words[1] == "build":
        assert words[-1] == "." and (ROOT / "Dockerfile").is_file()
        for flag, value in zip(words, words[1:], strict=False):
            if flag == "--build-arg":
                name, _, default = value.partition("=")
                assert f"ARG {name}={default}\n" in dockerfile, value
    elif words[0] == "docker":
        assert (
            words[-3:] == ["kvcat", "train", "doctor"]
            and '["kvcat", "train", "doctor", "--fast"]' in dockerfile
        )
    else:
        assert words[:3] == ["enroot", "import", "-o"] and words[3].endswith(".sqsh")


def test_kubectl_applies_what_was_written():
    written = [w[w.index("--out") + 1] for w in of("kvcat") if "--out" in w and "k8s" in w]
    assert [w[1:3] for w in of("kubectl")] == [["apply", "-f"]] and of("kubectl")[0][3] in written


def test_packages_are_those_that_ci_installs():
    (words,) = of("apt-get")
    packages = words[words.index("--no-install-recommends") + 1 :]
    assert f"install {' '.join(packages)}" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("words", of("python"), ids=" ".join)
def test_cluster_script(words):
    assert (ROOT / words[1]).is_file()
    assert words[2] in (ROOT / words[1]).read_text().split('"""')[1]


@pytest.mark.nemo
@pytest.mark.parametrize("words", of("nemo"), ids=lambda w: w[5])
def test_nemo_commands(words):
    from nemo_run.cli.cli_parser import parse_cli_args

    from kvcat_nemo.nemo import executors
    from kvcat_nemo.recipes import RECIPES
    from kvcat_nemo.recipes.overrides import check_overrides

    recipe = RECIPES[words[words.index("--factory") + 1]]()
    check_overrides(recipe, words)
    chosen = [w.removeprefix("run.executor=") for w in words if w.startswith("run.executor=")]
    module, _, name = chosen[0].rpartition(".")
    assert module == executors.__name__
    overrides = [w.removeprefix("run.executor.") for w in words if w.startswith("run.executor.")]
    parse_cli_args(getattr(executors, name)(), overrides)


def layout_rows():
    return re.findall(
        r"^\| `(kvcat_\w+)` \| (.*?) \| (.*?) \| ([\d.]+) \|$", PAGE.read_text(encoding="utf-8"), re.M
    )


@pytest.mark.nemo
def test_layouts_are_what_the_plan_says():
    from nemo_run.cli.cli_parser import parse_cli_args

    from kvcat_nemo.nemo.plan import plan
    from kvcat_nemo.recipes import RECIPES

    rows = layout_rows()
    assert {name for name, *_ in rows} == set(RECIPES) - {
        "kvcat_tiny",
        "kvcat_tiny_prefix",
        "kvcat_smollm2_135m",
    }
    wrong = []
    for name, overrides, layout, memory in rows:
        words = ["trainer.num_nodes=8", *re.findall(r"`([^`]+)`", overrides)]
        out = plan(parse_cli_args(RECIPES[name](), words))
        said = out["layout"]
        assert said["world_size"] == 64
        row = (
            f"TP{said['tensor']} × DP{said['data']}, {said['num_microbatches']} micro-batch(es) of {said['micro_batch_size']}",
            f"{out['memory_per_gpu_bytes']['total'] / 1e9:.1f}",
        )
        if row != (layout, memory):
            wrong.append(f"| `{name}` | {overrides} | {row[0]} | {row[1]} |")
    assert not wrong, "docs/cluster.md must say:\n" + "\n".join(wrong)


def test_links_lead_somewhere():
    text = PAGE.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        page, _, anchor = target.partition("#")
        assert (PAGE.parent / page).exists() and (not anchor or page or anchor in headings), target
