"""Who may do what: tokens and RBAC."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.k8s.api_server.errors import ApiError, Json
from tests.k8s.api_server.resources import (
    ACCESS_REVIEW,
    CLUSTER_ROLE,
    CLUSTER_ROLE_BINDING,
    ROLE,
    ROLE_BINDING,
    ResourceType,
)
from tests.k8s.api_server.store import Store, key_of

USERS = ("admin", "operator", "deployer")
ALMIGHTY = ("admin", "operator")
"""Users in group system:masters; `deployer` may only what roles allow."""


def token_of(user: str) -> str:
    return f"{user}-token"


@dataclass(frozen=True)
class Action:
    verb: str
    resource: ResourceType
    subresource: str = ""
    namespace: str | None = None
    name: str = ""

    @property
    def target(self) -> str:
        suffix = f"/{self.subresource}" if self.subresource else ""
        return self.resource.plural + suffix


class Access:
    """Answers from the roles and bindings in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def user(self, authorization: str | None) -> str:
        """Raises ApiError 401 for a token that is unknown."""
        for user in USERS:
            if authorization == f"Bearer {token_of(user)}":
                return user
        raise ApiError(401, "Unauthorized", "Unauthorized")

    def require(self, user: str, action: Action) -> None:
        """Raises ApiError 403."""
        if self.allows(user, action):
            return
        resource = action.resource
        where = f'in the namespace "{action.namespace}"' if action.namespace else ""
        name = f' "{action.name}"' if action.name else ""
        target = f"{action.target}.{resource.group}" if resource.group else action.target
        message = (
            f'{target}{name} is forbidden: User "{user}" cannot {action.verb} resource '
            f'"{action.target}" in API group "{resource.group}" '
            f"{where or 'at the cluster scope'}"
        )
        raise ApiError(403, "Forbidden", message, name=action.name, kind=action.target)

    def allows(self, user: str, action: Action) -> bool:
        if user in ALMIGHTY or action.resource == ACCESS_REVIEW:
            return True
        return any(_permits(rule, action) for rule in self._rules(user, action.namespace))

    def _rules(self, user: str, namespace: str | None) -> Iterator[Json]:
        bindings = self._store.select(CLUSTER_ROLE_BINDING, None, _any)
        if namespace:
            bindings = bindings + self._store.select(ROLE_BINDING, namespace, _any)
        for binding in bindings:
            if any(s["kind"] == "User" and s["name"] == user for s in binding.get("subjects", ())):
                kind = ROLE if binding["roleRef"]["kind"] == "Role" else CLUSTER_ROLE
                role = self._store.get(key_of(kind, namespace, binding["roleRef"]["name"]))
                yield from (role or {}).get("rules") or ()


def _any(_: Any) -> bool:
    return True


def _permits(rule: Json, action: Action) -> bool:
    names = rule.get("resourceNames")
    return (
        _lists(rule.get("apiGroups"), action.resource.group)
        and _lists(rule.get("resources"), action.target)
        and _lists(rule.get("verbs"), action.verb)
        and (not names or action.name in names)
    )


def _lists(allowed: list[str] | None, wanted: str) -> bool:
    return "*" in (allowed or ()) or wanted in (allowed or ())
