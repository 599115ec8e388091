"""Every setting of every protocol: one declaration, from which the command line, sweeps and checks follow."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import click
import pytest

from kvcat_nemo.cli import main
from kvcat_nemo.evaluate.options import default_of, fit, kinds_of, options_of
from kvcat_nemo.evaluate.registry import PROTOCOLS, protocol_class

SETTINGS = [(name, field) for name, (kind, _) in PROTOCOLS.items() for field in options_of(kind)]


def command(name):
    group = main.get_command(click.Context(main), "evaluate")
    return group.get_command(click.Context(group), name)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_help_needs_no_torch(name):
    code = "import sys; from kvcat_nemo.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, "evaluate", name, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and f"kvcat evaluate {name}" in done.stdout, done.stderr


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_command_line_without_options_is_the_settings_defaults(name):
    """The same defaults for a command line and a sweep's entry that says nothing."""
    given = command(name).make_context(name, ["m", "--out", "o"]).params
    dry_run = given.pop("dry_run")
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v is not None}
    made = protocol_class(name).of(settings)
    assert made == protocol_class(name).of({"models": ["m"], "out": "o"}) and dry_run is False


@pytest.mark.parametrize("name, field", SETTINGS)
def test_every_setting_has_help_and_a_fitting_default(name, field):
    declared, kind, about = options_of(PROTOCOLS[name][0])[field]
    assert about.help.endswith(".") and len(about.help) < 300
    default = default_of(declared)
    if default is not dataclasses.MISSING:
        assert fit(field, default, kind) == default
        made = protocol_class(name).of({"models": ["m"], "out": "o", field: default})
        made.check_options()
    options = {p.name for p in command(name).params}
    assert (field in options) == about.on_command_line


def beyond(kind, about):
    """Values that a setting's range or choices exclude."""
    if about.choices:
        yield "nonsense", "choose among"
    if about.each:
        yield [about.choices[0]] * 2, f"give each {about.each} once"
        yield [], f"give each {about.each} once"
    if about.number:
        yield "x", "must be numbers"
        yield [str(about.least), str(about.least)], "give different numbers"
        yield str(about.least - 1), "give different numbers, each at least"
        if about.most is not None:
            yield str(about.most + 1), "each must be from"
    elif list[str] not in kinds_of(kind):
        if about.least is not None:
            yield about.least - 1, f"give at least {about.least:g}"
        if about.above is not None:
            yield type(about.above)(about.above), "give a number above"
        if about.most is not None:
            yield about.most + 1, f"give at most {about.most:g}"


RANGES = [
    (name, field, value, message)
    for name, field in SETTINGS
    for value, message in beyond(*options_of(PROTOCOLS[name][0])[field][1:])
]


@pytest.mark.parametrize("name, field, value, message", RANGES)
def test_what_a_range_excludes_is_refused_with_field_value_and_what_to_give(name, field, value, message):
    kind = options_of(PROTOCOLS[name][0])[field][1]
    value = float(value) if kinds_of(kind) == (float,) and not isinstance(value, list) else value
    made = protocol_class(name).of({"models": ["m"], "out": "o", field: value})
    with pytest.raises(ValueError, match=f"^{field}(=|: )") as error:
        made.check()
    assert message in str(error.value)


def test_ranges_are_there():
    assert len(RANGES) > 40
