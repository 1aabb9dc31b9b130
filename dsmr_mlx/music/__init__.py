"""Notes: read, write, summarize, draw and hear them. Knows nothing of tokens or models."""
