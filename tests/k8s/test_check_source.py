"""Reading files: what cannot be read becomes a finding with its line, bad paths a ConfigError."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from cluster.config import ConfigError
from cluster.deploy.check.checks import check_manifests
from cluster.deploy.check.source import load, load_text

GOOD = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: a\n"


def told(text: str) -> list[str]:
    return [str(finding) for finding in check_manifests(load_text(text, "a.yaml"))]


def test_objects_know_their_lines() -> None:
    first, second = load_text(f"{GOOD}---\n{GOOD}  labels:\n    x: y\n", "a.yaml")
    assert first.where(("metadata", "name")) == ("a.yaml:4", "ConfigMap/a")
    assert second.where(("metadata", "labels", "x")) == ("a.yaml:11", "ConfigMap/a")
    assert second.where(("metadata", "annotations", "z"))[0] == "a.yaml:8"


def test_lists_are_taken_apart() -> None:
    text = "kind: List\nitems:\n- {kind: A}\n- kind: B\n  metadata: {name: b}\n"
    assert [each.kind for each in load_text(text, "a")] == ["A", "B"]
    assert load_text(text, "a")[1].where(("metadata", "name"))[0] == "a:5"


def test_empty_documents_are_nothing() -> None:
    assert load_text("---\n# nothing\n---\n", "a.yaml") == []
    assert told("") == []


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("a: [b\n", "a.yaml:2: document: no YAML: "),
        (f"{GOOD}kind: Pod\n", "a.yaml:5: Pod/a: kind is given twice; remove one"),
        ("- 1\n", "a.yaml:1: object/?: a list, not a mapping; "),
        ("text\n", "a.yaml:1: object/?: a str, not a mapping; "),
        (f"{GOOD}data: {{8000: x}}\n", 'data: key 8000 is no string; write "8000" in quotes'),
        (f"{GOOD}data: {{a: 2026-01-02}}\n", "a.yaml:5: ConfigMap/a data.a: YAML reads 2026-01-02"),
        (f"{GOOD}data: {{a: .nan}}\n", "data.a: nan is no number of JSON"),
        ("kind: Pod\n", "a.yaml:1: Pod/? apiVersion: missing; add apiVersion"),
        ("a: &a [*a]\n", "its aliases contain themselves"),
        ("[" * 3000, "a.yaml: document: nested too deeply; check its indentation"),
        ("? [a]\n: 1\n", "a.yaml:1: document: no YAML: "),
        ("a: 2026-99-99\n", "a.yaml: document: no YAML: month must be in 1..12"),
        ("a: \x07\n", "a.yaml: document: no YAML: unacceptable character"),
    ],
)
def test_broken_documents_are_findings(text: str, finding: str) -> None:
    assert any(finding in line for line in told(text)), told(text)


def test_aliases_that_multiply_are_refused() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "too many values" in told("\n".join(rows))[0]


def test_good_documents_before_a_broken_one_are_read() -> None:
    found = load_text(f"{GOOD}---\na: [b\n", "a.yaml")
    assert found[0].kind == "ConfigMap"
    assert len(found[1].faults) == 1


def test_files_folders_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yml").write_text(GOOD)
    (tmp_path / "note.txt").write_text("not read")
    monkeypatch.setattr("sys.stdin", io.StringIO(GOOD))
    files = [each.file for each in load([tmp_path, tmp_path / "b.yml", "-"])]
    assert files == [
        str(tmp_path / "b.yml"),
        str(tmp_path / "sub" / "a.yaml"),
        str(tmp_path / "b.yml"),
        "<stdin>",
    ]


@pytest.mark.parametrize(
    ("files", "path", "says"),
    [
        ({}, "no", "no such file or folder"),
        ({"x/a.txt": ""}, "x", r"no \.yaml or \.yml files"),
        ({"x/kustomization.yaml": ""}, "x", "render it first, kubectl kustomize"),
        ({"x/base/kustomization.yaml": ""}, "x", "render an overlay"),
    ],
)
def test_paths_that_cannot_be_read(
    tmp_path: Path, files: dict[str, str], path: str, says: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        load([tmp_path / path])


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="cannot be read"):
        load([tmp_path / "a.yaml"])
