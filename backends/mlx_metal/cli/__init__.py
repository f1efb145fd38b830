"""mlx-lm's command lines over compressed caches."""
