"""Whether a machine computes the same, and how fast."""
