"""API keys: their file, its changes, the environment variable, `shoal key new`, the refusal to
listen beyond loopback without any."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import API_KEY_VARIABLE, Auth, ConfigError, parse_config
from cluster.frontend.api_keys import (
    LOOK_PERIOD_S,
    MAX_FILE_BYTES,
    MAX_KEYS,
    ApiKey,
    KeyRing,
    digest_of,
    open_keys,
    read_keys,
)

ALICE, BOB = "alice-has-a-long-key", "bob's#key-0123456789"
ALICE_SHA256 = hashlib.sha256(ALICE.encode()).hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def names_of(keys: KeyRing, *texts: str) -> list[str | None]:
    found = [keys.find(text) for text in texts]
    return [key and key.name for key in found]


# ---- the file


def test_lines_with_hashed_and_plain_keys(path: Path) -> None:
    path.write_text(
        "\ufeff# who  what  key\r\n\r\n"
        f"alice inference sha256:{ALICE_SHA256.upper()}\r\n"
        f"  # bob is new\n\tbob.b-2  admin,metrics   {BOB}"
    )
    assert read_keys(path) == (
        ApiKey("alice", ("inference",), bytes.fromhex(ALICE_SHA256)),
        ApiKey("bob.b-2", ("metrics", "admin"), hashlib.sha256(BOB.encode()).digest()),
    )


def test_admin_includes_the_other_scopes(path: Path) -> None:
    path.write_text(f"alice metrics {ALICE}\nbob admin {BOB}")
    allowed = [
        [scope for scope in ("inference", "metrics", "admin") if key.allows(scope)]  # type: ignore[arg-type]
        for key in read_keys(path)
    ]
    assert allowed == [["metrics"], ["inference", "metrics", "admin"]]


SECRET = "a-key-that-nobody-may-see"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (f"alice {SECRET}", "found 2 fields, expected `name scopes key`"),
        (f"alice inference {SECRET} # mine", "found 5 fields"),
        (f"alice inference, metrics {SECRET}", "found 4 fields"),
        (f"alice Inference {SECRET}", "scopes are inference, metrics, admin"),
        (f"alice inference,root {SECRET}", "scopes are inference, metrics, admin"),
        (f"alice , {SECRET}", "scopes are inference, metrics, admin"),
        (f"inference {SECRET} alice-in-wonderland", "scopes are inference, metrics, admin"),
        (f"{SECRET}! inference {SECRET}", "a name is 1 to 64 letters"),
        ("alice inference fifteen-chars-x", "it must be 16 to 256 printable ASCII characters"),
        (f"alice inference {SECRET * 11}", "it must be 16 to 256 printable ASCII characters"),
        (f"alice inference {SECRET}\u00e9", "it must be 16 to 256 printable ASCII characters"),
        (f"alice inference {SECRET}\x00", "it must be 16 to 256 printable ASCII characters"),
        (f"alice inference sha256:{SECRET}", "after sha256: there must be 64 hex digits"),
        (f"alice inference sha256:{ALICE_SHA256[1:]}", "after sha256: there must be 64 hex digits"),
        (f"bob inference {SECRET}", "the name is already in line 2"),
        (f"alice admin {BOB}", "the key is already in line 2"),
    ],
)
def test_a_bad_line_is_named_and_not_shown(path: Path, line: str, fault: str) -> None:
    path.write_text(f"# keys\nbob inference {BOB}\n{line}\n")
    with pytest.raises(ConfigError) as error:
        read_keys(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and fault in str(error.value)
    assert SECRET not in str(error.value) and BOB not in str(error.value)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "no key in it"),
        (b"# nobody\n", "no key in it"),
        (b"a inference \xff\xfe", "not UTF-8"),
        (b"#" * (MAX_FILE_BYTES + 1), "larger than 1048576 bytes"),
        (
            b"".join(b"n%d metrics sha256:%064x\n" % (i, i) for i in range(MAX_KEYS + 1)),
            "1001 keys",
        ),
    ],
    ids=["empty", "comments", "binary", "huge", "many"],
)
def test_a_file_without_usable_keys_is_refused(path: Path, data: bytes, fault: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=fault):
        read_keys(path)


def test_a_file_that_cannot_be_read_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"auth.keys_file = {path}: No such file"):
        read_keys(path)
    with pytest.raises(ConfigError, match="Is a directory"):
        read_keys(tmp_path)


# ---- finding


def test_a_key_is_compared_with_all_keys(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(f"alice inference {ALICE}\nbob inference {BOB}\neve admin {'e' * 16}")
    keys, compared = KeyRing(path), []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    assert names_of(keys, ALICE, "nobody's key") == ["alice", None]
    assert len(compared) == 2 * 3


def test_nothing_but_the_key_itself_is_the_key(path: Path) -> None:
    path.write_text(f"alice inference {ALICE}\nbob inference {'?' * 16}")
    others = ["", ALICE[:-1], ALICE + " ", ALICE.upper(), f"sha256:{ALICE_SHA256}", ALICE_SHA256]
    assert names_of(KeyRing(path), *others, "\udc80" * 16) == [None] * 7


# ---- changes


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """Keys of a file under a clock that the test moves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = Clock()
        path.write_text(f"alice inference {ALICE}")
        self.keys = KeyRing(path, clock=self.clock)

    def names(self, after_s: float) -> list[str | None]:
        self.clock.now += after_s
        return names_of(self.keys, ALICE, BOB)


