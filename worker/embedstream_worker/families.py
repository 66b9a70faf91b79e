"""Families of models whose prompts stand on their model cards, and often nowhere else in their folders."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from embedstream_worker.engines.base import EngineInfo, Role
from embedstream_worker.model_settings import read_settings

_SEARCHING = "Represent this sentence for searching relevant passages: "
_TASK = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"


@dataclass(frozen=True)
class Family:
    """The prompts of one family; an empty one is none."""

    name: str
    """A pattern for the last part of a model's name."""
    types: str
    """A pattern for `model_type` in `config.json`: others of a like name are no kin."""
    document: str
    query: str
    source: str
    """The model card below https://huggingface.co/ that says so."""


FAMILIES = (
    Family(r"e5-.*instruct", "mistral|xlm-roberta", "", f"{_TASK} ", "intfloat/multilingual-e5-large-instruct"),
    Family(r"e5-(small|base|large)", "bert|xlm-roberta", "passage: ", "query: ", "intfloat/e5-base-v2"),
    Family(
        r"nomic-embed-text|modernbert-embed",
        "nomic_bert|bert|modernbert",
        "search_document: ",
        "search_query: ",
        "nomic-ai/nomic-embed-text-v1.5",
    ),
    Family(r"bge-(small|base|large)-en", "bert", "", _SEARCHING, "BAAI/bge-base-en-v1.5"),
    Family(
        r"bge-(small|base|large)-zh",
        "bert",
        "",
        "为这个句子生成表示以用于检索相关文章\N{FULLWIDTH COLON}",
        "BAAI/bge-base-zh-v1.5",
    ),
    Family(r"gte-qwen.*-instruct", "qwen2", "", f"{_TASK} ", "Alibaba-NLP/gte-Qwen2-1.5B-instruct"),
    Family(r"qwen3-embedding", "qwen3", "", _TASK, "Qwen/Qwen3-Embedding-0.6B"),
    Family(r"mxbai-embed-large", "bert", "", _SEARCHING, "mixedbread-ai/mxbai-embed-large-v1"),
    Family(r"arctic-embed-.*v2", "xlm-roberta|gte", "", "query: ", "Snowflake/snowflake-arctic-embed-l-v2.0"),
    Family(r"arctic-embed", "bert|nomic_bert", "", _SEARCHING, "Snowflake/snowflake-arctic-embed-m"),
    Family(r"uae-large", "bert", "", _SEARCHING, "WhereIsAI/UAE-Large-V1"),
    Family(
        r"embeddinggemma",
        "gemma3_text",
        "title: none | text: ",
        "task: search result | query: ",
        "google/embeddinggemma-300m",
    ),
)


def card_prompts(name: str, folder: Path) -> dict[Role, str]:
    """The prompts that the model's card asks for, by role; empty for a model of no known family.

    `name`: as the user gives it. A folder may be called anything, so the name that `config.json` keeps counts, too.

    Raises:
        ModelError: `config.json` is not readable.
    """
    config = folder / "config.json"
    settings = read_settings(config) if config.is_file() else {}
    names = [_last(name), _last(str(folder)), _last(str(settings.get("_name_or_path", "")))]
    for family in FAMILIES:
        found = any(re.search(rf"(?<![a-z0-9]){family.name}(?![a-z0-9])", each) for each in names)
        if found and re.fullmatch(family.types, str(settings.get("model_type"))):
            return {role: prompt for role, prompt in _by_role(family) if prompt}
    return {}


def missing(info: EngineInfo, role: Role) -> str:
    """A warning, for a role without a prompt in force, if the model's card wants one; else empty."""
    wanted = info.card_prompts.get(role)
    if not wanted:
        return ""
    quoted = shlex.quote(wanted) if wanted.isprintable() else "$" + repr(wanted)
    return (
        f"warning: no prompt is in force for the role {role}, and this model's card wants one in front of every text: "
        f"give it with --prompt {quoted}, or confirm that there is none with --prompt ''"
    )


def _by_role(family: Family) -> tuple[tuple[Role, str], ...]:
    return ("document", family.document), ("query", family.query)


def _last(name: str) -> str:
    """The last part of a name, path or folder of the hub's cache, in lower case."""
    path = Path(name)
    if path.parent.name == "snapshots":
        path = path.parent.parent
    return re.split(r"[/\\]|--", path.name.casefold())[-1]
