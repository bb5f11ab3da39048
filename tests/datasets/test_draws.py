"""The counter-based generator: the same one by one and in bulk, evenly spread, no two streams related."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nextscale.datasets.draws import uniforms, uniforms_of

words = st.integers(0, 2**40)


@given(seed=words, pairs=st.lists(st.tuples(words, words), min_size=1, max_size=5), count=st.integers(1, 4))
def test_one_by_one_and_in_bulk(seed, pairs, count):
    epochs, indices = np.array(pairs, np.int64).T
    found = uniforms_of(seed, epochs, indices, count)
    assert found.tolist() == [list(uniforms(seed, epoch, index, count)) for epoch, index in pairs]
    assert ((found >= 0) & (found < 1)).all()


def test_spread_and_independence():
    epochs, indices = (axis.ravel() for axis in np.meshgrid(np.arange(40), np.arange(500), indexing="ij"))
    drawn = uniforms_of(0, epochs, indices, 2)
    shares = np.histogram(drawn, 20, (0, 1))[0] / drawn.size
    assert np.abs(shares - 0.05).max() < 0.005
    columns = [drawn[:, 0], drawn[:, 1], np.roll(drawn[:, 0], 1), np.roll(drawn[:, 0], 500)]
    columns.append(uniforms_of(1, epochs, indices, 1)[:, 0])
    between = np.corrcoef(columns) - np.eye(5)
    assert np.abs(between).max() < 0.03
