"""What is asked of a cluster's workers before they get work; the real cluster is in tests/pipeline."""

import sys

import pytest

from ropeway.runtime.errors import ConfigError
from ropeway.stages.tokenize.cluster import check_workers, open_cluster


class Workers:
    """A client whose workers answer the probe as it is, but for what is wrong with one of them."""

    def __init__(self, **wrong):
        self.wrong = wrong

    def run(self, probe, path):
        answer = probe(path)
        return {"tcp://a:1": answer, "tcp://b:2": answer | self.wrong}


def test_workers_that_see_the_files_and_have_the_same_code_are_taken(tmp_path):
    check_workers(Workers(), tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"file": ""}, r"the worker tcp://b:2 does not see .*work; mount this workspace's file system"),
        ({"file": "another one"}, "does not see"),
        ({"code": "0" * 64}, r"tcp://b:2 has another version of code \(0000"),
        ({"code": "", "tokenizers": ""}, r"another version of code \(not installed, expected"),
        ({"tokenizers": "0.1"}, r"another version of tokenizers \(0.1, expected"),
    ],
)
def test_a_worker_that_would_make_other_bytes_is_named(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        check_workers(Workers(**wrong), tmp_path / "work")


def test_a_worker_without_this_package_can_answer(tmp_path, monkeypatch):
    answers = []

    class Bare(Workers):
        def run(self, probe, path):
            monkeypatch.setitem(sys.modules, "ropeway.stages.tokenize.units", None)
            answers.append(probe(path))
            monkeypatch.undo()
            return {"tcp://a:1": answers[0]}

    with pytest.raises(ConfigError, match="another version of code"):
        check_workers(Bare(), tmp_path)
    assert answers[0]["file"]


def test_without_distributed_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(ConfigError, match="`distributed` is not installed; run `make setup EXTRAS=cluster`"),
        open_cluster("tcp://127.0.0.1:1", tmp_path),
    ):
        pass
