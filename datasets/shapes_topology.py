"""How the faces of a mesh hang together.

A surface has an inside where each of its edges is passed as often one way as the other: its winding number is then a
whole number everywhere off it. This is what :func:`closed` tests; it admits edges that four faces share, which a test
for two faces an edge would not.
"""

from __future__ import annotations

import numpy as np

from .shapes_files import Mesh


def closed(faces: np.ndarray) -> bool:
    """Whether every edge is passed as often one way as the other."""
    return len(faces) > 0 and open_edges(faces) == 0


def open_edges(faces: np.ndarray) -> int:
    """Edges that are passed more often one way than the other."""
    if not len(faces):
        return 0
    tails, heads = faces.reshape(-1).astype(np.int64), np.roll(faces, -1, axis=1).reshape(-1).astype(np.int64)
    size = int(faces.max()) + 1
    forward = tails < heads
    keys = np.where(forward, tails * size + heads, heads * size + tails)
    _, edge = np.unique(keys, return_inverse=True)
    return int(np.count_nonzero(np.bincount(edge, np.where(forward, 1, -1))))


def pieces(mesh: Mesh) -> list[np.ndarray]:
    """Numbers of the faces of each piece that hangs together by vertices, the largest piece first."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.concatenate((mesh.faces[:, :2], mesh.faces[:, 1:]))
    graph = coo_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(mesh.vertices),) * 2)
    _, label = connected_components(graph, directed=False)
    owner = label[mesh.faces[:, 0]]
    order = np.argsort(owner, kind="stable")
    found = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)
    return sorted(found, key=len, reverse=True)
