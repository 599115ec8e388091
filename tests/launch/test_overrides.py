"""Overrides: what nemo-run's parser runs is refused before it sees it, and what people write passes."""

import sys
import types
from dataclasses import dataclass
from typing import Any, Optional

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcat_nemo.cli import main
from kvcat_nemo.launch.overrides import factory_call, key_of, read_override, touches

# VALUE for a field of the type; `probe.hit` is a function that is not to run, `probe.Hit` such a class.
RUNS = [
    ("count", "probe.hit"), ("count", "probe.hit()"), ("count", " probe.hit "), ("text", "probe.hit"), ("text", "probe.hit(x=1)"),
    ("text", "probe.hit(x=probe.hit)"), ("many", "[probe.hit]"), ("many", "[[probe.hit]]"), ("many", "[ probe.hit , probe.hit() ]"),
    ("text", "Config[probe.Hit]"), ("text", "<Config[probe.Hit()]>"), ("text", '"Config[probe.Hit]"'),
    ("text", '""Config[probe.Hit]""'), ("many", "['Config[probe.Hit]']"), ("many", "['a', 'Con' 'fig[probe.Hit]']"), ("many", "\"['a', 'Con' 'fig[probe.Hit]']\""), ("text", "main"),
    ("text", "main()"), ("anything", "probe.hit"),
]  # fmt: skip
# Refused too: other readers of the same line would run them or see another value than the plan did.
UNSAFE = [
    "__import__('os').system('touch pwned')", "os.system('touch pwned')", "eval('1')", "print(1)", "open('x')", "lambda: 1", "lambda x: x",
    "1 if True else 2", "[x for x in (1, 2)]", "{x for x in (1, 2)}", "(x for x in y)", "dict(a=1)", "list(1, 2)", "f'{x}'", "(y := 1)",
    "Partial[probe.Hit]", "'Config[x]'", "@more.yaml", "@dir/more.json:part", "@X.TOML", "${oc.env:HOME}", "a${b}", "__builtins__", "os", "app", "{'a': 'Partial[x]'}", "os.environ",
    "importlib.import_module", "a.b.c", "1.2.3", "x\ny", "\x00", "a\rb",
]  # fmt: skip
PLAIN = [
    "trainer.max_steps=100", "trainer.max_steps = 100", "optim.config.lr=1e-4", "optim.config.lr*=2", "optim.config.lr /= 2", "data.seed=-1",
    "x.y=1.5", "x.y=.5", "x.y=1_000", "x.y=0x10", "x.y=True", "x.y=true", "x.y=None", "x.y=null", "resume.mode=auto", "trainer.precision=bf16-mixed",
    "trainer.strategy.cp_comm_type=all_gather", "model.config.params_dtype=torch.bfloat16", "model.config.kvcat.policy=random", "log.name=first",
    "log.name='first.v2'", 'log.name="main"', "log.name=it's", "data.paths=/data/corpus", "data.paths=/data/my corpus (1)", "data.paths=../a/b.c",
    "data.paths=./x", "data.paths=~/x", "data.paths=.", "data.paths=['30','/a','70','/b']", "data.paths={'train': ['/a'], 'validation': ['/b']}",
    "data.paths=/a=b", "log.extra_loggers=[]", "trainer.callbacks[0].every=3", "data.base=/ckpt/é", "x.y=http://host:5000/a", "x.y=(1, 2)",
    "optim=distributed_fused_adam_with_cosine_annealing", "x.y=[a, b]", "x.y|={'a': 1}", "x.y='a(b)'", "x.y='os.abort'",
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), RUNS)
def test_what_nemo_run_runs_is_refused(field, value):
    with pytest.raises(ValueError, match=r"nemo-run would|not a list of plain values"):
        read_override(f"trainer.{field}={value}")


@pytest.mark.parametrize("value", [v for v in UNSAFE if v not in ("os",)])
def test_other_code_is_refused_too(value, tmp_path, monkeypatch):
    """In the form in which the command line gives it, by every command that reads overrides, before NeMo is imported."""
    monkeypatch.chdir(tmp_path)
    override = f"trainer.max_steps={value}"
    commands = [
        ["train", "plan", "kvcat_tiny"],
        ["launch", "local", "kvcat_tiny", "--dry-run"],
        ["launch", "slurm", "kvcat_tiny", "--no-plan"],
    ]
    for words in commands:
        done = CliRunner().invoke(main, [*words, "--", override])
        assert done.exit_code == 1 and done.output.startswith("Error: trainer.max_steps="), done.output
        assert done.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argument", PLAIN)
def test_what_people_write_passes(argument):
    override = read_override(argument)
    assert override.key == argument.partition("[0]" if "[0]" in argument else "=")[0].rstrip("+-*/|& ") + (
        "[0].every" if "[0]" in argument else ""
    )


@pytest.mark.parametrize(
    "word",
    [
        "foo",
        "--yaml=x",
        "-n x=3",
        "x.y==3",
        "x.y=",
        "x.y= ",
        "=3",
        " x.y=3",
        "x y=3",
        "x.__class__.y=3",
        "x.1=3",
    ],
)
def test_other_words_are_no_overrides(word):
    with pytest.raises(ValueError, match=r"not an override|key"):
        read_override(word)


@pytest.mark.parametrize(
    "key",
    [
        "trainer..devices",
        "[trainer].devices",
        "trainer[].devices",
        "trainer.devices ",
        "trainer.devices +",
        ".trainer.devices",
    ],
)
def test_a_key_has_one_form(key):
    assert key_of(f"{key}=3") == "trainer.devices" and touches(key_of(f"{key}=3"), "trainer.devices")


