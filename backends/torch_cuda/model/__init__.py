"""transformers' models with compressed caches."""
