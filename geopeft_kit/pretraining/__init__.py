"""Pretraining: make or continue a foundation model without task labels.

One loop for all objectives. `pretrain` (run.py) trains a `PretextTask` (task.py), whose
parts are masked image modelling (masking.py), distillation of a frozen teacher's
features (distillation.py), and dense maps and scene facts where the data knows them.
Taught in notebook 10.

Sources: SimMIM, Xie et al. 2022 (arXiv 2111.09886); GFM, Mendieta et al. 2023 (arXiv
2302.04476), which adds the teacher; PhilEO, Fibaek et al. 2024 (arXiv 2401.04464), for
geo-aware heads.
"""

from geopeft_kit.backbones.weights import save_weights
from geopeft_kit.pretraining.result import Pretraining
from geopeft_kit.pretraining.run import pretrain
from geopeft_kit.pretraining.task import Objective, PretextTask, known_error

__all__ = [
    "Objective",
    "PretextTask",
    "Pretraining",
    "known_error",
    "pretrain",
    "save_weights",
]
