"""The page in a browser, by clicks: a job watched to its end, its errors, a search, and another job cancelled."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
import pytest
from conftest import serve_redis
from e2e.harness import Fleet, fleet

pytest.importorskip("playwright")

from playwright.sync_api import Browser, Page, expect, sync_playwright

expect.set_options(timeout=60_000)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

SIZES: dict[str, tuple[int, int, Literal["light", "dark"]]] = {
    "wide": (1280, 800, "light"),
    "phone": (390, 844, "dark"),
}

TEXTS = [f"text {number} with <b>signs</b> in it" for number in range(200)]


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, str]]:
    root = tmp_path_factory.mktemp("looked-at")
    with serve_redis() as redis, fleet(redis.url, Path(root)) as running:
        running.start_coordinator()
        _, url = running.start_gateway("--output-root", root)
        yield running, url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # The sandbox needs rights that containers do not give, and only our own page is loaded.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=list(SIZES))
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page of a size, in the dark or not, on which nothing goes wrong unseen."""
    width, height, scheme = SIZES[request.param]
    faults: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if "Content Security" in said.text else None)
    yield page
    context.close()
    assert not faults


def fits(page: Page) -> bool:
    """Whether a page need not be moved sideways to be read, once its style is there."""
    page.wait_for_load_state()
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_a_job_is_started_watched_looked_into_searched_and_another_cancelled(
    looked_at: tuple[Fleet, str], page: Page, request: pytest.FixtureRequest
) -> None:
    running, url = looked_at
    worker, name = running.start_worker(), request.node.callspec.id
    corpus, output, endless = (running.root / f"{name}{ending}" for ending in (".jsonl", ".vectors", ".more"))
    rows = [{"id": f"r{number}", "text": "" if number == 5 else text} for number, text in enumerate(TEXTS)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))

    page.goto(url)
    page.get_by_role("link", name="Start a job").click()
    page.get_by_label("Corpus").fill(str(corpus))
    page.get_by_label("Output").fill("/elsewhere")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("/elsewhere is outside")
    expect(page.get_by_label("Corpus")).to_have_value(str(corpus))
    assert fits(page)
    page.get_by_label("Output").fill(str(output))
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Job")
    expect(page.locator(".state").first).to_have_text("completed")
    expect(page.locator("#job")).to_contain_text("200 of 200")
    assert fits(page)

    page.get_by_role("link", name="empty_text").click()
    expect(page.get_by_role("row")).to_have_count(2)
    expect(page.locator("tbody")).to_contain_text('"id": "r5"')
    assert fits(page)
    page.get_by_role("link", name=re.compile("[0-9a-f]{16}")).click()

    page.get_by_role("link", name="Search in this dataset").click()
    expect(page.get_by_label("Dataset")).to_have_value(str(output))
    page.get_by_label("Question").fill(TEXTS[7])
    page.get_by_role("button", name="Search").click()
    expect(page.get_by_role("listitem").first).to_contain_text("1.000 r7")
    expect(page.get_by_role("listitem").first).to_contain_text(TEXTS[7])
    assert fits(page)

    worker.send_signal(signal.SIGSTOP)
    body = {"model": "hashing", "output": str(endless), "corpus": [str(corpus)]}
    job = httpx.post(f"{url}/jobs", json=body, timeout=60).json()["job"]
    page.get_by_role("link", name="Fleet").click()
    expect(page.get_by_role("link", name=job)).to_be_visible()
    assert fits(page)
    page.get_by_role("link", name=job).click()
    page.get_by_role("link", name="Cancel…").click()
    page.get_by_role("button", name="Cancel it").click()
    expect(page.locator(".state").first).to_have_text("cancelled")
    assert httpx.get(f"{url}/jobs/{job}").json()["state"] == "cancelled"
    worker.kill()
