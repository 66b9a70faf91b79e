"""What the code may import, beyond what import-linter sees: function-level imports count here, too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import redis

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "embedstream": ROOT / "embedstream",
    "embedstream_producer": ROOT / "producer" / "embedstream_producer",
    "embedstream_worker": ROOT / "worker" / "embedstream_worker",
    "embedstream_coordinator": ROOT / "coordinator" / "embedstream_coordinator",
    "embedstream_gateway": ROOT / "gateway" / "embedstream_gateway",
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            name = ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
            found[name] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that a file imports, wherever it does, but for those that only types need."""
    tree = ast.parse(path.read_text("utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_file_imports_itself_by_way_of_others() -> None:
    known = modules()
    graph = {name: {found for found in imports(path, known) if found in known} for name, path in known.items()}
    assert len(graph) > 200
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


MAY_TALK_TO_REDIS = (
    "embedstream.server",
    "embedstream.queue",
    "embedstream.dataset.redis_hashes",  # an output, on a server of its own
    "embedstream_coordinator.rq_types",  # RQ's queue and keys
    "embedstream_coordinator.rq_keys",
)


def talk_to_redis(path: Path) -> Iterator[str]:
    """Where a file uses a client of Redis: redis-py for more than its exceptions, or the client of a broker."""

    def is_exception(name: str) -> bool:
        kind = getattr(redis, name, None)
        return name == "exceptions" or (isinstance(kind, type) and issubclass(kind, redis.RedisError))

    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Attribute(value=ast.Name(id="redis"), attr=name) if not is_exception(name):
                yield f"redis.{name}"
            case ast.Attribute(attr="client"):
                yield ast.unparse(node)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "redis" and module != "redis.exceptions":
                yield f"from {module}"
            case ast.Import(names=names):
                yield from (each.name for each in names if each.name.startswith("redis."))


def test_only_the_queue_and_what_connects_use_a_client_of_redis() -> None:
    found = {name: found for name, path in modules().items() if (found := sorted({*talk_to_redis(path)}))}
    assert {name for name in found if name.startswith("embedstream.queue")}
    strangers = {name: uses for name, uses in found.items() if not name.startswith(MAY_TALK_TO_REDIS)}
    assert strangers == {}
