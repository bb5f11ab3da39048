"""Windows whose keys stand in for those left out: which to keep, and how much each of them counts.

A query that sees all keys takes o = sum_j a_j v_j. If key j counts w_j times as much as its score says, and those left
out not at all, it takes o' = sum_j w_j a_j v_j / sum_j w_j a_j instead, so that

    o' - o = sum_j w_j u_j / sum_j w_j a_j    with    u_j = a_j (v_j - o).

That changes what is drawn from by half (o' - o)^T F (o' - o) nats, to second order, F the Fisher information: the mean
outer product of the gradients, in o, of the log-probabilities of symbols that the model draws. Branches of guidance are
taken together, o of all of them in one, since it is their difference that guidance multiplies. Averaged over pictures
this is w^T G w with G_jk = E[u_j^T F u_k], where w counts so that w^T E[a] = 1: a quadratic function, of which both are
found. Keys are left out one after another, each time the one without which the least that the others can come to is
least, as in the Optimal Brain Surgeon (Hassibi and Stork 1993); then the others' w are those that come to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nextscale.tasks.generation.litevar_windows import in_tiles

RIDGE = 0.1
"""How strongly weights are held near 1, and to how few pictures are fitted: as a share of each key's own square."""

RANGE = (0.1, 10.0)
"""Least and largest weight of a key that is kept."""

NUMBERS = 1 << 24
"""Numbers of the square matrices that are held at once, at most, beside the sums."""


