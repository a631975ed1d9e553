"""Cards of Prithvi-EO 1.0 and 2.0, and of the kit's own tiny models of that build.

Sources: the models' pages on the Hugging Face hub and TerraTorch's settings;
Prithvi-EO 1.0, arXiv 2310.18660; Prithvi-EO 2.0, arXiv 2412.02732.
Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from dataclasses import replace

from geopeft_kit.backbones.card import BackboneCard, Normalisation, WeightFile

HLS_BANDS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")

_V1 = Normalisation(
    1e4,
    (775.229, 1080.993, 1228.586, 2497.202, 2204.214, 1610.832),
    (1281.526, 1270.030, 1399.480, 1368.345, 1291.676, 1154.506),
)
_V2 = Normalisation(
    1e4,
    (1087.0, 1342.0, 1433.0, 2734.0, 1958.0, 1363.0),
    (2248.0, 2179.0, 2178.0, 1850.0, 1242.0, 1049.0),
)
# name, hub repository, file, width, depth, heads, patch, parameters, date and place
_PUBLISHED = (
    ("v1_100", "1.0-100M", "V1_100M", 768, 12, 12, 16, 86_237_184, False),
    ("v2_tiny_tl", "2.0-tiny-TL", "V2_tiny_TL", 192, 12, 3, 16, 5_634_048, True),
    ("v2_100_tl", "2.0-100M-TL", "V2_100M_TL", 768, 12, 12, 16, 86_237_184, True),
    ("v2_300", "2.0-300M", "V2_300M", 1024, 24, 16, 16, 303_886_336, False),
    ("v2_300_tl", "2.0-300M-TL", "V2_300M_TL", 1024, 24, 16, 16, 303_886_336, True),
    ("v2_600", "2.0-600M", "V2_600M", 1280, 32, 16, 14, 631_188_480, False),
    ("v2_600_tl", "2.0-600M-TL", "V2_600M_TL", 1280, 32, 16, 14, 631_188_480, True),
)


def _prithvi_card(
    name: str,
    repo: str,
    file: str,
    width: int,
    depth: int,
    heads: int,
    patch: int,
    parameters: int,
    metadata: bool,
) -> BackboneCard:
    repo = f"ibm-nasa-geospatial/Prithvi-EO-{repo}"
    first = name.startswith("v1")
    seen = "3 dates" if first else "1 date" if "tiny" in name else "4 dates"
    scalars = (
        " Adds date and place from meta to the tokens, each times one learned number: "
        "two more weights, beside the network and not counted. metadata=False leaves "
        "them out."
    )
    return BackboneCard(
        name=f"prithvi_eo_{name}",
        family="prithvi",
        bands=HLS_BANDS,
        patch=patch,
        width=width,
        depth=depth,
        parameters=parameters,
        image_size=224,
        normalisation=_V1 if first else _V2,
        licence_weights="Apache-2.0",
        licence_code="Apache-2.0",
        source=f"https://huggingface.co/{repo}",
        weights={"default": WeightFile(f"Prithvi_EO_{file}.pt", repo=repo)},
        architecture={"heads": heads, "metadata": metadata},
        paper="arXiv 2310.18660" if first else "arXiv 2412.02732",
        notes="Masked autoencoder on Harmonized Landsat Sentinel-2 time series, 30 m. "
        f"Pretrained with {seen}; load_backbone(..., dates=T) reads T."
        + (scalars if metadata else ""),
        cannot="Knows six bands only. Key names come from TerraTorch's code; no "
        "published file was at hand."
        + ("" if metadata else " Does not look at date and place."),
    )


GEOPEFT_TINY = BackboneCard(
    name="geopeft_tiny",
    family="prithvi",
    bands=HLS_BANDS,
    patch=8,
    width=192,
    depth=6,
    parameters=2_743_680,
    image_size=64,
    normalisation=Normalisation(
        1.0,
        (0.080, 0.100, 0.110, 0.240, 0.210, 0.150),
        (0.060, 0.065, 0.085, 0.110, 0.110, 0.095),
    ),
    licence_weights="Apache-2.0",
    licence_code="Apache-2.0",
    source="packaged with geopeft_kit",
    weights={"default": WeightFile("geopeft_tiny.safetensors")},
    architecture={"heads": 3, "metadata": False},
    notes="Small ViT in Prithvi's block layout for teaching. Pretrained by "
    "data_scripts/pretrain_geopeft_tiny.py on 307,200 crops of simulated scenes of "
    "five regions (savanna is in none of them) and of 23 unlabelled real Sentinel-2 "
    "chips: masked patches, cover fractions, height above the river, slope, facts "
    "about the scene. Cover fractions come close to land cover and building density; "
    "flood, burn and change were in no target. In unseen simulated regions (five "
    "seeds) a probe is 5.9 points of mIoU above random weights on burn scars, interval "
    "2.8 to 8.9, and 18 on building sites; LoRA is 2.7 and 1.6 above the probe, where "
    "3 were asked for.",
    cannot="Simulated scenes; not a real geospatial foundation model: draw no "
    "conclusions about Earth from it.",
)

GEOPEFT_TINY_RGB = replace(
    GEOPEFT_TINY,
    name="geopeft_tiny_rgb",
    bands=("BLUE", "GREEN", "RED"),
    parameters=2_706_816,
    normalisation=Normalisation(1.0, (0.080, 0.100, 0.110), (0.060, 0.065, 0.085)),
    weights={"default": WeightFile("geopeft_tiny_rgb.safetensors")},
    notes="geopeft_tiny's twin for the visible bands: same network, same scenes, same "
    "targets, and it has seen red, green and blue alone. What methods that add "
    "spectral bands (DEFLECT-style, SLR) start from in the lessons. On simulated burn "
    "scars in unseen regions LoRA is 1.2 points below the probe (five seeds).",
)

CARDS = (GEOPEFT_TINY, GEOPEFT_TINY_RGB, *(_prithvi_card(*row) for row in _PUBLISHED))
