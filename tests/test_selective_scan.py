"""The selective scan: both forms, a closed form, and the reference implementations."""

from __future__ import annotations

import pytest
import torch

import geopeft_kit as gk
from geopeft_kit.backbones.selective_scan import (
    SelectiveScanBlock,
    scan_image,
    selective_scan,
)

SEQUENCE = (2, 7, 3)  # batch, length, channels
STATES = 5


def arguments(length: int = SEQUENCE[1]) -> dict[str, torch.Tensor]:
    batch, _, channels = SEQUENCE
    generator = torch.Generator().manual_seed(length)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": rand(batch, length, channels) - 0.5,
        "delta": rand(batch, length, channels),
        "decay_rate": -3 * rand(channels, STATES),
        "write": rand(batch, length, STATES) - 0.5,
        "read": rand(batch, length, STATES) - 0.5,
        "skip": rand(channels),
    }


# also one token, powers of two and their neighbours
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 64, 100])
def test_both_forms_agree_in_values_and_gradients(length: int) -> None:
    results = []
    for how in ("sequential", "parallel"):
        given = {k: v.requires_grad_() for k, v in arguments(length).items()}
        out = selective_scan(**given, how=how)
        loss, inputs = out.square().sum() + out.sum(), list(given.values())
        unused = {"allow_unused": True, "materialize_grads": True}  # A, of one token
        results.append([out, *torch.autograd.grad(loss, inputs, **unused)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_scan_is_its_sum_written_out() -> None:
    a = arguments()
    out = torch.zeros_like(a["x"])
    for t in range(SEQUENCE[1]):
        for s in range(t + 1):
            steps = a["delta"][:, s + 1 : t + 1].sum(1)  # (B, E)
            kept = torch.exp(steps[..., None] * a["decay_rate"])  # (B, E, N)
            weight = torch.einsum(
                "ben,bn,bn->be", kept, a["write"][:, s], a["read"][:, t]
            )
            out[:, t] += weight * a["delta"][:, s] * a["x"][:, s]
    out = out + a["skip"] * a["x"]
    torch.testing.assert_close(gk.selective_scan(**a), out)


def test_the_future_is_not_seen_and_the_past_is() -> None:
    torch.manual_seed(0)
    block = SelectiveScanBlock(8, states=4)
    tokens = torch.rand(1, 12, 8)
    other = tokens.clone()
    other[:, 6] += 1
    with torch.no_grad():
        changed = (block(tokens) - block(other)).abs().amax((0, 2))
    assert (changed[:6] == 0).all()
    assert (changed[6:] > 0).all()


def test_an_image_is_seen_whole_and_turns_with_the_scan() -> None:
    torch.manual_seed(0)
    block = SelectiveScanBlock(8, states=4)
    image = torch.rand(1, 8, 3, 5)
    other = image.clone()
    other[..., 1, 2] += 1
    with torch.no_grad():
        out = scan_image(block, image)
        assert ((out - scan_image(block, other)).abs().amax((0, 1)) > 0).all()
        for dims in ((2, 3), (3,)):  # half a turn flips both; one axis alone does not
            turned = scan_image(block, image.flip(dims)).flip(dims)
            assert torch.allclose(turned, out, atol=1e-6) == (len(dims) == 2)
        torch.testing.assert_close(scan_image(block, image.mT).mT, out)


def test_counts_by_formula_and_a_kind_refusal() -> None:
    width, states, expand, kernel = 32, 6, 3, 4
    inner, rank = expand * width, 2
    found = sum(
        p.numel()
        for p in SelectiveScanBlock(width, states, expand, kernel).parameters()
    )
    matrices = 2 * width * inner + inner * (rank + 2 * states) + inner * width
    assert found == matrices + inner * (kernel + 1) + (rank + 1) * inner + inner * (
        states + 1
    )
    with pytest.raises(ValueError, match="'fast'.*sequential, parallel"):
        selective_scan(**arguments(), how="fast")


@pytest.mark.parametrize("how", ["sequential", "parallel"])
def test_equals_mambapy(how: str) -> None:
    mamba = pytest.importorskip("mambapy.mamba", reason="pip install mambapy")
    torch.manual_seed(0)
    theirs = mamba.MambaBlock(mamba.MambaConfig(d_model=48, n_layers=1))
    ours = SelectiveScanBlock(48, how=how)
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the same
    tokens = torch.randn(2, 37, 48)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_equals_the_block_of_transformers() -> None:
    module = pytest.importorskip(
        "transformers.models.mamba.modeling_mamba", reason="pip install transformers"
    )
    torch.manual_seed(0)
    config = module.MambaConfig(hidden_size=48, state_size=16)
    theirs = module.MambaMixer(config, layer_idx=0).eval()
    ours = SelectiveScanBlock(48)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(2, 37, 48)
    with torch.no_grad():
        wanted = theirs(tokens)
        torch.testing.assert_close(ours(tokens), wanted, rtol=1e-4, atol=1e-5)
