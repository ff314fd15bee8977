"""GGUF files opened by llama.cpp: the same token ids, probabilities, text and conversations."""

import json

import mlx.core as mx
import numpy as np
import pytest
from fuse_setup import fuse, make_adapter
from tiny import tiny_model_folder
from tiny_tokenizers import SPECIAL
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from data_utils import encode_prompt
from models.decoding import Sampling, generate
from models.load import load_model

xllamacpp = pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.torch
TEXTS = (
    "what is the answer",
    "8 20 22",
    "\u00fc, hello  world!\n",
    "<|im_start|>user\nhi<|im_end|>",
)
CHAT = [
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "the world"},
    {"role": "user", "content": "of  the <|eot_id|>"},
]
WHOLE = {"return_tokens": True, "verbose": True}
# name -> what the tiny model has: template, BOS, settings; "rows": more rows than tokens
CASES = {
    "digits": None,
    "chatml": {"template": "chatml", "bos": False, "tie_word_embeddings": True},
    "llama3": {
        "template": "llama3",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
    },
    "mistral": {"template": "mistral", "architecture": "mistral", "sliding_window": 256},
    "rows": {"template": "chatml", "vocab_size": 320},
    "bytes": {"template": "chatml"},
}


def make_base(case: str, folder):
    settings = CASES[case]
    if settings is None:
        return None
    tiny_model_folder(folder, hidden_size=64, **settings)
    if case == "bytes":
        template = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
        tokenizer = bytes_tokenizer()
        file = folder / "chat_template.jinja"
        tokenizer.chat_template = file.read_text() if file.exists() else template
        tiny_model_folder(folder, hidden_size=64, template="chatml", vocab_size=len(tokenizer))
        tokenizer.save_pretrained(folder)
    return folder


def bytes_tokenizer():
    """As Llama 2's: "\u2581" for spaces and one in front, bytes for what has no token."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[*SPECIAL, "<unk>", *alphabet], show_progress=False
    )
    core.train_from_iterator(["what is the answer to the question of the hello world"] * 4, trainer)
    described = json.loads(core.to_str())
    described["added_tokens"] = [
        t for t in described["added_tokens"] if t["content"] not in alphabet
    ]
    core = Tokenizer.from_str(json.dumps(described))
    from tokenizers import processors

    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def server(file):
    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.n_ctx, wanted.n_parallel = str(file), 256, 1
    wanted.warmup, wanted.use_jinja, wanted.verbosity = False, True, 0
    exact = xllamacpp.ggml_type.GGML_TYPE_F32  # the cache is in float16 otherwise
    wanted.cache_type_k = wanted.cache_type_v = exact
    wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(wanted)


def greedy(loaded, ids: list[int], count: int = 8):
    """(tokens, log-probability of the first) that this program writes after `ids`."""
    made = generate(
        loaded.model,
        [ids],
        max_tokens=count,
        eos_ids=loaded.eos_ids,
        sampling=Sampling(temperature=0),
    )
    return made.responses[0], float(made.logprobs[0][0])


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_writes_the_same(case, tmp_path):
    base = make_base(case, tmp_path / "base")
    loaded, _ = make_adapter(tmp_path / "a.npz", "lora", base)
    fuse(tmp_path, "--adapter-file", "a.npz", "--format", "gguf", "--save-path", "m.gguf")
    cpp = server(tmp_path / "m.gguf")
    for text in TEXTS:
        ids = loaded.tokenizer.encode(text)
        tokens, logprob = greedy(loaded, ids)
        found = cpp.handle_completions(
            {"prompt": text, "temperature": 0, "max_tokens": 8, "logprobs": 1, **WHOLE}
        )
        assert found["usage"]["prompt_tokens"] == len(ids), text
        check_tokens(found, tokens, logprob)
        wanted = loaded.tokenizer.decode([*ids, *tokens])[len(loaded.tokenizer.decode(ids)) :]
        # Bytes that make no character are dropped there.
        assert "\ufffd" in wanted or found["choices"][0]["text"] == wanted
    if case != "digits":
        check_chat(cpp, loaded)


def check_tokens(found: dict, tokens: list[int], logprob: float) -> None:
    """Equal tokens, and a first log-probability that no other prompt would have given."""
    assert found["__verbose"]["tokens"] == tokens
    first = found["choices"][0]["logprobs"]["content"][0]
    if first["id"] == tokens[0]:  # else a part of a character, which has no entry
        assert abs(first["logprob"] - logprob) < 2e-3


def check_chat(cpp, loaded) -> None:
    ids = encode_prompt(CHAT, loaded.tokenizer)  # as it is trained: one BOS, the template
    tokens, logprob = greedy(loaded, ids)
    found = cpp.handle_chat_completions(
        {"messages": CHAT, "temperature": 0, "max_tokens": 8, "logprobs": True, **WHOLE}
    )
    assert found["usage"]["prompt_tokens"] == len(ids), found["__verbose"]["prompt"]
    check_tokens(found, tokens, logprob)


@pytest.mark.parametrize("stored, kind", [("float32", 0), ("float16", 1), ("bfloat16", 1)], ids=str)
def test_the_type_of_the_file_is_said(stored, kind, tmp_path):
    tiny_model_folder(tmp_path / "base", hidden_size=64)
    fuse(
        tmp_path, "--model", "base", "--dtype", stored, "--format", "gguf", "--save-path", "m.gguf"
    )
    arrays, metadata = mx.load(str(tmp_path / "m.gguf"), return_metadata=True)
    assert metadata["general.file_type"].item() == kind
    assert metadata["tokenizer.ggml.token_type"].dtype == mx.int32
    matrices = {a.dtype for n, a in arrays.items() if "norm" not in n}
    assert matrices == {mx.float16 if kind else mx.float32}
    found = server(tmp_path / "m.gguf").handle_completions({"prompt": "what", "max_tokens": 2})
    assert found["usage"]["completion_tokens"] == 2
    ours = load_model(tmp_path / "base")
    assert np.isfinite(greedy(ours, ours.tokenizer.encode("what"), 2)[1])
