"""Addresses without their secrets: for messages, logs, manifests and whatever else may be seen by others."""

from __future__ import annotations

import re
from urllib.parse import unquote

HIDDEN = "***"

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,31}://|(?:^|(?<==))(?:rediss?|unix|s3):/?", re.IGNORECASE)
_HUB = re.compile(r"hf://datasets/[\w.-]+/[\w.-]+@[^/@\s]+(?:/[^@\s]*)?")
"""Of a data set: what is behind the @ is its revision."""
_SECRET = re.compile(r"pass|pwd|secret|token|credential|signature|(?:access|api)[_-]?key", re.IGNORECASE)
_WRONG_DATABASE = re.compile(r"^([^/?#]*)/+(?!\d*/?(?:[?#]|$))[^?#]*")
_SETTING = re.compile(r"([?&;])([^=&;?#]+)=([^&#]*)")
_IN_TEXT = re.compile(r"(?:[a-z][a-z0-9+.-]{0,31}://|\b(?:rediss?|unix|s3):)\S*", re.IGNORECASE)
_BEHIND = ")]}>'\"`,;:.…"
"""What a sentence puts behind an address."""

_PLACEHOLDER = "PASSWORD"
"""How our own messages say where a password goes."""


def mask(address: str) -> str:
    """An address without its password, however wrong it is spelled; what is no address comes back as it is.

    All between `://` and the last `@` is hidden, as a password may hold any character that should have been escaped;
    a user's name is shown only where the whole is well-formed. Values of settings with a secret's name are hidden, and
    a database that is not a number, as nobody knows what it was meant to be.
    """
    scheme = _SCHEME.search(address)
    if scheme is None or _HUB.fullmatch(address):
        return address
    head, rest = address[: scheme.end()], address[scheme.end() :]
    login, at, place = rest.rpartition("@")
    if at and any(_is_secret(setting) for setting in _SETTING.finditer(login)):
        return head + HIDDEN  # the @ may be the secret's own
    user, colon, password = login.partition(":")
    if at:
        plain = colon and password and not re.search(r"[/?#@\s]", login)
        if not (plain and password == _PLACEHOLDER):
            login = f"{user}:{HIDDEN}" if plain else HIDDEN if login else ""
    elif head.endswith("//") and not _is_server(re.split(r"[/?#]", place, maxsplit=1)[0]):
        return head + HIDDEN  # what stands for the port is a password without its @
    if head.lower().endswith(("redis://", "rediss://")):
        place = _WRONG_DATABASE.sub(rf"\1/{HIDDEN}", place)
    return head + login + at + _SETTING.sub(_without_value, place)


def mask_text(text: str) -> str:
    """A text in which every address is masked, as far as it holds no blank."""
    return _IN_TEXT.sub(_masked, text)


def _masked(found: re.Match[str]) -> str:
    address = found[0].rstrip(_BEHIND)
    return mask(address) + found[0][len(address) :]


def _is_server(authority: str) -> bool:
    """Whether it reads as host or host:port; the host may be an IPv6 address in brackets."""
    _, colon, port = authority.rpartition(":")
    return not colon or port.isdecimal() or not port or authority.endswith("]")


def _is_secret(setting: re.Match[str]) -> bool:
    name, value = unquote(setting[2]), setting[3]
    return _SECRET.search(name) is not None or (name == "db" and not value.isdecimal())


def _without_value(setting: re.Match[str]) -> str:
    return f"{setting[1]}{setting[2]}={HIDDEN}" if _is_secret(setting) else setting[0]
