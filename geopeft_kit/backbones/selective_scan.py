"""The selective scan of Mamba, to read: one sum, computed step by step or in parallel.

A state h walks along a sequence and forgets at its own pace:

    h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t        y_t = C_t h_t + D x_t

"Selective" means that delta, B and C are computed from x, so what is kept depends on
the content. The cost grows with the length L, that of attention with L squared. Step by
step it is a loop of L rounds. Two steps in a row are again one such step, so log2 L
rounds on whole sequences are enough (Hillis and Steele 1986): more work, all of it
parallel. Neither is fast without a kernel that keeps the states in the GPU's near
memory: this code is for reading, not for training large networks.

`SelectiveScanBlock` has the names of the reference implementation, so its weights
load. For practical use take ``timm:efficientvim_m1``, whose state-space mixer is
convolutions and products of matrices.

Source: Gu & Dao 2023, Mamba, arXiv 2312.00752, section 3 and algorithm 2; four
directions over an image: Liu et al. 2024, VMamba, arXiv 2401.10166, section 4.2.
Taught in notebook 11 (architectures and few labels).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sequential_states(decay: Tensor, push: Tensor) -> Tensor:
    """h_t = decay_t h_(t-1) + push_t from h = 0, in L rounds; all (B, L, E, N)."""
    state, states = torch.zeros_like(push[:, 0]), []
    for step in range(push.shape[1]):
        state = decay[:, step] * state + push[:, step]
        states.append(state)
    return torch.stack(states, dim=1)


def parallel_states(decay: Tensor, push: Tensor) -> Tensor:
    """The same states in log2 L rounds.

    After a round with reach r, position t holds the steps t - 2 r + 1 to t as one:
    two steps (a1, b1), (a2, b2) in a row are (a2 a1, a2 b1 + b2).
    """
    length, reach = push.shape[1], 1
    while reach < length:
        late = decay[:, reach:]
        push = torch.cat(
            [push[:, :reach], push[:, reach:] + late * push[:, :-reach]], 1
        )
        decay = torch.cat([decay[:, :reach], late * decay[:, :-reach]], 1)
        reach *= 2
    return push


SCANS = {"sequential": sequential_states, "parallel": parallel_states}


def selective_scan(
    x: Tensor,
    delta: Tensor,
    decay_rate: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    how: str = "parallel",
) -> Tensor:
    """Scan a sequence; the paper's letters are A, B, C, D for the last four tensors.

    Args:
        x: (B, L, E) the sequence.
        delta: (B, L, E) length of each step, above 0.
        decay_rate: A, (E, N), below 0: how fast each of the N states fades.
        write: B, (B, L, N): how x enters the states.
        read: C, (B, L, N): how the states leave.
        skip: D, (E,): what goes past them.
        how: "parallel" or "sequential": the same numbers, up to rounding.

    Returns:
        (B, L, E).

    Raises:
        ValueError: `how` is another word.
    """
    if how not in SCANS:
        raise ValueError(f"how is {how!r}; allowed are {', '.join(SCANS)}.")
    decay = torch.exp(delta[..., None] * decay_rate)  # (B, L, E, N)
    push = (delta * x)[..., None] * write[:, :, None]  # (B, L, E, N)
    states = SCANS[how](decay, push)
    return torch.einsum("blen,bln->ble", states, read) + skip * x


class SelectiveScanBlock(nn.Module):
    """Mamba's block: a short convolution, the scan, and a gate.

    Args:
        width: D of the tokens.
        states: N for each of the E = expand * D channels.
        expand: E / D.
        kernel: tokens that the convolution sees, this one and those before.
        how: as in `selective_scan`.
    """

    def __init__(
        self,
        width: int,
        states: int = 16,
        expand: int = 2,
        kernel: int = 4,
        how: str = "parallel",
    ) -> None:
        super().__init__()
        inner, rank = expand * width, math.ceil(width / 16)
        self.how, self.sizes = how, (rank, states, states)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, kernel, padding=kernel - 1, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        # steps from 0.001 to 0.1 at the start, as softplus of the bias
        start = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(0.1)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(start + torch.log(-torch.expm1(-start)))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D); token t sees the tokens up to t alone."""
        x, gate = self.in_proj(tokens).chunk(2, dim=-1)  # (B, L, E) both
        x = F.silu(self.conv1d(x.mT)[..., : x.shape[1]].mT)
        delta, write, read = self.x_proj(x).split(self.sizes, dim=-1)
        delta = F.softplus(self.dt_proj(delta))  # (B, L, E)
        y = selective_scan(
            x, delta, -self.A_log.exp(), write, read, self.D, self.how
        )  # (B, L, E)
        return self.out_proj(y * F.silu(gate))


def scan_image(block: nn.Module, image: Tensor) -> Tensor:
    """Scan a map (B, D, h, w) in four directions with `block`, and average.

    `block` maps (B, L, D) to (B, L, D). VMamba has weights of its own for each
    direction; here all four share the block's.
    """
    total = torch.zeros_like(image)
    for turned in (False, True):  # along rows, along columns
        view = image.mT if turned else image
        tokens = view.flatten(2).mT  # (B, h*w, D)
        out = block(tokens) + block(tokens.flip(1)).flip(1)
        out = out.mT.unflatten(2, view.shape[2:])
        total = total + (out.mT if turned else out)
    return total / 4
