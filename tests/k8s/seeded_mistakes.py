"""Mistakes that people make in manifests: how each gets into a good rendering, and what is said.

`says` and `fix` are parts of the finding's message and fix; `path` ends the place it names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml


class Objects:
    """A rendering to be spoilt, with names for its parts."""

    def __init__(self, manifests: list[dict[str, Any]]) -> None:
        self.all = copy.deepcopy(manifests)

    def one(self, kind: str, name: str | None = None) -> dict[str, Any]:
        found = [each for each in self.all if each["kind"] == kind]
        return next(each for each in found if name in (None, each["metadata"]["name"]))

    @property
    def service(self) -> dict[str, Any]:
        return self.one("RayService")

    @property
    def spec(self) -> dict[str, Any]:
        return self.service["spec"]

    @property
    def cluster(self) -> dict[str, Any]:
        return self.spec["rayClusterConfig"]

    @property
    def head(self) -> dict[str, Any]:
        return self.cluster["headGroupSpec"]

    def group(self, name: str = "experts") -> dict[str, Any]:
        return next(g for g in self.cluster["workerGroupSpecs"] if g["groupName"] == name)

    def pod(self, name: str = "experts") -> dict[str, Any]:
        return self.group(name)["template"]["spec"]

    def box(self, name: str = "experts") -> dict[str, Any]:
        return self.pod(name)["containers"][0]

    @property
    def head_box(self) -> dict[str, Any]:
        return self.head["template"]["spec"]["containers"][0]

    @contextmanager
    def serve(self) -> Iterator[dict[str, Any]]:
        """The Serve config, written back at the end."""
        config = yaml.safe_load(self.spec["serveConfigV2"])
        yield config
        self.spec["serveConfigV2"] = yaml.safe_dump(config)

    @contextmanager
    def args(self) -> Iterator[dict[str, Any]]:
        with self.serve() as config:
            yield config["applications"][0]["args"]


@dataclass(frozen=True)
class Mistake:
    """One change of a good rendering and what the check must say about it."""

    name: str
    change: Callable[[Objects], Any]
    path: str
    says: str
    fix: str


def _port(box: dict[str, Any], name: str) -> dict[str, Any]:
    return next(port for port in box["ports"] if port["name"] == name)


def _without(items: list[dict[str, Any]], name: str) -> None:
    items[:] = [item for item in items if item["name"] != name]


def _args(*keys: str, **values: Any) -> Callable[[Objects], None]:
    def change(objects: Objects) -> None:
        with objects.args() as args:
            for key in keys:
                args = args[key]
            args.update(values)

    return change


def _serve(**values: Any) -> Callable[[Objects], None]:
    def change(objects: Objects) -> None:
        with objects.serve() as config:
            config.update(values)

    return change


def _application(**values: Any) -> Callable[[Objects], None]:
    def change(objects: Objects) -> None:
        with objects.serve() as config:
            config["applications"][0].update(values)

    return change


def _policy_without_8000(objects: Objects) -> None:
    rule = objects.one("NetworkPolicy", "shoal-head")["spec"]["ingress"][0]
    rule["ports"] = [port for port in rule["ports"] if port["port"] != 8000]
    policy = objects.one("NetworkPolicy", "shoal")["spec"]
    policy["ingress"] = policy["ingress"][:1]


def _fallen_component(objects: Objects) -> None:
    objects.one("NetworkPolicy", "shoal")["metadata"]["namespace"] = "default"


SCHEMA = (
    Mistake(
        "typo in the cluster",
        lambda o: o.cluster.update(autoscalerOption=o.cluster.pop("autoscalerOptions")),
        "spec.rayClusterConfig.autoscalerOption",
        "no such field",
        "did you mean autoscalerOptions?",
    ),
    Mistake(
        "typo in a container",
        lambda o: o.box().update(imgae=o.box().pop("image")),
        "workerGroupSpecs[2].template.spec.containers[0].imgae",
        "no such field",
        "did you mean image?",
    ),
    Mistake(
        "text for an integer",
        lambda o: o.group().update(minReplicas="2"),
        "workerGroupSpecs[2].minReplicas",
        '"2" where an integer belongs',
        "without quotes: 2",
    ),
    Mistake(
        "start parameter without quotes",
        lambda o: o.head["rayStartParams"].update({"num-cpus": 0}),
        "headGroupSpec.rayStartParams.num-cpus",
        "0 where text belongs",
        'quote it: "0"',
    ),
    Mistake(
        "no such autoscaler",
        lambda o: o.cluster["autoscalerOptions"].update(version="v3"),
        "autoscalerOptions.version",
        '"v3" is not allowed',
        "'v1' or 'v2'",
    ),
    Mistake(
        "someone else's controller",
        lambda o: o.spec.update(managedBy="me"),
        "spec.managedBy",
        '"me" is not allowed',
        "ray.io/kuberay-operator",
    ),
    Mistake(
        "port number twice",
        lambda o: o.box()["ports"].append({"name": "x", "containerPort": 8000}),
        "workerGroupSpecs[2].template.spec.containers[0].ports",
        "two elements with containerPort 8000",
        "remove or rename one",
    ),
    Mistake(
        "group without a name",
        lambda o: o.group().pop("groupName"),
        "workerGroupSpecs[2]",
        "groupName is missing",
        "add groupName",
    ),
    Mistake(
        "volume twice",
        lambda o: o.pod()["volumes"].append({"name": "models", "emptyDir": {}}),
        "workerGroupSpecs[2].template.spec.volumes",
        "two elements with name models",
        "remove or rename one",
    ),
    Mistake(
        "no quantity",
        lambda o: o.box()["resources"]["limits"].update(memory="900Gx"),
        "resources.limits.memory",
        '"900Gx" is no quantity',
        "16Gi",
    ),
    Mistake(
        "fraction without quotes",
        lambda o: o.box()["resources"]["limits"].update(cpu=64.5),
        "workerGroupSpecs[2].template.spec.containers[0].resources.limits.cpu",
        "64.5 where text or an integer belongs",
        "quote it",
    ),
)
"""What the schema of KubeRay's CustomResourceDefinition refuses, too."""

