"""xKV: a group of layers' KV cache stored as one shared low-rank factor."""

from xkv.backend import load_backend
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.factorize import factorize
from xkv.grouping import make_groups
from xkv.profile import Profile, load_profile
from xkv.prompt_cache import disable, enable, load_prompt_cache, save_prompt_cache
from xkv.rope import RopeSpec
from xkv.transformers_cache import load_torch_cache, torch_cache, torch_decoder, torch_prefill

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
