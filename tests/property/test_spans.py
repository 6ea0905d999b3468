import itertools

from hypothesis import given
from hypothesis import strategies as st

from ursa.video.shots import cut_spans


@st.composite
def shots(draw):
    shortest = draw(st.integers(1, 60))
    longest = draw(st.integers(shortest, 5 * shortest))
    return draw(st.integers(0, 2000)), shortest, longest


@given(shots())
def test_spans_are_half_open_ordered_disjoint_and_of_legal_length(shot):
    num_frames, shortest, longest = shot
    spans = cut_spans(num_frames, shortest, longest)
    for start, stop in spans:
        assert shortest <= stop - start <= longest
    for (_, stop), (start, _) in itertools.pairwise(spans):
        assert stop == start
    if spans:
        assert spans[0][0] == 0
        assert spans[-1][1] <= num_frames


@given(shots())
def test_no_frame_is_lost_when_pieces_can_be_halved(shot):
    num_frames, shortest, longest = shot
    spans = cut_spans(num_frames, shortest, longest)
    if num_frames < shortest:
        assert spans == []
    elif longest >= 2 * shortest:
        assert spans[-1][1] == num_frames
        lengths = [stop - start for start, stop in spans]
        assert max(lengths) - min(lengths) <= 1
    else:
        assert num_frames - spans[-1][1] < longest
