"""Whether a model's folder is still the one that a finished dataset was made with."""

from __future__ import annotations

from embedstream.errors import UsageError
from embedstream.jobs import JobSpec, model_folder
from embedstream.records import Manifest
from embedstream.server.connection import mask
from embedstream_producer.plan import CountingProcess


def refuse_changed_model(manifest: Manifest, spec: JobSpec) -> None:
    """Raise `UsageError` if files of the model have changed since."""
    if is_other_model(manifest, spec):
        raise UsageError(
            f"{mask(spec.output)}: is finished, and files of model {spec.model} have changed since: embed its corpus "
            f"again (--update), write to another output (-o), restore the model, or keep what is there "
            f"(--trust-unchanged)"
        )


def is_other_model(manifest: Manifest, spec: JobSpec) -> bool:
    """Whether the fingerprint of the model's files is none of the manifest's.

    Not compared: a model that is no folder of this machine, or a fingerprint that cannot be taken here.
    """
    folder = model_folder(spec.model)
    made_with = {recipe.fingerprint for recipe in manifest.recipes}
    if folder is None or not folder.is_dir() or not made_with:
        return False
    with CountingProcess(spec) as process:
        now = process.about.fingerprint
    return bool(now) and not any(each.startswith(now) for each in made_with)  # int8 adds to it
