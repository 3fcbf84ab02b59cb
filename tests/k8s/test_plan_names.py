"""Models, GPUs and networks that can be named."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from cluster.config import ConfigError
from cluster.deploy.hardware import GPUS, NETWORKS, known_gpu, known_network
from cluster.deploy.known_models import ALIASES, KNOWN, known_model, model_sizes


class TestNames:
    def test_every_alias_names_a_model(self) -> None:
        assert {known_model(alias).name for alias in ALIASES} <= {*KNOWN, "shoal-tiny"}

    def test_case_does_not_matter(self) -> None:
        assert known_model("R1").config == known_model("v3").config

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ("v33", "model = 'v33': not known, did you mean v3? known are v2-lite, v2, v3"),
            ("llama", "model = 'llama': not known; known are v2-lite"),
            ("./v3", "model = './v3': no such folder"),
        ],
    )
    def test_an_unknown_model_names_the_nearest(self, given: str, said: str) -> None:
        with pytest.raises(ConfigError) as error:
            model_sizes(given)
        assert str(error.value).startswith(said)

    def test_unknown_hardware_names_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="gpu = 'h201': not known, did you mean h200"):
            known_gpu("h201")
        with pytest.raises(ConfigError, match="network = '400gb': not known, did you mean 400g"):
            known_network("400gb")


class TestHardware:
    def test_every_figure_has_a_source(self) -> None:
        assert all(item.source for item in itertools.chain(GPUS.values(), NETWORKS.values()))

    def test_the_network_of_every_node_is_known(self) -> None:
        assert {gpu.node_network for gpu in GPUS.values()} <= set(NETWORKS)

    def test_without_fp8_units_fp8_weights_run_as_bf16(self) -> None:
        a100 = known_gpu("a100")
        assert a100.flops_per_s("fp8") == a100.flops_per_s("bf16")

    def test_the_ridge_of_h200(self) -> None:
        h200 = known_gpu("h200")
        assert round(h200.bf16_flops_per_s / h200.bandwidth_bytes_per_s) == 184
        assert round(h200.flops_per_s("fp8") / h200.bandwidth_bytes_per_s) == 367


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, cluster.deploy.plan_cli, cluster.deploy.plan_table; "
        "print(sorted({'torch', 'ray', 'kubernetes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
