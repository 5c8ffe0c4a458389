"""LLM-Pruner: whole heads and channels go, by what their removal does to the loss (arXiv 2305.11627).

importance.py (pure: scores of units from weights and gradients), gradients.py (those, on calibration text),
widths.py (how many units a ratio takes), compressor.py (all of it as a compressor).
"""
