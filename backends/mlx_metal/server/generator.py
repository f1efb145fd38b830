"""The thread that answers the server's requests.

Prompts go through the model one at a time, layer by layer, so that no two are dense at once; their
answers are decoded in one batch. What fits into memory alone, but not beside what runs, waits.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from xkv.backends.mlx_metal.cli.commands import replaced
from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.enabled import enabled_state, native_caches
from xkv.backends.mlx_metal.server.answers import Answers
from xkv.backends.mlx_metal.server.batches import Batches
from xkv.backends.mlx_metal.server.budget import PromptCache
from xkv.backends.mlx_metal.server.errors import RequestError, error_text
from xkv.backends.mlx_metal.server.guard import AllowedModels
from xkv.backends.mlx_metal.server.messages import CountRequest, PromptCount
from xkv.backends.mlx_metal.server.need import RequestBytes
from xkv.backends.mlx_metal.server.request import malformed_calls, wrap_arguments
from xkv.errors import InputError

mlx_server = borrowed.module("mlx_lm.server")


def end_streams() -> None:
    """Destroy the streams that the current thread has made, where MLX can."""
    # MLX 0.31 cannot, and keeps no streams by thread
    getattr(mx, "clear_streams", lambda: None)()


class Generator(mlx_server.ResponseGenerator):  # type: ignore[name-defined]
    """mlx-lm's generation thread, which refuses what does not fit before it is computed."""

    prompt_cache: PromptCache

    def __init__(self, model_provider: Any, prompt_cache: PromptCache) -> None:
        self._is_ready = threading.Event()
        self._load_error: Exception | None = None
        self._vocabulary: tuple[Any, int] = None, 0
        """Size by the key of the models."""
        self.allowed = AllowedModels.of(model_provider.cli_args)
        self._held: Any = None
        """A request that waits for memory."""
        self._starting: Answers | None = None
        """The request that is about to run, in a batch or alone."""
        self._batches: Batches | None = None
        self._open: set[Answers] = set()
        prompt_cache.needed, prompt_cache.active = self._needed, self._active
        prompt_cache.holds_more = self._holds_more
        prompt_cache.after_keeping = self._send_ends
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
            self._serve()
        finally:
            # MLX's own threads of this one: a process that ends before they do is aborted
            end_streams()

    def _serve(self) -> None:
        try:
            self.model_provider.load_default()
        except Exception as error:
            self._load_error = error
            return
        finally:
            self._is_ready.set()
        prompt_cache = self.prompt_cache
        try:
            with replaced(mlx_server, {"BatchGenerator": self._new_batches}):
                while self._is_cut_off():
                    pass
        finally:
            self._send_ends()
            prompt_cache.close()

    def _is_cut_off(self) -> bool:
        """Answer requests until the server ends, or mlx-lm's loop does by an error of its own."""
        try:
            super()._generate()
        except Exception as error:
            if self._is_distributed:
                raise
            logging.exception("the generation stopped; requests that ran get an error")
            self._batches = self._starting = None
            for answers in list(self._open):
                answers.put(error)
            return True
        return False

    def _new_batches(self, *args: Any, **kwargs: Any) -> Batches:
        self._batches = Batches(self._take_starting, self._keep, *args, **kwargs)
        return self._batches

    def _take_starting(self) -> Answers:
        taken, self._starting = self._starting, None
        assert taken is not None
        return taken

    def _keep(self, tokens: list[int], cache: list[Any]) -> None:
        self.prompt_cache.insert_cache(self.model_provider.model_key, tokens, cache)

    def _needed(self) -> RequestBytes:
        running = [] if self._batches is None else list(self._batches.answers.values())
        starting = [] if self._starting is None else [self._starting]
        return sum((answers.need for answers in (*starting, *running)), RequestBytes())

    def _holds_more(self, n_bytes: int) -> None:
        """The request that starts shares a beginning that is longer than what it uses of it."""
        if self._starting is not None:
            self._starting.need += RequestBytes(n_bytes)

    def _active(self) -> dict[int, int]:
        return {} if self._batches is None else self._batches.arrays()

    def _send_ends(self) -> None:
        """Let clients know of answers that have ended, and are out of the batch."""
        running = set() if self._batches is None else set(self._batches.answers.values())
        for answers in self._open - running:
            answers.send_end()
            if answers.is_done or answers.is_left:
                self._open.remove(answers)

    def _next_request(self, *args: Any, **kwargs: Any) -> Any:
        # whatever kept one from being kept
        self._send_ends()
        if self._held is None:
            self._held = self._taken(super()._next_request(*args, **kwargs))
        if self._held is None or self._waits(*self._held):
            return None
        taken, self._held = self._held, None
        return taken

    def _taken(self, taken: Any) -> Any:
        if taken is None:
            return None
        queue, request, wanted = taken
        answers = Answers(queue, wanted, lambda: self.model_provider.tokenizer)
        request.answers, request.tokenized = answers, None
        self._open.add(answers)
        # mlx-lm looks for stop strings among tokens, and misses those that begin inside one
        return answers, request, replace(wanted, stop_words=[])

    def _waits(self, answers: Answers, request: Any, args: Any) -> bool:
        """Whether a request has to wait until others have ended."""
        is_busy = self._batches is not None and self._batches.answers
        key = self.model_provider.model_key
        if not is_busy or self._is_distributed or self._key_of(args.model) != key:
            return False
        try:
            request.tokenized = self._admitted(self.model_provider.tokenizer, request, args)
        except Exception:
            # and again, where the client is told
            return False
        return not self.prompt_cache.has_room(answers.need)

    def _key_of(self, models: Any) -> Any:
        """The key by which mlx-lm knows a request's models."""
        provider: Any = self.model_provider
        return (
            provider._model_map.get(models.model, models.model),
            provider._adapter_map.get(models.model, models.adapter),
            provider._draft_model_map.get(models.draft, models.draft),
        )

    def _serve_single(self, request: Any, *args: Any) -> None:
        answers, *_ = request
        answers.is_alone = True
        super()._serve_single(request, *args)
        self._starting = None

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        self._starting = request.answers
        if request.tokenized is None:
            request.tokenized = self._admitted(tokenizer, request, args)
        return request.tokenized

    def _admitted(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """What mlx-lm makes of a request; raises if it is malformed, or does not fit."""
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
        request.answers.need = self._admit(len(prompt), args.max_tokens)
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
                is_layerwise = enabled.plan.probe.why_not_layerwise is None
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
        provider: Any = self.model_provider
        models = provider.model, provider.draft_model
        weights: list[Any] = [tree_flatten(model.parameters()) for model in models if model]
        model_bytes = sum(x.nbytes for parameters in weights for _, x in parameters)
        drafts = {} if models[1] is None else {"drafts": provider.drafts.report()}
        found = [x.basis for x in map(enabled_state, filter(None, models)) if x is not None]
        basis_bytes = sum(basis.nbytes for basis in found if basis is not None)
        beside = {"model_bytes": model_bytes, "basis_bytes": basis_bytes}
        return {**self.prompt_cache.report(), **drafts, **beside}
