"""The user's own data: folders, tables and scenes -> chips, for `ChipData.from_pairs`.

What the stored numbers mean is asked, with a proposal, and never assumed. Taught in
`notebooks/14_your_own_data.ipynb`.
"""
