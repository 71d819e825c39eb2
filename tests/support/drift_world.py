"""Versions as the flow publishes them, each with the data profile of texts that a test states."""

from ropeway.config.sections import DriftLimits
from ropeway.data.data_profile import FILE
from ropeway.orchestration.publish import publish_package
from ropeway.orchestration.revision import Revision
from ropeway.runtime.manifest import write_json, write_manifest
from tests.support.data_profiles import profile_texts
from tests.support.gate_limits import make_limits
from tests.support.registry_world import make_pages

COMMIT = Revision("a" * 40, ())
LIMITS = DriftLimits(
    max_psi=0.25, max_js_divergence=0.1, max_share_change=0.1, max_size_ratio=3.0, min_seen_share=None, window=4
)
ENGLISH = [f"the lamp number {n} is lit and the sea is calm" for n in range(400)]
RUSSIAN = [f"лампа номер {n + 1000} горит сегодня и море спокойно весь день до вечера" for n in range(400)]


class Profile:
    max_length = 512

    def __init__(self, limits=LIMITS):
        self.gate = make_limits(drift=limits)


def make_drifting(workspace, number, texts, *, limits=LIMITS):
    """Publish a package whose bytes tell its number and whose data are these texts; None: a version without profile."""
    loss = 5.0 - number / 100
    workspace.package.mkdir(parents=True, exist_ok=True)
    write_json(workspace.package / "weights.json", {"loss": loss})
    write_manifest(workspace.package, {})
    metrics = {"sources": {"docs": {"base": {"loss": 8.0}, "tuned": {"loss": loss}}}, "validation": "rows"}
    write_json(workspace.evaluation, {**metrics, "mean": {"base": 8.0, "tuned": loss}})
    workspace.pages.mkdir(exist_ok=True)
    (workspace.pages / FILE).unlink(missing_ok=True)
    if texts is not None:
        write_json(workspace.pages / FILE, profile_texts(texts))
    make_pages(workspace.package, workspace.pages, f"# {number}\n")
    return publish_package(workspace, Profile(limits), COMMIT, lambda *_: None)
