"""The members that compute: a plain worker, its channel server and its line to the directory.

`app.py` puts each into a Serve deployment, `inline.py` puts all into one process; nothing here
knows which of the two it is. The other members are in placement.py and ingress.py.
"""

from __future__ import annotations

import logging
from functools import partial

from attention.worker import AttentionWorker
from cluster import chaos
from cluster.autoscaling.stats import (
    UNKNOWN,
    AttentionMeter,
    AttentionStats,
    ExpertMeter,
    ExpertStats,
)
from cluster.config import HANDOVER_TIMEOUT_S, ComputingTier, ShoalConfig
from cluster.observability.member_samples import (
    AttentionSamples,
    DeployedRouterSamples,
    ExpertSamples,
)
from cluster.observability.samples import MemberSamples
from cluster.site import Site, expert_space, redundancy
from experts.checkpoint import Checkpoint
from experts.config import ModelConfig
from experts.device import ComputeDevice, host_device, open_device
from experts.directory.client import DirectoryClient
from experts.memory import check_slots
from experts.messages import Assign, LoadReport, Role
from experts.placement.replan import slots_needed
from experts.snapshots import SnapshotBoard
from experts.worker import ExpertWorker
from router.client import RouterClient
from router.worker import RouterWorker

logger = logging.getLogger(__name__)


def _open_device(site: Site, tier: ComputingTier) -> ComputeDevice:
    """Where a worker of the tier computes: chosen once, at its start. Raises DeviceError."""
    return site.device or open_tier_device(site.config, tier)


def open_tier_device(config: ShoalConfig, tier: ComputingTier) -> ComputeDevice:
    """A process without a reserved GPU does not look for one: Ray 2.60 lets it see all of them.

    Raises DeviceError.
    """
    if config.may_use_gpu(tier):
        return open_device(config.device_of(tier), getattr(config, tier).num_gpus)
    if config.device_of(tier) == "cpu":
        return open_device("cpu")
    host = host_device("no GPU is reserved for this worker")
    logger.info("device: %s", host.reason)
    return host


def slots_per_worker(config: ShoalConfig, model: ModelConfig) -> int:
    """As configured, else what full coverage and the redundancy need."""
    tier, space = config.experts, expert_space(model)
    if tier.slots_per_worker is not None:
        return tier.slots_per_worker
    return slots_needed(
        space.num_total, tier.num_workers, redundancy(config, space), space.unit_size
    )


def spare_slots_per_worker(config: ShoalConfig, model: ModelConfig, *, is_host: bool) -> int:
    """As configured, else all that the worker's own slots leave out, if they cost nothing."""
    tier = config.experts
    if tier.spare_slots_per_worker is not None:
        return tier.spare_slots_per_worker
    if not is_host:
        return 0
    return max(0, expert_space(model).num_total - slots_per_worker(config, model))


class ExpertMember:
    """An expert worker that holds what the directory assigns."""

    def __init__(self, site: Site, worker_id: str) -> None:
        checkpoint, tier = Checkpoint.open(site.config.model), site.config.experts
        model, device = checkpoint.config, _open_device(site, "experts")
        slots = slots_per_worker(site.config, model)
        spare = spare_slots_per_worker(site.config, model, is_host=device.is_host)
        if device.is_cuda:
            check_slots(slots + spare, model, device.total_bytes, tier.gpu_memory_utilization)
        self.worker = ExpertWorker(
            checkpoint,
            worker_id,
            slots + spare,
            device=device,
            load_window_s=tier.load_window_s,
            emulated_pairs_per_s=tier.emulated_pairs_per_s,
        )
        space = expert_space(checkpoint.config)
        usable = slots // space.unit_size * space.unit_size
        self._meter = ExpertMeter(self.worker.counters, usable, space.num_total)
        self.samples = MemberSamples(ExpertSamples(self.worker))
        endpoint = self.worker.start(site.new_endpoint(worker_id), site.secret)
        self._line = DirectoryClient(
            site.directory,
            site.secret,
            site.register("experts", worker_id, endpoint, slots, spare),
            on_assign=self._assign,
            load_source=self._load,
            on_signal=chaos.obey,
            metrics_source=site.told(self.samples),
        )
        self._line.start()

    def read_stats(self) -> ExpertStats:
        """How busy the worker was since the last time somebody asked."""
        snapshot, held = self._line.snapshot, len(self.worker.holds)
        is_drained = snapshot is not None and self.worker.worker_id in snapshot.drained
        commanded = _commanded(self._line, "experts")
        return self._meter.read(held, commanded, is_drained=is_drained)

    def _assign(self, assign: Assign) -> None:
        report = partial(self._line.report_holding, epoch=assign.epoch)
        self.worker.hold(assign.experts, assign.epoch, report)

    def _load(self) -> LoadReport:
        return self.worker.load_counter.report()

    def close(self, hand_over: bool = True) -> None:
        """Hand over first, so that nobody needs it any more, then finish what is under way."""
        if hand_over:
            self._line.leave(HANDOVER_TIMEOUT_S)
            self.worker.wait_quiet()
        self._line.close()
        self.worker.close()


