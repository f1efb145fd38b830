"""xKV: a group of layers' KV cache stored as one shared low-rank factor."""

from xkv.caches import (
    disable,
    enable,
    load_prompt_cache,
    load_torch_cache,
    save_prompt_cache,
    torch_cache,
    torch_decoder,
    torch_prefill,
)
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.loading import load_backend
from xkv.ops.types import RopeSpec
from xkv.planning.grouping import make_groups
from xkv.planning.profile import Profile, load_profile
from xkv.store.svd import factorize

__all__ = [
    "InputError",
    "Profile",
    "RopeSpec",
    "XKVConfig",
    "disable",
    "enable",
    "factorize",
    "load_backend",
    "load_profile",
    "load_prompt_cache",
    "load_torch_cache",
    "make_groups",
    "save_prompt_cache",
    "torch_cache",
    "torch_decoder",
    "torch_prefill",
]
