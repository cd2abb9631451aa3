"""Under memory pressure goes what is least worth its RAM."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sandbox_tools.policy.cost import Terms
from sandbox_tools.policy.pressure import key, victims

LOCAL = Terms.of(vcpu=2, gib=1, can_freeze=True, abortable=True)


def test_of_two_used_at_once_the_larger_goes_first() -> None:
    frozen = {"small": (key(0, LOCAL, 0.5), 0.5), "large": (key(0, LOCAL, 4), 4.0)}
    assert victims(frozen, 0.1, 0) == (["large"], key(0, LOCAL, 4))


def test_a_small_one_that_nobody_uses_goes_at_last_before_large_ones_that_are_used_again_and_again() -> None:
    frozen, level = {"small": (key(0, LOCAL, 0.25), 0.25)}, 0.0
    for number in range(1000):
        frozen[f"large {number}"] = (key(level, LOCAL, 4), 4.0)
        (gone, *_), level = victims(frozen, 0.1, level)
        del frozen[gone]
        if gone == "small":
            return
    raise AssertionError("the small one stays for ever")


@given(
    st.dictionaries(st.text(max_size=3), st.tuples(st.floats(0, 10), st.floats(0.1, 8))),
    st.floats(0, 40),
    st.floats(0, 10),
)
def test_enough_go_and_none_too_many_and_the_level_never_falls(
    frozen: dict[str, tuple[float, float]], wanted: float, level: float
) -> None:
    chosen, after = victims(frozen, wanted, level)
    freed = sum(frozen[handle][1] for handle in chosen)
    assert freed >= wanted - 1e-9 or set(chosen) == set(frozen)
    assert not chosen or freed - frozen[chosen[-1]][1] < wanted + 1e-9
    assert after >= level
    stay = [frozen[handle][0] for handle in frozen if handle not in chosen]
    assert not chosen or not stay or max(frozen[handle][0] for handle in chosen) <= min(stay)
