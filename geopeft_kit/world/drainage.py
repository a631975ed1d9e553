"""Where water runs: the streams of a terrain."""

from __future__ import annotations

import heapq

import numpy as np
from scipy import ndimage

from geopeft_kit.world.noise import hash_unit


def drainage(height: np.ndarray, outlet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the water of each cell goes, and how much passes it: priority-flood.

    From the outlets and the border, the lowest cell seen so far is taken next, and its
    unseen neighbours drain into it. `height` (h, w) in metres and `outlet` (h, w) bool
    -> index of the cell drained into (h*w,), -1 at outlets and borders, and the number
    of cells upstream (h*w,) float32. Source: Barnes et al. 2014,
    doi:10.1016/j.cageo.2013.04.024.
    """
    rows, columns = height.shape
    wide = columns + 2
    # A frame of seen cells saves the bounds check.
    level = np.pad(height, 1, constant_values=0).ravel().tolist()
    frame = np.pad(np.zeros(height.shape, bool), 1, constant_values=True)
    seen = frame.ravel().tolist()
    border = outlet.copy()
    border[[0, -1]] = border[:, [0, -1]] = True
    start = np.flatnonzero(np.pad(border, 1)).tolist()
    receiver = [-1] * len(level)
    queue = [(level[cell], cell) for cell in start]
    for cell in start:
        seen[cell] = True
    heapq.heapify(queue)
    steps = (-1, 1, -wide, wide, -wide - 1, -wide + 1, wide - 1, wide + 1)
    order = []
    while queue:
        floor, cell = heapq.heappop(queue)
        order.append(cell)
        for step in steps:
            other = cell + step
            if not seen[other]:
                seen[other] = True
                receiver[other] = cell
                filled = level[other]
                heapq.heappush(queue, (filled if filled > floor else floor, other))
    flow = [1.0] * len(level)
    for cell in reversed(order):
        if receiver[cell] >= 0:
            flow[receiver[cell]] += flow[cell]
    inner = np.arange(len(level)).reshape(rows + 2, wide)[1:-1, 1:-1]
    to = np.asarray(receiver)[inner].ravel()
    to = np.where(to < 0, -1, (to // wide - 1) * columns + to % wide - 1)
    return to, np.asarray(flow, np.float32)[inner].ravel()


def stream_distance(
    receiver: np.ndarray,
    flow: np.ndarray,
    shape: tuple[int, int],
    size: int,
    least: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest stream (pixels) and its flow (cells), (size, size).

    The coarse cells of `drainage` with a flow of at least `least` are joined to lines,
    which are smoothed along their course before they are drawn on the fine grid.
    """
    cells = np.flatnonzero((flow > least) & (receiver >= 0))
    if cells.size == 0:
        nowhere = np.full((size, size), 1e3, np.float32)
        return nowhere, np.zeros_like(nowhere)
    scale = size / shape[0]
    every = np.arange(receiver.size)
    place = np.stack([every // shape[1], every % shape[1]], 1).astype(np.float32)
    place += np.stack([hash_unit(every, 3), hash_unit(every, 4)], 1) * 0.7 - 0.35
    donor = np.arange(receiver.size)
    ascending = cells[np.argsort(flow[cells], kind="stable")]
    donor[receiver[ascending]] = ascending  # the largest one is written last
    below = np.where(receiver >= 0, receiver, every)
    for _ in range(4):
        place[cells] = (
            0.4 * place[cells] + 0.3 * place[below[cells]] + 0.3 * place[donor[cells]]
        )
    steps = int(np.ceil(scale * 2.2))
    along = np.linspace(0, 1, steps, dtype=np.float32)[:, None, None]  # (steps, 1, 1)
    points = place[cells] * (1 - along) + place[below[cells]] * along  # (steps, n, 2)
    points = ((points + 0.5) * scale - 0.5).reshape(-1, 2)
    carried = np.tile(flow[cells], along.shape[0])
    pixel = np.rint(points).astype(int)
    inside = ((pixel >= 0) & (pixel < size)).all(1)
    points, pixel, carried = points[inside], pixel[inside], carried[inside]
    exact = np.zeros((3, size, size), np.float32)
    exact[:, pixel[:, 0], pixel[:, 1]] = points[:, 0], points[:, 1], carried
    dry = np.ones((size, size), bool)
    dry[pixel[:, 0], pixel[:, 1]] = False
    nearest = ndimage.distance_transform_edt(
        dry, return_distances=False, return_indices=True
    )
    row, column, carried = exact[:, nearest[0], nearest[1]]
    grid = np.arange(size, dtype=np.float32)
    return np.hypot(row - grid[:, None], column - grid[None, :]), carried
