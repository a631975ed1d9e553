"""Predictions as files for other tools, under the path that older scripts import."""

from geopeft_kit.scenes.exports import export_prediction, save_cog

__all__ = ["export_prediction", "save_cog"]
