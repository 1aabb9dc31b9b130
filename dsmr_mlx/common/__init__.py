"""What every room uses: errors, files, configurations, number formats. No MLX."""
