"""When two objects count as the same, and how a difference is shown."""

from __future__ import annotations

import copy
from typing import Any

from cluster.deploy.differ import cluster_changes, content, settings_differ, unified_diff


def config_map(**data: str) -> dict[str, Any]:
    metadata = {"name": "settings", "resourceVersion": "7", "uid": "u", "generation": 1}
    return {"kind": "ConfigMap", "metadata": metadata, "data": data}


def ray_service(image: str = "shoal:1", low: int = 2) -> dict[str, Any]:
    group = {"groupName": "experts", "minReplicas": low, "maxReplicas": 6, "image": image}
    cluster = {"rayVersion": "2.60.0", "workerGroupSpecs": [group]}
    return {"kind": "RayService", "metadata": {}, "spec": {"rayClusterConfig": cluster}}


def test_bookkeeping_and_status_are_no_content() -> None:
    later = config_map(a="1") | {"status": {"phase": "Bound"}}
    later["metadata"] |= {"resourceVersion": "8", "managedFields": [{}], "generation": 2}
    assert content(later) == content(config_map(a="1"))
    assert unified_diff("ConfigMap/settings", config_map(a="1"), later) == ""


def test_labels_are_content() -> None:
    later = config_map(a="1")
    later["metadata"]["labels"] = {"app": "shoal"}
    assert content(later) != content(config_map(a="1"))


def test_a_change_shows_both_values() -> None:
    shown = unified_diff("ConfigMap/settings", config_map(a="1"), config_map(a="2")).splitlines()
    assert shown[:2] == ["--- live/ConfigMap/settings", "+++ new/ConfigMap/settings"]
    assert [line for line in shown if line[0] in "+-"][2:] == ["-  a: '1'", "+  a: '2'"]


def test_a_new_object_is_all_additions() -> None:
    shown = unified_diff("ConfigMap/settings", None, config_map(a="1")).splitlines()
    assert "+  a: '1'" in shown
    assert not [line for line in shown[3:] if line.startswith("-")]


def test_secrets_are_never_shown() -> None:
    before = {"kind": "Secret", "metadata": {"name": "s"}, "data": {"key": "b2xkLXNlY3JldA=="}}
    after = copy.deepcopy(before)
    after["data"]["key"] = "bmV3LXNlY3JldA=="
    shown = unified_diff("Secret/s", before, after)
    assert "b2xkLXNlY3JldA==" not in shown and "bmV3LXNlY3JldA==" not in shown
    assert "-  key: (sha256 " in shown and "+  key: (sha256 " in shown


def test_bounds_need_no_new_cluster() -> None:
    assert cluster_changes(ray_service(), ray_service(low=3)) == []
    assert cluster_changes(None, ray_service()) == []


def test_what_needs_a_new_cluster_is_named() -> None:
    changed = ray_service(image="shoal:2")
    changed["spec"]["rayClusterConfig"] |= {"rayVersion": "3", "authOptions": {"mode": "token"}}
    assert cluster_changes(ray_service(), changed) == [
        ".rayVersion",
        ".workerGroupSpecs[experts].image",
        ".authOptions",
    ]


def test_settings_differ_only_from_those_that_were_there() -> None:
    before, after = ray_service(), ray_service()
    after["spec"]["serveConfigV2"] = "applications: []"
    assert settings_differ(before, after)
    assert not settings_differ(before, copy.deepcopy(before))
    assert not settings_differ(None, after)
