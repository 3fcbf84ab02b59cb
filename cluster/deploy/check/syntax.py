"""How Kubernetes writes names, labels, quantities and durations."""

from __future__ import annotations

import re

LABEL_PART = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
DNS_1035 = r"[a-z]([-a-z0-9]*[a-z0-9])?"
QUANTITY = re.compile(
    r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))((?:[eE][+-]?\d{1,3})|[KMGTPE]i|[numkMGTPE]|)", re.ASCII
)
SUFFIX = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3} | {
    unit: 1000.0 ** (power + 1) for power, unit in enumerate("kMGTPE")
}
BINARY = {f"{unit}i": 1024.0 ** (power + 1) for power, unit in enumerate("KMGTPE")}
GO_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)", re.ASCII)
SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def is_label_key(key: str) -> bool:
    """`name` or `prefix/name`, the prefix a DNS subdomain."""
    prefix, slash, name = key.rpartition("/")
    dns = rf"{DNS_LABEL}(\.{DNS_LABEL})*"
    if slash and not (len(prefix) <= 253 and re.fullmatch(dns, prefix)):
        return False
    return len(name) <= 63 and re.fullmatch(LABEL_PART, name) is not None


def is_label_value(value: str) -> bool:
    """At most 63 of A-Z a-z 0-9 - _ . with a letter or digit at both ends; may be empty."""
    return not value or (len(value) <= 63 and re.fullmatch(LABEL_PART, value) is not None)


def is_dns_1035(name: str) -> bool:
    """Lower case letters, digits and hyphens, a letter first."""
    return len(name) <= 63 and re.fullmatch(DNS_1035, name) is not None


def is_dns_label(name: str) -> bool:
    """Lower case letters, digits and hyphens, at most 63."""
    return len(name) <= 63 and re.fullmatch(DNS_LABEL, name) is not None


def is_port_name(name: str) -> bool:
    """At most 15 of a-z 0-9 -, with a letter, no hyphen at an end nor two in a row."""
    return (
        0 < len(name) <= 15
        and re.fullmatch(DNS_LABEL, name) is not None
        and "--" not in name
        and any(char.isalpha() for char in name)
    )


def quantity(value: object) -> float | None:
    """`4`, `500m`, `16Gi` as a number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    match = QUANTITY.fullmatch(str(value))
    if match is None:
        return None
    number, suffix = match.groups()
    if suffix[:1] in ("e", "E") and len(suffix) > 1:
        return float(number + suffix)
    return float(number) * (BINARY | SUFFIX)[suffix]


def duration_s(text: str) -> float | None:
    """Go's `2h`, `1h30m`, or plain seconds; None if it is neither."""
    if re.fullmatch(r"-?\d{1,12}", text, re.ASCII):
        return float(text)
    parts = GO_DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * SECONDS[unit] for number, unit in parts)


def version(text: str) -> tuple[int, ...]:
    """`2.60.0` as (2, 60, 0); empty if it is no version."""
    match = re.match(r"v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text, re.ASCII)
    return tuple(int(part or 0) for part in match.groups()) if match else ()
