"""Sheared LLaMA: prune a model to a shape that was chosen before, then train it on (arXiv 2310.06694).

hard_concrete.py (pure: masks that learn), shape.py (target shapes), masks.py (the masks of a model and their
constraint), masked.py (a model that runs under masks), cut.py (masks become a smaller model), compressor.py (all of it
as a compressor); dynamic batch loading is in training/domains.py.
"""
