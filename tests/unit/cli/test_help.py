"""Every command explains itself: help with defaults for each argument and option, JSON wherever facts are printed."""

import pytest
import typer

from ropeway.cli.main import app

# They run other programs, whose output is not theirs: `run` and `stage` print DVC's and the stages' lines.
WITHOUT_JSON = {"params schema", "run", "stage", "server", "serve"}


def list_commands(command, path=()):
    for name, child in command.commands.items():
        if hasattr(child, "commands"):
            yield from list_commands(child, (*path, name))
        elif not child.hidden:
            yield " ".join((*path, name)), child


COMMANDS = dict(list_commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_prints_facts_has_json(name):
    options = {word for parameter in COMMANDS[name].params for word in parameter.opts}
    assert ("--json" in options) == (name not in WITHOUT_JSON)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_and_option_is_explained_with_its_default(name):
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert parameter.help, parameter.name
        if parameter.default is None and not parameter.required and parameter.name != "help":
            assert any(word in parameter.help for word in ("Default:", "with --", "With --", "Without")), parameter.name
