"""Tokenizers: notes to token ids and back, and the grammar of which token may follow which. NumPy only."""
