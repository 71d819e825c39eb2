import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.data import words
from ropeway.data.words import hash_grams, hash_words, is_short

TEXT = st.text(alphabet="aB9é,.-'\n xyz\u0301ßÄ", max_size=60)


def split(text):
    """The words as a plain regular expression finds them."""
    import unicodedata

    return re.findall(r"[^\W_\u0301]+", unicodedata.normalize("NFC", text).lower())


@settings(deadline=None)  # the first builds the table of code points
@given(st.lists(TEXT, max_size=6))
def test_words_are_equal_exactly_where_a_regular_expression_says_so(texts):
    found = hash_words([text.replace("\u0301", "") for text in texts])
    plain = [split(text.replace("\u0301", "")) for text in texts]
    assert np.diff(found.offsets).tolist() == [len(each) for each in plain]
    flat = [word for each in plain for word in each]
    assert len(set(flat)) == len(set(found.values.tolist()))
    assert len({*zip(flat, found.values.tolist(), strict=True)}) == len(set(flat))


@settings(deadline=None)
@given(st.lists(TEXT, max_size=6), st.integers(1, 5), st.booleans())
def test_grams_are_equal_exactly_where_runs_of_words_are(texts, n, mark_short):
    texts = [text.replace("\u0301", "") for text in texts]
    runs = []
    for each in map(split, texts):
        own = [tuple(each[at : at + n]) for at in range(len(each) - n + 1)]
        runs.append(own or ([tuple(each)] if each else []))
    found = hash_grams(texts, n, mark_short=mark_short)
    if mark_short:
        assert is_short(found.values).tolist() == [len(run) < n for each in runs for run in each]
    assert np.diff(found.offsets).tolist() == [len(each) for each in runs]
    flat = [run for each in runs for run in each]
    assert len({*zip(flat, found.values.tolist(), strict=True)}) == len(set(flat)) == len(set(found.values.tolist()))


def test_case_punctuation_blanks_and_normal_form_do_not_count():
    same = ["The café — isn't it?", "the  CAFE\u0301,\nisn't (it)", "<the> café isn\u2019t it"]
    first, *others = (hash_words([text]).values.tolist() for text in same)
    assert others == [first, first]


def test_scripts_without_blanks_are_read_sign_by_sign():
    assert len(hash_words(["猫は魚を食べる", "मैं हिन्दी"]).values) == 7 + 2


def test_a_long_document_is_hashed_in_pieces_with_the_same_words(monkeypatch):
    text = " ".join(f"word{n % 97}" for n in range(5000))
    whole = hash_words([text, "end"])
    monkeypatch.setattr(words, "_CHUNK", 1000)
    apart = hash_words([text, "end"])
    assert apart.values.tolist() == whole.values.tolist()
    assert apart.offsets.tolist() == whole.offsets.tolist() == [0, 5000, 5001]


def test_text_without_blanks_is_cut_and_ends():
    assert len(hash_words(["x" * 300_000]).values) == 3


@pytest.mark.parametrize("texts", [[], [""], ["", "!?"], ["\ud800"]])
def test_nothing_has_no_words(texts):
    assert len(hash_words(texts).values) == len(hash_grams(texts, 3).values) == 0
    assert len(hash_words(texts).offsets) == len(texts) + 1


def test_hashes_are_the_same_in_every_process():
    program = "from ropeway.data.words import hash_grams\nprint(hash_grams(['Same everywhere, always'], 2).values)"
    again = [
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert again == [f"{hash_grams(['Same everywhere, always'], 2).values}\n"] * 2


@settings(max_examples=10)
@given(st.integers(2, 40))
def test_words_in_another_order_are_other_grams(count):
    there, back = (" ".join(f"w{n}" for n in order) for order in (range(count), range(count, 0, -1)))
    grams = hash_grams([there, back], 2)
    assert len(set(grams.values.tolist())) == 2 * (count - 1)