OTHER_SCHEMA = (
    Mistake(
        "old API",
        lambda o: o.one("PodDisruptionBudget").update(apiVersion="policy/v1beta1"),
        "PodDisruptionBudget/shoal-attention kind",
        "no PodDisruptionBudget in apiVersion policy/v1beta1",
        "use apiVersion policy/v1",
    ),
    Mistake(
        "typo in a claim",
        lambda o: o.one("PersistentVolumeClaim")["spec"].update(accessMode=["ReadWriteMany"]),
        "spec.accessMode",
        "no such field",
        "remove it, accessModes is there",
    ),
)

OPERATOR = (
    Mistake(
        "long name",
        lambda o: o.service["metadata"].update(name="a" * 60),
        "metadata.name",
        "60 characters, KubeRay allows 47",
        "shorten",
    ),
    Mistake(
        "more at least than at most",
        lambda o: o.group().update(minReplicas=99),
        "workerGroupSpecs[2].minReplicas",
        "minReplicas 99 is more than maxReplicas 4",
        "lower it to 4",
    ),
    Mistake(
        "fields of autoscaler v2",
        lambda o: o.cluster["autoscalerOptions"].pop("version"),
        "workerGroupSpecs[0].idleTimeoutSeconds",
        "needs autoscaler v2",
        "version: v2",
    ),
    Mistake(
        "resources said twice",
        lambda o: (
            o.group().update(resources={"GPU": "8"}),
            o.group()["rayStartParams"].update({"num-gpus": "8"}),
        ),
        "workerGroupSpecs[2].rayStartParams.num-gpus",
        "KubeRay takes only one",
        "remove it",
    ),
    Mistake(
        "no serve port",
        lambda o: o.head_box.update(ports=[{"name": "metrics", "containerPort": 8080}]),
        "headGroupSpec.template.spec.containers[0].ports",
        "no port named serve",
        "containerPort: 8000",
    ),
    Mistake(
        "token for an old Ray",
        lambda o: o.cluster.update(rayVersion="2.50.0"),
        "authOptions.mode",
        "needs Ray 2.52",
        "rayVersion",
    ),
    Mistake(
        "incremental without options",
        lambda o: o.spec.update(upgradeStrategy={"type": "NewClusterWithIncrementalUpgrade"}),
        "upgradeStrategy.clusterUpgradeOptions",
        "needs clusterUpgradeOptions",
        "gatewayClassName",
    ),
    Mistake(
        "head service with a name",
        lambda o: o.head.update(headService={"metadata": {"name": "mine"}}),
        "headGroupSpec.headService.metadata.name",
        "KubeRay names the head's Service itself",
        "remove",
    ),
    Mistake(
        "password of Redis in the environment",
        lambda o: o.head_box["env"].append({"name": "REDIS_PASSWORD", "value": "x"}),
        "headGroupSpec.template.spec.containers[0].env[4]",
        "credentials of Redis",
        "gcsFaultToleranceOptions.redisPassword",
    ),
    Mistake(
        "timeout that is no duration",
        lambda o: o.service["metadata"]["annotations"].update(
            {"ray.io/initializing-timeout": "2 hours"}
        ),
        'metadata.annotations["ray.io/initializing-timeout"]',
        '"2 hours" is no duration',
        "2h",
    ),
    Mistake(
        "pods that restart in place",
        lambda o: o.pod().update(restartPolicy="Always"),
        "workerGroupSpecs[2].template.spec.restartPolicy",
        "restartPolicy Always with autoscaler v2",
        "remove",
    ),
)

