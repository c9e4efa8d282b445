"""Progress: a live line on a terminal, plain lines in a log, nothing on standard output."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.errors import printable
from raybert.terminal import display as module
from raybert.terminal.display import Display
from raybert.terminal.formats import clock, escape_controls

TRAIN = {
    "kind": "train",
    "step": 1200,
    "total_steps": 4800,
    "loss": 3.25,
    "lr": 5e-4,
    "tokens_per_second": 12345.6,
    "step_seconds": 0.5,
    "data_wait": 0.0,
    "mfu": None,
}


#: What changes the direction of a text: all that Unicode names Bidi_Control.
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@given(st.text() | st.text(BIDI + "\u2028\u2029a\x1b", min_size=1))
def test_no_text_controls_the_terminal(text):
    for shown in (escape_controls(text), printable(text, None)):
        assert not {c for c in shown if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
        assert not {c for c in shown if unicodedata.category(c) in ("Zl", "Zp")}
        assert not set(BIDI) & set(shown)
    assert "\n" not in printable(text, None)
    assert escape_controls(escape_controls(text)) == escape_controls(text)
    if text.isprintable():
        assert escape_controls(text) == printable(text, None) == text


def test_labels_and_names_are_shown_without_their_escape_sequences(capsys):
    display = Display()
    display._live = True
    label = "pos\x1b]0;owned\x07\x1b[2J\x9b31m\r"
    with display.stage("evaluate"):
        display.print(f"label {label}")
        display.progress(f"label {label}")
        display.forward(f"label {label}")
        display.forward(f"\x1flabel {label}")
    shown = capsys.readouterr().err
    assert shown.count(r"pos\x1b]0;owned\x07\x1b[2J\x9b31m\r") == 4
    assert set(re.findall("\x1b.{3}", shown)) <= {"\x1b[2K"} and "\x9b" not in shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (9.6, "0:10"), (75, "1:15"), (3599.4, "59:59"), (3661, "1:01:01"), (-3, "0:00")],
)
def test_durations_are_formatted_as_minutes_or_hours(seconds, shown):
    assert clock(seconds) == shown


def test_a_line_of_training_shows_step_and_remaining_time(capsys):
    display = Display()
    with display.stage("pretrain"):
        display._last_plain = 0.0
        display.record(TRAIN)
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert "step 1,200/4,800  loss 3.250  lr 5.0e-04  12,346 tokens/s  ETA 30:00" in line
    assert "mfu" not in line
    assert "waiting" not in line


def test_a_line_of_training_shows_mfu_and_the_wait_for_data(capsys):
    display = Display()
    with display.stage("pretrain"):
        display._last_plain = 0.0
        display.record({**TRAIN, "mfu": 0.42, "data_wait": 0.1, "total_steps": None})
    line = capsys.readouterr().err.splitlines()[-1]
    assert "mfu 42%" in line
    assert "waiting for data 20%" in line
    assert "ETA" not in line


def test_a_line_of_training_names_the_rank_that_waits_and_the_slowest(capsys):
    display = Display()
    ranks = {"data_wait_max": 0.2, "data_wait_rank": 3}
    own = {"own_seconds": 0.2, "own_seconds_max": 0.4, "own_seconds_rank": 3}
    for more in ({**ranks, **own}, {**ranks, "data_wait_rank": 0}, {**own, "own_seconds": 0.39}):
        with display.stage("pretrain"):
            display._last_plain = 0.0
            display.record({**TRAIN, **more})
    both, first, alike = [x for x in capsys.readouterr().err.splitlines() if "1,200" in x]
    assert "waiting for data 40% (rank 3)" in both and "rank 3 2.0x slower" in both
    assert "waiting for data 40%" in first and "rank" not in first
    assert "waiting" not in alike and "rank" not in alike


def test_an_undefined_loss_can_be_shown(capsys):
    display = Display()
    with display.stage("pretrain"):
        display._last_plain = 0.0
        display.record({**TRAIN, "loss": float("nan")})
    assert "loss none" in capsys.readouterr().err


def test_a_log_gets_a_line_every_few_seconds(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    display = Display()
    with display.stage("corpus"):
        for _ in range(100):
            now[0] += 1.0
            display.progress("working")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 100 // module.PLAIN_SECONDS
    assert re.fullmatch(r"corpus\s+1:40  working", lines[-1])


def test_evaluations_and_events_are_permanent_lines(capsys):
    display = Display()
    guesses = [{"token": "movie", "probability": 0.5}, {"token": "film", "probability": 0.25}]
    with display.stage("pretrain"):
        display.record(
            {
                "kind": "eval",
                "step": 7,
                "loss": 2.5,
                "unigram_loss": 6.0,
                "fillings": [{"text": "a [MASK]", "tokens": guesses}],
            }
        )
        display.record({"kind": "event", "step": 8, "event": "start", "attempt": 1})
        display.record({"kind": "event", "step": 9, "event": "skipped step", "message": "oh"})
    err = capsys.readouterr().err
    assert "step      7  held-out loss 2.5000  (unigram 6.0000)" in err
    assert "a [MASK]  ->  movie 0.50, film 0.25" in err
    assert "step      9  oh" in err
    assert "step      8" not in err


def test_records_of_checkpoints_are_not_shown(capsys):
    display = Display()
    with display.stage("pretrain"):
        capsys.readouterr()
        display.record(
            {"kind": "checkpoint", "step": 8, "stalled": 0.1, "written": 2.0, "bytes": 9}
        )
    assert capsys.readouterr() == ("", "")


def test_a_quiet_display_writes_nothing(capsys):
    display = Display(quiet=True)
    with display.stage("corpus"):
        display.progress("working")
        display.print("done")
        display.record(TRAIN)
    assert capsys.readouterr() == ("", "")


def test_markup_in_a_line_is_printed_as_text(capsys):
    display = Display()
    display.print("I saw this [MASK] and [bold]it[/bold] was [/x] good")
    assert "this [MASK] and [bold]it[/bold] was [/x] good" in capsys.readouterr().err


def test_without_a_terminal_a_panel_is_a_line(capsys):
    display = Display()
    with display.stage("tune"):
        display._last_plain = 0.0
        display.panel("a table", "3/12 trials")
    out, err = capsys.readouterr()
    assert out == ""
    assert "tune" in err and "3/12 trials" in err
    assert "a table" not in err


def test_a_panel_is_rewritten_on_a_terminal_and_lines_stay(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = Display()
    assert display._live
    with display.stage("tune"):
        display.panel("first table", "1/12 trials")
        display.print("trial 0000 is over")
        display.panel("second table", "2/12 trials")
    out, err = capsys.readouterr()
    assert out == ""
    for words in ("first table", "trial 0000 is over", "second table", "2/12 trials"):
        assert words in err


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ({"metric": "rmse", "rmse": 90.5, "spearman": 0.5}, "held-out loss 0.5000  rmse 90.5000"),
        ({"accuracy": 0.875}, "held-out loss 0.5000  accuracy 0.8750"),  # of an earlier version
        ({"metric": "loss"}, "held-out loss 0.5000"),
        ({"unigram_loss": 6.5}, "held-out loss 0.5000  (unigram 6.5000)"),
    ],
)
def test_an_evaluation_shows_the_metric_that_selects(capsys, scores, shown):
    display = Display()
    with display.stage("finetune"):
        display.record({"kind": "eval", "step": 9, "loss": 0.5, "score": 1.0, **scores})
    assert capsys.readouterr().err.splitlines()[-1].endswith(shown)


def test_what_takes_long_is_shown_again_while_nothing_newer_comes(capsys, monkeypatch):
    """Ray and its workers start silently: the time shows that the command is alive."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "TICK_SECONDS", 0.001)
    display, shown = Display(), ""
    with display.stage("corpus", "starting Ray"):
        for seconds in (0, 10, 20):
            now[0] = 1000.0 + seconds
            while f"corpus      0:{seconds:02}  starting Ray" not in shown:
                shown += capsys.readouterr().err
        display.progress("reading")
        now[0] = 1031.0
        while "corpus      0:31  reading" not in shown:
            shown += capsys.readouterr().err
    assert len(shown.splitlines()) == 4
    now[0] = 2000.0
    assert display._text is None  # the thread has ended with the stage
