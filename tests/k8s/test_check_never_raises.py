"""Whatever is done to a good rendering, the check answers with findings and never raises."""

from __future__ import annotations

import copy
import datetime
import functools
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.deploy.check.checks import check_manifests, list_notes
from cluster.deploy.check.source import Located, load_text
from cluster.deploy.config import parse_deploy_config
from cluster.deploy.known_models import known_model
from cluster.deploy.render import render

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "0", "-1", "9" * 400, "1e999", "\ud800", "in(", "a/b/c", "v2"]),
    st.just(datetime.date(2026, 1, 2)),
    st.sampled_from(
        [{}, [], [[]], [None], {"": None}, {1: 2}, {"name": []}, [{}], {"a": {"b": 1}}]
    ),
)
STEPS = st.lists(st.integers(0, 40), min_size=1, max_size=14)
EDITS = st.lists(
    st.tuples(STEPS, st.sampled_from(["replace", "delete", "rename"]), ODD), max_size=4
)
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@functools.cache
def manifests() -> str:
    """Everything there is, as JSON: a copy of it is a cheap parse away."""
    on = {
        key: {"enabled": True} for key in ("network_policy", "monitoring", "gateway", "gcs_redis")
    }
    return json.dumps(render(parse_deploy_config({"preset": "gpu-small", **on})))


def edit(root: Any, steps: list[int], how: str, value: Any) -> None:
    """Walk down by the steps, each an index of the children there, and change the last child."""
    node = root
    for i, step in enumerate(steps):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = keys[step % len(keys)]
        if i == len(steps) - 1 or not isinstance(node[key], (dict, list)):
            break
        node = node[key]
    if how == "delete":
        del node[key]
    elif how == "rename" and isinstance(node, dict):
        node["x"] = node.pop(key)
    else:
        node[key] = copy.deepcopy(value)


@QUIET
@given(EDITS)
def test_mangled_objects(edits: list[tuple[list[int], str, Any]]) -> None:
    objects = json.loads(manifests())
    for steps, how, value in edits:
        edit(objects, steps, how, value)
    located = [Located("a.yaml", each) for each in objects]
    for finding in check_manifests(located, sizes=known_model("v2-lite")) + list_notes(located):
        assert str(finding).startswith("a.yaml: ")
        assert finding.message and finding.fix


@QUIET
@given(EDITS)
def test_mangled_settings(edits: list[tuple[list[int], str, Any]]) -> None:
    objects = json.loads(manifests())
    service = next(each for each in objects if each["kind"] == "RayService")
    config = load_text(service["spec"]["serveConfigV2"], "x")[0].body
    for steps, how, value in edits:
        edit(config, steps, how, value)
    service["spec"]["serveConfigV2"] = json.dumps(config, default=str)
    located = [Located("a.yaml", service)]
    for finding in check_manifests(located, sizes=known_model("v2-lite")):
        assert finding.path.startswith("RayService/")


@QUIET
@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>?,'\"#%@ \n\t1.~<"), max_size=60))
def test_any_text(text: str) -> None:
    check_manifests(load_text(text, "a.yaml"))
    service = next(each for each in json.loads(manifests()) if each["kind"] == "RayService")
    service["spec"]["serveConfigV2"] = text
    assert check_manifests([Located("a.yaml", service)])
