"""Bulk text embedding over Redis Streams. `Client` and `AsyncClient` are the Python API."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedstream.api.async_client import AsyncClient, AsyncJob
    from embedstream.api.client import Client
    from embedstream.api.embeddings import SparseVector
    from embedstream.api.job import Job
    from embedstream.api.reading import open_dataset
    from embedstream.errors import (
        BrokerError,
        CorpusChanged,
        CorpusDiffers,
        EmbedstreamError,
        InputError,
        JobCancelled,
        JobFailed,
        JobUnknown,
        OutputError,
        RequestError,
        SpecDiffers,
        UsageError,
    )
    from embedstream.jobs import JobSpec, JobState, JobStatus

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "BrokerError",
    "Client",
    "CorpusChanged",
    "CorpusDiffers",
    "EmbedstreamError",
    "InputError",
    "Job",
    "JobCancelled",
    "JobFailed",
    "JobSpec",
    "JobState",
    "JobStatus",
    "JobUnknown",
    "OutputError",
    "RequestError",
    "SparseVector",
    "SpecDiffers",
    "UsageError",
    "__version__",
    "open_dataset",
]

_HOMES = {
    "AsyncClient": "api.async_client",
    "AsyncJob": "api.async_client",
    "Client": "api.client",
    "Job": "api.job",
    "JobSpec": "jobs",
    "JobState": "jobs",
    "JobStatus": "jobs",
    "SparseVector": "api.embeddings",
    "open_dataset": "api.reading",
}


def __getattr__(name: str) -> object:
    # On first use: pyarrow and redis take a quarter of a second, which `--help` should not cost.
    if name not in __all__:
        raise AttributeError(f"module 'embedstream' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"embedstream.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value
