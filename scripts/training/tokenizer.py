"""The bundled model's tokenizer: one piece a word that documents and tasks may say."""

import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xkv.evaluation.tasks import TASKS
from xkv.tiny import documents

PAD, BOS, END, UNKNOWN = "<pad>", "<s>", "<|end|>", "<unk>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIALS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT, UNKNOWN)
PUNCTUATION = ".,?!;:'\"()[]{}-_/\\&%$#@*+=<>|~^`"
ALPHANUMERIC = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram tokenizer: one piece a known word; numbers by three digits, hexadecimal by two.

    Letters, digits and bytes are there for all else. A value's first piece includes the space
    before it: a space alone would hide from the next token which key came before.
    """
    words = [("▁" + word, -2.0) for word in sorted({*documents.vocabulary(), *task_words()})]
    small = [(piece, -8.5) for piece in ("▁", *PUNCTUATION, *ALPHANUMERIC)]
    small += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
    digits = [(f"{number:03}", -8.0) for number in range(1000)]
    digits += [(f"{number:02x}", -9.0) for number in range(256)]
    digits += [("▁" + piece, score) for piece, score in digits]
    pieces = [(special, 0.0) for special in SPECIALS] + words + [("▁->", -2.0)] + small + digits
    unigram = models.Unigram(pieces, unk_id=SPECIALS.index(UNKNOWN), byte_fallback=True)
    tokenizer = Tokenizer(unigram)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    # mlx-lm recognizes exactly this sequence and streams without decoding again from the start.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def task_words() -> set[str]:
    """The words of instructions, questions and answers of the evaluation's tasks."""
    words: set[str] = set()
    for make in TASKS.values():
        sample = make(0, 2000, lambda text: len(text.split()))
        intro = re.split("\n", sample.context)[0]
        texts = [intro, *(f"{q.text} {q.prefix}" for q in sample.questions)]
        # a UUID's letters are no words
        words.update(word for text in texts for word in re.findall(r"\b[A-Za-z]{2,}\b", text))
    return {word for word in words if not re.fullmatch("[0-9a-f]+", word)}
