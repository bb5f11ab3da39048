"""Scales, their places in the sequence, and what each may see."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextscale.core.schedule import Scale, ScaleSchedule, Segment

SCALES = st.lists(st.builds(Scale, *(st.integers(1, n) for n in (5, 5, 3, 2))), min_size=1, max_size=5).map(
    lambda scales: ScaleSchedule(tuple(scales))
)


@given(SCALES)
def test_ranges_levels_segments_and_mask_agree(schedule: ScaleSchedule) -> None:
    levels = schedule.levels().tolist()
    assert levels == [k for k, s in enumerate(schedule.scales) for _ in range(s.tokens)]
    assert schedule.length == len(levels) == sum(schedule.lengths)
    for k, (start, stop) in enumerate(schedule.ranges):
        assert levels[start:stop] == [k] * schedule[k].tokens
    mask = torch.zeros(schedule.length, schedule.length, dtype=torch.bool)
    for segment in schedule.segments:
        mask[segment.start : segment.stop, : segment.visible] = True
    assert torch.equal(mask, schedule.mask())


@given(SCALES)
def test_text_keeps_everything(schedule: ScaleSchedule) -> None:
    again = ScaleSchedule.parse(str(schedule))
    assert again == schedule
    assert hash(again) == hash(schedule)


@given(SCALES, st.data())
def test_split_and_prefix(schedule: ScaleSchedule, data: st.DataObject) -> None:
    flat = torch.arange(schedule.length)[None].repeat(2, 1)
    parts = schedule.split(flat)
    assert [p.shape[1] for p in parts] == list(schedule.lengths)
    assert torch.equal(torch.cat(parts, 1), flat)
    count = data.draw(st.integers(1, len(schedule)))
    assert schedule.prefix(count).ranges == schedule.ranges[:count]
    assert [schedule.ratio(0), schedule.ratio(len(schedule) - 1)] == [0 if len(schedule) > 1 else 1, 1]


def test_known_lists_and_forms() -> None:
    schedule = ScaleSchedule.squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert (schedule.length, schedule.segments[1]) == (680, Segment(1, 5, 5))
    assert int(schedule.mask().sum()) == 286_434
    assert schedule.scaled(16) == (256, 256)
    assert ScaleSchedule.parse("1, 2 4X6") == ScaleSchedule.parse([1, (2, 2), "4x6"])
    assert ScaleSchedule.parse("2x2x3") == ScaleSchedule.squares(2, planes=3)
    assert ScaleSchedule.squares(2, planes=3, streams=2).length == 24
    assert ScaleSchedule.parse(schedule) is schedule
    counts = ScaleSchedule.counts(1, 4, 9)
    assert counts.lengths == (1, 4, 9) and ScaleSchedule.parse(str(counts)) == counts


def test_levels_made_while_sampling_serve_training() -> None:
    schedule = ScaleSchedule.squares(1, 7)
    with torch.inference_mode():
        schedule.levels()
    weight = torch.zeros(2, 1, requires_grad=True)
    torch.nn.functional.embedding(schedule.levels(), weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [1, 49]


@pytest.mark.parametrize("value", ["", "1 two", "1x2x1x1x1", [(1, "a")], "0", "2 -3", [1.5]])
def test_what_is_no_schedule_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="scale"):
        ScaleSchedule.parse(value)  # type: ignore[arg-type]


def test_split_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="6 positions, the schedule '1 2' has 5"):
        ScaleSchedule.squares(1, 2).split(torch.zeros(1, 6))