def test_a_changed_file_is_read_within_a_second_and_not_before(path: Path) -> None:
    watched = Watched(path)
    path.write_text(f"bob inference {BOB}")
    assert watched.names(after_s=LOOK_PERIOD_S - 0.01) == ["alice", None]
    assert watched.names(after_s=0.01) == [None, "bob"]


def test_a_mounted_secret_changes_by_its_link(tmp_path: Path) -> None:
    for folder, line in ("1", f"alice inference {ALICE}"), ("2", f"bob inference {BOB}"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "keys").write_text(line)
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "keys").symlink_to("..data/keys")
    clock = Clock()
    keys = KeyRing(tmp_path / "keys", clock=clock)
    assert names_of(keys, ALICE, BOB) == ["alice", None]
    (tmp_path / "new").symlink_to("2")
    os.replace(tmp_path / "new", tmp_path / "..data")
    clock.now += LOOK_PERIOD_S
    assert names_of(keys, ALICE, BOB) == [None, "bob"]


def test_an_emptied_file_takes_all_keys_back(path: Path) -> None:
    watched = Watched(path)
    path.write_text("# the only key leaked\n")
    assert watched.names(after_s=LOOK_PERIOD_S) == [None, None]
    path.write_text(f"bob inference {BOB}")
    assert watched.names(after_s=LOOK_PERIOD_S) == [None, "bob"]


def test_a_damaged_file_keeps_the_keys_and_is_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched(path)
    path.write_text(f"bob inference {BOB}\nbob root {SECRET}")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert watched.names(after_s=LOOK_PERIOD_S) == ["alice", None]
    assert len(caplog.records) == 1 and f"{path}, line 2: scopes are" in caplog.text
    path.unlink()
    assert watched.names(after_s=LOOK_PERIOD_S) == ["alice", None]
    path.write_text(f"bob inference {BOB}")
    assert watched.names(after_s=LOOK_PERIOD_S) == [None, "bob"]
    assert not any(text in caplog.text for text in (SECRET, ALICE, BOB))


# ---- the environment


def test_no_key_anywhere_means_no_keys() -> None:
    assert open_keys(Auth(), {}) is None


