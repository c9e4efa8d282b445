"""Entities: tags to spans and back, and their scores."""

from hypothesis import given
from hypothesis import strategies as st

from raybert.records import finite
from raybert.tasks.entities import Span, entity_scores, spans_of_tags, tags_of_words

TAGS = st.lists(st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]), max_size=12)


def reference(tags):
    """Entities as seqeval's get_entities finds them: a chunk ends and begins at each change."""
    chunks, begin, kind = [], None, None
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if begin is not None and (prefix in "BO" or name != kind):
            chunks.append((begin, index, kind))
            begin = None
        if prefix != "O" and begin is None:
            begin, kind = index, name
    return chunks


@given(TAGS)
def test_spans_are_the_entities_of_seqeval(tags):
    assert [tuple(span) for span in spans_of_tags(tags)] == reference(tags)


@given(TAGS)
def test_tags_of_spans_give_the_same_spans(tags):
    spans = spans_of_tags(tags)
    words = [(index, index + 1) for index in range(len(tags))]
    assert spans_of_tags(tags_of_words(words, spans)) == spans


def test_a_word_belongs_to_the_span_that_it_overlaps():
    words = [(0, 2), (3, 4), (4, 5), (6, 9), (9, 9)]
    assert tags_of_words(words, [Span(3, 5, "A"), Span(7, 9, "B")]) == [
        "O",
        "B-A",
        "I-A",
        "B-B",
        "O",
    ]


def test_adjacent_spans_of_one_type_stay_two():
    words = [(0, 2), (3, 5)]
    assert tags_of_words(words, [Span(0, 2, "A"), Span(3, 5, "A")]) == ["B-A", "B-A"]


def test_scores_count_exact_matches_of_span_and_type():
    expected = [[Span(0, 2, "PER"), Span(3, 4, "LOC")], [Span(0, 1, "LOC")]]
    predicted = [[Span(0, 2, "PER"), Span(3, 4, "PER")], [Span(0, 2, "LOC"), Span(5, 6, "LOC")]]
    scores = entity_scores(expected, predicted)
    assert scores["precision"] == 1 / 4
    assert scores["recall"] == 1 / 3
    assert scores["f1"] == 2 * 1 / (4 + 3)
    assert scores["per_class"]["PER"] == {
        "precision": 0.5,
        "recall": 1.0,
        "f1": 2 / 3,
        "support": 1,
    }
    assert scores["per_class"]["LOC"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2}
    assert scores["f1_macro"] == 1 / 3


def test_a_score_of_no_entity_is_no_number():
    for texts in ([[]], []):
        scores = finite(entity_scores(texts, texts))
        assert scores == {
            **dict.fromkeys(("precision", "recall", "f1", "f1_macro")), "per_class": {},
        }  # fmt: skip
    found = finite(entity_scores([[]], [[Span(0, 1, "PER")]]))
    assert (found["precision"], found["recall"], found["f1"]) == (0.0, None, None)


@given(st.lists(TAGS, max_size=4))
def test_a_perfect_prediction_scores_one(texts):
    spans = [spans_of_tags(tags) for tags in texts]
    assert finite(entity_scores(spans, spans))["f1"] == (1.0 if any(spans) else None)
