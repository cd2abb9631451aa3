"""All commands, each in the file of what it is about."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from sandbox_tools.cli import inside, machine, reports, sandboxes, snapshots, templates


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="sandbox-tools")
def app() -> None:
    """Computers for AI agents that wait."""


@app.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands: add `eval "$(sandbox-tools completion bash)"` to ~/.bashrc."""
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(app, {}, "sandbox-tools", "_SANDBOX_TOOLS_COMPLETE").source())


for command in (
    *(machine.serve, machine.mcp, machine.setup, machine.doctor, machine.key),
    *(sandboxes.ps, sandboxes.pause, sandboxes.resume, sandboxes.rm, sandboxes.logs, sandboxes.prune),
    *(inside.run, inside.shell, inside.cp),
    *(snapshots.snapshot, snapshots.fork, templates.template),
    reports.savings,
):
    app.add_command(command)
