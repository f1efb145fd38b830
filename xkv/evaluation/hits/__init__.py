"""The tasks ``hits``: questions to a cache that went through what users' caches go through."""