POD = (
    Mistake(
        "mount without a volume",
        lambda o: _without(o.pod()["volumes"], "models"),
        "containers[0].volumeMounts[1].name",
        "no volume named models",
        "known here: shared-mem",
    ),
    Mistake(
        "GPU request without limit",
        lambda o: o.box()["resources"]["limits"].pop("nvidia.com/gpu"),
        'resources.requests["nvidia.com/gpu"]',
        "request 8 of nvidia.com/gpu without the same limit",
        "alike",
    ),
    Mistake(
        "fewer GPUs requested",
        lambda o: o.box()["resources"]["requests"].update({"nvidia.com/gpu": "4"}),
        'resources.requests["nvidia.com/gpu"]',
        "request 4 of nvidia.com/gpu without the same limit",
        "alike",
    ),
    Mistake(
        "long port name",
        lambda o: _port(o.box(), "metrics").update(name="metrics-of-workers"),
        "containers[0].ports[2].name",
        '"metrics-of-workers" is no port name',
        "at most 15",
    ),
    Mistake(
        "no such effect",
        lambda o: o.pod()["tolerations"][0].update(effect="Never"),
        "tolerations[0].effect",
        '"Never" is not allowed',
        "NoSchedule, PreferNoSchedule, NoExecute",
    ),
    Mistake(
        "label with a space",
        lambda o: o.group()["template"]["metadata"]["labels"].update({"bad key!": "x"}),
        'template.metadata.labels["bad key!"]',
        '"bad key!" is no key of labels',
        "use letters",
    ),
    Mistake(
        "no such priority class",
        lambda o: o.pod().update(priorityClassName="shoal-serving"),
        "template.spec.priorityClassName",
        "no PriorityClass shoal-serving here",
        "did you mean shoal-shoal-serving?",
    ),
    Mistake(
        "more requested than allowed",
        lambda o: o.box()["resources"]["requests"].update(memory="4Ti"),
        "resources.requests.memory",
        "request 4Ti of memory is more than the limit",
        "write at most",
    ),
)

APPLICATION = (
    Mistake(
        "Serve config that is no YAML",
        lambda o: o.spec.update(serveConfigV2="a: [b"),
        "spec.serveConfigV2",
        "no YAML: line 1: expected ',' or ']'",
        "mend its syntax",
    ),
    Mistake(
        "typo in the settings",
        _args("experts", num_worker=4),
        "applications[0].args.experts.num_worker",
        "no such field",
        "remove it, num_workers is there",
    ),
    Mistake(
        "settings out of bounds",
        _args("experts", num_workers=0),
        "args.experts.num_workers",
        "greater than or equal to 1",
        "change this value",
    ),
    Mistake(
        "settings that contradict each other",
        _args("attention", "scaling", min_workers=64),
        "args.attention.scaling",
        "max_workers = 48 is less than min_workers = 64",
        "raise max_workers or lower min_workers",
    ),
    Mistake(
        "wrong import path",
        _application(import_path="cluster.app:build"),
        "applications[0].import_path",
        "there is no cluster.app:build in Shoal",
        "did you mean cluster.app:build_app?",
    ),
    Mistake(
        "no gRPC service",
        _serve(grpc_options={"port": 9000}),
        "grpc_options.grpc_servicer_functions",
        "is not among grpc_servicer_functions",
        "add cluster.protos.inference_pb2_grpc",
    ),
    Mistake(
        "gRPC service that Shoal has not",
        _serve(grpc_options={"grpc_servicer_functions": ["cluster.protos.inference_pb2_grpc.add"]}),
        "grpc_options.grpc_servicer_functions[0]",
        "there is no cluster.protos.inference_pb2_grpc.add in Shoal",
        "did you mean cluster.protos.inference_pb2_grpc.add_InferenceServicer_to_server?",
    ),
    Mistake(
        "sockets of one machine",
        _args(channel="unix"),
        "args.channel",
        "channel unix joins processes of one machine only",
        "channel: tcp",
    ),
    Mistake(
        "override that hides settings",
        _application(deployments=[{"name": "Experts", "ray_actor_options": {"num_gpus": 2}}]),
        "deployments[0].ray_actor_options",
        "ray_actor_options of Experts hides what args say",
        "say it in args",
    ),
    Mistake(
        "proxy on the head only",
        _serve(proxy_location="HeadOnly"),
        "proxy_location",
        "have no proxy",
        "write EveryNode",
    ),
    Mistake(
        "ports that differ",
        _serve(http_options={"port": 8001}),
        "ports[3].containerPort",
        "port serve is 8000, serveConfigV2 says 8001",
        "write 8001 in both",
    ),
    Mistake(
        "API keys that are not mounted",
        lambda o: _without(o.box("ingress")["volumeMounts"], "api-keys"),
        "workerGroupSpecs[0].template.spec.containers[0].volumeMounts",
        "auth.keys_file is /etc/shoal/api-keys/keys, and nothing is mounted there",
        "mount the Secret",
    ),
)

