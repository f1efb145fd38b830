"""What xkv adds to mlx-lm's server.

Requests are served one at a time: each conversation has bases and ranks of its own, and prompts of
a batch would all be dense at once before they are compressed.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from xkv.backends.mlx_metal.cli.commands import Command, run
from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.enable import disable
from xkv.backends.mlx_metal.model.enabled import enabled_state, native_caches
from xkv.backends.mlx_metal.server.answers import Answers
from xkv.backends.mlx_metal.server.budget import PromptCache, RequestBytes
from xkv.backends.mlx_metal.server.errors import RequestError, error_text
from xkv.backends.mlx_metal.server.guard import AllowedModels
from xkv.backends.mlx_metal.server.listening import is_loopback, server_class
from xkv.backends.mlx_metal.server.messages import CountRequest, MessagesHandler, PromptCount
from xkv.backends.mlx_metal.server.request import malformed_calls, wrap_arguments
from xkv.cli.server_flags import API_KEY
from xkv.errors import InputError

mlx_server = borrowed.module("mlx_lm.server")


def run_server(argv: Sequence[str] | None = None) -> None:
    """mlx-lm's server over compressed caches."""
    run("server", argv, command=Server())


class Server(Command):
    """mlx-lm's server, which keeps to its memory and answers every request."""

    def take(self, args: argparse.Namespace) -> None:
        super().take(args)
        # mlx-lm's own call does nothing when there is a handler already
        logging.basicConfig(
            level=args.log_level, format="%(asctime)s - %(levelname)s - %(message)s", force=True
        )

    def replacements(self, module: Any) -> dict[str, Any]:
        return {
            **super().replacements(module),
            "LRUPromptCache": lambda size: PromptCache(size, self.args.prompt_cache_bytes),
            "ModelProvider": lambda args: Models(args, self),
            "ResponseGenerator": Generator,
            "_run_http_server": _serving(module._run_http_server),
            "make_sampler": flat_tokens(module.make_sampler),
        }


def _serving(original: Callable[..., None]) -> Callable[..., None]:
    """``_run_http_server`` with our handler, once the model is loaded."""

    def _run_http_server(host: str, port: int, generator: Generator) -> None:
        try:
            generator.wait_until_loaded()
            args = generator.cli_args
            if args.api_key is None and not is_loopback(host):
                print(
                    f"Warning: whoever reaches {host}:{port} may ask this server: give it an "
                    f"--api-key, or {API_KEY}",
                    file=sys.stderr,
                )
            classes = {
                "server_class": server_class(args.max_connections),
                "handler_class": MessagesHandler,
            }
            original(host, port, generator, **classes)
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}:{port}: {error}; try another --port"
            ) from error
        finally:
            generator.stop_and_join()

    return _run_http_server


def flat_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """``make_sampler`` that takes lists among XTC's tokens, as mlx-lm up to 0.31 gives them."""

    def make_sampler(*args: Any, xtc_special_tokens: Sequence[Any], **kwargs: Any) -> Any:
        lists = (x if isinstance(x, list) else [x] for x in xtc_special_tokens)
        return original(*args, xtc_special_tokens=[x for y in lists for x in y], **kwargs)

    return make_sampler


class Models(mlx_server.ModelProvider):  # type: ignore[name-defined]
    """mlx-lm's models, of which ours lets go together with it."""

    def __init__(self, args: argparse.Namespace, command: Server) -> None:
        super().__init__(args)
        self._command = command

    def _load(self, *args: Any) -> None:
        while self._command.models:
            disable(self._command.models.pop())
        # before the next one is loaded; mlx-lm up to 0.31 leaves it to Python's collector
        self.model_key = self.model = self.tokenizer = self.draft_model = None
        gc.collect()
        super()._load(*args)

    def load(self, model_path: str, *args: Any) -> Any:
        try:
            return super().load(model_path, *args)
        except Exception as error:
            raise RequestError(404, str(error), "model_not_found") from error


