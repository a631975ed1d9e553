"""The explorer: choose, train, compare and copy the code, in one widget.

`session` trains and keeps runs, `choice` writes their code, `controls`, `page`,
`panels` and `figures` are the page, `threads` lets page and training share one
backbone, `storage` saves it all. Taught in notebook 13.
"""

from geopeft_kit.explorer.explorer import Explorer

__all__ = ["Explorer"]
