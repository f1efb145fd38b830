"""xKV on PyTorch: the reference backend, the transformers cache and the generation engine."""

from xkv.backends.torch_cuda.backend import TorchBackend

__all__ = ["TorchBackend", "make_backend"]


def make_backend(device: str | None = None) -> TorchBackend:
    """The PyTorch backend on ``device`` (default: CUDA if there is one, else the CPU)."""
    return TorchBackend(device)