class Generator(mlx_server.ResponseGenerator):  # type: ignore[name-defined]
    """mlx-lm's generation thread, which refuses what does not fit before it is computed."""

    prompt_cache: PromptCache

    def __init__(self, model_provider: Models, prompt_cache: PromptCache) -> None:
        self._is_ready = threading.Event()
        self._load_error: Exception | None = None
        self._vocabulary: tuple[Any, int] = None, 0
        """Size by the key of the models."""
        self.allowed = AllowedModels.of(model_provider.cli_args)
        super().__init__(model_provider, prompt_cache)

    def generate(self, request: Any, generation_args: Any, *args: Any) -> Any:
        models = self.allowed.chosen(generation_args.model)
        return super().generate(request, replace(generation_args, model=models), *args)

    def wait_until_loaded(self) -> None:
        """Wait for the model of the command line.

        Raises:
            InputError: If it cannot be loaded.
        """
        self._is_ready.wait()
        if self._load_error is not None:
            raise InputError(str(self._load_error)) from self._load_error

    def _generate(self) -> None:
        try:
            self.model_provider.load_default()
        except Exception as error:
            self._load_error = error
            return
        finally:
            self._is_ready.set()
        super()._generate()

    def _next_request(self, *args: Any, **kwargs: Any) -> Any:
        taken = super()._next_request(*args, **kwargs)
        if taken is None:
            return None
        queue, request, wanted = taken
        answers = Answers(queue, wanted, lambda: self.model_provider.tokenizer)
        # mlx-lm looks for stop strings among tokens, and misses those that begin inside one
        return answers, request, replace(wanted, stop_words=[])

    def _serve_single(self, request: Any, *args: Any) -> None:
        answers, *_ = request
        answers.is_alone = True
        super()._serve_single(request, *args)
        self.prompt_cache.reserved = RequestBytes()

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        self._fit_vocabulary(request, args)
        malformed = malformed_calls(request.messages)
        try:
            tokenized = self._tokenized(tokenizer, request, args, malformed)
        except Exception as error:
            message = f"the prompt cannot be made into tokens: {error_text(error)}"
            raise RequestError(400, message) from error
        prompt = tokenized[0]
        if not isinstance(prompt, list) or not all(isinstance(x, int) for x in prompt):
            raise RequestError(400, "the chat template's arguments make something else than tokens")
        if not prompt:
            raise RequestError(400, "the prompt is empty")
        if isinstance(request, CountRequest):
            raise PromptCount(len(prompt))
        self.prompt_cache.reserved = self._admit(len(prompt), args.max_tokens)
        return tokenized

    def _tokenized(self, tokenizer: Any, request: Any, args: Any, malformed: Any) -> Any:
        if isinstance(request.prompt, list):
            tokenizer = SimpleNamespace(encode=list)
        try:
            return super()._tokenize(tokenizer, request, args)
        except Exception:
            if not malformed:
                raise
            wrap_arguments(malformed)
            return super()._tokenize(tokenizer, request, args)

    def _fit_vocabulary(self, request: Any, args: Any) -> None:
        """Refuse tokens that the models do not have; MLX would read beyond its arrays."""
        biases = args.logits.logit_bias or {}
        ids = request.prompt if isinstance(request.prompt, list) else []
        if not (biases or ids or args.sampling.top_k):
            return
        n_tokens = self._n_tokens()
        for name, tokens in (("logit_bias", biases), ("prompt", ids)):
            outside = [x for x in tokens if not 0 <= x < n_tokens]
            if outside:
                raise RequestError(
                    400, f"{name} has token {outside[0]}, and the vocabulary ends at {n_tokens - 1}"
                )
        if args.sampling.top_k >= n_tokens:
            args.sampling.top_k = 0

    def _n_tokens(self) -> int:
        """Tokens that the models and the tokenizer know."""
        provider: Any = self.model_provider
        if self._vocabulary[0] == provider.model_key:
            return self._vocabulary[1]
        sizes = [len(provider.tokenizer.get_vocab())]
        for model in (provider.model, provider.draft_model):
            if model is not None:
                # a call that is never computed
                logits = model(mx.zeros((1, 1), mx.int32), cache=native_caches(model))
                sizes.append(logits.shape[-1])
        self._vocabulary = provider.model_key, min(sizes)
        return self._vocabulary[1]

    def _admit(self, n_prompt: int, n_answer: int) -> RequestBytes:
        """What a request takes; raises if there is no room for it."""
        provider, need = self.model_provider, RequestBytes()
        for model in (provider.model, provider.draft_model):
            enabled = None if model is None else enabled_state(model)
            if enabled is not None:
                is_layerwise = provider.draft_model is None
                need += RequestBytes.of(enabled, n_prompt, n_answer, is_layerwise)
        why_not = self.prompt_cache.why_not(need)
        if why_not is not None:
            raise RequestError(
                400,
                f"The request ({n_prompt} tokens and up to {n_answer} in the answer) does not "
                f"fit: {why_not}. Shorten the messages or lower max_tokens.",
                "context_length_exceeded",
            )
        return need

    def memory(self) -> dict[str, Any]:
        """What ``GET /xkv/memory`` answers."""
        models: Any = (self.model_provider.model, self.model_provider.draft_model)
        weights: list[Any] = [tree_flatten(model.parameters()) for model in models if model]
        model_bytes = sum(x.nbytes for parameters in weights for _, x in parameters)
        return {**self.prompt_cache.report(), "model_bytes": model_bytes}
