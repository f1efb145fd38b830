"""mlx-lm's server over compressed caches."""
