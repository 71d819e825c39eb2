"""The Prefect UI (V2, 3.9.1) in a real chromium: run graph, review report, form, answer.

`python -m tests.support.browser_walk URL RUN REVIEW FOLDER` takes the screenshots of docs/ from a running workspace.
"""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

TIMEOUT_MS = 90_000  # a loaded machine renders a page in tens of seconds
WIDTH = 1280  # pixels


@contextmanager
def open_browser():
    """Yield a page in ROPEWAY_CHROMIUM, in the system's chromium, or in the one that playwright installed."""
    path = os.environ.get("ROPEWAY_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses to start as root with one
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000}, color_scheme="light")
        page.set_default_timeout(TIMEOUT_MS)
        expect.set_options(timeout=TIMEOUT_MS)
        yield page
        browser.close()


def screenshot_run(page, url, run, picture):
    """Take a screenshot of a run's page with its graph; return the page's text."""
    page.goto(f"{url}/v2/runs/flow-run/{run}?tab=TaskRuns")
    expect(page.get_by_role("link", name="publish")).to_be_visible()
    page.locator("canvas").first.wait_for()
    page.wait_for_timeout(3000)  # the canvas of the graph has no event for "drawn"
    page.screenshot(path=picture)
    return page.get_by_role("main").inner_text() if page.get_by_role("main").count() else page.inner_text("body")


def screenshot_report(page, url, review, picture):
    """Take a screenshot of a review's report, opened from the run's artifacts; return the page's text."""
    page.goto(f"{url}/v2/runs/flow-run/{review}?tab=Artifacts")
    page.goto(url + page.get_by_role("link", name="laptop-review").get_attribute("href"))
    expect(page.get_by_role("heading", name="Lineage")).to_be_visible()
    page.wait_for_timeout(500)
    page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": 1700})
    return page.inner_text("body")


def fill_form(page, url, review, answer, picture):
    """Submit the form without a decision, expect the error, then fill it in, take a screenshot and submit it."""
    page.goto(f"{url}/v2/runs/flow-run/{review}")
    page.get_by_role("button", name="Open menu").click()
    page.get_by_role("menuitem", name="Resume").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Reviewer").fill(answer["reviewer"])
    dialog.get_by_role("button", name="Resume").click()
    # Half an answer is refused, and the form may be redrawn when the refusal arrives: fill it in after that.
    expect(page.get_by_text("'decision' is a required property")).to_be_visible()
    page.wait_for_timeout(1000)
    dialog.get_by_label("Reviewer").fill(answer["reviewer"])
    dialog.get_by_label("Select Decision").click()
    page.get_by_role("option", name=answer["decision"]).click()
    dialog.get_by_label("Comment").fill(answer["comment"])
    expect(dialog.get_by_label("Reviewer")).to_have_value(answer["reviewer"])
    page.screenshot(path=picture)
    dialog.get_by_role("button", name="Resume").click()
    expect(dialog).to_be_hidden()


def main(url, run, review, folder):
    answer = {"decision": "approve", "reviewer": "anna", "comment": "Better on both sources."}
    with open_browser() as page:
        screenshot_run(page, url, run, Path(folder) / "flow-run.png")
        screenshot_report(page, url, review, Path(folder) / "review-report.png")
        fill_form(page, url, review, answer, Path(folder) / "review-form.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
