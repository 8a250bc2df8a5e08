"""A tiny chat model with random weights, made on the spot: for tests that need a real server.

It writes nonsense, yet it is whole: a byte-level tokenizer, a ChatML template, Qwen2 weights in
bfloat16. The seed decides the weights, so two seeds are two models that share a tokenizer.

`python tests/tiny_model.py FOLDER [SEED]` makes one in a few seconds.
"""

import sys
from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END, START, PAD = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
TOKENS = 768
LETTERS = (
    "The quick brown fox jumps over the lazy dog while seven wizards judge an essay. "
    'Is this answer better, worse or equal? {"verdict": "A", "reason": "It is clearer."} '
    "Numbers such as 0, 1, 2, 3.14 and 9876543210 stand in it, and so do lists: a), b), c)."
)
"""What the tokenizer learns its merges from; the bytes themselves are all in it anyway."""


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write the model with the weights of `seed` into `folder`, and return the folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    # The caller's own draws of random numbers stay what they were.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _tokenizer():
    """A byte-level tokenizer: any text becomes tokens and comes back as it was."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bare.train_from_iterator([LETTERS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token=END, pad_token=PAD, chat_template=CHATML
    )


if __name__ == "__main__":
    make_tiny_model(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
