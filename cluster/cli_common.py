"""What every `shoal` command shares: options, and errors as one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from cluster.config import API_KEY_VARIABLE, ConfigError, StartFailed
from cluster.console import stderr
from cluster.http_client import ApiError
from experts.errors import CheckpointError

DEFAULT_URL = "http://127.0.0.1:8000"

UrlOption = Annotated[str, typer.Option(envvar="SHOAL_URL", help="Where the server listens.")]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar=API_KEY_VARIABLE,
        help="Key for the server; others on this machine can see arguments, but not the variable.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """Our own errors become one line and an exit code, never a traceback."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        stderr.print(f"shoal: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except (ApiError, StartFailed) as error:
        stderr.print(f"shoal: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(3) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
