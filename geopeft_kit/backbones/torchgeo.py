"""The backbones that torchgeo publishes, in one table of builders and cards.

Each file holds one kind: kernels made from wavelengths (`dofa`, `panopticon`,
`copernicusfm`), attention that falls with distance (`croma`), windows (`satlas`),
SSL4EO-S12's plain networks (`ssl4eo`), positions in metres (`scalemae`).

Taught in notebook 01 (load a geospatial foundation model).
"""

from __future__ import annotations

from geopeft_kit.backbones import (
    copernicusfm,
    croma,
    dofa,
    panopticon,
    satlas,
    scalemae,
    ssl4eo,
)

BUILDERS = {
    "copernicusfm": copernicusfm.build,
    "croma": croma.build,
    "dofa": dofa.build,
    "panopticon": panopticon.build,
    "satlas": satlas.build,
    "scalemae": scalemae.build_scalemae,
    "ssl4eo_resnet": ssl4eo.build_resnet,
    "ssl4eo_vit": ssl4eo.build_vit,
}
CARDS = (
    dofa.CARDS
    + scalemae.CARDS
    + croma.CARDS
    + panopticon.CARDS
    + copernicusfm.CARDS
    + satlas.CARDS
    + ssl4eo.CARDS
)
