"""Places in the arena: what lives together never shares a byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arkinfer.exporters.arena import Lifetime, place

ALIGNMENT = 256


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    values = []
    for _ in range(draw(st.integers(0, 24))):
        first = draw(st.integers(0, 30))
        values.append(Lifetime(draw(st.integers(0, 5000)), first, first + draw(st.integers(0, 8))))
    return values


@given(lifetimes())
def test_what_lives_together_does_not_overlap(values: list[Lifetime]) -> None:
    offsets, end = place(values, ALIGNMENT)
    for index, value in enumerate(values):
        assert offsets[index] % ALIGNMENT == 0 and offsets[index] + value.nbytes <= end
        for other in range(index):
            apart = (
                offsets[index] + value.nbytes <= offsets[other]
                or offsets[other] + values[other].nbytes <= offsets[index]
            )
            assert apart or not value.meets(values[other])


@given(lifetimes())
def test_the_arena_is_no_larger_than_all_values_side_by_side(values: list[Lifetime]) -> None:
    _, end = place(values, ALIGNMENT)
    assert end % ALIGNMENT == 0
    assert end <= sum(-(-value.nbytes // ALIGNMENT) * ALIGNMENT for value in values)


def test_values_that_follow_each_other_share_their_bytes() -> None:
    chain = [Lifetime(1000, index, index + 1) for index in range(10)]
    offsets, end = place(chain, ALIGNMENT)
    assert end == 2048
    assert set(offsets) == {0, 1024}
