"""The pods and Services that KubeRay makes of a RayCluster, with what it adds to the templates."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from tests.k8s.api_server.errors import Json
from tests.k8s.kuberay_rules import has_autoscaler_v2, head_container, serve_ports

HEAD_GROUP = "headgroup"
SERVICE_LABEL = "ray.io/originated-from-cr-name"
AGENT_IS_WELL = (
    "wget --tries 1 -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success"
)
PROXY_IS_WELL = "wget --tries 1 -T 10 -q -O- http://localhost:8000/-/healthz | grep success"
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}


def owned_by(owner: Json) -> list[Json]:
    """`ownerReferences` of what goes when `owner` goes."""
    return [
        {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def num_workers(group: Json) -> int:
    """How many pods the operator wants in a worker group."""
    least, most = group.get("minReplicas") or 0, group.get("maxReplicas", 2**31 - 1)
    replicas = group.get("replicas")
    wanted = max(least, min(most, least if replicas is None else replicas))
    return int(wanted * (group.get("numOfHosts") or 1))


def pods(cluster: Json) -> Iterator[Json]:
    """All pods that the cluster should have, the head first; names tell them apart."""
    name, config = cluster["metadata"]["name"], cluster["spec"]
    yield _pod(cluster, f"{name}-head", HEAD_GROUP, _head_spec(config), config["headGroupSpec"])
    for group in config.get("workerGroupSpecs") or ():
        for index in range(num_workers(group)):
            pod_name = f"{name}-{group['groupName']}-worker-{index}"
            yield _pod(cluster, pod_name, group["groupName"], _worker_spec(config, group), group)


def _pod(cluster: Json, name: str, group_name: str, spec: Json, group: Json) -> Json:
    metadata = group["template"].get("metadata") or {}
    labels = {
        **(group.get("labels") or {}),
        **(metadata.get("labels") or {}),
        SERVICE_LABEL: cluster["metadata"]["labels"][SERVICE_LABEL],
        "ray.io/originated-from-crd": "RayService",
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": cluster["metadata"]["name"],
        "ray.io/node-type": "head" if group_name == HEAD_GROUP else "worker",
        "ray.io/group": group_name,
        "ray.io/serve": "false" if group_name == HEAD_GROUP else "true",
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": cluster["metadata"]["namespace"],
            "labels": labels,
            "annotations": metadata.get("annotations") or {},
            "ownerReferences": owned_by(cluster),
        },
        "spec": spec,
    }


def _head_spec(config: Json) -> Json:
    group = config["headGroupSpec"]
    spec = _ray_spec(config, group, "ray start --head --block")
    container = spec["containers"][0]
    probe = {"httpGet": {"path": "/api/healthz", "port": 52365}, "periodSeconds": 5}
    container.setdefault("readinessProbe", {**probe, "failureThreshold": 10})
    container.setdefault("livenessProbe", {**probe, "failureThreshold": 120})
    if config.get("enableInTreeAutoscaling"):
        spec["containers"].append(_autoscaler(config, container["image"]))
    return spec


def _worker_spec(config: Json, group: Json) -> Json:
    spec = _ray_spec(config, group, "ray start --block")
    container = spec["containers"][0]
    command = ["bash", "-c", f"{AGENT_IS_WELL} && {PROXY_IS_WELL}"]
    container.setdefault("readinessProbe", {"exec": {"command": command}, "failureThreshold": 1})
    agent = {"exec": {"command": ["bash", "-c", AGENT_IS_WELL]}}
    container.setdefault("livenessProbe", {**agent, "failureThreshold": 120})
    waits = {
        "name": "wait-gcs-ready",
        "image": container["image"],
        "command": ["/bin/bash", "-c", "--"],
        "args": ["until ray health-check; do sleep 5; done"],
        "env": container["env"],
        "volumeMounts": container["volumeMounts"],
        "securityContext": container.get("securityContext") or {},
    }
    spec.setdefault("initContainers", []).append(waits)
    return spec


def _ray_spec(config: Json, group: Json, command: str) -> Json:
    """The template's pod with what head and workers have in common."""
    spec: Json = copy.deepcopy(group["template"]["spec"])
    container = spec["containers"][0]
    parameters = " ".join(f"--{k}={v}" for k, v in (group.get("rayStartParams") or {}).items())
    container["command"] = ["/bin/bash", "-c", "--"]
    container["args"] = [f"ulimit -n 65536; {command} {parameters}".rstrip()]
    container["env"] = [*(container.get("env") or ()), *_environment(config)]
    _add_shared_memory(spec, container)
    if has_autoscaler_v2(config):
        spec["restartPolicy"] = "Never"
    return spec


def _environment(config: Json) -> Iterator[Json]:
    labels = "metadata.labels['ray.io/cluster']"
    yield {"name": "RAY_CLUSTER_NAME", "valueFrom": {"fieldRef": {"fieldPath": labels}}}
    options = config.get("authOptions") or {}
    if options.get("mode") == "token":
        secret = {"name": options.get("secretName", "ray-auth"), "key": "auth_token"}
        yield {"name": "RAY_AUTH_MODE", "value": "token"}
        yield {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": secret}}


def _add_shared_memory(spec: Json, container: Json) -> None:
    mounts = container.setdefault("volumeMounts", [])
    if not any(mount["mountPath"] == "/dev/shm" for mount in mounts):
        mounts.append({"name": "shared-mem", "mountPath": "/dev/shm"})
        volume = {"name": "shared-mem", "emptyDir": {"medium": "Memory"}}
        spec.setdefault("volumes", []).append(volume)


def _autoscaler(config: Json, image: str) -> Json:
    options = config.get("autoscalerOptions") or {}
    return {
        "name": "autoscaler",
        "image": options.get("image") or image,
        "command": ["/bin/bash", "-c", "--"],
        "args": ["ray kuberay-autoscaler"],
        "resources": options.get("resources") or {},
    }


def serve_service(service: Json, cluster: Json) -> Json:
    """`NAME-serve-svc`: the head's serve ports, each as the user's own Service describes it."""
    own = service["spec"].get("serveService") or {}
    described = {port["name"]: port for port in own.get("spec", {}).get("ports") or ()}
    ports = [
        {"name": port["name"], "port": port["containerPort"], **described.get(port["name"], {})}
        for port in serve_ports(cluster["spec"])
    ]
    default_name = f"{service['metadata']['name']}-serve-svc"
    name = own.get("metadata", {}).get("name") or default_name
    selector = {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/serve": "true"}
    return _service(service, name, ports, selector)


def head_service(service: Json, cluster: Json) -> Json:
    """`NAME-head-svc`: dashboard, GCS and what else the head listens on."""
    declared = head_container(cluster["spec"]).get("ports") or ()
    numbers = {port["name"]: port["containerPort"] for port in declared if "name" in port}
    numbers = {**HEAD_PORTS, **numbers}
    ports = [{"name": name, "port": number} for name, number in numbers.items()]
    by_number = {port["port"]: port for port in ports}
    selector = {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/node-type": "head"}
    name = f"{service['metadata']['name']}-head-svc"
    return _service(service, name, list(by_number.values()), selector)


def _service(owner: Json, name: str, ports: list[Json], selector: dict[str, str]) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": owner["metadata"]["namespace"],
            "ownerReferences": owned_by(owner),
        },
        "spec": {
            "selector": selector,
            "ports": [{"protocol": "TCP", **port} for port in ports],  # 1.20 has no default
        },
    }
