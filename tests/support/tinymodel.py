"""A random tiny Llama with an ordinary tokenizer and a ChatML template, for tests that need a model
and no meaning."""

from __future__ import annotations

import sys
from pathlib import Path

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
LLAMA = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "bos": LLAMA, "no_end": NO_END, "thinks": THINKS}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCES = (
    "Which answer asks the caller for less private information? Answer A, B or T.",
    "The quick brown fox jumps over the lazy dog while 123456789 birds sing in the garden of the "
    "clinic.",
    "Please tell me your name, and I will gladly look for an open appointment on Monday morning.",
    "I am sorry, but I can not help you with that request; it could hurt somebody. Yes, No, None, "
    "Fault.",
    "A critique names the fault in an answer, and a revision mends the fault and keeps everything "
    "else.",
)


def build_tokenizer(vocab: int = 1500):
    """Train a byte-level BPE on a few sentences and give it a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words = [f"word{i} item{i * 7}" for i in range(400)]
    raw.train_from_iterator([*SENTENCES, *words, " A B T 1 2 3 4 5 6 7 8 9"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def build(
    folder: Path,
    heads: int = 8,
    hidden: int = 256,
    layers: int = 5,
    context: int = 512,
    seed: int = 0,
) -> Path:
    """Write tokenizer and random float32 weights (tied embeddings) to `folder`; return it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), heads=int(sys.argv[2]) if len(sys.argv) > 2 else 8))
