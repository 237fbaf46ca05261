from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fedomc_speech.experiments.figures import pareto, spread

COORDINATE = st.integers(0, 5).map(float)
POINTS = st.lists(st.tuples(COORDINATE, COORDINATE), max_size=12)
PLACES = st.lists(st.floats(0, 1), max_size=12).map(sorted)


@given(POINTS)
def test_the_front_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    front = [points[i] for i in pareto(points)]
    assert set(front) == {point for point in points if not beaten(point)}
    assert front == sorted(set(front))  # the same point twice is drawn once


@given(PLACES, st.floats(0, 0.5))
def test_spread_labels_do_not_overlap_and_none_moves_without_need(places: list[float], gap: float) -> None:
    moved = spread(places, gap)
    assert all(high - low >= gap - 1e-9 for low, high in pairwise(moved))
    assert all(new >= old for new, old in zip(moved, places, strict=True))
    for i, (new, old) in enumerate(zip(moved, places, strict=True)):
        assert new == old or new == moved[i - 1] + gap
