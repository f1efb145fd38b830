"""Training the bundled model: what ``scripts/train_tiny.py`` is made of."""
