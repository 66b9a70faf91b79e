"""The pages for people: what they show, what they let a key do, and that no text of a corpus becomes code in them."""

from __future__ import annotations

import re
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import serve_redis
from e2e.harness import fleet, wait_until
from gateway.conftest import Served

EVIL = "<script>alert(1)</script>\u202e"


class Page(HTMLParser):
    """What a reader of a page gets."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for found, attrs in self.tags if found == tag]


def page(client: httpx.Client, path: str, **params: Any) -> Page:
    answer = client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"].startswith("text/html")
    return Page(answer.text)


@pytest.fixture(scope="module")
def job(served: Served) -> str:
    """A finished job with rows that failed, and texts that would be code."""
    records = [{"id": f"r{number}", "text": f"text {number} {EVIL}" if number % 3 else ""} for number in range(30)]
    output = str(served.fleet.root / "shown.vectors")
    with served.http() as client:
        id: str = client.post("/jobs", json={"model": "hashing", "output": output, "records": records}).json()["job"]
        wait_until(lambda: client.get(f"/jobs/{id}").json()["state"] == "completed", "the job's end")
    return id


def test_the_fleet_has_queues_jobs_and_workers(served: Served, job: str) -> None:
    with served.http("read") as client:
        shown = page(client, "/")
    assert "Queue hashing" in shown.text
    assert "1 ready worker" in shown.text
    assert f"/page/jobs/{job}" in [link["href"] for link in shown.all("a")]
    bars = [bar for bar in shown.all("progress") if bar["aria-label"] == f"Progress of job {job}"]
    assert [bar["value"] for bar in bars] == ["1.0"]
    assert "hashing float32" in shown.text


def test_a_job_has_its_parts_workers_shards_and_failed_rows_by_kind(served: Served, job: str) -> None:
    with served.http("read") as client:
        shown = page(client, f"/page/jobs/{job}")
        errors = page(client, f"/page/jobs/{job}/errors", code="empty_text")
        other = page(client, f"/page/jobs/{job}/errors", code="other")
    for expected in ("completed", "100 %", "30 of 30", "empty_text : 10", "part-", "records", "Padding"):
        assert expected in shown.text, shown.text
    assert "records:1 r0 empty_text" in errors.text
    assert len(errors.all("tr")) == 11
    assert "None." in other.text
    assert not [link for link in shown.all("a") if (link["href"] or "").endswith(("/cancel", "/retry"))]


@pytest.mark.usefixtures("job")
def test_a_finished_dataset_is_searched_and_texts_are_shown_as_texts(served: Served) -> None:
    with served.http("read") as client:
        found = client.get(
            "/page/search", params={"output": str(served.fleet.root / "shown.vectors"), "q": f"text 1 {EVIL}"}
        )
        shown = Page(found.text)
        assert "1.000 r1 text 1 <script>alert(1)</script>" in shown.text
        assert "<script>alert" not in found.text
        assert "\u202e" not in found.text
        assert [each["src"] for each in shown.all("script")] == ["/page/static/page.js"]
        empty = page(client, "/page/search")
        assert str(served.fleet.root / "shown.vectors") in [each["value"] for each in empty.all("option")]


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("/etc", "outside"),
        ("{root}/nothing", "no such folder"),
        ("{root}/../x", "outside"),
        ("redis:?prefix=a:", "outside"),
    ],
    ids=["etc", "missing", "above", "redis"],
)
def test_what_lies_elsewhere_is_not_searched(served: Served, output: str, says: str) -> None:
    with served.http("read") as client:
        assert says in page(client, "/page/search", output=output.replace("{root}", str(served.fleet.root)), q="x").text


def test_nothing_on_a_page_needs_another_place_or_a_style_or_script_in_it(served: Served, job: str) -> None:
    with served.http("read") as client:
        for path in ("/", f"/page/jobs/{job}", f"/page/jobs/{job}/errors", f"/page/jobs/{job}/cancel", "/page/search"):
            source = client.get(path).text
            shown = Page(source)
            for tag, attrs in shown.tags:
                assert "style" not in attrs
                assert not [name for name in attrs if name.startswith("on")]
                for name in ("src", "href", "action"):
                    assert re.match(r"/[^/]|/$|#|data:,$", attrs.get(name) or "/"), (tag, attrs)
            assert shown.all("html")[0]["lang"] == "en"
            assert len(shown.all("h1")) == 1
            assert len(shown.all("main")) == 1
            assert all(
                label.get("for") in [each.get("id") for each in shown.all("input")] for label in shown.all("label")
            )
            assert all("scope" in each for each in shown.all("th"))
        for name in ("style.css", "page.js"):
            assert client.get(f"/page/static/{name}").status_code == 200
        assert client.get("/page/static/../page.py").status_code == 404


def test_a_job_is_cancelled_behind_a_confirmation_by_administrators_alone(served: Served, tmp_path: Path) -> None:
    with serve_redis() as redis, fleet(redis.url, tmp_path) as running:
        worker = running.start_worker()
        keys = str(served.fleet.root / "keys.txt")
        _, url = running.start_gateway("--api-key-file", keys, "--output-root", tmp_path)
        worker.send_signal(signal.SIGSTOP)
        headers = {"Authorization": f"Bearer {served.keys['admin']}"}
        with httpx.Client(base_url=url, headers=headers) as admin:
            body = {"model": "hashing", "output": str(tmp_path / "unwanted"), "records": ["x"]}
            id = admin.post("/jobs", json=body).json()["job"]
            reader = {"Authorization": f"Bearer {served.keys['read']}"}
            for headers, sees in (({}, True), (reader, False)):
                links = [link["href"] for link in Page(admin.get(f"/page/jobs/{id}", headers=headers).text).all("a")]
                assert (f"/page/jobs/{id}/cancel" in links) == sees
            asked = page(admin, f"/page/jobs/{id}/cancel")
            assert asked.all("form") == [{"method": "post", "action": f"/page/jobs/{id}/cancel"}]
            assert admin.get(f"/jobs/{id}").json()["verdict"] == ""
            assert admin.post(f"/page/jobs/{id}/cancel", headers=reader).status_code == 403
            elsewhere = {"Sec-Fetch-Site": "cross-site"}
            assert admin.post(f"/page/jobs/{id}/cancel", headers=elsewhere).status_code == 403
            done = admin.post(f"/page/jobs/{id}/cancel", headers={"Sec-Fetch-Site": "same-origin"})
            assert (done.status_code, done.headers["Location"]) == (303, f"/page/jobs/{id}")
            assert admin.get(f"/jobs/{id}").json()["verdict"] == "cancelled"


def test_what_is_not_there_is_a_page_too(served: Served) -> None:
    with served.http("read") as client:
        missing = client.get("/page/jobs/0000000000000000")
        assert missing.status_code == 404
        assert "no job 0000000000000000" in Page(missing.text).text
        assert client.get("/page/jobs/..%2f..%2fetc").status_code in (400, 404)
