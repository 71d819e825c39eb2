"""A person's way through the Prefect UI (V2, 3.9.1), made by a real chromium: run graph, report, form, answer.

`python -m tests.support.browser_walk URL RUN REVIEW FOLDER` makes the pictures of docs/ from a running workspace.
"""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

SECONDS = 90_000  # a loaded machine draws a page in tens of seconds


@contextmanager
def open_browser():
    """Yield a page of Debian's chromium, or of the one that playwright installed."""
    path = os.environ.get("ROPEWAY_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses to start as root with one
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        page = browser.new_page(viewport={"width": 1400, "height": 1100}, color_scheme="light")
        page.set_default_timeout(SECONDS)
        expect.set_options(timeout=SECONDS)
        yield page
        browser.close()


def look_at_run(page, url, run, picture):
    """Open a run's page and wait for its graph and its tasks' names."""
    page.goto(f"{url}/v2/runs/flow-run/{run}?tab=TaskRuns")
    expect(page.get_by_role("link", name="publish")).to_be_visible()
    page.locator("canvas").first.wait_for()
    page.wait_for_timeout(3000)  # the graph is drawn on a canvas, which tells nobody when it is done
    page.screenshot(path=picture)
    return page.get_by_role("main").inner_text() if page.get_by_role("main").count() else page.inner_text("body")


def look_at_report(page, url, review, picture):
    """Open the report of a review from the run's artifacts; return its text."""
    page.goto(f"{url}/v2/runs/flow-run/{review}?tab=Artifacts")
    page.goto(url + page.get_by_role("link", name="laptop-review").get_attribute("href"))
    expect(page.get_by_role("heading", name="Lineage")).to_be_visible()
    page.wait_for_timeout(500)
    page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": 1400, "height": 1800})
    return page.inner_text("body")


def fill_form(page, url, review, answer, picture):
    """Open the form, find that it takes no empty answer, fill it in and send it."""
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
        look_at_run(page, url, run, Path(folder) / "flow-run.png")
        look_at_report(page, url, review, Path(folder) / "review-report.png")
        fill_form(page, url, review, answer, Path(folder) / "review-form.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