@dataclass
class Effects:
    """Sums over pictures, of one block and scale.

    Attributes:
        products: G, summed over the queries of each tile.
        attention: to each key, summed over the queries of each tile.
        images: number of pictures added up.
    """

    products: Float[Tensor, "heads tiles keys keys"]
    attention: Float[Tensor, "heads tiles keys"]
    images: int = 0

    @classmethod
    def none(cls, heads: int, queries: int, keys: int, tile: int, device: torch.device) -> Effects:
        """Nothing added yet."""
        tiles = -(-queries // tile)
        shape = (heads, tiles, keys)
        return cls(torch.zeros(*shape, keys, device=device), torch.zeros(shape, device=device))

    def add(
        self,
        attention: Float[Tensor, "rows heads queries keys"],
        value: Float[Tensor, "rows heads keys size"],
        output: Float[Tensor, "rows heads queries size"],
        information: Float[Tensor, "heads branches branches size size"],
        tile: int,
    ) -> None:
        """Add pictures, branch by branch.

        Args:
            output: attention times value.
            information: F of each head, and of each pair of branches.
        """
        heads, branches = information.shape[:2]
        self.images += len(attention) // branches
        self.attention += sum(in_tiles(each, tile).sum(2) for each in attention) / branches
        step = max(1, NUMBERS // self.products[0].numel())
        for start in range(0, heads, step):
            part = slice(start, start + step)
            parts = (t.chunk(branches) for t in (attention[:, part], value[:, part], output[:, part]))
            given = list(zip(*parts, strict=True))
            for b, one in enumerate(given):
                for c, other in enumerate(given[: b + 1]):
                    found = _products(one, other, information[part, b, c], tile)
                    self.products[part] += found if b == c else found + found.mT


def _products(
    one: Sequence[Tensor], other: Sequence[Tensor], information: Float[Tensor, "heads size size"], tile: int
) -> Float[Tensor, "heads tiles keys keys"]:
    """Of a pair of branches, without the vectors u: a_j b_k (v_j - o)^T F (w_k - p), multiplied out.

    Args:
        one, other: attention, values and output, (images, heads, ...).
    """
    (a, v, o), (b, w, p) = one, other
    seen, taken = v @ information, o @ information
    own = (taken * p).sum(-1, keepdim=True) / 2
    left, right = (_rows_in_tiles(t, tile) for t in (a, b))
    mixed_left = _rows_in_tiles(a * (p @ seen.mT - own), tile)
    mixed_right = _rows_in_tiles(b * (taken @ w.mT - own), tile)
    # Pictures are added up by the product itself, (heads, tiles, keys, rows x tile) by its transpose.
    along = [t.permute(1, 2, 4, 0, 3).flatten(3) for t in (left, right, mixed_left, mixed_right)]
    products = (along[2] @ along[1].mT).add_(along[0] @ along[3].mT).neg_()
    for first, second, similar in zip(left, right, seen @ w.mT, strict=True):
        products.addcmul_(first.mT @ second, similar[:, None])
    return products


def _rows_in_tiles(x: Float[Tensor, "rows heads queries keys"], tile: int) -> Tensor:
    """(rows, heads, tiles, tile, keys), filled up with zeros."""
    return in_tiles(x.flatten(0, 1), tile).unflatten(0, x.shape[:2])


def elimination_costs(effects: Effects) -> Float[Tensor, "heads tiles keys"]:
    """By how much leaving out each key raises what the others can come to, when its turn has come.

    Keys of a tile go in the order of these costs; one that goes later is never cheaper, and the last never goes.
    """
    products, attention = _flat(effects)
    parts = [_eliminate(g, a) for g, a in zip(*_split(products, attention), strict=True)]
    return torch.cat(parts).view(effects.attention.shape).div_(max(effects.images, 1))


def stand_in_weights(effects: Effects, kept: Bool[Tensor, "heads tiles keys"]) -> Float[Tensor, "heads tiles keys"]:
    """How much each key counts that is kept; 0 of those left out."""
    products, attention = _flat(effects)
    parts = [_weights(g, a, k) for g, a, k in zip(*_split(products, attention, kept.flatten(0, 1)), strict=True)]
    return torch.cat(parts).view(kept.shape)


def _flat(effects: Effects) -> tuple[Tensor, Tensor]:
    return effects.products.flatten(0, 1), effects.attention.flatten(0, 1)


def _split(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Runs of tiles that fit into memory together."""
    step = max(1, NUMBERS // tensors[0][0].numel())
    return [tensor.split(step) for tensor in tensors]


def _held(products: Tensor) -> tuple[Tensor, Tensor]:
    """G with what holds weights near 1 on its diagonal, and that alone."""
    own = products.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * own + (RIDGE * 1e-2 * own.mean(1, keepdim=True)).clamp_min(torch.finfo(own.dtype).tiny)
    return products + torch.diag_embed(ridge), ridge


def _eliminate(products: Tensor, attention: Tensor) -> Tensor:
    """With P = G^-1 the least is 1 / a^T P a; without key j, P is less by P_:j P_j: / P_jj."""
    tiles, keys, _ = products.shape
    each = torch.arange(tiles, device=products.device)
    size = products.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(products.dtype).tiny)
    inverse = torch.linalg.inv(_held(products / size[:, None, None])[0])
    wanted = (inverse @ attention[..., None])[..., 0]
    worth = (wanted * attention).sum(1)
    costs = torch.full_like(attention, torch.inf)
    gone = torch.zeros_like(attention, dtype=torch.bool)
    least, highest = 1 / worth, torch.zeros_like(worth)
    for turn in range(keys - 1):
        lost = wanted.square() / inverse.diagonal(dim1=1, dim2=2).clamp_min(1e-20)
        lost, key = lost.masked_fill(gone, torch.inf).min(1)
        column = inverse[each, :, key]
        share = column / column[each, key].clamp_min(1e-20)[:, None]
        wanted = (wanted - share * wanted[each, key][:, None]).index_put_((each, key), worth.new_zeros(()))
        inverse.baddbmm_(column[:, :, None], share[:, None], alpha=-1)
        gone[each, key] = True
        worth = (worth - lost).clamp_min(1e-12)
        highest = torch.maximum(highest, (1 / worth - least) * size)
        least = 1 / worth
        # Of keys that cost the same, those that went first are still the ones to go first.
        costs[each, key] = highest * (1 + 1e-6 * turn)
    return costs


def _weights(products: Tensor, attention: Tensor, kept: Tensor) -> Tensor:
    """The least of w^T G w + ridge |w - 1|^2 over the kept keys with w^T a = 1, scaled to count as plain keys would."""
    size = products.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(products.dtype).tiny)
    held, ridge = _held(products / size[:, None, None])
    there = kept.to(held.dtype)
    held = held * there[:, :, None] * there[:, None, :] + torch.diag_embed(1 - there)
    seen = there * attention
    found = torch.linalg.solve(held, torch.stack((seen, there * ridge), dim=-1)) * there[..., None]
    along, near = found.unbind(-1)
    total = seen.sum(1, keepdim=True)
    # As many queries' attention as the tile has adds up to more than 1; weights are free of that unit.
    missing = (total - (near * seen).sum(1, keepdim=True)) / (along * seen).sum(1, keepdim=True).clamp_min(1e-20)
    return (near + missing * along).clamp(*RANGE) * there
