"""The directory as a member: membership and the expert table."""

from __future__ import annotations

from cluster.config import ShoalConfig
from cluster.site import expert_space, redundancy
from experts.config import ModelConfig
from experts.directory.roster import RosterRules
from experts.directory.server import Directory
from experts.messages import Role
from experts.metrics import Sample
from experts.placement.rebalance import RebalanceRules


def fixed_sizes(config: ShoalConfig) -> dict[Role, int]:
    """Workers that each tier shall have while no command says otherwise; those that follow the load
    are left out."""
    sizes: dict[Role, int] = {}
    if not config.experts.follows_load:
        sizes["experts"] = config.experts.num_workers
    if not config.attention.follows_load:
        sizes["attention"] = config.attention.num_workers
    if config.router.mode == "deployment":
        sizes["router"] = config.router.num_workers
    return sizes


class PlacementMember:
    """The directory: membership and the expert table."""

    def __init__(self, config: ShoalConfig, secret: bytes, endpoint: str) -> None:
        space = expert_space(ModelConfig.load(config.model))
        rules = RosterRules(
            space=space,
            expected_experts=config.experts.num_workers,
            redundancy=redundancy(config, space),
            needs_router=config.router.mode == "deployment",
            rebalance=RebalanceRules(**config.experts.rebalance.model_dump()),
            max_workers={
                "experts": config.experts.max_workers,
                "attention": config.attention.max_workers,
            },
            fixed_sizes=fixed_sizes(config),
        )
        self.directory = Directory(rules, enable_chaos=config.enable_chaos)
        self.directory.start(endpoint, secret)

    @property
    def endpoint(self) -> str:
        return self.directory.endpoint

    def samples(self) -> list[Sample]:
        """Its numbers at this moment, as every member has them."""
        return self.directory.samples()

    def close(self) -> None:
        self.directory.close()
