"""Kubeconfig files for the users of a test server."""

from __future__ import annotations

import json
from pathlib import Path

from tests.k8s.api_server.access import USERS, token_of


def write_kubeconfig(folder: Path, url: str, user: str, authority: Path | None = None) -> Path:
    """The file of `admin`, `operator` or `deployer`, in JSON, which is YAML.

    authority: certificates to check the server's with.
    """
    if user not in USERS:
        raise ValueError(f"no user {user!r}; there are {', '.join(USERS)}")
    cluster = {"server": url}
    if authority:
        cluster["certificate-authority"] = str(authority)
    context = {"cluster": "test", "user": user, "namespace": "default"}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": context}],
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": user, "user": {"token": token_of(user)}}],
    }
    path = folder / f"{user}.kubeconfig"
    path.write_text(json.dumps(content))
    return path
