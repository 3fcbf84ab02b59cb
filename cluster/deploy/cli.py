"""`shoal k8s`: from deploy.yaml to a running RayService. A command's module is imported when it is
asked for: `shoal --help` and `shoal serve` do not pay for them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

MODULES = {
    "render": "manifest_cli",
    "check": "manifest_cli",
    "diff": "apply_cli",
    "apply": "apply_cli",
    "status": "apply_cli",
    "scale": "operate_cli",
    "logs": "operate_cli",
    "forward": "operate_cli",
    "down": "operate_cli",
}
"""By command, in the order of the help; the function is called like the command."""


class Commands(TyperGroup):
    """Imports commands by name. Any: typer has a click of its own, whose types are private."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in MODULES:
            return None
        module = import_module(f"cluster.deploy.{MODULES[cmd_name]}")
        single = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
        single.command(cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(single)


k8s_app = typer.Typer(
    cls=Commands,
    help="Deploy to Kubernetes and look after it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@k8s_app.callback()
def _group() -> None:
    """Typer needs one where no command is registered."""
