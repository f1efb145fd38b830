"""Decode steps of constant shapes: ordinary tokens, and replays on the same memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import xkv
from tests.torch_models import make_model, make_prompt
from xkv.backends.torch_cuda.model.decoder import Decoder

OPTIONS = {
    "exact": {"rank_k": 24, "rank_v": 24, "attention": "exact"},
    "set": {"rank_k": 24, "rank_v": 24, "budget": 64},
    "bits": {"compression": 2, "attention": "exact"},
}


class Recording(TorchDispatchMode):
    """What a CUDA graph keeps of a step: operations on fixed memory, and nothing of Python."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        assert name != "aten::_local_scalar_dense", "the step waits for the device"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, before in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(
                *map(torch.utils._pytree.tree_leaves, (before, again)), strict=True
            ):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(run):
    with Recording() as recording:
        output = run()
    calls = iter([lambda: None])  # on the CPU recording has run the step once already

    def replay():
        next(calls, recording.replay)()
        return output

    return replay


def prefilled(model, prompt, **options):
    cache = xkv.torch_cache(model, sinks=4, window=16, max_tail=24, **options)
    xkv.torch_prefill(model, cache, prompt)
    return cache


def greedy(step, prompt, n_tokens):
    token, tokens = prompt[:, -1:], []
    with torch.inference_mode():
        for _ in range(n_tokens):
            token = step(token).argmax(-1, keepdim=True)
            tokens.append(token.clone())
    return torch.cat(tokens, -1)


def ordinary_step(model, cache):
    return lambda token: model(token, cache=cache, use_cache=True).logits[:, -1]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_recorded_steps_give_the_tokens_of_ordinary_ones(options, batch):
    model, prompt = make_model("llama", head_dim=32), make_prompt(500, batch)
    cache, others = (prefilled(model, prompt, **options) for _ in range(2))
    recorded = []

    def counted(run):
        recorded.append(run)
        return record(run)

    decoder = Decoder(model, cache, counted)
    assert cache.sequences[0].layers[0].is_compressed
    got = greedy(decoder, prompt, 80)
    assert (got == greedy(ordinary_step(model, others), prompt, 80)).all()
    assert len(recorded) > 1  # the tail was folded in between
    assert cache.get_seq_length() == others.get_seq_length()
    # the cache may be used otherwise in between
    for step in (ordinary_step(model, cache), decoder):
        want = greedy(ordinary_step(model, others), prompt, 9)
        assert (greedy(step, prompt, 9) == want).all()


def test_steps_that_are_not_recorded_give_the_tokens_of_ordinary_ones():
    model, prompt = make_model("llama"), make_prompt(300)
    cache, others = (prefilled(model, prompt, **OPTIONS["exact"]) for _ in range(2))
    want = greedy(ordinary_step(model, others), prompt, 60)
    assert (greedy(xkv.torch_decoder(model, cache), prompt, 60) == want).all()


@pytest.mark.parametrize("n_padding", [0, 40])
def test_cache_that_was_emptied_meanwhile_is_noticed(n_padding):
    model, prompt = make_model("llama"), make_prompt(300, batch=2)
    cache, others = (prefilled(model, prompt, **OPTIONS["exact"]) for _ in range(2))
    decoder = Decoder(model, cache, record)
    greedy(decoder, prompt, 5)
    cache.reset()
    mask = torch.ones_like(prompt)
    mask[0, :n_padding] = 0
    xkv.torch_prefill(model, cache, prompt, attention_mask=mask)
    if n_padding:
        with pytest.raises(xkv.InputError, match="do not take batches with padding"):
            greedy(decoder, prompt, 1)
        return
    want = greedy(ordinary_step(model, others), prompt, 9)
    assert (greedy(decoder, prompt, 9) == want).all()


def test_as_many_tokens_in_other_buffers_are_noticed():
    model, prompt = make_model("llama"), make_prompt(300)
    cache, others = (prefilled(model, prompt, **OPTIONS["exact"]) for _ in range(2))
    decoder = Decoder(model, cache, record)
    for step, each in ((decoder, cache), (ordinary_step(model, others), others)):
        greedy(step, prompt, 5)
        each.crop(-4)
        greedy(ordinary_step(model, each), prompt, 40)  # the tail is folded meanwhile
        each.crop(-36)
    want = greedy(ordinary_step(model, others), prompt, 9)
    assert (greedy(decoder, prompt, 9) == want).all()


def test_dense_prompts_run_ordinary_steps():
    model, prompt = make_model("llama"), make_prompt(20)
    cache, others = (prefilled(model, prompt, compression=3) for _ in range(2))
    decoder = Decoder(model, cache, pytest.fail)
    want = greedy(ordinary_step(model, others), prompt, 9)
    assert (greedy(decoder, prompt, 9) == want).all()


@pytest.mark.parametrize(
    ("name", "padding", "sentence"),
    [
        ("gemma3", 0, "those of layer 0 are not"),
        ("deepseek_v3", 0, "are rebuilt for the model in every step"),
        ("llama", 5, "do not take batches with padding"),
    ],
)
def test_what_cannot_be_replayed_is_refused(name, padding, sentence):
    model, prompt = make_model(name), make_prompt(200, batch=2)
    mask = torch.ones_like(prompt)
    mask[0, :padding] = 0
    cache = xkv.torch_cache(model, compression=3)
    xkv.torch_prefill(model, cache, prompt, attention_mask=mask)
    with pytest.raises(xkv.InputError, match=sentence):
        xkv.torch_decoder(model, cache)