def test_what_an_override_touches():
    for key in ("trainer", "trainer.devices", "trainer.devices[0]", "trainer.devices.x"):
        assert touches(key, "trainer.devices")
    for key in ("trainer.devices_x", "trainer.max_steps", "train", "x.trainer.devices"):
        assert not touches(key, "trainer.devices")


def test_a_secret_in_an_override_is_not_shown():
    with pytest.raises(ValueError) as error:
        read_override("x.y==" + "gh" + "p_" + "aB3d" * 9)
    assert "aB3d" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a,b", "commas"),
        ("a\\b", "backslashes"),
        ("a\nb", "line breaks"),
        ("a'\"b", "both kinds"),
        ("'a'", "quotes off"),
        (["a", "b"], "data.paths="),
    ],
)
def test_arguments_that_nemo_run_would_read_otherwise_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        factory_call("kvcat_x", {"base": value})


@pytest.mark.parametrize("name", ["main", "app", "__import__", "a.b", "a b", ""])
def test_recipes_have_names(name):
    with pytest.raises(ValueError, match="not the name of a recipe"):
        factory_call(name, {})


# --- held against nemo-run's own parser ---


@pytest.fixture(scope="module")
def parser():
    from nemo_run.cli import cli_parser

    return cli_parser


@pytest.fixture
def probe(monkeypatch):
    hits = []
    module = types.ModuleType("probe")
    module.hit = lambda *args, **kwargs: hits.append("hit") or 7
    module.Hit = type("Hit", (), {"__init__": lambda self, *args, **kwargs: hits.append("Hit")})
    monkeypatch.setitem(sys.modules, "probe", module)
    monkeypatch.setattr(sys.modules["__main__"], "main", module.hit, raising=False)
    return hits


@dataclass
class Part:
    count: int = 1
    text: Optional[str] = None  # noqa: UP045 (nemo-run knows this form alone)
    many: Optional[list[str]] = None  # noqa: UP045
    anything: Any = None


@dataclass
class Whole:
    trainer: Part


def parsed(parser, argument):
    import fiddle as fdl
    import nemo_run as run

    parser.parse_value.cache_clear()
    out = parser.parse_cli_args(run.Partial(Whole, trainer=run.Config(Part)), [argument])
    fdl.build(out.trainer)
    return out.trainer


@pytest.mark.nemo
@pytest.mark.parametrize(("field", "value"), RUNS)
def test_nemo_run_does_run_it(parser, probe, field, value):
    """The reason for each refusal: otherwise the table would keep people from what is harmless."""
    parsed(parser, f"trainer.{field}={value}")
    assert probe


@pytest.mark.nemo
@pytest.mark.parametrize(
    "key",
    [
        "trainer..count",
        "[trainer].count",
        "trainer[].count",
        "trainer.count ",
        "trainer.count\t",
        "trainer.count +",
    ],
)
def test_nemo_run_does_take_such_a_key(parser, key):
    assert parsed(parser, f"{key}=3").count in (3, 4)


@pytest.mark.nemo
def test_what_passes_runs_nothing(parser, probe):
    for argument in PLAIN:
        value = read_override(argument).value
        for field in ("count", "text", "many", "anything"):
            try:
                parsed(parser, f"trainer.{field}={value}")
            except Exception:
                continue  # of another type
            finally:
                assert not probe, argument


TEXT = st.text(st.sampled_from("ab/ '\"=()[]{}.:;$`#%&!?é\t-_ConfigPartial<>@"), max_size=14)


@pytest.mark.nemo
@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT)
def test_arguments_come_back_as_they_were(parser, base, folder):
    """What factory_call lets pass is what the recipe gets."""
    got = {}

    def kvcat_probe(base: Optional[str] = None, dir: str = "", untyped=None):  # noqa: UP045
        got.update(base=base, dir=dir, untyped=untyped)

    try:
        call = factory_call("kvcat_probe", {"base": base, "dir": folder, "untyped": base})
    except ValueError:
        return
    sys.modules["__main__"].kvcat_probe = kvcat_probe
    try:
        parser.parse_factory(Whole, "", Whole, call)
    finally:
        del sys.modules["__main__"].kvcat_probe
    assert got == {"base": base, "dir": folder, "untyped": base}, call


@pytest.mark.nemo
@settings(max_examples=150, deadline=None)
@given(
    st.text(st.sampled_from("probe.hit()[],'\" <>=CfgxP"), max_size=18)
    | st.sampled_from([v for _, v in RUNS]),
    st.sampled_from(["", '"', "'", "[", "<", " "]),
)
def test_nothing_that_passes_runs_code(parser, text, around):
    """Any text near to what runs code."""
    hits = []
    module = types.ModuleType("probe")
    module.hit = lambda *args, **kwargs: hits.append("hit")
    module.Hit = type("Hit", (), {"__init__": lambda self, *args, **kwargs: hits.append("Hit")})
    before, sys.modules["probe"] = sys.modules.get("probe"), module
    try:
        for field in ("text", "many", "anything"):
            argument = f"trainer.{field}={around}{text}{around.replace('[', ']').replace('<', '>')}"
            try:
                read_override(argument)
            except ValueError:
                continue
            try:
                parsed(parser, argument)
            except Exception:
                continue
            finally:
                assert not hits, argument
    finally:
        del sys.modules["probe"]
        if before:
            sys.modules["probe"] = before
