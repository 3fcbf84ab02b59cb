"""What the API server checks of a pod that its schema cannot say."""

from __future__ import annotations

from collections.abc import Iterator

from tests.k8s.api_server.errors import Json

Cause = tuple[str, str]
TOLERATION_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
LONGEST_PORT_NAME = 15


def pod_errors(spec: Json) -> Iterator[Cause]:
    """Paths and texts."""
    volumes = {volume["name"] for volume in spec.get("volumes") or ()}
    for kind in ("containers", "initContainers"):
        for index, container in enumerate(spec.get(kind) or ()):
            path = f"spec.{kind}[{index}]"
            yield from _mount_errors(container, volumes, path)
            yield from _port_errors(container, path)
            yield from _resource_errors(container, path)
    yield from _duplicates(spec.get("volumes") or (), "spec.volumes")
    for index, toleration in enumerate(spec.get("tolerations") or ()):
        effect = toleration.get("effect") or TOLERATION_EFFECTS[0]
        if effect not in TOLERATION_EFFECTS:
            yield f"spec.tolerations[{index}].effect", f'Unsupported value: "{effect}"'


def _mount_errors(container: Json, volumes: set[str], path: str) -> Iterator[Cause]:
    for index, mount in enumerate(container.get("volumeMounts") or ()):
        if mount["name"] not in volumes:
            yield f"{path}.volumeMounts[{index}].name", f'Not found: "{mount["name"]}"'


def _port_errors(container: Json, path: str) -> Iterator[Cause]:
    for index, port in enumerate(container.get("ports") or ()):
        name = port.get("name") or ""
        if len(name) > LONGEST_PORT_NAME:
            text = f'Invalid value: "{name}": must be no more than {LONGEST_PORT_NAME} characters'
            yield f"{path}.ports[{index}].name", text
    named = [port for port in container.get("ports") or () if port.get("name")]
    yield from _duplicates(named, f"{path}.ports")


def _resource_errors(container: Json, path: str) -> Iterator[Cause]:
    """Extended resources, such as GPUs, are not overcommitted: request and limit are one."""
    resources = container.get("resources") or {}
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for name, amount in requests.items():
        if "/" not in name:
            continue
        if name not in limits:
            yield f"{path}.resources.limits", f"Required value: Limit must be set for {name}"
        elif str(limits[name]) != str(amount):
            text = f'Invalid value: "{amount}": must be equal to {name} limit of {limits[name]}'
            yield f"{path}.resources.requests", text


def _duplicates(items: list[Json] | tuple[Json, ...], path: str) -> Iterator[Cause]:
    names = [item["name"] for item in items]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield f"{path}[{index}].name", f'Duplicate value: "{name}"'
