"""Features are gathered in one matrix that grows in place, whatever the batches."""

import pytest
import torch

from nextscale.evaluation.feature_statistics import Gathering, Rows
from nextscale.evaluation.networks import Network, Responses


def test_rows_are_those_that_were_added() -> None:
    made, parts = Rows(), [torch.randn(size, 3) for size in (1, 700, 900, 2, 1500)]
    assert made.matrix() is None
    for part in parts:
        made.add(part)
    matrix = made.matrix()
    assert matrix is not None and torch.equal(matrix, torch.cat(parts))
    kept = matrix.clone()
    made.add(torch.ones(5000, 3))
    assert torch.equal(matrix, kept)
    longer = made.matrix()
    assert longer is not None and torch.equal(longer, torch.cat([kept, torch.ones(5000, 3)]))


def test_features_do_not_keep_what_they_are_a_view_of() -> None:
    gathering = Gathering(Network(lambda images: Responses(images.flatten(1)[:, :4]), "corner"))
    images = torch.rand(6, 3, 4, 4)
    for part in images.split(2):
        gathering.add(part)
    features = gathering.statistics().features
    assert features is not None and torch.equal(features, images.flatten(1)[:, :4])
    assert features.untyped_storage().nbytes() == 6 * 4 * 4
    with pytest.raises(ValueError, match="no images were given"):
        Gathering(gathering.network).statistics()
