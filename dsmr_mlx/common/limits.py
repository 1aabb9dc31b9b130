"""The largest sizes that configurations, options and converted checkpoints may have.

They are far above any trained model, and small enough that a damaged or hostile file causes a one-line error, not an
impossible allocation.
"""

MAX_INTEGER = 2**63 - 1
MAX_LAYERS = 1024
MAX_TOKENS = 1 << 24  # of a memory horizon or a table of positions
MAX_WEIGHTS = 1 << 40  # of a model
MAX_STATE = 1 << 40  # numbers in the recurrent state of one lane

# name of a setting or option → its largest value
MAX_SIZES = {
    "n_layers": MAX_LAYERS,
    "layers": MAX_LAYERS,
    "d_model": 1 << 17,
    "canon": 1 << 17,
    "d_ff": 1 << 20,
    "n_heads": 1 << 12,
    "n_kv_heads": 1 << 12,
    "kv_heads": 1 << 12,
    "head_dim": 1 << 14,
    "segment_length": 1 << 17,
    "segment": 1 << 17,
    "max_positions": MAX_TOKENS,
    "vocab_size": 1 << 22,
    "batch_size": 1 << 16,
    "accumulate": 1 << 20,
    "keep_last": 1 << 20,
    "workers": 1 << 10,
    "n": 1 << 12,
    "best_of": 1 << 12,
    "excerpts": 1 << 20,
    "systems": 1 << 12,
}