def test_the_variable_is_one_more_admin_key(path: Path) -> None:
    path.write_text(f"alice inference {ALICE}")
    alone = open_keys(Auth(), {API_KEY_VARIABLE: BOB})
    both = open_keys(Auth(keys_file=path), {API_KEY_VARIABLE: BOB})
    assert alone and both
    assert names_of(alone, ALICE, BOB) == [None, API_KEY_VARIABLE]
    assert names_of(both, ALICE, BOB) == ["alice", API_KEY_VARIABLE]
    found = both.find(BOB)
    assert found and found.scopes == ("admin",)


@pytest.mark.parametrize("text", ["", "short", "sixteen and more", "x" * 257])
def test_an_unusable_variable_opens_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match="SHOAL_API_KEY: a key is 16 to 256") as error:
        open_keys(Auth(), {API_KEY_VARIABLE: text})
    assert not text or text not in str(error.value)


# ---- shoal key new


def test_key_new_prints_a_line_that_a_server_accepts(path: Path) -> None:
    results = [
        CliRunner().invoke(app, ["key", "new", "--scopes", "inference,metrics", "--name", "alice"]),
        CliRunner().invoke(app, ["key", "new"]),
    ]
    path.write_text("".join(result.stdout for result in results))
    texts = [result.stderr.split()[-1] for result in results]
    assert texts[0] not in path.read_text() and texts[0] != texts[1]
    found = [KeyRing(path).find(text) for text in texts]
    assert [key and key.scopes for key in found] == [("inference", "metrics"), ("inference",)]
    assert [key and key.name for key in found][0] == "alice"


def test_key_new_as_json() -> None:
    body = json.loads(CliRunner().invoke(app, ["key", "new", "--json"]).stdout)
    assert body["line"].endswith(digest_of(body["key"]).hex())
    assert body["name"] == body["line"].split()[0]


@pytest.mark.parametrize("args", [["--scopes", "root"], ["--scopes", ""], ["--name", "a b"]])
def test_key_new_refuses_what_no_server_would_read(args: list[str]) -> None:
    result = CliRunner().invoke(app, ["key", "new", *args])
    assert result.exit_code == 2 and result.stderr.startswith("shoal: ") and not result.stdout


# ---- shoal serve


@pytest.fixture
def taken_port() -> Iterator[str]:
    """`shoal serve` gets as far as finding that this port is taken."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))  # noqa: S104
        taken.listen()
        yield str(taken.getsockname()[1])


@pytest.mark.parametrize("mode", [[], ["--inline"]])
def test_serve_refuses_to_be_reached_without_keys(
    taken_port: str, mode: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    args = ["serve", "--host", "0.0.0.0", "--http-port", taken_port, *mode]  # noqa: S104
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert "listen.host = '0.0.0.0'" in result.stderr and "shoal key new" in result.stderr


@pytest.mark.parametrize("why", ["file", "variable", "insecure", "loopback"])
def test_serve_goes_on_with_keys_or_when_told_so(
    taken_port: str, path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text(f"alice inference {ALICE}")
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    if why == "variable":
        monkeypatch.setenv(API_KEY_VARIABLE, BOB)
    more = {"file": ["--keys-file", str(path)], "insecure": ["--insecure"]}.get(why, [])
    host = "127.0.0.1" if why == "loopback" else "0.0.0.0"  # noqa: S104
    args = ["serve", "--host", host, "--http-port", taken_port, *more]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2 and f"listen.http_port = {taken_port}" in result.stderr


def test_serve_refuses_a_damaged_file_before_anything_starts(path: Path) -> None:
    path.write_text("alice inference")
    result = CliRunner().invoke(app, ["serve", "--keys-file", str(path)])
    assert result.exit_code == 2 and f"{path}, line 1: " in result.stderr


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"listen": {"host": "10.1.2.3"}}, None),
        ({"enable_operations": False}, False),
        ({"enable_operations": True, "listen": {"host": "10.1.2.3"}}, True),
    ],
)
def test_operations_are_on_by_themselves_on_loopback(
    settings: dict[str, object], expected: bool | None
) -> None:
    config = parse_config({"model": "m", **settings}).served_here()
    assert config.enable_operations is expected
