"""`holloway admin`: every noun and verb of the API, and the account as one file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from cyclopts import App, Parameter

from admin import declaration
from admin.building import CONNECTION, build
from admin.calling import Common
from admin.description import description
from admin.failures import FAILED, Failure

TheCommon = Annotated[Common | None, Parameter(name="*", group=CONNECTION)]
File = Annotated[Path, Parameter(name=["--file", "-f"], allow_leading_hyphen=True)]

OTHERS = (
    "cluster",
    "demo",
    "down",
    "gateway",
    "netcheck",
    "portal",
    "relay",
    "sim",
    "status",
    "up",
)
"""The other subcommands of `holloway`: completed by name alone, since a machine need not have what
they are made of."""
WITHIN: dict[str, tuple[str, ...]] = {
    "cluster": ("drain", "restart", "start", "status"),
    "portal": ("reseal", "tree"),
    "sim": ("compare", "drill", "list", "replay", "run", "shrink"),
}
"""What is below some of them, by name too."""

app = App(name="admin", help="Look after an account, or an installation, by the JSON API.")


def ended(failure: Failure) -> NoReturn:
    """One sentence on the standard error, and the status of the failure's kind."""
    sys.stderr.write(f"holloway admin: {failure}\n")
    sys.exit(failure.status)


@app.command
def export(
    *,
    file: Annotated[Path | None, Parameter(name=["--file", "-f"])] = None,
    common: TheCommon = None,
) -> None:
    """Write the whole account as one file (TOML; or JSON, YAML by -o). Secrets stay where they are.

    Parameters
    ----------
    file
        Where to; by default the standard output.
    """
    try:
        declaration.export(common or Common(), file)
    except Failure as failure:
        ended(failure)


@app.command
def diff(
    *,
    file: File,
    exit_code: Annotated[bool, Parameter(negative=())] = False,
    common: TheCommon = None,
) -> None:
    """Show what has to change for the account to be as a file says, and who gains and loses what.

    Parameters
    ----------
    file
        The declaration (TOML, or JSON by its name); - for the standard input.
    exit_code
        End with status 1 if there is a difference.
    """
    try:
        planned = declaration.plan(common or Common(), file)
    except Failure as failure:
        ended(failure)
    if exit_code and planned["steps"]:
        sys.exit(FAILED)


@app.command
def apply(
    *,
    file: File,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    yes: Annotated[bool, Parameter(name=["--yes", "-y"], negative=())] = False,
    common: TheCommon = None,
) -> None:
    """Make the account as a file says, in one transaction, or not at all.

    Parameters
    ----------
    file
        The declaration (TOML, or JSON by its name); - for the standard input.
    dry_run
        Show the plan, and do nothing.
    yes
        Do not ask.
    """
    try:
        declaration.apply(common or Common(), file, is_dry=dry_run, confirm=not yes)
    except Failure as failure:
        ended(failure)


@app.command
def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print a completion of `holloway` for a shell: the names of all commands, and all of `admin`.

    For bash: holloway admin completion bash > ~/.local/share/bash-completion/completions/holloway

    Parameters
    ----------
    shell
        Which shell.
    """
    whole = App(name="holloway")
    whole.command(app)
    for name in OTHERS:
        other = App(name=name)
        for inner in WITHIN.get(name, ()):
            other.command(App(name=inner))
        whole.command(other)
    sys.stdout.write(whole.generate_completion(prog_name="holloway", shell=shell))


build(app, description(), ended)
