"""The number of steps that minutes become, computed on simulated clocks."""

from types import SimpleNamespace

import pytest

from raybert.train.budget import StepBudget
from raybert.train.settings import TrainConfig
from raybert.train.state import Progress

TASK = SimpleNamespace(steps_per_epoch=50, tokens_per_epoch=5000)


def measure(step_seconds, *, slow_first=0.0, begin=None, **settings):
    """Take steps of a duration until the speed is measured; returns the budget and progress."""
    progress = begin or Progress()
    budget = StepBudget(TrainConfig(**settings), TASK, progress)
    assert not budget.begin()
    first = progress.seconds
    for taken in range(10_000):
        if taken:  # the clock is read before each step
            progress.seconds = first + slow_first + taken * step_seconds
        assert progress.total_steps is None and not budget.is_spent
        progress.step += 1
        if budget.is_measured():
            return budget, progress
    raise AssertionError("the speed is never measured")


def test_minutes_become_the_steps_that_fit_beside_the_evaluations():
    budget, progress = measure(0.1, minutes=1, warmup_fraction=0.1, evaluations=10)
    assert progress.seconds == pytest.approx(6.0)  # a tenth of the minute
    budget.set_total_steps(evaluation_seconds=1.5)
    left = 60 - 6 - 1.5 - 10 * 1.5
    assert progress.total_steps == progress.step + int(0.98 * left / 0.1)
    assert (progress.warmup_steps, progress.minutes) == (progress.step, 1)
    assert str(budget) == f"1 minutes are {progress.total_steps} steps"


def test_evaluations_after_every_epoch_make_each_step_longer():
    budget, progress = measure(0.1, minutes=1, warmup_fraction=0.1, evaluations=None)
    budget.set_total_steps(evaluation_seconds=5.0)  # in 50 steps: as long again as a step each
    assert progress.total_steps == progress.step + int(0.98 * (60 - 6 - 5) / 0.2)


def test_the_next_evaluation_corrects_the_steps_once():
    """The first steps were twice as slow as the others, and the first evaluation four times."""
    budget, progress = measure(0.2, minutes=1, warmup_fraction=0.1, evaluations=4)
    budget.set_total_steps(evaluation_seconds=4.0)
    first_total, began = progress.total_steps, progress.step
    evaluated = []
    for seconds in (6.0 + 4.0 + 0.2 + 0.1 * taken for taken in range(10_000)):
        progress.seconds = seconds + 1.0 * len(evaluated)
        progress.step += 1
        is_measured = budget.is_measured()
        assert is_measured == (budget.is_evaluation_due() and not evaluated)
        if is_measured:
            assert progress.step == round(first_total / 4)
            budget.set_total_steps(evaluation_seconds=1.0)
        if is_measured or budget.is_evaluation_due():
            evaluated.append(progress.step)
        if budget.is_spent:
            break
    assert progress.warmup_steps == began
    assert progress.total_steps > 1.5 * first_total
    assert 60 * 0.96 < progress.seconds + 1.0 <= 60  # with the evaluation at the end
    assert len(evaluated) == 3
    rest = progress.total_steps - evaluated[0]
    assert evaluated[1:] == [evaluated[0] + round(rest * i / 3) for i in (1, 2)]


def test_an_attempt_that_resumes_keeps_the_steps():
    budget, progress = measure(0.1, minutes=1, warmup_fraction=0.1, evaluations=4)
    budget.set_total_steps(evaluation_seconds=1.0)
    resumed = StepBudget(TrainConfig(minutes=1, evaluations=4), TASK, progress)
    assert not resumed.begin()
    for step in range(progress.step, progress.total_steps):
        progress.step = step
        assert not resumed.is_measured()


def test_slow_first_steps_do_not_count():
    """The measurement begins in the second half of the warm-up."""
    budget, progress = measure(0.1, slow_first=2.0, minutes=1, warmup_fraction=0.1)
    budget.set_total_steps(evaluation_seconds=0.0)
    steps = progress.total_steps - progress.step
    assert steps == pytest.approx(0.98 * (60 - progress.seconds) / 0.1, abs=1)


def test_the_measurement_of_a_resumed_run_is_of_its_own_attempt():
    begin = Progress(step=7, seconds=5.9)
    _, progress = measure(0.1, begin=begin, minutes=1, warmup_fraction=0.1)
    assert progress.seconds == pytest.approx(5.9 + 6.0)


def test_while_the_speed_is_measured_the_learning_rate_rises_with_the_seconds():
    progress = Progress()
    budget = StepBudget(TrainConfig(minutes=1, warmup_fraction=0.1, lr=0.5), TASK, progress)
    budget.begin()
    rates = []
    for progress.seconds in (0.0, 3.0, 6.0, 9.0):
        rates.append(budget.lr())
    assert rates == pytest.approx([0.0, 0.25, 0.5, 0.5], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({"steps": 10, "evaluations": 4}, [2, 5, 8]),  # round(2.5) is 2
        ({"steps": 3, "evaluations": 10}, [1, 2]),
        ({"steps": 120, "evaluations": None}, [50, 100]),
        ({"steps": 100, "evaluations": None}, [50]),
        ({"minutes": 1}, []),  # as long as the number of steps is unknown
    ],
)
def test_the_steps_after_which_to_evaluate(settings, due):
    progress = Progress()
    budget = StepBudget(TrainConfig(**settings), TASK, progress)
    budget.begin()
    found = []
    for progress.step in range(1, 130):
        if budget.is_evaluation_due():
            found.append(progress.step)
    assert found == due
