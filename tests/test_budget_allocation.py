"""Sharing a budget out: convex hulls, and greedy steps against every other allocation."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mendlm.budget_allocation import Allocation, Option, least_bytes, least_error, lower_hull
from mendlm.errors import UsageError

EPS = 1e-9
OPTIONS = st.lists(st.builds(Option, st.integers(0, 50), st.floats(0, 100)), min_size=1, max_size=5)
TENSORS = st.lists(OPTIONS, min_size=1, max_size=4)


def every_allocation(tensors: list[list[Option]]) -> list[Allocation]:
    found = []
    for indices in itertools.product(*(range(len(options)) for options in tensors)):
        chosen = [options[i] for options, i in zip(tensors, indices, strict=True)]
        found.append(Allocation(indices, sum(o.n_bytes for o in chosen), sum(o.error for o in chosen)))
    return found


def largest_step(tensors: list[list[Option]]) -> tuple[int, float]:
    """The most bytes, and the most error, between two corners of a hull."""
    n_bytes, error = 0, 0.0
    for options in tensors:
        for a, b in itertools.pairwise(lower_hull(options)):
            n_bytes = max(n_bytes, options[b].n_bytes - options[a].n_bytes)
            error = max(error, options[a].error - options[b].error)
    return n_bytes, error


def test_hull_by_hand() -> None:
    points = [(0, 10.0), (1, 8.0), (2, 3.0), (3, 4.0), (4, 1.0), (4, 0.5), (6, 0.5)]
    options = [Option(*point) for point in points]
    # (1, 8) is above the line from (0, 10) to (2, 3); (3, 4), (4, 1) and (6, 0.5) are worse than another option.
    assert lower_hull(options) == [0, 2, 5]
    assert lower_hull([Option(5, 1.0)]) == [0]
    assert lower_hull([Option(5, 1.0), Option(5, 1.0)]) == [0]


@given(OPTIONS)
def test_hull_is_convex_and_below_every_option(options: list[Option]) -> None:
    corners = [options[i] for i in lower_hull(options)]
    assert corners[0].n_bytes == min(o.n_bytes for o in options)
    assert corners[-1].error == min(o.error for o in options)
    for a, b in itertools.pairwise(corners):
        assert a.n_bytes < b.n_bytes
        assert a.error > b.error
        for o in options:
            if a.n_bytes <= o.n_bytes <= b.n_bytes:
                share = (o.n_bytes - a.n_bytes) / (b.n_bytes - a.n_bytes)
                assert o.error >= a.error + share * (b.error - a.error) - EPS * (1 + a.error)


def test_allocation_by_hand() -> None:
    first = [Option(0, 10.0), Option(4, 2.0), Option(8, 0.0)]  # saves 2 per byte, then 0.5
    second = [Option(0, 9.0), Option(3, 6.0), Option(6, 5.0)]  # 1, then 1/3
    assert least_error([first, second], 0).indices == (0, 0)
    assert least_error([first, second], 4).indices == (1, 0)
    assert least_error([first, second], 7) == Allocation((1, 1), 7, 8.0)
    # The step of 4 bytes does not fit any more, the smaller one of the other tensor does.
    assert least_error([first, second], 10) == Allocation((1, 2), 10, 7.0)
    assert least_error([first, second], 99) == Allocation((2, 2), 14, 5.0)
    assert least_bytes([first, second], 8.0) == Allocation((1, 1), 7, 8.0)
    assert least_bytes([first, second], 19.0).indices == (0, 0)


@given(TENSORS, st.integers(0, 200))
def test_least_error_fits_and_is_within_one_step_of_the_best(tensors: list[list[Option]], budget: int) -> None:
    fitting = [a for a in every_allocation(tensors) if a.n_bytes <= budget]
    if not fitting:
        with pytest.raises(UsageError, match=f"above the budget of {budget}"):
            least_error(tensors, budget)
        return
    found = least_error(tensors, budget)
    assert found.n_bytes <= budget
    assert found.error <= min(a.error for a in fitting) + largest_step(tensors)[1] + EPS
    assert found == least_error(tensors, budget)


@given(TENSORS, st.floats(0, 400))
def test_least_bytes_is_good_enough_and_within_one_step_of_the_best(
    tensors: list[list[Option]], max_error: float
) -> None:
    enough = [a for a in every_allocation(tensors) if a.error <= max_error - EPS]
    if math.fsum(min(o.error for o in options) for options in tensors) > max_error:
        with pytest.raises(UsageError, match="the smallest error that the options allow is"):
            least_bytes(tensors, max_error)
        return
    found = least_bytes(tensors, max_error)
    assert found.error <= max_error
    if enough:
        assert found.n_bytes <= min(a.n_bytes for a in enough) + largest_step(tensors)[0]


@given(TENSORS, st.integers(0, 200), st.integers(0, 50))
def test_a_larger_budget_is_never_worse(tensors: list[list[Option]], budget: int, more: int) -> None:
    fewest = sum(min(o.n_bytes for o in options) for options in tensors)
    small, large = least_error(tensors, fewest + budget), least_error(tensors, fewest + budget + more)
    assert large.error <= small.error + EPS


@given(TENSORS, st.floats(0, 100), st.floats(0, 100))
def test_a_larger_error_never_takes_more_bytes(tensors: list[list[Option]], slack: float, more: float) -> None:
    least = least_error(tensors, 10**6).error
    assert least_bytes(tensors, least + slack + more).n_bytes <= least_bytes(tensors, least + slack).n_bytes


@given(TENSORS, st.integers(0, 200), st.data())
def test_never_worse_than_an_alternative_that_fits(
    tensors: list[list[Option]], budget: int, data: st.DataObject
) -> None:
    everything = every_allocation(tensors)
    other = data.draw(st.sampled_from(everything))
    limit = max(budget, other.n_bytes)
    assert least_error(tensors, limit, [other.indices]).error <= other.error + EPS
    assert least_bytes(tensors, other.error + EPS, [other.indices]).n_bytes <= other.n_bytes


def test_equal_gains_go_in_the_order_of_the_tensors() -> None:
    tensor = [Option(0, 2.0), Option(1, 1.0), Option(2, 0.0)]
    assert least_error([tensor, tensor, tensor], 4).indices == (2, 2, 0)


def test_bad_options_are_refused() -> None:
    with pytest.raises(UsageError, match="tensor 1 has no options"):
        least_error([[Option(0, 1.0)], []], 1)
    with pytest.raises(UsageError, match="error of tensor 0 is not finite"):
        least_bytes([[Option(0, float("nan"))]], 1.0)
    with pytest.raises(UsageError, match=r"smallest error that the options allow is 1, above 0\.5"):
        least_bytes([[Option(0, 1.0)]], 0.5)
