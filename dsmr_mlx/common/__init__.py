"""Shared utilities: errors, files, configurations, number formats. Needs no MLX."""
