"""The random Llama that the benchmarks run, in Hugging Face's format, and its tokenizer."""

import json
from pathlib import Path

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}
FIRST_WORD = 3  # ids below are special
# "w3" is the header of a user's turn, "w4" that of the assistant's; </s> ends both.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ ('w3 ' if m.role == 'user' else 'w4 ') + m.content + ' </s> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'w4 ' }}{% endif %}"
)


# The shape of SmolLM2-135M.
SMOLLM2 = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def make_model(
    folder: Path, seed: int = 0, vocabulary: int = CONFIG["vocab_size"], **shape
) -> Path:
    """Write the model to `folder`: normal(0, 0.02) matrices, Hugging Face's initialisation.

    `shape`: further entries of its config.json.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    key, weights, config = mx.random.key(seed), {}, CONFIG | {"vocab_size": vocabulary} | shape
    vocabulary = config["vocab_size"]
    for name, array in tree_flatten(Model(ModelArgs.from_dict(config)).parameters()):
        key, own = mx.random.split(key)
        random = mx.random.normal(array.shape, scale=0.02, key=own)
        weights[name] = random if array.ndim > 1 else mx.ones(array.shape)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    make_tokenizer(folder, vocabulary)
    return folder


def make_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of the words "w3", "w4" and so on, one token each, split at spaces."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    special = ["<s>", "</s>", "<pad>"]
    words = special + [f"w{i}" for i in range(FIRST_WORD, vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