PLACEMENT = (
    Mistake(
        "tier without a Serve replica",
        _args("experts", label_selector={"shoal.io/tier": "attention"}),
        "workerGroupSpecs[2].labels",
        "no deployment selects group experts",
        "label_selector",
    ),
    Mistake(
        "selector that fits no group",
        _args("experts", label_selector={"shoal.io/tier": "expert"}),
        "args.experts.label_selector",
        "no worker group has the labels shoal.io/tier: expert",
        "shoal.io/tier: experts",
    ),
    Mistake(
        "replicas on the head",
        _args("ingress", label_selector={}),
        "args.ingress.label_selector",
        "Ingress may be placed on the head",
        "select the label",
    ),
    Mistake(
        "more GPUs than a pod has",
        _args("experts", num_gpus=16),
        "args.experts.num_gpus",
        "16 GPUs for a worker, its pods have 8",
        "lower num_gpus",
    ),
    Mistake(
        "more workers than the groups hold",
        lambda o: o.group("attention").update(maxReplicas=5),
        "args.attention.scaling",
        "48 workers of 1 GPUs, 40 fit",
        "raise maxReplicas",
    ),
    Mistake(
        "pods without replicas",
        _args("experts", num_workers=8, slots_per_worker=1856),
        "workerGroupSpecs[2].minReplicas",
        "2 pods, and the replicas of Experts may leave one empty",
        "raise num_workers",
    ),
    Mistake(
        "GPUs for nobody",
        _args("experts", device="auto", num_gpus=0),
        "args.experts.num_gpus",
        "num_gpus 0",
        "num_gpus: 1",
    ),
    Mistake(
        "a GPU to compute on and none reserved",
        _args("experts", num_gpus=None),
        "args.experts",
        "experts shall compute on a GPU and reserves none",
        "num_gpus: 1",
    ),
    Mistake(
        "experts that do not fit",
        lambda o: o.pod()["nodeSelector"].update({"nvidia.com/gpu.product": "NVIDIA-L40S"}),
        "args.experts",
        "a worker of Experts needs 82 GB",
        "more workers with fewer slots",
    ),
    Mistake(
        "cache that does not fit",
        _args("attention", "engine", kv_cache_bytes=10**12),
        "args.attention",
        "a worker of Attention needs",
        "lower engine.kv_cache_bytes",
    ),
    Mistake(
        "too few slots",
        _args("experts", slots_per_worker=100),
        "args.experts.slots_per_worker",
        "16 workers of 100 slots hold fewer than the 14848 experts",
        "at least 928",
    ),
)

