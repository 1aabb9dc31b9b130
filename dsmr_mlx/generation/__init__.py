"""New music from a model: grammar mask, steering, sampling, the player, files that grow."""