class RouterMember:
    """A deployed router."""

    def __init__(self, site: Site, worker_id: str) -> None:
        board = SnapshotBoard()
        self.worker = RouterWorker.open(
            Checkpoint.open(site.config.model),
            board,
            site.secret,
            site.config.router_worker,
            name=worker_id,
            device=_open_device(site, "router"),
        )
        self.samples = MemberSamples(DeployedRouterSamples(self.worker))
        endpoint = self.worker.start(site.new_endpoint(worker_id), site.secret)
        self._line = DirectoryClient(
            site.directory,
            site.secret,
            site.register("router", worker_id, endpoint),
            board.publish,
            on_signal=chaos.obey,
            metrics_source=site.told(self.samples),
        )
        self._line.start()

    def close(self) -> None:
        self._line.close()
        self.worker.drain()
        self.worker.close()


class AttentionMember:
    """An attention worker with its way to the experts: a deployed router or one of its own."""

    def __init__(self, site: Site, worker_id: str) -> None:
        board = SnapshotBoard()
        checkpoint, device = Checkpoint.open(site.config.model), _open_device(site, "attention")
        self._moe = _way_to_the_experts(site, worker_id, checkpoint, board, device)
        self._tracer = site.open_tracer("attention", worker_id)
        self.worker = AttentionWorker(
            checkpoint, self._moe, site.config.engine, device=device, tracer=self._tracer
        )
        source = AttentionSamples(self.worker, self._moe, site.config.model_name)
        self.samples = MemberSamples(source)
        endpoint = self.worker.start(site.new_endpoint(worker_id), site.secret)
        self._line = DirectoryClient(
            site.directory,
            site.secret,
            site.register("attention", worker_id, endpoint),
            board.publish,
            on_signal=chaos.obey,
            metrics_source=site.told(self.samples),
        )
        self._line.start()
        self._meter = AttentionMeter()

    def read_stats(self) -> AttentionStats:
        """How full the worker is, and its throughput since the last time somebody asked."""
        return self._meter.read(self.worker.engine.stats(), _commanded(self._line, "attention"))

    def check_health(self) -> None:
        """Raises RuntimeError when the engine has ended: nothing is served then."""
        if not self.worker.alive:
            raise RuntimeError("the engine thread has ended")

    def close(self) -> None:
        """The worker first: its last step may need the experts, which the line tells of."""
        self.worker.close()
        self._line.close()
        self._moe.close()
        if self._tracer is not None:
            self._tracer.close()


def _commanded(line: DirectoryClient, role: Role) -> float:
    """The size of the tier that was asked for by command, as far as the worker knows."""
    snapshot = line.snapshot
    return UNKNOWN if snapshot is None else float(snapshot.scale.get(role, 0))


def _way_to_the_experts(
    site: Site,
    worker_id: str,
    checkpoint: Checkpoint,
    board: SnapshotBoard,
    device: ComputeDevice,
) -> RouterClient | RouterWorker:
    """device: of the attention worker, whose router computes there too unless told not to."""
    settings = site.config.router_worker
    if site.config.router.mode == "inline":
        if site.config.router.device == "cpu":
            device = host_device()
        return RouterWorker.open(
            checkpoint, board, site.secret, settings, name=worker_id, device=device
        )
    return RouterClient(
        board,
        site.secret,
        worker_id,
        site.node,
        deadline_s=settings.deadline_s,
    )
