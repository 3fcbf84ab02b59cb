"""What an API server's answers become."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.deploy.api import Cluster, Ref
from cluster.deploy.api_errors import (
    Conflict,
    Forbidden,
    Gone,
    NotFound,
    Refused,
    Unreachable,
    refusal,
)


def status(message: str, *causes: dict[str, str]) -> bytes:
    return json.dumps({"message": message, "details": {"causes": list(causes)}}).encode()


class TestRefusal:
    @pytest.mark.parametrize(
        ("code", "kind"), [(403, Forbidden), (404, NotFound), (410, Gone), (422, Refused)]
    )
    def test_kinds(self, code: int, kind: type[Refused]) -> None:
        error = refusal(code, status("no\n  way"))
        assert type(error) is kind
        assert str(error) == f"HTTP {code}: no way"

    @pytest.mark.parametrize("code", [429, 502, 503, 504])
    def test_what_may_pass_counts_as_unreachable(self, code: int) -> None:
        assert type(refusal(code, b"")) is Unreachable

    def test_conflicts_name_owner_and_field(self) -> None:
        causes = [
            {"reason": "FieldManagerConflict", "message": message, "field": ".spec.replicas"}
            for message in ('conflict with "kubectl-edit" using apps/v1', "conflict unexplained")
        ]
        error = refusal(409, status("Apply failed", *causes))
        assert isinstance(error, Refused)
        assert error.conflicts == (
            Conflict("kubectl-edit", ".spec.replicas"),
            Conflict("conflict unexplained", ".spec.replicas"),
        )

    @pytest.mark.parametrize("body", [b"<html>gateway</html>", b"[1]", b"\xff"])
    def test_a_body_that_is_no_status(self, body: bytes) -> None:
        assert str(refusal(500, body)).startswith("HTTP 500: ")

    def test_a_login_that_ran_out(self) -> None:
        assert "log in to the cluster anew" in str(refusal(401, status("Unauthorized")))


class FakeHttp:
    """Pods in two pages; nothing else exists."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []

    def call(self, method: str, path: str, query: dict[str, str] | None = None) -> dict[str, Any]:
        self.asked.append((path, dict(query or {})))
        if path == "/api/v1":
            pods = {"name": "pods", "kind": "Pod", "namespaced": True}
            return {"resources": [pods, {**pods, "name": "pods/log"}]}
        if path == "/api/v1/namespaces/here/pods":
            if (query or {}).get("continue") == "more":
                return {"items": [{"metadata": {"name": "b"}}], "metadata": {}}
            return {"items": [{"metadata": {"name": "a"}}], "metadata": {"continue": "more"}}
        raise NotFound(404, path)


@pytest.fixture
def http() -> FakeHttp:
    return FakeHttp()


@pytest.fixture
def cluster(http: FakeHttp) -> Cluster:
    made = Cluster.__new__(Cluster)
    made._http = http  # type: ignore[assignment]
    made._kinds = {}
    return made


def test_a_long_list_comes_in_pages(cluster: Cluster, http: FakeHttp) -> None:
    found = cluster.select("v1", "Pod", "here", "tier=experts")
    assert [(each["kind"], each["metadata"]["name"]) for each in found] == [
        ("Pod", "a"),
        ("Pod", "b"),
    ]
    assert [query.get("labelSelector") for _, query in http.asked[1:]] == ["tier=experts"] * 2


def test_a_group_is_asked_for_once(cluster: Cluster, http: FakeHttp) -> None:
    assert cluster.kind("v1", "Pod")
    assert cluster.kind("v1", "Secret") is None
    assert cluster.kind("example.com/v1", "Thing") is None
    assert cluster.kind("example.com/v1", "Thing") is None
    assert [path for path, _ in http.asked] == ["/api/v1", "/apis/example.com/v1"]


def test_what_a_cluster_lacks_is_absent_and_cannot_be_written(cluster: Cluster) -> None:
    thing = Ref("example.com/v1", "Thing", "x", "here")
    assert cluster.get(thing) is None
    assert cluster.select("example.com/v1", "Thing") == []
    assert not cluster.delete(thing)
    metadata = {"name": "x", "namespace": "here"}
    with pytest.raises(NotFound, match=r"this cluster has no Thing of example\.com/v1"):
        cluster.apply({"apiVersion": "example.com/v1", "kind": "Thing", "metadata": metadata})
