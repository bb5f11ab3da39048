"""Lists of scales: published ones, lists to any size, random ones."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextscale.tasks.generation.flexvar_lists import PUBLISHED, RandomLists, list_for


def test_published_lists_lead_where_their_names_say() -> None:
    for name, schedule in PUBLISHED.items():
        if name != "512":
            assert len(schedule) == int(name) and schedule.final.grid == (16, 16)
            assert list_for((16, 16), int(name)) == schedule
    assert PUBLISHED["512"].final.grid == (32, 32)


@pytest.mark.parametrize(
    ("grid", "steps", "expected"),
    [
        ((8, 8), 5, "1 2 3 6 8"),
        ((8, 8), 8, "1 2 3 4 5 6 7 8"),
        ((8, 8), 12, "1 1x2 2 2x3 3 3x4 4 4x5 5 6 7 8"),
        ((2, 4), 3, "1 1x2 2x4"),
        ((4, 2), 3, "1 2x1 4x2"),
        ((1, 1), 1, "1"),
    ],
)
def test_a_list_to_a_grid(grid: tuple[int, int], steps: int, expected: str) -> None:
    assert str(list_for(grid, steps)) == expected


@given(st.integers(1, 24), st.integers(1, 24), st.integers(2, 16))
def test_lists_grow_to_their_grid(height: int, width: int, steps: int) -> None:
    if steps > max(height, width):
        return
    schedule = list_for((height, width), steps)
    assert len(schedule) == steps
    assert schedule.final.grid == (height, width) and schedule[0].grid == (1, 1)
    for before, after in zip(schedule.scales, schedule.scales[1:], strict=False):
        assert before.height <= after.height and before.width <= after.width and before != after


@pytest.mark.parametrize(
    ("grid", "steps", "message"),
    [
        ((2, 2), 4, "4 steps to 2 x 2 cells are not possible; expected at most 3"),
        ((2, 2), 1, "1 step to 2 x 2 cells is not possible"),
        ((0, 2), 3, "expected 1 or more of each"),
    ],
)
def test_a_list_that_cannot_be(grid: tuple[int, int], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_for(grid, steps)


def test_the_official_rule_by_hand() -> None:
    """Written with the random module itself, as the rule is stated."""
    rng, ours = random.Random(11), random.Random(11)
    lists = RandomLists()
    for _ in range(300):
        if rng.random() < 0.05:
            sides = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
        else:
            sides = sorted([1, 2, *rng.sample(range(3, 11), 5), *rng.sample(range(11, 16), 2), 16])
        chance = rng.random()
        for threshold in (0.9, 0.95, 0.98, 0.99):
            if chance > threshold:
                del sides[rng.choice(range(2, len(sides) - 1))]
        while sum(side * side for side in sides) > 680:
            del sides[rng.choice(range(len(sides) - 4, len(sides)))]
        assert [scale.height for scale in lists.draw(ours).scales] == sides


def test_lists_for_small_models() -> None:
    lists = RandomLists(
        standard="1 2 4", standard_share=0.25, first="1", middle="1x2 2 2x3 3", middle_count=(0, 3), late="",
        late_count=(0, 0), final="4", removals=(0.5,), budget=30, keep_final=True,
    )  # fmt: skip
    drawn = [lists.at(7, step) for step in range(400)]
    assert drawn == [lists.at(7, step) for step in range(400)] != [lists.at(8, step) for step in range(400)]
    assert str(lists.everything) == "1 1x2 2 2x3 3 4"
    assert all(part.final.grid == (4, 4) and part.length <= 30 for part in drawn)
    assert all(set(part.scales) <= set(lists.everything.scales) for part in drawn)
    assert set(Counter(len(part) for part in drawn)) == {2, 3, 4, 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"middle_count": (2, 9)}, "middle_count is 2 to 9; expected 0 <= first <= second <= 8"),
        ({"late_count": (3, 2)}, "late_count is 3 to 2"),
        ({"final": "8 16"}, "final is '8 16'; expected one grid"),
        ({"budget": 200}, "budget is 200 tokens; the first scales and the final one have 261"),
    ],
)
def test_rules_that_contradict_themselves(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomLists(**changes)
