"""xKV on MLX: the backend, the mlx-lm cache and the generation engine."""

from xkv.backends.mlx_metal.backend import MLXBackend

__all__ = ["MLXBackend", "make_backend"]


def make_backend() -> MLXBackend:
    """The MLX backend on the default device."""
    return MLXBackend()
