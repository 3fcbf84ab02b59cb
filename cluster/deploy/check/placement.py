"""Deployments against worker groups: somewhere to run, GPUs enough, no pod without a replica."""

from __future__ import annotations

from collections.abc import Iterator

from attention.memory import block_size, cache_bytes_per_token, cache_dtype
from cluster.deploy.check.application import Application, Deployment
from cluster.deploy.check.finding import Finding
from cluster.deploy.check.ray_cluster import Group
from cluster.deploy.hardware import GPUS
from cluster.deploy.sizes import ModelSizes

PRODUCT = "nvidia.com/gpu.product"


def placement_findings(
    app: Application, groups: list[Group], sizes: ModelSizes | None
) -> Iterator[Finding]:
    """`groups`: head first. `sizes`: of the model, None if nobody knows them."""
    workers = [group for group in groups if not group.is_head]
    for deployment in app.deployments:
        yield from _somewhere_to_run(deployment, groups[0], workers)
    for group in workers:
        here = [each for each in app.deployments if group.fits(each.label_selector)]
        yield from _no_idle_pods(group, here)
    yield from _enough_gpus(app.deployments, workers)
    if sizes is not None:
        yield from _coverage(app, sizes)
        for group in workers:
            yield from _memory(app, group, sizes)


def _somewhere_to_run(
    deployment: Deployment, head: Group, workers: list[Group]
) -> Iterator[Finding]:
    selector = deployment.settings["label_selector"]
    homes = [group for group in workers if group.fits(deployment.label_selector)]
    if not homes:
        asked = ", ".join(f"{k}: {v}" for k, v in deployment.label_selector.items())
        labels = sorted({f"{k}: {v}" for group in workers for k, v in group.ray_labels.items()})
        message = f"no worker group has the labels {asked} that {deployment.name} selects"
        yield selector.finding(message, f"groups have {', '.join(labels) or 'no labels'}")
    elif head.fits(deployment.label_selector) and not deployment.num_gpus:
        message = f"{deployment.name} may be placed on the head, which serves nothing"
        yield selector.finding(message, "select the label of a worker group")
    elif deployment.num_gpus > max(group.gpus_per_pod for group in homes):
        most = max(group.gpus_per_pod for group in homes)
        message = f"{deployment.num_gpus:g} GPUs for a worker, its pods have {most:g}"
        fix = "lower num_gpus, or raise the limit of nvidia.com/gpu of the group's container"
        yield deployment.settings["num_gpus"].finding(message, fix)


def _no_idle_pods(group: Group, here: list[Deployment]) -> Iterator[Finding]:
    """A pod without a Serve replica has no proxy: KubeRay's probe keeps it NotReady for ever."""
    if not here:
        message = f"no deployment selects group {group.name}: its pods never become ready"
        fix = "give it a label that the label_selector of a tier names, or remove the group"
        yield group.node["labels"].finding(message, fix)
        return
    if group.min_pods > 0 and not any(_reaches_all(each, group) for each in here):
        names = " and ".join(deployment.name for deployment in here)
        message = f"{group.min_pods} pods, and the replicas of {names} may leave one empty"
        fix = (
            "raise num_workers, lower minReplicas, or set max_per_node in the tier's settings: "
            "a pod without a replica never becomes ready"
        )
        yield group.node["minReplicas"].finding(message, fix)
    if group.gpus_per_pod and not any(deployment.num_gpus for deployment in here):
        message = f"the GPUs of group {group.name} are for nobody: its tiers have num_gpus 0"
        yield here[-1].settings["num_gpus"].finding(message, "write num_gpus: 1")


def _reaches_all(deployment: Deployment, group: Group) -> bool:
    """Whether every pod must have one of its replicas, as the others cannot hold them all."""
    others = group.min_pods - 1
    return deployment.num_workers > others * _most_in_pod(deployment, group) if others else True


