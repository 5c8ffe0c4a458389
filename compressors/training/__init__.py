"""Training for compressors that learn.

spec.py        how long, how fast, in which precision
text.py        domains of text, mixed into batches
pairs.py       instruction pairs
domains.py     dynamic batch loading: weights of domains that follow their losses
objective.py   what is minimised, and what happens between steps
loop.py        the loop
parallel.py    a model shared out among processes (FSDP)
state.py       states to resume from
history.py     the steps of a run on disk
figures.py     figures of them
"""
