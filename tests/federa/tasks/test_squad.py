"""SQuAD's scores: by hand from the definition, and by torchmetrics, which others wrote."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federa.tasks.squad import exact_match, f1, normalise


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Cat!", "cat"),
        ("  a  cat,\tan\ndog ", "cat dog"),
        ("Theatre another", "theatre another"),  # articles are whole words
        ("U.S.A.", "usa"),
        ("the-end", "theend"),  # punctuation goes before articles
        ("“quoted”", "“quoted”"),  # ASCII punctuation only
        ("the", ""),
    ],
)
def test_normalisation_by_its_definition(answer, normal):
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("predicted", "references", "exact", "overlap"),
    [
        ("the Denver Broncos", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos"], 0, 2 / 3),  # precision 1, recall 1/2
        ("in Denver", ["Paris", "Denver, Colorado", "Denver"], 0, 2 / 3),  # the best of 0, 1/2 and 2/3
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),  # as multisets: one cat, one dog
        ("London", ["Paris"], 0, 0),
        ("", ["Paris"], 0, 0),
        ("", [], 1, 1),  # no answer, and rightly so
        ("Paris", [], 0, 0),
        ("", ["the", "Paris"], 0, 0),  # a reference without words counts only where there is no other
        ("", ["the"], 1, 1),
    ],
)
def test_scores_by_hand(predicted, references, exact, overlap):
    assert exact_match(predicted, references) == exact
    assert f1(predicted, references) == pytest.approx(overlap, abs=1e-15)


WORDS = st.sampled_from(["the", "a", "cat", "Dog", "U.S.", "1,000", "-", "Élan", "end."])
ANSWERS = st.lists(WORDS, min_size=1, max_size=5).map(" ".join).filter(normalise)


@pytest.mark.exhaustive  # importing torchmetrics takes seconds
@settings(deadline=None)
@given(predicted=ANSWERS, references=st.lists(ANSWERS, min_size=1, max_size=3))
def test_scores_are_torchmetrics(predicted, references):
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    theirs = squad(
        {"prediction_text": predicted, "id": "1"},
        {"answers": {"text": references, "answer_start": [0] * len(references)}, "id": "1"},
    )
    assert 100 * exact_match(predicted, references) == theirs["exact_match"].item()
    assert 100 * f1(predicted, references) == pytest.approx(theirs["f1"].item(), rel=1e-5)
