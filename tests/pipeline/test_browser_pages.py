"""The data report of records with markup in a real browser: its own script runs, and nothing of a record does."""

import pytest

from ropeway.models.conversation import Conversation
from tests.support.prepared_run import TALKS, make_prepared

pytestmark = pytest.mark.browser
EVIL = "window.acted = true"
TEXT = f"<script>{EVIL}</script>"


def test_a_page_runs_its_own_script_and_no_other(tmp_path):
    from tests.support.browser_walk import open_browser

    said = Conversation(("What is a rope?", TEXT), "Be kind.")
    workspace, _ = make_prepared(tmp_path, talks=[said, *TALKS])
    with open_browser() as page:
        refused = []
        page.on("console", lambda message: refused.append(message.text))
        page.goto(workspace.report.as_uri())
        assert page.evaluate("typeof open_") == "function"  # the page's own script
        assert TEXT in page.locator("main").text_content()  # of a record, as text
        assert page.locator("script").count() == 1
        page.evaluate(
            """code => {
                const image = document.createElement("img"); image.setAttribute("onerror", code);
                image.src = "data:image/png;base64,AA"; document.body.append(image);
                const script = document.createElement("script");
                script.textContent = code; document.body.append(script);
            }""",
            EVIL,
        )
        page.wait_for_function("document.querySelectorAll('script').length == 2")
        page.wait_for_timeout(500)  # a handler that would run has no event of its own
        assert page.evaluate("window.acted") is None
        assert any("Content Security Policy" in text for text in refused)
