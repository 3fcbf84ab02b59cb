"""serveConfigV2: the text parses, names what exists, and its args are settings that Shoal takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.config import GRPC_SERVICERS, ShoalConfig
from cluster.deploy.check.finding import Finding
from cluster.deploy.check.node import Node
from cluster.deploy.check.ray_cluster import serves_grpc
from cluster.deploy.check.schemas import shown
from cluster.deploy.check.serve_model import ServeConfig
from cluster.deploy.check.typed import typed_findings
from cluster.deploy.check.yaml_nodes import explain, parse_yaml
from cluster.deploy.manifests.serve_config import BETWEEN_PODS, IMPORT_PATH
from cluster.field_names import suggest
from cluster.gpus import WORKER_TIERS

OUR_SERVICER = GRPC_SERVICERS[0]
DEFAULT_PORTS = {"serve": 8000, "serve-grpc": 9000}


@dataclass(frozen=True)
class Deployment:
    """A Serve deployment of Shoal, as its settings make it."""

    name: str
    settings: Node
    """The tier's part of args."""
    label_selector: dict[str, str]
    max_per_pod: int | None = None
    """None: any number."""
    num_workers: int = 1
    max_workers: int = 1
    """The most that load makes it; a command may ask for more and then waits for pods."""
    num_gpus: float = 0


@dataclass(frozen=True)
class Application:
    """What serveConfigV2 says about Shoal."""

    serve: Node
    args: Node
    config: ShoalConfig
    deployments: tuple[Deployment, ...]

    def port(self, name: str) -> tuple[int, Node]:
        """The number of the port `serve` or `serve-grpc`, and where it is said."""
        section = "http_options" if name == "serve" else "grpc_options"
        place = self.serve[section]["port"]
        return (DEFAULT_PORTS[name] if place.number is None else place.number), place


def read_application(root: Node) -> tuple[Application | None, list[Finding]]:
    """Our application in a RayService and what is wrong with it; None if args are no settings."""
    text = root["spec"]["serveConfigV2"]
    try:
        parsed = parse_yaml(text.text)
    except yaml.YAMLError as error:
        why, line = explain(error)
        at = "" if line is None else f"line {line}: "
        return None, [text.finding(f"no YAML: {at}{why}", "mend its syntax; it is one text: |")]
    serve = text.with_value(parsed)
    if not isinstance(parsed, dict):
        if text.given and not isinstance(
            text.value, str
        ):  # of another type, which the schema tells
            return None, []
        fix = "write a Serve config file as one text: |"
        return None, [text.finding("missing, or no mapping", fix)]
    found = list(typed_findings(ServeConfig, serve)) + list(_serve_findings(serve))
    found += _servicer_findings(serve["grpc_options"]["grpc_servicer_functions"], root)
    ours = [app for app in serve["applications"].each() if _is_ours(app)]
    if len(ours) != 1:
        message = f"{len(ours)} applications with import_path {IMPORT_PATH}"
        return None, [*found, serve["applications"].finding(message, "make it exactly one")]
    args = ours[0]["args"]
    settings = args if args.given else args.with_value({})
    try:
        config = ShoalConfig.model_validate(settings.value)
    except ValidationError:
        return None, found + list(typed_findings(ShoalConfig, settings))
    found += _settings_findings(settings, config)
    deployments = _deployments(ours[0], config)
    found += _override_findings(ours[0], deployments)
    return Application(serve, args, config, deployments), found


def _is_ours(app: Node) -> bool:
    return app["import_path"].text == IMPORT_PATH


def _deployments(app: Node, config: ShoalConfig) -> tuple[Deployment, ...]:
    def deployment(name: str, *size: Any) -> Deployment:
        tier = getattr(config, name.lower())
        settings = app["args"][name.lower()]
        return Deployment(name, settings, tier.label_selector, tier.max_per_node, *size)

    attention, experts, router = config.attention, config.experts, config.router
    found = [deployment("Ingress", *[config.ingress.num_workers] * 2), deployment("Placement")]
    if router.mode == "deployment":
        size = (router.num_workers, router.num_workers, router.num_gpus or 0)
        found.append(deployment("Router", *size))
    for name, tier in (("Attention", attention), ("Experts", experts)):
        most = tier.scaling.max_workers if tier.scaling else tier.num_workers
        found.append(deployment(name, tier.num_workers, most, tier.num_gpus or 0))
    return tuple(found)


def _serve_findings(serve: Node) -> Iterator[Finding]:
    location, host = serve["proxy_location"], serve["http_options"]["host"]
    if location.text in ("HeadOnly", "Disabled"):
        message = f"{location.text}: the pods of the Service have no proxy then"
        yield location.finding(message, "write EveryNode")
    if host.text in ("127.0.0.1", "localhost", "::1"):
        yield host.finding(f"{host.text} is reached from the pod only", "write 0.0.0.0")
    for app in serve["applications"].each():
        yield from _no_such_path(app["import_path"], [IMPORT_PATH])


def _servicer_findings(functions: Node, root: Node) -> Iterator[Finding]:
    if serves_grpc(root) and OUR_SERVICER not in [each.value for each in functions.each()]:
        message = "the gRPC service of Shoal is not among grpc_servicer_functions"
        yield functions.finding(message, f"add {OUR_SERVICER}")
    for function in functions.each():
        yield from _no_such_path(function, GRPC_SERVICERS)


def _no_such_path(place: Node, paths: Sequence[str]) -> Iterator[Finding]:
    """A path into Shoal's own code other than those that there are."""
    if place.text.startswith("cluster.") and place.text not in paths:
        yield place.finding(f"there is no {place.text} in Shoal", suggest(place.text, paths))


def _override_findings(app: Node, deployments: tuple[Deployment, ...]) -> Iterator[Finding]:
    """An override that says nothing but a name does no harm."""
    names = [deployment.name for deployment in deployments]
    for override in app["deployments"].each():
        name = override["name"]
        if name.text not in names:
            message = f"{shown(name.value)} is no deployment of this application"
            yield name.finding(message, suggest(name.text, names))
        for key, node in override.entries():
            if key != "name":
                message = f"{key} of {name.text} hides what args say"
                yield node.finding(message, "say it in args and remove it here")


def _settings_findings(args: Node, config: ShoalConfig) -> Iterator[Finding]:
    if config.channel not in BETWEEN_PODS:
        message = f"channel {config.channel} joins processes of one machine only"
        yield args["channel"].finding(message, "write channel: tcp, or nixl")
    for tier in WORKER_TIERS:
        if config.device_of(tier) == "cuda" and getattr(config, tier).num_gpus is None:
            message = f"{tier} shall compute on a GPU and reserves none"
            yield args[tier].finding(message, "write num_gpus: 1, or a part of one")
    if config.runtime_dir is not None:
        yield args["runtime_dir"].finding("only channel unix has such a folder", "remove it")
