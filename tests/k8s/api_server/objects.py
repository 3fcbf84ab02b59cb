"""Create, read, change, delete: what the server does with a request once it is understood."""

from __future__ import annotations

import copy
import uuid
from dataclasses import dataclass
from typing import Any

from tests.k8s.api_server import fields, managed, patches
from tests.k8s.api_server.admission import Admission
from tests.k8s.api_server.crds import CustomResource
from tests.k8s.api_server.errors import (
    Json,
    already_exists,
    bad_request,
    invalid,
    modified,
    not_found,
    untyped,
)
from tests.k8s.api_server.managed import Owner
from tests.k8s.api_server.resources import (
    BUILTIN,
    CUSTOM_RESOURCE_DEFINITION,
    NAMESPACE,
    ResourceType,
)
from tests.k8s.api_server.schemas import builtin_schema
from tests.k8s.api_server.store import Key, Store, key_of

SERVER_METADATA = ("uid", "creationTimestamp", "generation", "deletionTimestamp")


@dataclass(frozen=True)
class Write:
    """How a change is made, from its query and headers."""

    manager: str
    is_dry_run: bool = False
    is_forced: bool = False
    subresource: str = ""


class Objects:
    """All kinds and their objects. Call under `store.lock`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._custom: dict[tuple[str, str], CustomResource] = {}
        self._admission = Admission(store, self._custom)
        with store.lock:
            for name in ("default", "kube-system"):
                self.create(NAMESPACE, None, _namespace(name), Write("kube-apiserver"))

    @property
    def types(self) -> list[ResourceType]:
        return [*BUILTIN, *(custom.type for custom in self._custom.values())]

    def get(self, resource: ResourceType, namespace: str | None, name: str) -> Json:
        """Raises ApiError 404."""
        obj = self._store.get(key_of(resource, namespace, name))
        if obj is None:
            raise not_found(resource.full_name, name)
        return obj

    def create(
        self, resource: ResourceType, namespace: str | None, body: Json, write: Write
    ) -> Json:
        obj = self._new(resource, namespace, body)
        key = key_of(resource, namespace, obj["metadata"]["name"])
        if self._store.get(key):
            raise already_exists(resource.full_name, key.name)
        if resource == CUSTOM_RESOURCE_DEFINITION:  # a megabyte each, taken as it is
            return self._store.put(key, self._establish(obj))
        owner = Owner(write.manager, "Update")
        owners = managed.updated(None, obj, self._schema(resource), owner)
        obj = managed.with_owners(obj, owners, None)
        return self._save(resource, key, obj, None, write, is_apply=False)

    def replace(
        self, resource: ResourceType, namespace: str | None, name: str, body: Json, write: Write
    ) -> Json:
        old = self.get(resource, namespace, name)
        if body["metadata"].get("resourceVersion") not in (None, *_version(old)):
            raise modified(resource.full_name, name)
        return self._change(resource, old, body, write)

    def patch(
        self,
        resource: ResourceType,
        namespace: str | None,
        name: str,
        patch: Any,
        content_type: str,
        write: Write,
    ) -> Json:
        if content_type == patches.APPLY:
            return self._apply(resource, namespace, name, patch, write)
        old = self.get(resource, namespace, name)
        is_custom = self._is_custom(resource)
        schema = self._schema(resource)
        new = patches.patched(old, patch, content_type, schema, is_custom)
        if new["metadata"].get("resourceVersion") not in (None, *_version(old)):
            raise modified(resource.full_name, name)
        return self._change(resource, old, new, write)

    def delete(self, resource: ResourceType, namespace: str | None, name: str, dry: bool) -> Json:
        obj = self.get(resource, namespace, name)
        if dry:
            return obj
        gone = self._store.delete(key_of(resource, namespace, name))
        if resource == CUSTOM_RESOURCE_DEFINITION:
            self._custom.pop((obj["spec"]["group"], obj["spec"]["names"]["plural"]), None)
        return gone

    def _apply(
        self, resource: ResourceType, namespace: str | None, name: str, intent: Json, write: Write
    ) -> Json:
        if intent.get("metadata", {}).get("managedFields"):
            raise bad_request("metadata.managedFields must be nil")
        intent = {k: v for k, v in intent.items() if k != "status" or write.subresource}
        old = self._store.get(key_of(resource, namespace, name))
        intent = {**intent, "metadata": {**intent.get("metadata", {}), "name": name}}
        self._check_identity(resource, intent)
        live = old or self._new(resource, namespace, {**intent, "metadata": {"name": name}})
        for path in fields.duplicates(intent, self._schema(resource)):
            raise untyped(f"{fields.readable(path)}: duplicate entries for key")
        owner = Owner(write.manager, "Apply", write.subresource)
        new, owners = managed.applied(live, intent, self._schema(resource), owner, write.is_forced)
        new = managed.with_owners(new, owners, old)
        return self._save(
            resource, key_of(resource, namespace, name), new, old, write, is_apply=True
        )

    def _change(self, resource: ResourceType, old: Json, new: Json, write: Write) -> Json:
        """`old` becomes `new`, but for what this kind of write leaves alone."""
        kept = {k: old["metadata"][k] for k in SERVER_METADATA if k in old["metadata"]}
        new = {**new, "metadata": {**new["metadata"], **kept}}
        if write.subresource == "status":
            new = _with_status(old, new.get("status"))
        elif self._has_status(resource):
            new = _with_status(new, old.get("status"))
        self._check_identity(resource, new)
        owner = Owner(write.manager, "Update", write.subresource)
        owners = managed.updated(old, new, self._schema(resource), owner)
        new = managed.with_owners(new, owners, old)
        name = old["metadata"]["name"]
        key = key_of(resource, old["metadata"].get("namespace"), name)
        return self._save(resource, key, new, old, write, is_apply=False)

    def _new(self, resource: ResourceType, namespace: str | None, body: Json) -> Json:
        self._check_identity(resource, body)
        metadata = copy.deepcopy(body.get("metadata", {}))
        if not metadata.get("name"):
            if not metadata.get("generateName"):
                cause = ("metadata.name", "Required value: name or generateName is required")
                raise invalid(resource.kind, "", [cause])
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        if resource.namespaced:
            metadata["namespace"] = namespace
        metadata["generation"] = 1
        obj = {k: copy.deepcopy(v) for k, v in body.items() if k != "metadata"}
        if self._has_status(resource):
            obj.pop("status", None)
        return {**obj, "metadata": metadata}

    def _check_identity(self, resource: ResourceType, obj: Json) -> None:
        given = (obj.get("apiVersion"), obj.get("kind"))
        if given != (resource.api_version, resource.kind):
            wanted = f"{resource.api_version}, Kind={resource.kind}"
            raise bad_request(f"the object provided is {given[0]}, Kind={given[1]}, not {wanted}")

    def _save(
        self,
        resource: ResourceType,
        key: Key,
        obj: Json,
        old: Json | None,
        write: Write,
        is_apply: bool,
    ) -> Json:
        custom = self._custom.get((resource.group, resource.plural))
        if custom:
            obj = custom.with_defaults(obj)
        if old is not None and obj.get("spec") != old.get("spec"):
            generation = old["metadata"]["generation"] + 1
            obj = {**obj, "metadata": {**obj["metadata"], "generation": generation}}
        self._admission.check(resource, obj, old, is_apply)
        if write.is_dry_run or obj == old:
            return obj
        stored = self._store.put(key, obj)
        if stored["metadata"].get("deletionTimestamp") and not stored["metadata"].get("finalizers"):
            return self._store.delete(key)
        return stored

    def _establish(self, definition: Json) -> Json:
        custom = CustomResource(definition)
        self._custom[(custom.type.group, custom.type.plural)] = custom
        established = [{"type": "Established", "status": "True", "reason": "InitialNamesAccepted"}]
        return {**definition, "status": {"conditions": established}}

    def _schema(self, resource: ResourceType) -> Json:
        custom = self._custom.get((resource.group, resource.plural))
        return custom.schema if custom else builtin_schema(resource)

    def _is_custom(self, resource: ResourceType) -> bool:
        return (resource.group, resource.plural) in self._custom

    def _has_status(self, resource: ResourceType) -> bool:
        """Whether status is written only through its own subresource."""
        custom = self._custom.get((resource.group, resource.plural))
        if custom:
            return custom.has_status
        return "status" in builtin_schema(resource).get("properties", {})


def _namespace(name: str) -> Json:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def _version(obj: Json) -> tuple[str]:
    return (obj["metadata"]["resourceVersion"],)


def _with_status(obj: Json, status: Json | None) -> Json:
    rest = {k: v for k, v in obj.items() if k != "status"}
    return {**rest, **({"status": status} if status is not None else {})}