RAY_PODS = (
    Mistake(
        "another Ray",
        lambda o: o.cluster.update(rayVersion="2.55.0"),
        "rayClusterConfig.rayVersion",
        "Shoal is made for Ray",
        "the image has the same",
    ),
    Mistake(
        "no time to drain",
        lambda o: o.pod().update(terminationGracePeriodSeconds=60),
        "terminationGracePeriodSeconds",
        "60 seconds, a worker's drain takes up to 90",
        "write 300",
    ),
    Mistake(
        "shared memory larger than memory",
        lambda o: o.pod()["volumes"][0]["emptyDir"].update(sizeLimit="1Ti"),
        "volumes[0].emptyDir.sizeLimit",
        "/dev/shm may take 1Ti",
        "lower sizeLimit",
    ),
    Mistake(
        "no requests",
        lambda o: o.box().pop("resources"),
        "resources.requests.cpu",
        "no request of cpu",
        "add requests.cpu",
    ),
    Mistake(
        "secret in clear",
        lambda o: o.box()["env"][0].update(value="abcd", valueFrom=None),
        "env[0].value",
        "SHOAL_CLUSTER_SECRET stands here for all to read",
        "secretKeyRef",
    ),
    Mistake(
        "no cluster secret",
        lambda o: _without(o.box()["env"], "SHOAL_CLUSTER_SECRET"),
        "containers[0].env",
        "SHOAL_CLUSTER_SECRET is missing",
        "secretKeyRef",
    ),
    Mistake(
        "authentication without a mode",
        lambda o: o.cluster["authOptions"].pop("mode"),
        "authOptions.mode",
        "there is no authentication",
        "mode: token",
    ),
    Mistake(
        "autoscaler by default",
        lambda o: o.cluster["autoscalerOptions"].pop("version"),
        "autoscalerOptions.version",
        "autoscaler v2 must be spelled out",
        "version: v2",
    ),
    Mistake(
        "actors on the head",
        lambda o: o.head["rayStartParams"].pop("num-cpus"),
        "rayStartParams.num-cpus",
        "place actors on the head",
        'num-cpus: "0"',
    ),
    Mistake(
        "dashboard for clients",
        lambda o: o.spec["serveService"]["spec"]["ports"].append({"name": "ui", "port": 8265}),
        "serveService.spec.ports[2]",
        "the dashboard in the Service of clients",
        "remove it",
    ),
    Mistake(
        "gRPC without HTTP/2",
        lambda o: o.spec["serveService"]["spec"]["ports"][1].pop("appProtocol"),
        "serveService.spec.ports[1].appProtocol",
        "HTTP/1 to gRPC",
        "kubernetes.io/h2c",
    ),
)

REFERENCES = (
    Mistake(
        "budget of nobody",
        lambda o: o.one("PodDisruptionBudget", "shoal-experts")["spec"]["selector"].update(
            matchLabels={"app.kubernetes.io/component": "expert"}
        ),
        "PodDisruptionBudget/shoal-experts spec.selector",
        "selects no pod",
        "app.kubernetes.io/component: experts",
    ),
    Mistake(
        "budget that needs a scale",
        lambda o: o.one("PodDisruptionBudget", "shoal-experts")["spec"].update(
            maxUnavailable=o.one("PodDisruptionBudget", "shoal-experts")["spec"].pop("minAvailable")
        ),
        "PodDisruptionBudget/shoal-experts spec.maxUnavailable",
        "a RayCluster has no scale",
        "an integer minAvailable",
    ),
    Mistake(
        "budget in percent",
        lambda o: o.one("PodDisruptionBudget", "shoal-head")["spec"].update(minAvailable="50%"),
        "PodDisruptionBudget/shoal-head spec.minAvailable",
        "a RayCluster has no scale",
        "an integer minAvailable",
    ),
    Mistake(
        "operator locked out",
        _policy_without_8000,
        "NetworkPolicy/shoal spec.ingress",
        "operator cannot reach Serve's proxy at 8000",
        "allow 8000",
    ),
    Mistake(
        "component in another namespace",
        _fallen_component,
        "NetworkPolicy/shoal metadata.namespace",
        "namespace default, the RayService is in shoal",
        "namespace: shoal",
    ),
    Mistake(
        "route to another Service",
        lambda o: o.one("HTTPRoute")["spec"]["rules"][0]["backendRefs"][0].update(name="shoal-svc"),
        "backendRefs[0].name",
        "no Service shoal-svc here",
        "did you mean shoal-serve-svc?",
    ),
    Mistake(
        "no such metrics port",
        lambda o: o.one("PodMonitor")["spec"]["podMetricsEndpoints"][0].update(port="metric"),
        "podMetricsEndpoints[0].port",
        "no port metric in these pods",
        "did you mean metrics?",
    ),
    Mistake(
        "the same object twice",
        lambda o: o.all.append(copy.deepcopy(o.one("PersistentVolumeClaim"))),
        "PersistentVolumeClaim/shoal-models metadata.name",
        "a second PersistentVolumeClaim shoal-models",
        "rename or remove",
    ),
)

MISTAKES = (
    *SCHEMA,
    *OTHER_SCHEMA,
    *OPERATOR,
    *POD,
    *APPLICATION,
    *PLACEMENT,
    *RAY_PODS,
    *REFERENCES,
)
