"""Who holds what: cache, groups, layers, state, files."""
