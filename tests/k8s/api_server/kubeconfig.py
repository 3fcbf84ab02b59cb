"""Kubeconfig files for the users of a test server."""

from __future__ import annotations

import json
from pathlib import Path

from tests.k8s.api_server.access import token_of


def write_kubeconfig(folder: Path, url: str, user: str) -> Path:
    """The file; JSON is YAML. A server with TLS has a certificate of its own."""
    cluster = {"server": url}
    if url.startswith("https"):
        cluster["insecure-skip-tls-verify"] = True  # type: ignore[assignment]
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
