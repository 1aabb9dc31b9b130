"""The DSMR network, its horizons and recurrent state; checkpoints and the bundled weights."""
