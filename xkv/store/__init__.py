"""How rows become few bytes."""
