"""Sweeps: plan what is to be done, keep what is done, do what is missing."""
