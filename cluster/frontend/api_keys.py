"""API keys: made, read from a file that may change while the server runs, found again.

A line of the file is `name scopes key`; `#` begins a comment line. The key stands there hashed, as
`shoal key new` prints it, or as it is:

    # name   scopes             key
    alice    inference          sha256:<64 hex digits>
    grafana  metrics,inference  any-16-or-more-printable-characters
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from cluster.config import API_KEY_VARIABLE, Auth, ConfigError

logger = logging.getLogger(__name__)

KeyScope = Literal["inference", "metrics", "admin"]
"""What a key is for; admin includes the others."""
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
MAX_KEYS = 1000
"""Every request is compared with all of them: 0.3 ms."""
MAX_FILE_BYTES = 2**20
LOOK_PERIOD_S = 1.0
"""How often the file is looked at, at most."""
_HASHED = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[!-~]{16,256}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_WHAT_KEYS_ARE = "16 to 256 printable ASCII characters without spaces; `shoal key new` makes one"


@dataclass(frozen=True)
class ApiKey:
    """Who may do what; of the key itself only its SHA-256."""

    name: str
    scopes: tuple[KeyScope, ...]
    digest: bytes = field(repr=False)

    def allows(self, scope: KeyScope) -> bool:
        """Whether the key is for this."""
        return scope in self.scopes or "admin" in self.scopes

    @property
    def line(self) -> str:
        """The key's line in a file, hashed."""
        return f"{self.name} {','.join(self.scopes)} {_HASHED}{self.digest.hex()}"


def new_key(scopes: str, name: str | None = None) -> tuple[str, ApiKey]:
    """A random key, which nothing else knows, and what to keep of it. Raises ConfigError."""
    text = f"shoal_{secrets.token_urlsafe(32)}"
    name = name or f"key-{secrets.token_hex(4)}"
    try:
        return text, _api_key(name, scopes, text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def open_keys(auth: Auth, environment: Mapping[str, str] = os.environ) -> KeyRing | None:
    """The configured keys; None if there are none at all. Raises ConfigError."""
    text = environment.get(API_KEY_VARIABLE)
    if text is None and auth.keys_file is None:
        return None
    if text is None:
        return KeyRing(auth.keys_file)
    if not _KEY.fullmatch(text):  # empty too: a Secret that went missing must not open everything
        raise ConfigError(f"{API_KEY_VARIABLE}: a key is {_WHAT_KEYS_ARE}, or unset the variable")
    return KeyRing(auth.keys_file, (ApiKey(API_KEY_VARIABLE, ("admin",), digest_of(text)),))


class KeyRing:
    """The keys that are valid now. Used from one thread."""

    def __init__(
        self,
        path: Path | None,
        fixed: tuple[ApiKey, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keys of a file, and `fixed` ones. Raises ConfigError."""
        self._path = path
        self._fixed = fixed
        self._clock = clock
        self._looked_s = clock()
        self._version = _version_of(path)
        self._from_file = read_keys(path) if path else ()

    def find(self, text: str) -> ApiKey | None:
        """The key that a client presents; all are compared, whichever it is."""
        self._look()
        digest, found = digest_of(text), None
        for key in (*self._from_file, *self._fixed):
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _look(self) -> None:
        """Read a changed file; a damaged one leaves the keys as they are, an empty one has taken
        them all back."""
        now = self._clock()
        if self._path is None or now - self._looked_s < LOOK_PERIOD_S:
            return
        self._looked_s = now
        version = _version_of(self._path)  # before reading: a change meanwhile is seen next time
        if version == self._version:
            return
        self._version = version
        try:
            self._from_file = _read(self._path)
        except ConfigError as error:
            logger.error("%s. The keys read before stay valid.", error)
        else:
            logger.info("%s: %d keys are valid now", self._path, len(self._from_file))


def digest_of(text: str) -> bytes:
    """SHA-256 of a key. Keys are random and long: a slow hash would add nothing."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """All keys of a file, at least one. Raises ConfigError with file, line, fault and fix."""
    keys = _read(path)
    if not keys:
        raise ConfigError(f"{path}: no key in it; `shoal key new` makes one")
    return keys


def _read(path: Path) -> tuple[ApiKey, ...]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; is it a keys file?")
        return _parse(data.decode("utf-8-sig"), path)
    except OSError as error:
        raise ConfigError(
            f"auth.keys_file = {path}: {error.strerror}; give a readable file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; is it a keys file?") from None


def _parse(text: str, path: Path) -> tuple[ApiKey, ...]:
    keys: dict[int, ApiKey] = {}  # by number of the line
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        try:
            key = _parse_line(fields)
            _check_new(key, keys)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        keys[number] = key
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"{path}: {len(keys)} keys; at most {MAX_KEYS}, remove some")
    return tuple(keys.values())


def _parse_line(fields: list[str]) -> ApiKey:
    """Messages never show a field: with one left out or swapped, any of them may be the key."""
    if len(fields) != 3:
        raise ValueError(
            f"found {len(fields)} fields, expected `name scopes key`; `shoal key new` prints a line"
        )
    name, scopes, key = fields
    if not key.startswith(_HASHED):
        return _api_key(name, scopes, key)
    digest = key.removeprefix(_HASHED)
    if not _DIGEST.fullmatch(digest):
        raise ValueError(
            f"after {_HASHED} there must be 64 hex digits; `shoal key new` prints them"
        )
    return ApiKey(_check_name(name), _parse_scopes(scopes), bytes.fromhex(digest))


def _api_key(name: str, scopes: str, text: str) -> ApiKey:
    if not _KEY.fullmatch(text):
        raise ValueError(f"the key is not usable: it must be {_WHAT_KEYS_ARE}")
    return ApiKey(_check_name(name), _parse_scopes(scopes), digest_of(text))


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("a name is 1 to 64 letters, digits, '.', '_' or '-'; choose another one")
    return name


def _parse_scopes(text: str) -> tuple[KeyScope, ...]:
    given = text.split(",")
    if not set(given) <= set(SCOPES):
        raise ValueError(
            f"scopes are {', '.join(SCOPES)}, with commas between several; correct them"
        )
    return tuple(scope for scope in SCOPES if scope in given)


def _check_new(key: ApiKey, keys: Mapping[int, ApiKey]) -> None:
    for number, other in keys.items():
        if key.name == other.name or key.digest == other.digest:
            what = "name" if key.name == other.name else "key"
            raise ValueError(f"the {what} is already in line {number}; remove one of the two")


def _version_of(path: Path | None) -> tuple[int, ...] | None:
    """Changes with the file behind the path: a mounted Secret is a link to another one then."""
    try:
        stat = os.stat(path) if path else None
    except OSError:
        stat = None
    return stat and (stat.st_dev, stat.st_ino, stat.st_ctime_ns, stat.st_size)
