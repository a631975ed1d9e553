"""Methods that Hugging Face `peft` computes: a table, and what some rows need besides.

Source: the papers named on the cards; the layers are those of `peft`.
"""
