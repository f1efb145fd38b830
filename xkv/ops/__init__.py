"""What a framework must offer, and what it gets for free."""
