"""reBEN-7k, the PEFT study's part of BigEarthNet v2 -> a chip folder for segmentation.

    python data_scripts/reben_7k.py --root data

19 land-cover classes; 4690 / 946 / 945 patches, and the 807 of Austria and Ireland
apart, in a split "ood". The same as `bigearthnet.py --reben-7k`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import bigearthnet
from command import main

SOURCE = replace(
    bigearthnet.SOURCE,
    title="reBEN-7k: 7,388 patches of BigEarthNet v2 with land-cover maps, 12 bands",
    disk_mb=2700,
)
convert = partial(bigearthnet.convert, reben_7k=True)

if __name__ == "__main__":
    main(SOURCE, convert)
