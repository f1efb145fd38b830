"""mlx-lm's models with compressed caches."""
