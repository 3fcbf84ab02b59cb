"""Which Secrets a deployment needs. Their values are random, made where they are missing, and never
part of the manifests."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest
from cluster.deploy.manifests import names


@dataclass(frozen=True)
class SecretSpec:
    """A Secret with one key."""

    name: str
    namespace: str
    key: str
    purpose: str
    labels: dict[str, str]
    new_value: Callable[[], str]
    """Another random value at each call."""

    def manifest(self, value: str) -> Manifest:
        """The object that holds `value`."""
        metadata = {"name": self.name, "namespace": self.namespace, "labels": self.labels}
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": metadata,
            "type": "Opaque",
            "stringData": {self.key: value},
        }


def missing_secrets(config: DeployConfig) -> list[SecretSpec]:
    """Those that the manifests name and do not contain."""

    def spec(name: str, key: str, purpose: str, new_value: Callable[[], str]) -> SecretSpec:
        return SecretSpec(name, config.namespace, key, purpose, names.labels(config), new_value)

    needed = [
        spec(
            names.cluster_secret(config),
            names.CLUSTER_SECRET_KEY,
            "members prove it to each other",
            lambda: secrets.token_hex(32),
        ),
        spec(
            names.token_secret(config),
            names.TOKEN_KEY,
            "token of Ray: whoever has it can run code in the pods",
            lambda: secrets.token_hex(32),
        ),
    ]
    if config.auth.api_keys:
        purpose = "API keys of clients, lines `name scopes key`"
        needed.append(
            spec(names.api_keys_secret(config), names.API_KEYS_KEY, purpose, _first_api_key)
        )
    if config.gcs_redis.enabled:
        purpose = "password of the Redis that keeps the head's state"
        needed.append(
            spec(names.redis(config), names.REDIS_KEY, purpose, lambda: secrets.token_hex(32))
        )
    return needed


def _first_api_key() -> str:
    """One line of the file: a key for everything, for who deploys."""
    return f"first admin shoal_{secrets.token_urlsafe(32)}\n"
