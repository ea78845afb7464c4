"""The tokenizer of the small engines: a byte-level BPE and a chat template, made from a text that is shipped.

Owns the files of the model directory and the way to make them: `python -m rollout_ft.testing.small_engine.tokenizer
OUTDIR`. Must not know how a model uses the ids. The subtle invariant: the chat template is append-only. What it
renders for some messages is a prefix of what it renders for the same messages and more, which is why every tool
result has a user block of its own, where Qwen's template joins neighbours into one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Left out of the text when special tokens are skipped."""

MARKUP_TOKENS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""One token each, yet part of the text: a parser of tool calls has to see them."""

VOCAB_SIZE = 768
CONTEXT_LENGTH = 32768

CHAT_TEMPLATE = r"""
{%- set first = messages[0] if messages else none %}
{%- set has_system = first is not none and first.role == 'system' %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- first.content if has_system else 'You are a helpful assistant.' }}
    {{- '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif has_system %}
    {{- '<|im_start|>system\n' + first.content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if message.content %}
            {{- message.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {%- if message.content or not loop.first %}
                {{- '\n' }}
            {%- endif %}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif not (loop.first and has_system) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()


def train(text: str) -> Tokenizer:
    """A byte-level BPE over `text`: the same bytes in, the same vocabulary out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKUP_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    markup = [AddedToken(token, normalized=False) for token in MARKUP_TOKENS]
    tokenizer.add_tokens(markup)  # pyright: ignore[reportUnknownMemberType]
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the text is too short for {VOCAB_SIZE} tokens: it gave {tokenizer.get_vocab_size()}")
    return tokenizer


def write_model_dir(directory: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(directory)` and the small engines read."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train((Path(__file__).parent / "corpus.txt").read_text(encoding="utf-8"))
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    config: dict[str, Any] = {
        # A type of transformers' own, or it warns; and one that does not bring a tokenizer class of its own.
        "model_type": "gpt_neox",
        "architectures": ["SmallEngineForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT_LENGTH,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    for name, content in (("tokenizer_config.json", tokenizer_config), ("config.json", config)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m rollout_ft.testing.small_engine.tokenizer OUTDIR")
    write_model_dir(Path(sys.argv[1]))
