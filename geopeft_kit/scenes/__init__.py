"""Whole scenes: read by the window, predicted, described by STAC catalogues."""
