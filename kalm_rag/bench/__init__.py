"""Speed, measured against what a user would pick instead: one run, medians, ratios.

Baselines: a cross-encoder of the same size, KaLM's published one-phase protocol, sentence-transformers' encode, a
checkpoint loaded whole. `suite.run` does it all, `report` holds what comes of it.
"""
