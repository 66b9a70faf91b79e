"""What a request needs to be allowed to do, by its method and path."""

from __future__ import annotations

import re
from typing import Literal

from embedstream_gateway.api_keys import Scope

Need = Scope | Literal["none", "any"]
"""none: no key; any: a key, whatever its scopes."""

_GET = "GET|HEAD"

_RULES: tuple[tuple[str, str, Need], ...] = (
    (_GET, r"/health|/healthz|/readyz", "none"),
    (_GET, r"/v1/models(/.*)?|/info", "any"),
    ("POST", r"/v1/embeddings|/v1/rerank|/v2/.*", "embed"),
    ("POST", r"/embed|/embed_sparse|/embed_all|/rerank|/predict|/similarity|/tokenize", "embed"),
    (".*", r"/v1/files(/.*)?|/v1/batches(/.*)?", "submit"),
    ("POST", r"/jobs|/page/new", "submit"),  # `/jobs/ID/retry` is for administrators
    (_GET, r".*", "read"),
)


def needed(method: str, path: str) -> Need:
    """The first rule that fits; what no rule names is for administrators."""
    for methods, paths, need in _RULES:
        if re.fullmatch(methods, method) and re.fullmatch(paths, path):
            return need
    return "admin"
