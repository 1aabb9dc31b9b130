"""Notes to token ids and back, and the grammar that says which token may follow which. NumPy only."""
