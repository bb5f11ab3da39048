"""Attention to texts of various length: padding never shows, keys and values are computed once."""

import pytest
import torch

from nextscale.core.cross_attention import CrossAttention, Packed


@pytest.mark.parametrize("cosine", [False, True])
def test_each_row_sees_its_own_text(cosine: bool) -> None:
    torch.manual_seed(0)
    attention = CrossAttention(8, 2, 6, cosine=cosine)
    texts = Packed(torch.randn(9, 6), (2, 4, 3))
    x = torch.randn(3, 5, 8)
    together = attention(x, texts)
    for row in range(3):
        alone = attention(x[row : row + 1], texts.select([row]))
        torch.testing.assert_close(together[row : row + 1], alone)
    memory = attention.remember(texts)
    rows = torch.tensor([2, 0, 2])
    shared = attention(x, type(memory)(memory.key, memory.value, memory.visible, rows))
    torch.testing.assert_close(shared, attention(x, texts.select([2, 0, 2])))


def test_dot_product_attention_is_the_plain_one() -> None:
    attention = CrossAttention(8, 2, 6)
    x, text = torch.randn(1, 5, 8), torch.randn(4, 6)
    key, value = attention.key_value(text).chunk(2, dim=-1)
    value = value + attention.value_bias
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(-3, -2) for t in (attention.query(x), key, value))
    expected = attention.projection(((q @ k.mT / 2).softmax(-1) @ v).transpose(-3, -2).flatten(-2))
    torch.testing.assert_close(attention(x, Packed(text, (4,))), expected)


def test_packed_sequences() -> None:
    packed = Packed.join([Packed(torch.ones(2, 3), (2,)), Packed(2 * torch.ones(4, 3), (1, 3))])
    assert packed.lengths == (2, 1, 3)
    assert len(packed) == 3
    assert packed.padded().shape == (3, 3, 3)
    visible = packed.visible()
    assert visible is not None
    assert visible.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert packed.select([0]).visible() is None
    for values, lengths in ((torch.zeros(3, 1), (2,)), (torch.zeros(2, 1), (2, 0)), (torch.zeros(0, 1), ())):
        with pytest.raises(ValueError, match="cannot be sequences of the lengths"):
            Packed(values, lengths)
