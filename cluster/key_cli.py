"""`shoal key`: API keys for clients of a server."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli_common import JsonOption, user_errors
from cluster.console import stderr, stdout
from cluster.frontend.api_keys import SCOPES, new_key

key_app = typer.Typer(help="Make API keys.", no_args_is_help=True)


@key_app.command()
def new(
    scopes: Annotated[
        str, typer.Option(help=f"What it is for: {', '.join(SCOPES)}, with commas between.")
    ] = "inference",
    name: Annotated[
        str | None, typer.Option(help="Who has it; without one, a random name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a new key (on standard error) and its line for the keys file (on standard output).

    The line holds only a hash: the key cannot be shown again.
    """
    with user_errors():
        text, key = new_key(scopes, name)
    if as_json:
        stdout.print_json(data={"key": text, "name": key.name, "line": key.line})
        return
    stderr.print(f"key, shown only now: {text}", markup=False, soft_wrap=True)
    stdout.print(key.line, markup=False, soft_wrap=True)
