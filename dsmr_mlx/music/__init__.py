"""Notes: read, write, summarize, draw and render them as sound. Independent of tokens and models."""
