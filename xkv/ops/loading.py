"""Finding a backend: the only place that imports one."""

from __future__ import annotations

import importlib
from typing import Any

from xkv.errors import InputError
from xkv.ops.backend import Backend

_BACKENDS = {
    "mlx": ("xkv.backends.mlx_metal", "mlx", "pip install xkv"),
    "torch": ("xkv.backends.torch_cuda", "torch", "pip install 'xkv[torch]'"),
}


def load_backend_module(name: str) -> Any:
    """Import the backend package ``name`` ("mlx" or "torch"); the only place that does.

    Raises:
        InputError: If the name is unknown or the framework is not installed.
    """
    if name not in _BACKENDS:
        raise InputError(f"backend {name!r} is unknown; choose one of {', '.join(_BACKENDS)}")
    module, framework, install = _BACKENDS[name]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("xkv"):
            raise
        raise InputError(
            f"the {name} backend needs {error.name or framework}, which is not installed: {install}"
        ) from error


def load_backend(name: str, **options: Any) -> Backend:
    """A new instance of the backend ``name``; options are those of its class (torch: device)."""
    return load_backend_module(name).make_backend(**options)
