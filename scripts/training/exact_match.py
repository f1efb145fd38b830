"""What the bundled model is judged by: exact answers to questions about unseen documents."""

import copy
import random

import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from training.tokenizer import ASSISTANT, BOS, END, USER
from xkv.tiny import documents

ANSWER_TOKENS = 6  # Name, verb, adjective, noun, period, end.


@torch.inference_mode()
def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    n_tokens: int,
    n_questions: int,
    first_seed: int,
) -> float:
    """Share of exact greedy answers; each question is asked alone, directly after its document.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        n_tokens: Length of the documents, without the question.
        n_questions: Questions in all, at most 16 a document.
        first_seed: Seed of the first document; the next ones count up.

    Returns:
        A share between 0 and 1.
    """
    n_right = n_asked = 0
    for seed in range(first_seed, first_seed + n_questions):
        document = documents.make_document(seed, n_tokens)
        n_facts = min(16, len(document.facts), n_questions - n_asked)
        text = tokenizer.encode(f"{BOS}{USER}{document.text}", add_special_tokens=False)
        prefix = DynamicCache(config=model.config)
        model(torch.tensor([text], device=model.device), past_key_values=prefix, logits_to_keep=1)
        for fact in random.Random(seed).sample(document.facts, n_facts):
            prompt = f"{fact.question}{END}{ASSISTANT}{fact.answer}{END}"
            ids = tokenizer.encode(prompt, return_tensors="pt", add_special_tokens=False)
            ids = ids.to(model.device)
            logits = model(ids, past_key_values=copy.deepcopy(prefix)).logits[0]
            # Greedy decoding gives the answer exactly when each token is the argmax in its place.
            predicted = logits[-ANSWER_TOKENS - 1 : -1].argmax(-1)
            n_right += bool((predicted == ids[0, -ANSWER_TOKENS:]).all())
        n_asked += n_facts
        if n_asked == n_questions:
            break
    return n_right / n_questions