def _most_in_pod(deployment: Deployment, group: Group) -> float:
    bounds = [float("inf")]
    if deployment.max_per_pod is not None:
        bounds.append(deployment.max_per_pod)
    if deployment.num_gpus:
        bounds.append(group.gpus_per_pod // deployment.num_gpus)
    return min(bounds)


def _enough_gpus(deployments: tuple[Deployment, ...], workers: list[Group]) -> Iterator[Finding]:
    """Deployments that share groups share their GPUs; a worker's GPUs are of one pod."""
    free = {id(group): group.max_pods * group.gpus_per_pod for group in workers}
    for deployment in (each for each in deployments if each.num_gpus):
        left = deployment.max_workers
        homes = [
            group
            for group in workers
            if group.fits(deployment.label_selector) and group.gpus_per_pod >= deployment.num_gpus
        ]
        for group in homes:
            a_pod = group.gpus_per_pod // deployment.num_gpus
            taken = min(
                left, int(min(free[id(group)] / deployment.num_gpus, a_pod * group.max_pods))
            )
            free[id(group)] -= taken * deployment.num_gpus
            left -= taken
        if left and homes:
            message = (
                f"{deployment.max_workers} workers of {deployment.num_gpus:g} GPUs, "
                f"{deployment.max_workers - left} fit into its groups at maxReplicas"
            )
            key = "scaling" if deployment.settings["scaling"].given else "num_workers"
            fix = "raise maxReplicas of the group, or lower the number of workers"
            yield deployment.settings[key].finding(message, fix)


def _coverage(app: Application, sizes: ModelSizes) -> Iterator[Finding]:
    tier, place = app.config.experts, app.args["experts"]["slots_per_worker"]
    slots = _slots(app, sizes)
    if slots * tier.num_workers < sizes.num_experts_total:
        message = (
            f"{tier.num_workers} workers of {slots} slots hold fewer than the "
            f"{sizes.num_experts_total} experts of {sizes.name}"
        )
        least = -(-sizes.num_experts_total // tier.num_workers)
        yield place.finding(message, f"write at least {least}, or leave it out")


def _memory(app: Application, group: Group, sizes: ModelSizes) -> Iterator[Finding]:
    product = group.spec["nodeSelector"][PRODUCT]
    gpu = next((gpu for gpu in GPUS.values() if product.text in gpu.products), None)
    if gpu is None:
        return
    for deployment in app.deployments:
        is_here = deployment.num_gpus and group.fits(deployment.label_selector)
        needed, remedy = _needs(deployment.name, app, sizes)
        usable = gpu.usable_bytes * deployment.num_gpus
        if is_here and needed > usable:
            message = (
                f"a worker of {deployment.name} needs {needed / 1e9:.0f} GB for {sizes.name}, "
                f"{deployment.num_gpus:g} {gpu.name} have {usable / 1e9:.0f} GB to use"
            )
            yield deployment.settings.finding(message, f"use larger GPUs, or {remedy}")


def _needs(name: str, app: Application, sizes: ModelSizes) -> tuple[int, str]:
    """Bytes of GPU memory that a worker takes, and how it would take less."""
    if name == "Experts":
        slots = _slots(app, sizes) + (app.config.experts.spare_slots_per_worker or 0)
        return sizes.expert_worker_bytes(slots), "more workers with fewer slots"
    if name == "Attention":
        cache = _cache_bytes(app, sizes)
        return sizes.attention_worker_bytes() + cache, "lower engine.kv_cache_bytes"
    return 0, ""


def _slots(app: Application, sizes: ModelSizes) -> int:
    tier = app.config.experts
    return tier.slots_per_worker or sizes.slots_per_worker(tier.num_workers, tier.redundancy)


def _cache_bytes(app: Application, sizes: ModelSizes) -> int:
    engine = app.config.attention.engine
    if engine.num_kv_blocks is None:
        return engine.kv_cache_bytes or 0  # what the weights leave
    per_token = cache_bytes_per_token(sizes.config, cache_dtype(engine, on_gpu=True))
    return engine.num_kv_blocks * block_size(engine, on_gpu=True) * per_token
