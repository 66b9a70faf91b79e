"""The pages for people, rendered here; a little JavaScript asks for them again. Nothing is loaded from elsewhere."""

from __future__ import annotations

from http import HTTPStatus
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Form, Path, Query, Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError
from starlette.responses import HTMLResponse, RedirectResponse, Response

from embedstream.api.interactive import make_request
from embedstream.errors import EmbedstreamError, OutputError, UsageError
from embedstream.masking import mask
from embedstream.terminal import printable, printable_lines
from embedstream_gateway.api_keys import ApiKey, Scope
from embedstream_gateway.jobs import JobBody, blocking, submit
from embedstream_gateway.page_view import MOST_LISTED, JobView, queue_view
from embedstream_gateway.refusals import Refusal
from embedstream_gateway.services import Services, services

router = APIRouter(include_in_schema=False)

JobId = Annotated[str, Path(pattern="^[0-9a-f]{16}$")]

ERRORS_AT_ONCE = 50

HITS = 10


def _shown(value: object) -> object:
    """What comes from corpora and Redis may hold characters that reverse text, or none at all."""
    return printable_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_templates = Environment(
    loader=PackageLoader("embedstream_gateway"),
    autoescape=True,
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@router.get("/")
async def fleet(request: Request) -> Response:
    """Queues, their jobs and workers."""
    desk = services(request).desk
    queues = await blocking(desk.queues)
    coordinators = await blocking(desk.coordinators)
    return _page(
        "fleet.html",
        here="fleet",
        live=True,
        queues=[queue_view(look, jobs) for look, jobs in queues],
        coordinators=[f"{each.name}, {each.processes} processes" for each in coordinators],
        may_start=bool(coordinators) and _may(request, "submit"),
    )


@router.get("/page/jobs/{id}")
async def job(id: JobId, request: Request) -> Response:
    """One job."""
    desk = services(request).desk
    found = await blocking(lambda: desk.details(id))
    view, spec = JobView(found.look), found.look.status.spec
    parts = [
        {"name": name, "state": "being read" if number in found.unsealed else "read"}
        for number, name in enumerate(spec.parts[:MOST_LISTED])
    ]
    shards = [] if found.manifest is None else found.manifest.shards
    return _page(
        "job.html",
        here="job",
        live=True,
        job=view,
        notes=view.notes,
        facts=view.facts,
        shares=view.shares,
        parts=parts,
        more_parts=max(0, len(spec.parts) - MOST_LISTED),
        shards=[
            {
                "name": shard.file or shard.name,
                "rows": f"{shard.rows:,}",
                "failed": f"{shard.failed:,}",
                "bytes": f"{shard.bytes:,}",
            }
            for shard in shards[:MOST_LISTED]
        ],
        more_shards=max(0, len(shards) - MOST_LISTED),
        kinds=[(code, f"{count:,}") for code, count in found.kinds],
        searchable=found.manifest is not None and bool(found.manifest.rows),
        may_change=_may(request, "admin"),
    )


@router.get("/page/jobs/{id}/errors")
async def errors(
    id: JobId,
    request: Request,
    offset: Annotated[int, Query(ge=0, le=2**40)] = 0,
    code: Annotated[str, Query(max_length=64)] = "",
) -> Response:
    """Failed rows with their originals, all or of one kind."""
    desk, reading = services(request).desk, services(request).reading

    def read() -> list[Any]:
        rows = (row for row in desk.errors(id) if code in ("", row.code))
        return list(islice(rows, offset, offset + ERRORS_AT_ONCE + 1))

    rows = await blocking(read, reading)
    shown = rows[:ERRORS_AT_ONCE]
    return _page(
        "errors.html",
        here="job",
        live=False,
        id=id,
        code=code,
        rows=shown,
        first=offset + 1,
        last=offset + len(shown),
        more=len(rows) > len(shown),
    )


_ACTIONS = {
    "cancel": ("Cancel", "Workers have five seconds to write what they have computed. What is written stays."),
    "retry": ("Go on with", "Coordinators read the corpus again; what is written is not done again."),
}


@router.get("/page/jobs/{id}/cancel")
@router.get("/page/jobs/{id}/retry")
async def confirm(id: JobId, request: Request) -> Response:
    """Asks before anything is done."""
    action = request.url.path.rpartition("/")[2]
    verb, what = _ACTIONS[action]
    desk = services(request).desk
    await blocking(lambda: desk.look(id))
    return _page("confirm.html", here="job", live=False, id=id, action=action, verb=verb, what=what)


@router.post("/page/jobs/{id}/cancel")
async def cancel(id: JobId, request: Request) -> Response:
    """Does it; a job that has ended meanwhile is shown as it is."""
    desk = services(request).desk
    await blocking(lambda: desk.cancel(id))
    return RedirectResponse(f"/page/jobs/{id}", HTTPStatus.SEE_OTHER)


@router.post("/page/jobs/{id}/retry")
async def retry(id: JobId, request: Request) -> Response:
    """Goes on with it."""
    desk = services(request).desk
    await blocking(lambda: desk.retry(id))
    return RedirectResponse(f"/page/jobs/{id}", HTTPStatus.SEE_OTHER)


@router.get("/page/search")
async def search(
    request: Request,
    output: Annotated[str, Query(max_length=4096)] = "",
    q: Annotated[str, Query(max_length=2000)] = "",
) -> Response:
    """The nearest texts of a finished dataset."""
    serving, hits, trouble = services(request), None, ""
    queues = await blocking(serving.desk.queues)
    outputs = {job.status.spec.output for _, jobs in queues for job in jobs if job.status.state.ended}
    if output and q:
        try:
            hits = await _hits(serving, output, q)
        except (Refusal, EmbedstreamError) as error:
            trouble = str(error)
    return _page(
        "search.html",
        here="search",
        live=False,
        output=output,
        question=q,
        outputs=sorted(each for each in outputs if mask(each) == each and serving.desk.allows(each)),
        hits=hits,
        trouble=trouble,
    )


async def _hits(serving: Services, output: str, question: str) -> list[dict[str, str]]:
    """Raises `Refusal`, `EmbedstreamError`."""
    desk = serving.desk
    manifest = await blocking(lambda: desk.manifest(output))
    model = await serving.fleet.find(desk.queue_of(manifest), "dense")
    rows = await serving.gathering.run(model, make_request((question,), "query", None, None, None))
    numbers, made_by = rows.numbers, rows.fingerprint
    found = await blocking(lambda: desk.search(output, manifest, numbers, made_by, HITS), serving.reading)
    return [
        {"score": f"{hit.score:.3f}", "id": hit.id, "text": printable(hit.text or "(no text is kept)", 2000)}
        for hit in found
    ]


@router.get("/page/new")
async def new(request: Request) -> Response:
    """Asks for a new job."""
    return await _asking(request, {"corpus": "", "output": "", "model": ""})


@router.post("/page/new")
async def start(
    request: Request,
    corpus: Annotated[str, Form()] = "",
    output: Annotated[str, Form()] = "",
    model: Annotated[str, Form()] = "",
) -> Response:
    """Starts it and shows it, or asks again and says what is wrong."""
    parts = [line.strip() for line in corpus.splitlines() if line.strip()]
    try:
        body = JobBody.model_validate({"corpus": parts, "output": output.strip(), "model": model})
        job = await submit(body, services(request))
    except ValidationError as error:
        first = error.errors()[0]
        trouble, status = f"{'.'.join(map(str, first['loc']))}: {first['msg']}", HTTPStatus.BAD_REQUEST
    except Refusal as error:
        trouble, status = str(error), error.status
    except (UsageError, OutputError) as error:
        trouble, status = str(error), HTTPStatus.BAD_REQUEST
    else:
        return RedirectResponse(f"/page/jobs/{job}", HTTPStatus.SEE_OTHER)
    return await _asking(request, {"corpus": corpus, "output": output, "model": model}, trouble, status)


async def _asking(
    request: Request, given: dict[str, str], trouble: str = "", status: HTTPStatus = HTTPStatus.OK
) -> Response:
    """The form of a new job, with what was given."""
    models = [model.queue for model in await services(request).fleet.models()]
    page = _page("new.html", here="new", live=False, models=models, given=given, trouble=trouble)
    page.status_code = status
    return page


def _may(request: Request, scope: Scope) -> bool:
    key: ApiKey | None = getattr(request.state, "key", None)
    return key is None or key.may(scope)


def _page(name: str, **values: object) -> HTMLResponse:
    return HTMLResponse(_templates.get_template(name).render(**values))
