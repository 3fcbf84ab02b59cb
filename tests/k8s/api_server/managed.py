"""Field managers: what each write makes its own, and server-side apply."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

from tests.k8s.api_server import fields
from tests.k8s.api_server.errors import ApiError, Json
from tests.k8s.api_server.fields import Path
from tests.k8s.api_server.store import timestamp

SYSTEM_METADATA = (
    "name",
    "namespace",
    "generateName",
    "managedFields",
    "resourceVersion",
    "uid",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
)
"""Fields of metadata that nobody owns."""


class Owner(NamedTuple):
    manager: str
    operation: str
    """`Apply` or `Update`."""
    subresource: str = ""


Owners = dict[Owner, set[Path]]
Conflict = tuple[Owner, Path]


def ownable(obj: Json) -> Json:
    """`obj` without what nobody owns."""
    rest = {k: v for k, v in obj.items() if k not in ("apiVersion", "kind", "metadata")}
    metadata = {k: v for k, v in obj["metadata"].items() if k not in SYSTEM_METADATA}
    return {**rest, **({"metadata": metadata} if metadata else {})}


def owners_of(obj: Json) -> Owners:
    return {
        Owner(m["manager"], m["operation"], m.get("subresource", "")): fields.from_fields_v1(
            m["fieldsV1"]
        )
        for m in obj["metadata"].get("managedFields") or []
    }


def with_owners(obj: Json, owners: Owners, old: Json | None) -> Json:
    """`obj` with `owners` as its managedFields; entries that did not change keep their time."""
    before = {
        (m["manager"], m["operation"], m.get("subresource", "")): m
        for m in ((old or {}).get("metadata", {}).get("managedFields") or [])
    }
    entries = []
    for owner, paths in owners.items():
        entry = {
            "manager": owner.manager,
            "operation": owner.operation,
            "apiVersion": obj["apiVersion"],
            "time": timestamp(),
            "fieldsType": "FieldsV1",
            "fieldsV1": fields.to_fields_v1(paths),
            **({"subresource": owner.subresource} if owner.subresource else {}),
        }
        known = before.get((owner.manager, owner.operation, owner.subresource))
        entries.append(known if known and known["fieldsV1"] == entry["fieldsV1"] else entry)
    return {**obj, "metadata": {**obj["metadata"], "managedFields": entries}}


def updated(old: Json | None, new: Json, schema: Json, owner: Owner) -> Owners:
    """The owners after a write that is no apply: what it changed is now `owner`'s."""
    owners = owners_of(old) if old else {}
    before = ownable(old) if old else {}
    after = ownable(new)
    present = fields.field_set(after, schema)
    changed = {p for p in present if fields.read(before, p) != fields.read(after, p)}
    for other in owners:
        owners[other] = {
            p for p in owners[other] - changed if fields.read(after, p) is not None or p in present
        }
    owners[owner] = owners.get(owner, set()) | changed
    return {o: paths for o, paths in owners.items() if paths}


def applied(
    live: Json, intent: Json, schema: Json, owner: Owner, force: bool
) -> tuple[Json, Owners]:
    """The object and its owners after `owner` applied `intent`.

    Raises:
        ApiError: 409, another manager owns a field at another value, unless `force`.
    """
    owners = owners_of(live)
    wanted = fields.field_set(ownable(intent), schema)
    conflicts = _conflicts(live, intent, owners, wanted, owner)
    if conflicts and not force:
        raise _conflict_error(conflicts, intent["apiVersion"])
    for other, path in conflicts:
        owners[other].discard(path)
    merged = fields.merge(live, intent, schema)
    others = set().union(*(paths for other, paths in owners.items() if other != owner))
    merged = _without(merged, owners.get(owner, set()) - wanted - others, others)
    owners[owner] = wanted
    return merged, {o: paths for o, paths in owners.items() if paths}


def _conflicts(
    live: Json, intent: Json, owners: Owners, wanted: set[Path], owner: Owner
) -> list[Conflict]:
    return [
        (other, path)
        for other, paths in owners.items()
        if other != owner
        for path in sorted(wanted & paths)
        if not path[-1].startswith("k:") and fields.read(live, path) != fields.read(intent, path)
    ]


def _without(obj: Json, dropped: Iterable[Path], kept: set[Path]) -> Json:
    """`obj` less the `dropped` fields; a list's item stays while a field in it is `kept`."""
    obj = copy.deepcopy(obj)
    for path in sorted(dropped, key=len):  # an item before the keys that find it
        below = any(other[: len(path)] == path for other in kept)
        if not (path[-1].startswith("k:") and below):
            fields.remove(obj, path)
            _drop_empty_parents(obj, path[:-1], kept)
    return obj


def _drop_empty_parents(obj: Json, path: Path, kept: set[Path]) -> None:
    """Maps that an apply made and has emptied go too."""
    while len(path) > 1 and fields.read(obj, path) == {} and path not in kept:
        fields.remove(obj, path)
        path = path[:-1]


def _conflict_error(conflicts: list[Conflict], api_version: str) -> ApiError:
    causes = [
        {
            "reason": "FieldManagerConflict",
            "message": _conflict_with(owner, api_version),
            "field": fields.readable(path),
        }
        for owner, path in conflicts
    ]
    listed = "\n".join(f"- {cause['message']}: {cause['field']}" for cause in causes)
    if len(causes) == 1:
        text = f"Apply failed with 1 conflict: {listed[2:]}"
    else:
        text = f"Apply failed with {len(causes)} conflicts:\n{listed}"
    return ApiError(409, "Conflict", text, causes=causes)


def _conflict_with(owner: Owner, api_version: str) -> str:
    text = f'conflict with "{owner.manager}"'
    if owner.subresource:
        text += f' with subresource "{owner.subresource}"'
    return text + (f" using {api_version}" if owner.operation == "Update" else "")
