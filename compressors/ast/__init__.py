"""AST: sparse weights that learn while their mask does (arXiv 2407.20584).

schedule.py (pure: how much decay, how many weights stay), sparse.py (masked weights with a straight-through gradient),
optimizer.py (AdamW with decay on what is pruned), slorb.py (the low-rank branch), objective.py (distillation),
compressor.py (all of it as a compressor).
"""
