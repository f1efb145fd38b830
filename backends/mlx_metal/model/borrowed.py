"""What is taken from inside mlx-lm and mlx-vlm, whose modules are imported here alone."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from importlib.metadata import version
from typing import Any

from xkv.errors import InputError

KNOWN_TO_WORK = ("0.31.3", "0.32.2")
"""Versions of mlx-lm that all tests pass with."""
VLM_KNOWN_TO_WORK = ("0.7.10",)
"""Versions of mlx-vlm that its tests pass with; only who brings such a model has it."""

_COMMAND = {"main": "()", "argparse": "", "load": "(path_or_hf_repo, *, tokenizer_config)"}
_SHARDED = {"sharded_load": "(repo, pipeline_group, tensor_group, *, tokenizer_config)"}
_STREAM = "(model, tokenizer, prompt, *, prompt_cache, prompt_progress_callback)"

TAKEN: dict[str, dict[str, str]] = {
    "mlx_lm": {"load": _COMMAND["load"], "stream_generate": _STREAM},
    "mlx_lm.generate": {
        **_COMMAND,
        "BatchGenerator.insert_segments": "(self, segments)",
        "BatchGenerator": "(model, *, completion_batch_size, prefill_step_size)",
        "BatchGenerator._generation_batch": "",
        "BatchGenerator._prompt_batch": "",
        "BatchGenerator._stream": "",
        "BatchGenerator._unprocessed_sequences": "",
        "BatchGenerator.close": "(self)",
        "BatchGenerator.completion_batch_size": "",
        "BatchGenerator.prefill_batch_size": "",
        "BatchGenerator.extract_cache": "(self, uids)",
        "BatchGenerator.model": "",
        "BatchGenerator.next": "(self)",
        "BatchGenerator.remove": "(self, uids)",
        "GenerationBatch.prompt_cache": "",
        "GenerationBatch.Response": "(*, uid, token, logprobs, finish_reason, prompt_cache, "
        "all_tokens, ...)",
        "GenerationBatch.uids": "",
        "BatchGenerator.prefill_step_size": "",
        "PromptProcessingBatch.Response": "(*, uid, end_of_prompt, ...)",
        "PromptProcessingBatch.model": "",
        "PromptProcessingBatch.prefill_step_size": "",
        "PromptProcessingBatch.prompt": "(self, tokens)",
        "PromptProcessingBatch.prompt_cache": "",
        "PromptProcessingBatch.tokens": "",
        "PromptProcessingBatch.uids": "",
        "GenerationResponse": "(*, text, token, prompt_tokens, prompt_tps, generation_tps, "
        "finish_reason, ...)",
        "generate": "(model, tokenizer, prompt, *, verbose)",
        "generate_step": "(prompt, model, *, input_embeddings, kv_bits, max_kv_size, prompt_cache, "
        "prefill_step_size, prompt_progress_callback)",
        "generation_stream": "",
        "load_prompt_cache": "(file_name, return_metadata)",
        "maybe_quantize_kv_cache": "(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)",
        "speculative_generate_step": "(prompt, model, draft_model, *, kv_bits, max_tokens, "
        "num_draft_tokens, prefill_step_size, prompt_cache)",
    },
    "mlx_lm.chat": {**_COMMAND, **_SHARDED, "stream_generate": _STREAM},
    "mlx_lm.cache_prompt": {**_COMMAND, "save_prompt_cache": "(file_name, cache, metadata)"},
    "mlx_lm.server": {
        **_COMMAND,
        **_SHARDED,
        "_run_http_server": "(host, port, response_generator, *, handler_class, server_class)",
        "APIHandler": "(response_generator, ...)",
        "APIHandler._set_completion_headers": "(self, status_code)",
        "APIHandler._validate": "(self, name, expected_type, *, optional)",
        "APIHandler.body": "",
        "APIHandler.do_GET": "(self)",
        "APIHandler.do_POST": "(self)",
        "APIHandler.end_headers": "(self)",
        "APIHandler.generate_response": "(self, text, finish_reason, *, token_logprobs, "
        "tool_calls, top_tokens)",
        "APIHandler.handle_chat_completions": "(self)",
        "APIHandler.handle_completion": "(self, request, stop_words)",
        "APIHandler.handle_models_request": "(self)",
        "APIHandler.requested_draft_model": "",
        "APIHandler.request_id": "",
        "APIHandler.requested_model": "",
        "APIHandler.response_generator": "",
        "APIHandler.stream": "",
        "APIHandler.stream_options": "",
        "APIHandler.temperature": "",
        "APIHandler.validate_model_parameters": "(self)",
        "CompletionRequest": "(*, messages, prompt, ...)",
        "GenerationArguments": "(*, logits, logprobs, max_tokens, sampling, stop_words, "
        "top_logprobs, ...)",
        "GenerationContext": "(*, prompt, prompt_cache_count, tool_parser, _should_stop, ...)",
        "GenerationContext.stop": "(self)",
        "LogitsProcessorArguments": "(*, logit_bias, ...)",
        "make_sampler": "(temp, top_p, min_p, *, top_k, xtc_special_tokens)",
        "LRUPromptCache": "(max_size)",
        "ModelProvider": "(cli_args)",
        "ModelProvider._load": "(self, model_path, ...)",
        "ModelProvider.draft_model": "",
        "ModelProvider.load": "(self, model_path, ...)",
        "ModelProvider.load_default": "(self)",
        "ModelProvider.model": "",
        "ModelProvider.model_key": "",
        "ModelProvider.tokenizer": "",
        "Response": "(*, finish_reason, logprob, text, token, top_tokens, ...)",
        "BatchGenerator": "(model, *, completion_batch_size, prefill_step_size)",
        "ModelProvider._adapter_map": "",
        "ModelProvider._draft_model_map": "",
        "ModelProvider._model_map": "",
        "ModelProvider.is_batchable": "",
        "ResponseGenerator": "(model_provider, prompt_cache)",
        "ResponseGenerator._is_distributed": "",
        "ResponseGenerator._generate": "(self)",
        "ResponseGenerator._next_request": "(self)",
        "ResponseGenerator._serve_single": "(self, request, ...)",
        "ResponseGenerator._tokenize": "(self, tokenizer, request, args)",
        "ResponseGenerator.generate": "(self, request, generation_args, progress_callback)",
        "ResponseGenerator.model_provider": "",
        "ResponseGenerator.prompt_cache": "",
        "ResponseGenerator.stop_and_join": "(self)",
        "SamplingArguments": "(*, top_k, ...)",
        "stream_generate": "(model, tokenizer, prompt, *, draft_model, max_tokens, "
        "num_draft_tokens)",
    },
    "mlx_lm.utils": {"_get_classes": "(config)", "load_config": "(model_path)"},
    "mlx_lm.sample_utils": {"make_sampler": "(temp, top_p, min_p, *, top_k)"},
    "mlx_lm.models.base": {
        "scaled_dot_product_attention": "(queries, keys, values, cache, scale, mask, sinks)"
    },
    "mlx_lm.models.bitlinear_layers": {"bitnet_quantize": "(model, quantization_config)"},
    "mlx_lm.models.cache": {
        "_BaseCache.empty": "(self)",
        "_BaseCache.from_state": "(state, ...)",
        "_BaseCache.is_trimmable": "(self)",
        "_BaseCache.size": "(self)",
        "CacheList.caches": "",
        "can_trim_prompt_cache": "(cache)",
        "ChunkedKVCache.chunk_size": "",
        "ChunkedKVCache.start_position": "",
        "create_attention_mask": "(N, offset, return_array, window_size)",
        "create_causal_mask": "(N, offset, window_size, *, left_padding)",
        "KVCache": "()",
        "KVCache.keys": "",
        "KVCache.nbytes": "",
        "KVCache.offset": "",
        "KVCache.state": "",
        "KVCache.trim": "(self, n)",
        "KVCache.update_and_fetch": "(self, keys, values)",
        "KVCache.values": "",
        "load_prompt_cache": "(file_name, return_metadata)",
        "LRUPromptCache": "(max_size)",
        "LRUPromptCache._trie": "",
        "LRUPromptCache.CacheEntry": "(*, prompt_cache, ...)",
        "LRUPromptCache.fetch_nearest_cache": "(self, model, tokens)",
        "LRUPromptCache.insert_cache": "(self, model, tokens, prompt_cache)",
        "LRUPromptCache.nbytes": "",
        "LRUPromptCache.trim_to": "(self, *, n_sequences)",
        "make_prompt_cache": "(model, max_kv_size)",
        "PromptTrie": "()",
        "PromptTrie.add": "(self, model, tokens, value)",
        "PromptTrie.get": "(self, model, tokens)",
        "PromptTrie.pop": "(self, model, tokens)",
        "PromptTrie.pop_prefixes": "(self, model, tokens)",
        "PromptTrie.search": "(self, model, tokens)",
        "PromptTrieResult": "(*, exact, shorter, ...)",
        "RotatingKVCache._idx": "",
        "RotatingKVCache.keep": "",
        "RotatingKVCache.keys": "",
        "RotatingKVCache.max_size": "",
        "save_prompt_cache": "(file_name, cache, metadata)",
        "trim_prompt_cache": "(cache, num_tokens)",
    },
    "mlx_lm.models.rope_utils": {
        "Llama3RoPE._freqs": "",
        "Llama3RoPE.traditional": "",
        "ProportionalRoPE._freqs": "",
        "ProportionalRoPE.traditional": "",
        "SuScaledRoPE._freqs": "",
        "SuScaledRoPE._scale": "",
        "YarnRoPE._freqs": "",
        "YarnRoPE.mscale": "",
        "YarnRoPE.traditional": "",
    },
    "mlx_vlm.generate.ar": {
        "_make_cache": "(model, left_padding)",
        "generate_step": "(input_ids, model, pixel_values, mask, *, draft_model, kv_bits, "
        "max_kv_size, prompt_cache)",
    },
    "mlx_vlm.models.base": {
        "scaled_dot_product_attention": "(queries, keys, values, cache, scale, mask, sinks)"
    },
    "mlx_vlm.models.cache": {"KVCache": "()"},
    "mlx_vlm.models.rope_utils": {
        "EagerRoPE.base": "",
        "EagerRoPE.dims": "",
        "EagerRoPE.scale": "",
        "EagerRoPE.traditional": "",
        "Llama3RoPE._freqs": "",
        "Llama3RoPE.traditional": "",
        "MRoPERotaryEmbedding.inv_freq": "",
        "MRoPERotaryEmbedding.pairing": "",
        "ProportionalRoPE._freqs": "",
        "ProportionalRoPE.traditional": "",
        "YarnRoPE._freqs": "",
        "YarnRoPE.mscale": "",
        "YarnRoPE.traditional": "",
    },
}
"""By module: what it is called, and what it has to take.

