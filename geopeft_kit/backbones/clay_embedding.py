"""Clay's patch embedding: a small transformer makes kernels from wavelengths.

Source: Clay Foundation, github.com/Clay-foundation/model (Apache-2.0), whose names the
modules keep; the idea is DOFA's, arXiv 2403.15356.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CODE, _LATENTS = 128, 128  # width of the wavelength's code, and latent tokens


class ResidualMlp(nn.Module):
    """Two layers beside a shortcut, ``x + GELU(l2(GELU(l1 x)))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(width, width)
        self.l2 = nn.Linear(width, width)

    def forward(self, codes: Tensor) -> Tensor:
        """(C, width) -> (C, width)."""
        return codes + F.gelu(self.l2(F.gelu(self.l1(codes))))


class WeightGenerator(nn.Module):
    """A transformer over one token per band, which computes the kernel of each.

    `width` is the length of a wavelength's code, `outputs` that of a kernel, `tokens`
    that of the bias (D); `latents` learned tokens precede the bands.
    """

    def __init__(self, width: int, latents: int, outputs: int, tokens: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.fc_weight = nn.Linear(width, outputs)
        self.fc_bias = nn.Linear(width, tokens)
        self.weight_tokens = nn.Parameter(torch.randn(latents, width) * 0.02)
        self.bias_token = nn.Parameter(torch.randn(1, width) * 0.02)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (C, width) -> kernels (C, outputs) and bias (D,)."""
        sequence = torch.cat([self.weight_tokens, codes, self.bias_token])
        seen = self.encoder(sequence)  # (latents + C + 1, width)
        bands = slice(len(self.weight_tokens), -1)
        return self.fc_weight(seen[bands] + sequence[bands]), self.fc_bias(seen[-1])


class WavelengthEmbedding(nn.Module):
    """Patches to tokens; kernels are made from wavelengths in micrometres."""

    waves: Tensor

    def __init__(self, waves: Sequence[float], patch: int, width: int) -> None:
        super().__init__()
        self.patch_size = (patch, patch)
        self.fclayer = ResidualMlp(_CODE)
        self.weight_generator = WeightGenerator(
            _CODE, _LATENTS, width * patch**2, width
        )
        self.register_buffer("waves", torch.tensor(waves), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h, w, D)."""
        dtype = self.weight_generator.bias_token.dtype  # a method may wrap layers
        codes = self.fclayer(wave_code(self.waves.float(), _CODE).to(dtype))
        kernels, bias = self.weight_generator(codes)
        shape = (-1, *self.patch_size)
        kernels = kernels.unflatten(1, shape).transpose(0, 1)  # (D, C, p, p)
        tokens = F.conv2d(image, kernels * 0.02, bias, stride=self.patch_size)
        return tokens.permute(0, 2, 3, 1)


def wave_code(waves: Tensor, size: int) -> Tensor:
    """Sines, then cosines, of wavelengths: (C,) -> (C, size), base 10000."""
    steps = torch.arange(size // 2, device=waves.device) / (size // 2 - 1)
    angles = torch.outer(waves, 10000.0**-steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
