"""Before a prompt: which layers share a latent, and what fits into memory."""