``(a, b, *, c)`` are the first parameters, in this order, and one more that can be given by name; no
other may have to be given, unless ``...`` says so. Nothing: it has to be there.
"""


@functools.cache
def module(name: str) -> Any:
    """A module of either by its full name, which a function of the same name may hide.

    Raises:
        InputError: If what is taken of it has moved or changed.
    """
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name or name == "mlx_lm":
            raise
        raise InputError(_sentence(name)) from error
    for path, call in TAKEN[name].items():
        if not _is_there(found, path, call):
            raise InputError(_sentence(f"{name}.{path}"))
    return found


def _sentence(what: str) -> str:
    is_vlm = what.startswith("mlx_vlm")
    package, known = ("mlx-vlm", VLM_KNOWN_TO_WORK) if is_vlm else ("mlx-lm", KNOWN_TO_WORK)
    return (
        f"{package} {version(package)} has moved or changed {what}, which xkv builds on; "
        f"{' and '.join(known)} {'are' if len(known) > 1 else 'is'} known to work: pip install "
        f"'{package}=={known[-1]}'"
    )


def _is_there(owner: Any, path: str, call: str) -> bool:
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part, None)
    found = getattr(owner, name, None)
    if call:
        return callable(found) and _takes(found, call)
    return found is not None or (isinstance(owner, type) and name in _attributes(owner))


def _takes(function: Any, call: str) -> bool:
    """Whether a function takes what the table says; see there."""
    given, _, by_name = call.partition("*")
    first, named = re.findall(r"\w+", given), re.findall(r"\w+", by_name)
    parameters = inspect.signature(function).parameters
    kinds = {x.kind for x in parameters.values()}
    return (
        list(parameters)[: len(first)] == first
        and all(name in parameters or inspect.Parameter.VAR_KEYWORD in kinds for name in named)
        and ("..." in call or not _needed(parameters) - {*first, *named})
    )


def _needed(parameters: Any) -> set[str]:
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return {
        name
        for name, x in parameters.items()
        if x.default is inspect.Parameter.empty and x.kind not in variable
    }


def _attributes(cls: type) -> set[str]:
    """What the methods of a class read and write, its instances' attributes among it."""
    methods = (x for base in cls.__mro__ for x in vars(base).values())
    codes = (getattr(x, "__code__", None) for x in methods)
    return {name for code in codes if code for name in code.co_names}
