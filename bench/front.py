"""Pareto fronts: of bare numbers, and of numbers that are known to within an interval."""

from __future__ import annotations

from collections.abc import Sequence

Span = tuple[float, float, float]  # a number and its 95% interval: centre, low, high


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points that no other beats, by the first number; of equal points the first alone.

    Less is better; a point is beaten by one that is as good in both numbers and better in one.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def undominated(points: Sequence[tuple[Span, Span]]) -> list[int]:
    """The indices of the points that no other beats beyond their intervals, by the first number; less is better.

    A point is beaten by one whose centres are as good in both numbers, and whose interval in one of them ends before
    that of the beaten begins. So all of `pareto_front` of the centres stays, with what the intervals cannot tell from
    it, and without intervals nothing else does but equal points. The looser rule "clearly better in one number, not
    clearly worse in the other" would not do: with intervals of unlike width it goes round in circles (a beats b beats
    c beats d beats a), and nobody is left.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0][0], points[i][1][0]))
    return [i for i in order if not any(_beats(other, points[i]) for other in points)]


def _beats(a: tuple[Span, Span], b: tuple[Span, Span]) -> bool:
    as_good = all(one[0] <= other[0] for one, other in zip(a, b))
    return as_good and any(one[2] < other[1] for one, other in zip(a, b))


def turned(span: Span) -> Span:
    """The same number with less as good as more was."""
    return -span[0], -span[2], -span[1]
