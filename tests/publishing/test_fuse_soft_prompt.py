"""Soft prompts as tokens of the vocabulary: the same model, in programs without soft prompts."""

import json

import mlx.core as mx
import numpy as np
import pytest
from fuse_setup import PROMPTS, fuse, greedy, largest, logits, make_adapter
from mlx_lm import generate as mlx_lm_generate
from mlx_lm import load as mlx_lm_load
from tiny import tiny_model_folder
from tiny_tokenizers import metaspace_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer

from errors import UserError
from models.decoding import Sampling, generate
from models.load import load_model
from models.soft_vocabulary import repelling_row, token_names, with_prefix, with_tokens

COUNT = 5


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(folder, unfused model, soft prompt on it) of the embedded model; fused/ is in the folder."""
    folder = tmp_path_factory.mktemp("soft")
    loaded, prompt = make_adapter(folder / "soft.npz", "prompt", num_tokens=COUNT)
    out = fuse(folder, "--adapter-file", "soft.npz", "--save-path", "fused")
    assert f"{COUNT} tokens added" in out and "not never" not in out
    return folder, loaded, prompt


def test_logits_and_text_are_those_of_the_unfused_model(digits):
    folder, loaded, prompt = digits
    model, tokenizer = mlx_lm_load(str(folder / "fused"))
    vocabulary = loaded.config["vocab_size"]
    for text in PROMPTS:  # its own tokenizer puts the prompt in front, and before BOS
        assert tokenizer.encode(text) == [*prompt.prefix, *loaded.tokenizer.encode(text)]
    expected = logits(loaded.model, loaded.tokenizer, prompt.prefix)
    found = [rows[COUNT:] for rows in logits(model, tokenizer)]
    assert largest(expected, [rows[:, :vocabulary] for rows in found]) < 1e-4
    without = load_model(dtype="stored")
    assert largest(expected, logits(without.model, without.tokenizer)) > 0.1
    texts = greedy(loaded, prompt.prefix)
    assert greedy(load_model(folder / "fused")) == texts
    for text, ids in zip(PROMPTS, texts, strict=True):
        written = mlx_lm_generate(model, tokenizer, text, max_tokens=12)
        ended = [i for i in ids if i not in loaded.eos_ids]
        assert written.strip() == loaded.tokenizer.decode(ended).strip()


def test_virtual_tokens_are_never_written(digits):
    folder, loaded, prompt = digits
    fused = load_model(folder / "fused")
    vocabulary = loaded.config["vocab_size"]
    rows = [fused.tokenizer.encode(text) for text in PROMPTS] * 16
    made = generate(
        fused.model,
        rows,
        max_tokens=40,
        eos_ids=set(),
        key=mx.random.key(3),
        sampling=Sampling(temperature=3.0),
    )
    assert max(max(row) for row in made.responses) < vocabulary
    # Log-probabilities are those of the unfused model too: no mass has gone to the new tokens.
    ids = [*prompt.prefix, *loaded.tokenizer.encode("2 4 6")]
    ours, theirs = (np.array(m.model(mx.array([ids]))[0]) for m in (loaded, fused))
    ours, theirs = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (ours, theirs))
    assert np.abs(ours - theirs[:, :vocabulary]).max() < 1e-4
    assert theirs[COUNT - 1 :, vocabulary:].max() < -50
    # A tied output layer would have let them: the learned rows themselves are likely outputs.
    tied = np.array(fused.model.model.embed_tokens.weight @ fused.model.model.norm.weight)
    assert len(tied) == vocabulary + COUNT
    assert not fused.config["tie_word_embeddings"]
    settings = json.loads((folder / "fused" / "generation_config.json").read_text())
    assert settings["suppress_tokens"] == list(prompt.prefix)


def test_the_row_that_repels():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=16)
    states = rng.normal(size=(500, 16)) + 2 * shared
    row = repelling_row(states)
    assert (states @ row).max() == pytest.approx(-1000, rel=1e-3)
    # No direction has more margin than the one found: compare with many others.
    margin = -(states @ row).max() / np.linalg.norm(row)
    others = rng.normal(size=(2000, 16)) + 3 * shared
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    assert (states @ others.T).min(axis=0).max() <= margin + 1e-3
    assert repelling_row(rng.normal(size=(500, 16))) is None  # around the origin: no such row


def test_reads_on_as_a_model_of_its_own(digits, tmp_path):
    """Fused once more, with LoRA on top; and a fused prompt is no soft prompt to GGUF."""
    folder, _, prompt = digits
    loaded, _ = make_adapter(tmp_path / "a.npz", "lora", folder / "fused", scale=0.2)
    expected = [rows[:, :469] for rows in logits(loaded.model, loaded.tokenizer)]
    out = fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "twice")
    assert float(out.split("unfused: ")[1].split(";")[0]) < 1e-4
    again = load_model(tmp_path / "twice")
    assert again.tokenizer.encode("2")[:COUNT] == list(prompt.prefix)
    found = [rows[:, :469] for rows in logits(again.model, again.tokenizer)]
    assert largest(expected, found) < 1e-4
    err = fuse(
        tmp_path, "--model", folder / "fused", "--format", "gguf", "--save-path", "m.gguf", status=2
    )
    assert "soft prompt" in err


@pytest.mark.long
def test_with_lora_and_on_a_quantised_base(tmp_path):
    from models.model_folders import write_model

    (tmp_path / "base").mkdir()
    write_model(tmp_path / "base", load_model(quantize=4))
    loaded, prompt = make_adapter(tmp_path / "soft.npz", "prompt", tmp_path / "base", num_tokens=2)
    expected = logits(loaded.model, loaded.tokenizer, prompt.prefix)
    texts = greedy(loaded, prompt.prefix)
    fuse(tmp_path, "--adapter-file", "soft.npz", "--save-path", "fused")
    fused = load_model(tmp_path / "fused", dtype="stored")
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4  # the blocks still are, the two ends are not
    found = [rows[2:, :469] for rows in logits(fused.model, fused.tokenizer)]
    assert largest(expected, found) < 1e-4
    assert greedy(fused) == texts
    # LoRA and soft prompt together.
    prompt.deactivate()
    make_adapter(tmp_path / "lora.npz", "lora", tmp_path / "base")
    out = fuse(
        tmp_path, "--adapter-file", "lora.npz", "soft.npz", "--save-path", "both", "--dequantize"
    )
    assert float(out.split("unfused: ")[1].split(";")[0]) < 1e-4


@pytest.mark.parametrize("template", [None, "chatml", "llama3"])
def test_tokenizers_without_bos_with_templates_and_with_unused_rows(tmp_path, template):
    """As Qwen 2: no post-processor of its own, more rows in the embedding than tokens."""
    bos = template == "llama3"
    base = tiny_model_folder(tmp_path / "base", bos=bos, template=template)
    weights = mx.load(str(base / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = mx.concatenate([weights[name], weights[name][:7]])  # 7 rows of padding
    mx.save_safetensors(str(base / "model.safetensors"), weights)
    config = json.loads((base / "config.json").read_text())
    size = config["vocab_size"] + 7
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    loaded, prompt = make_adapter(tmp_path / "soft.npz", "prompt", base, num_tokens=3)
    expected = logits(loaded.model, loaded.tokenizer, prompt.prefix)
    out = fuse(tmp_path, "--adapter-file", "soft.npz", "--save-path", "fused")
    assert "not never" in out  # random weights: no row can be kept away, and that is said
    fused = load_model(tmp_path / "fused", dtype="stored")
    assert list(prompt.prefix) == [size, size + 1, size + 2]
    for text in PROMPTS:
        assert fused.tokenizer.encode(text) == [*prompt.prefix, *loaded.tokenizer.encode(text)]
    found = [rows[3:, :size] for rows in logits(fused.model, fused.tokenizer)]
    assert largest(expected, found) < 1e-4
    if template:
        turns = [{"role": "user", "content": "what is it"}]
        ids = loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        again = fused.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        assert again == [*prompt.prefix, *ids]
    assert fused.tokenizer.decode(again if template else [*prompt.prefix]).count("soft_prompt") == 3
    assert fused.tokenizer.decode([*prompt.prefix, 70], skip_special_tokens=True) == (
        loaded.tokenizer.decode([70])
    )


def test_tokenizer_classes_that_build_their_own_post_processor(tmp_path):
    """LlamaTokenizer makes one from add_bos_token (in transformers 4 always): not used there."""
    base = tiny_model_folder(tmp_path / "base")
    tokenizer = metaspace_tokenizer()
    tokenizer.save_pretrained(base)
    file = base / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    file.write_text(json.dumps(settings))
    loaded, prompt = make_adapter(tmp_path / "soft.npz", "prompt", base, num_tokens=2)
    assert type(loaded.tokenizer._tokenizer).__name__ == "LlamaTokenizer"
    fuse(tmp_path, "--adapter-file", "soft.npz", "--save-path", "fused")
    fused = load_model(tmp_path / "fused")
    text = "what is the answer"
    ids = fused.tokenizer.encode(text)
    assert ids == [*prompt.prefix, *loaded.tokenizer.encode(text)] and ids[2] == 1
    settings = json.loads((tmp_path / "fused" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fused.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_kind_of_post_processor():
    plain = tiny_tokenizer(bos=False).backend_tokenizer
    bos = tiny_tokenizer(bos=True).backend_tokenizer
    size = plain.get_vocab_size()
    ids = [size, size + 1]
    template = json.loads(bos.to_str())["post_processor"]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    cases = [
        (None, []),
        (level, []),
        (template, [1]),
        ({"type": "Sequence", "processors": [level, template]}, [1]),
        ({"type": "Sequence", "processors": [level]}, []),
    ]
    for processor, written in cases:
        described = json.loads(with_tokens(plain, ids).to_str())
        described["post_processor"] = with_prefix(processor, ids)
        made = Tokenizer.from_str(json.dumps(described))
        text = plain.encode("the answer", add_special_tokens=False).ids
        assert made.encode("the answer").ids == [*ids, *written, *text], processor
        assert made.encode("the answer", add_special_tokens=False).ids == text
        assert made.encode("".join(token_names(2))).ids[-2:] == ids
    with pytest.raises(UserError, match="BertProcessing"):
        with_prefix({"type": "BertProcessing"}, ids)
    with pytest.raises(UserError, match="only 100 rows"):
        with_tokens(plain, [100, 101])


def test_a_model_that_cannot_be_separated_from_its_embedding(tmp_path):
    """Gemma has no output layer; nothing is written."""
    from mlx.utils import tree_flatten
    from mlx_lm.models.gemma2 import Model, ModelArgs

    base = tiny_model_folder(tmp_path / "base")
    config = {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": 300,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = Model(ModelArgs.from_dict(config))
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (base / "config.json").write_text(json.dumps(config))
    make_adapter(tmp_path / "soft.npz", "prompt", base)
    err = fuse(tmp_path, "--adapter-file", "soft.npz", "--save-path", "x", status=2)
    assert "gemma2" in err and not (tmp_path / "x").exists()


@pytest.mark.torch
def test_transformers_computes_and_writes_the_same(digits):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, loaded, prompt = digits
    tokenizer = AutoTokenizer.from_pretrained(folder / "fused")
    model = AutoModelForCausalLM.from_pretrained(folder / "fused")
    texts = greedy(loaded, prompt.prefix)
    for text, expected, ids in zip(
        PROMPTS, logits(loaded.model, loaded.tokenizer, prompt.prefix), texts, strict=True
    ):
        given = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            found = model(**given).logits[0].numpy()
            written = model.generate(**given, max_new_tokens=12, do_sample=False)[0].tolist()
        assert np.abs(found[COUNT:, :469] - expected).max() < 1e-4
        assert written[given["input_ids"].shape[1] :] == ids
    with torch.no_grad():  # left-padded batches, sampled hot: never a virtual token
        given = tokenizer(list(PROMPTS[:2]) * 8, return_tensors="pt", padding=True)
        torch.manual_seed(0)
        hot = model.generate(**given, max_new_tokens=40, do_sample=True, temperature=3.0)
    assert hot[:, given["input_ids"].shape[1] :].max() < 469


def test_training_ppo_and_chat_tokenise_with_the_prompt_in_front(digits, tmp_path):
    """The data layer writes special tokens itself; a fused soft prompt is among them, once."""
    from data_loading.templates import Template
    from data_utils import read_records, tokenise_prompts, tokenise_sft

    folder, loaded, prompt = digits
    fused = load_model(folder / "fused")
    (tmp_path / "rows.jsonl").write_text('{"text": "2 4 6 8"}\n')
    records = list(read_records(tmp_path / "rows.jsonl"))
    for function, options in ((tokenise_sft, {}), (tokenise_prompts, {"prompt_words": 2})):
        ours = function(records, fused.tokenizer, **options).rows[0]
        theirs = function(records, loaded.tokenizer, **options).rows[0]
        assert ours.tokens == [*prompt.prefix, *theirs.tokens]
    row = tokenise_sft(records, fused.tokenizer).rows[0]
    assert row.mask == [0] * (COUNT + 1) + [1] * 5  # the virtual tokens are never a target
    # With a chat template the text has them already; a prompt that is cut keeps them.
    base = tiny_model_folder(tmp_path / "base", template="llama3")
    make_adapter(tmp_path / "soft.npz", "prompt", base, num_tokens=3)
    fuse(tmp_path, "--adapter-file", "soft.npz", "--save-path", "chat")
    chat, plain = load_model(tmp_path / "chat"), load_model(base)
    assert Template(chat.tokenizer).uses_chat_template
    turns = '{"messages": [{"role": "user", "content": "what is the question"}]}\n'
    (tmp_path / "turns.jsonl").write_text(turns)
    records = list(read_records(tmp_path / "turns.jsonl"))
    ours, theirs = (tokenise_prompts(records, x.tokenizer).rows[0] for x in (chat, plain))
    first = plain.config["vocab_size"]
    assert ours.tokens == [first, first + 1, first + 2, *theirs.tokens]
    assert ours.text.endswith(theirs.text) and ours.text.count("<|soft_prompt_") == 3
    assert ours.prompt == theirs.prompt  # what a reward gets
    cut = tokenise_prompts(records, chat.tokenizer, max_length=7, too_long="cut").rows[0]
    assert cut.tokens == [first, first + 1, first + 2, 1, *theirs.tokens[-3:]]
