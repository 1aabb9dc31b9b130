"""Tokenizers: notes to token ids and back, and the grammar of the tokens. NumPy only."""
