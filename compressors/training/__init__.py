"""Training for compressors that learn: how long (spec), on what (text), the loop, and what is kept of it (history)."""
