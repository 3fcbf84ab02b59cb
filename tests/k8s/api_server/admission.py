"""What an object must satisfy before it is stored."""

from __future__ import annotations

import re
from collections.abc import Iterable

import jsonschema

from tests.k8s.api_server.crds import CustomResource
from tests.k8s.api_server.errors import ApiError, Json, bad_request, invalid, not_found, untyped
from tests.k8s.api_server.pods import pod_errors
from tests.k8s.api_server.resources import NAMESPACE, POD, PRIORITY_CLASS, RBAC, ResourceType
from tests.k8s.api_server.schemas import UNKNOWN_FIELD, schema_errors
from tests.k8s.api_server.store import Store, key_of

SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
LABEL_NAME = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


class Admission:
    """Checks against schemas and against what else is stored."""

    def __init__(self, store: Store, custom: dict[tuple[str, str], CustomResource]) -> None:
        self._store = store
        self._custom = custom

    def check(self, resource: ResourceType, obj: Json, old: Json | None, is_apply: bool) -> None:
        """Raises ApiError: 400 or 500 for what the schema does not know, 404, 403, 422."""
        if old is None:
            self._check_namespace(resource, obj)
        self._check_schema(resource, obj, old, is_apply)
        causes = [*_metadata_errors(resource, obj["metadata"])]
        if resource == POD and old is None:
            causes += pod_errors(obj["spec"])
        if causes:
            raise invalid(resource.kind, obj["metadata"]["name"], causes)
        if resource == POD and old is None:
            self._check_priority(obj)

    def _check_namespace(self, resource: ResourceType, obj: Json) -> None:
        namespace = obj["metadata"].get("namespace")
        if not resource.namespaced:
            return
        if self._store.get(key_of(NAMESPACE, None, namespace or "")) is None:
            raise not_found("namespaces", namespace or "")

    def _check_schema(
        self, resource: ResourceType, obj: Json, old: Json | None, is_apply: bool
    ) -> None:
        custom = self._custom.get((resource.group, resource.plural))
        errors = list(custom.errors(obj) if custom else schema_errors(resource, obj))
        unknown = [e for e in errors if e.validator == UNKNOWN_FIELD]
        if unknown:
            raise _unknown_field(unknown[0], is_apply)
        causes = [(e.json_path.removeprefix("$."), e.message[:300]) for e in errors]
        causes += custom.rule_errors(obj, old) if custom else []
        if causes:
            raise invalid(resource.kind, obj["metadata"]["name"], causes)

    def _check_priority(self, pod: Json) -> None:
        name = pod["spec"].get("priorityClassName")
        if not name or name.startswith("system-"):
            return
        if self._store.get(key_of(PRIORITY_CLASS, None, name)) is None:
            forbidden = f'pods "{pod["metadata"]["name"]}" is forbidden'
            text = f"{forbidden}: no PriorityClass with name {name} was found"
            raise ApiError(403, "Forbidden", text)


def _unknown_field(error: jsonschema.ValidationError, is_apply: bool) -> ApiError:
    known = error.schema.get("properties", {})
    name = next(iter(sorted(set(error.instance) - set(known))))
    path = f"{error.json_path.removeprefix('$')}.{name}"
    if is_apply:
        return untyped(f"{path}: field not declared in schema")
    return bad_request(f'strict decoding error: unknown field "{path[1:]}"')


def _metadata_errors(resource: ResourceType, metadata: Json) -> Iterable[tuple[str, str]]:
    name = metadata["name"]
    if resource.group != RBAC and not (SUBDOMAIN.fullmatch(name) and len(name) <= 253):
        yield (
            "metadata.name",
            f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case '
            "alphanumeric characters, '-' or '.'",
        )
    for key, value in (metadata.get("labels") or {}).items():
        if not LABEL_NAME.fullmatch(key):
            yield "metadata.labels", f'Invalid value: "{key}": not a qualified name'
        if not LABEL_VALUE.fullmatch(value):
            yield "metadata.labels", f'Invalid value: "{value}": not a label value'
