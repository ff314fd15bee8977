"""Adapters, reward models and weights go to PEFT, transformers and llama.cpp, and come back."""

import json

import mlx.core as mx
import numpy as np
import pytest
from adapters import peft_arrays, write_peft
from fuse_setup import fuse, fuse_process, largest, logits, make_adapter, make_tuning
from mlx.utils import tree_flatten
from tiny import tiny_model_folder

from errors import UserError
from models.adapter_files import load_adapter, read_adapter
from models.interop import load_peft_adapter
from models.load import load_model
from models.model_folders import write_model
from models.reward_model import RewardModel, load_reward_model, save_reward_head
from padding import pad_rows

TEXTS = ("2 4 6 8", "5 3", "0 1 2 3 5 8 13", "8")


# ------------------------------------------------------------------------------ PEFT


@pytest.mark.parametrize("kind", ["lora", "dora", "prompt", "some_layers"])
def test_peft_out_and_in(tmp_path, kind):
    options = {"num_layers": 1, "keys": ["q_proj", "v_proj"]} if kind == "some_layers" else {}
    loaded, tuning = make_adapter(
        tmp_path / "a.npz", kind.replace("some_layers", "lora"), **options
    )
    expected = logits(loaded.model, loaded.tokenizer, tuning.prefix)
    out = fuse(tmp_path, "--adapter-file", "a.npz", "--format", "peft", "--save-path", "peft")
    assert float(out.split("against ours: ")[1].split(";")[0]) < 1e-4
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    if kind == "some_layers":  # the other block is left alone, not given zeros
        assert len(config["target_modules"]) == 2
        assert all(name.startswith("model.layers.1.") for name in config["target_modules"])
    again = load_model(dtype="stored")
    back = load_adapter(again, tmp_path / "peft")
    assert largest(expected, logits(again.model, again.tokenizer, back.prefix)) < 1e-4
    # And into a fused model: the base is the one that PEFT's configuration names.
    if kind != "prompt":
        fuse(tmp_path, "--adapter-file", "peft", "--save-path", "fused")
        fused = load_model(tmp_path / "fused")
        assert largest(expected, logits(fused.model, fused.tokenizer)) < 1e-4


def test_peft_ranks_and_alphas_of_their_own(tmp_path):
    """rank_pattern, alpha_pattern and rsLoRA; the sums are made here."""
    shapes = {
        "0.self_attn.q_proj": (2, 64, 64),
        "1.self_attn.q_proj": (8, 64, 64),
        "1.mlp.down_proj": (4, 176, 64),
    }
    arrays = peft_arrays(shapes)
    write_peft(
        tmp_path / "a",
        arrays,
        use_rslora=True,
        lora_alpha=6,
        r=8,
        rank_pattern={"0.self_attn.q_proj": 2, "down_proj": 4},
        alpha_pattern={"down_proj": 3, "layers.0.self_attn.q_proj": 10},
    )
    alphas = {"0.self_attn.q_proj": 10, "1.self_attn.q_proj": 6, "1.mlp.down_proj": 3}
    loaded = load_model(dtype="stored")
    before = {k: np.array(v) for k, v in tree_flatten(loaded.model.parameters())}
    adapter = load_peft_adapter(loaded.model, tmp_path / "a")
    for layer, (rank, _, _) in shapes.items():
        a, b = (
            np.array(arrays[f"base_model.model.model.layers.{layer}.lora_{x}.weight"]) for x in "AB"
        )
        expected = alphas[layer] / rank**0.5 * (b @ a)
        wrapped = adapter.layers[f"model.layers.{layer}"]
        found = np.array(wrapped.fuse().weight) - before[f"model.layers.{layer}.weight"]
        assert np.abs(found - expected).max() < 1e-5, layer
    untouched = adapter.layers["model.layers.0.mlp.down_proj"]  # wrapped, but zero
    assert mx.abs(untouched.lora_b).max() == 0


def test_peft_adapters_without_a_counterpart_are_refused(tmp_path):
    arrays = peft_arrays({"0.self_attn.q_proj": (4, 64, 64)})
    cases = {
        "peft_type": "LOHA",
        "modules_to_save": ["score"],
        "fan_in_fan_out": True,
        "init_lora_weights": "pissa_niter_4",
    }
    loaded = load_model()
    for number, (name, value) in enumerate(cases.items()):
        write_peft(tmp_path / str(number), arrays, **{name: value})
        with pytest.raises(UserError) as caught:
            load_adapter(loaded, tmp_path / str(number))
        assert str(value).split("_")[0].strip("[]'") in str(caught.value) or name in str(
            caught.value
        )
    biased = {**arrays, "base_model.model.model.layers.0.self_attn.q_proj.bias": mx.zeros((64,))}
    write_peft(tmp_path / "biased", biased)
    with pytest.raises(UserError, match="no part of a LoRA"):
        load_adapter(loaded, tmp_path / "biased")
    head = {
        "base_model.model.lm_head.lora_A.weight": mx.zeros((4, 64)),
        "base_model.model.lm_head.lora_B.weight": mx.zeros((469, 4)),
    }
    write_peft(tmp_path / "head", {**arrays, **head})
    with pytest.raises(UserError, match="lm_head"):
        load_adapter(loaded, tmp_path / "head")
    wide = peft_arrays({"0.self_attn.q_proj": (4, 32, 64)})
    write_peft(tmp_path / "wide", wide)
    with pytest.raises(UserError, match=r"\(32, 4\) in the file and \(64, 4\) in the model"):
        load_adapter(loaded, tmp_path / "wide")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text("{}")
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="pickled weights can run code"):
        load_adapter(loaded, tmp_path / "pickled")


def test_what_peft_has_no_form_for(tmp_path):
    make_adapter(tmp_path / "full.npz", "full")
    loaded, tuning = make_adapter(tmp_path / "reward.npz", "lora")
    save_reward_head(tmp_path / "reward.npz", RewardModel(loaded.model, tuning=tuning))
    words = ("--format", "peft", "--save-path", "x")
    assert "every weight" in fuse(tmp_path, "--adapter-file", "full.npz", *words, status=2)
    assert "reward head" in fuse(tmp_path, "--adapter-file", "reward.npz", *words, status=2)
    assert not (tmp_path / "x").exists()


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["lora", "dora", "prompt", "some_layers"])
def test_peft_computes_the_same(tmp_path, kind):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    options = {"num_layers": 1, "keys": ["q_proj", "v_proj"]} if kind == "some_layers" else {}
    loaded, tuning = make_adapter(
        tmp_path / "a.npz", kind.replace("some_layers", "lora"), **options
    )
    fuse(tmp_path, "--adapter-file", "a.npz", "--format", "peft", "--save-path", "peft")
    model = AutoModelForCausalLM.from_pretrained(loaded.path)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert len(adapted) == len(getattr(tuning, "layers", ()))
    for text, expected in zip(
        TEXTS, logits(loaded.model, loaded.tokenizer, tuning.prefix, TEXTS), strict=True
    ):
        with torch.no_grad():
            found = model(torch.tensor([loaded.tokenizer.encode(text)])).logits[0].numpy()
        assert np.abs(found[len(tuning.prefix) :] - expected).max() < 1e-4


@pytest.mark.torch
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"layers_to_transform": [0]},
    ],
    ids=["lora", "dora", "rslora", "patterns", "one_layer"],
)
def test_what_peft_wrote_computes_the_same_here(tmp_path, settings):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    ours = load_model(dtype="stored")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(ours.path), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    for text, expected in zip(TEXTS, logits(ours.model, ours.tokenizer, (), TEXTS), strict=True):
        with torch.no_grad():
            found = model(torch.tensor([ours.tokenizer.encode(text)])).logits[0].numpy()
        assert np.abs(found - expected).max() < 1e-4


# ------------------------------------------------------------------------------ reward models


def make_reward_model(folder, base=None, *, bias=0.0, pooling="last"):
    """A fused reward model with a random head, on a random or the embedded model."""
    loaded = load_model(base, dtype="stored")
    make_tuning(loaded, "full")
    mx.random.seed(5)
    reward_model = RewardModel(loaded.model, pooling=pooling, gain=2.0, offset=bias)
    folder.mkdir()
    write_model(folder, loaded)
    save_reward_head(folder, reward_model)
    return loaded, reward_model


@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_classifier_out_and_in(tmp_path, bias):
    loaded, reward_model = make_reward_model(tmp_path / "ours", bias=bias)
    out = fuse(tmp_path, "--model", "ours", "--format", "classifier", "--save-path", "theirs")
    assert ("-3" in out and "all by the same" in out) if bias else ("note" not in out)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    arrays = mx.load(str(tmp_path / "theirs" / "model.safetensors"))
    assert arrays["score.weight"].shape == (1, 64) and "lm_head.weight" not in arrays
    texts = [loaded.tokenizer.encode(text) + [2] * (i % 2) for i, text in enumerate(TEXTS)]
    again = load_reward_model(tmp_path / "theirs")
    assert again.pooling == "last" and again.source.tokenizer.encode("8") == texts[3][:2]
    assert np.allclose(again.score(texts), reward_model.score(texts), atol=1e-5)
    # transformers pools the last token that is not padding, in whatever batch.
    padded, lengths = pad_rows(texts)
    assert np.allclose(again.score(padded.tolist()), again.score(texts), atol=1e-5)
    with pytest.raises(UserError, match="give it as --reward-model"):
        load_model(tmp_path / "theirs")


def test_classifier_refusals(tmp_path):
    make_reward_model(tmp_path / "mean", pooling="mean")
    words = ("--format", "classifier", "--save-path", "x")
    assert "pooling 'mean'" in fuse(tmp_path, "--model", "mean", *words, status=2)
    make_reward_model(tmp_path / "last")
    fuse(tmp_path, "--model", "last", "--format", "classifier", "--save-path", "good")
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    arrays = mx.load(str(tmp_path / "good" / "model.safetensors"))

    def damaged(name, arrays, **changes):
        folder = tmp_path / name
        folder.mkdir()
        for file in (tmp_path / "good").glob("*.json"):
            if "index" not in file.name:
                (folder / file.name).write_bytes(file.read_bytes())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)
        with pytest.raises(UserError) as caught:
            load_reward_model(folder)
        return str(caught.value)

    two = {**arrays, "score.weight": mx.zeros((2, 64))}
    assert "has 2 labels" in damaged("two", two)
    assert "bert" in damaged("bert", arrays, model_type="bert")
    headless = {k: v for k, v in arrays.items() if k != "score.weight"}
    assert "score.weight" in damaged("headless", headless)
    missing = {k: v for k, v in arrays.items() if "layers.1.mlp" not in k}
    assert "lacks 3 arrays" in damaged("missing", missing)


def test_classifier_pads_with_what_no_text_ends_with(tmp_path):
    """A tokenizer that pads with EOS would hide the EOS of a text from transformers."""
    base = tiny_model_folder(tmp_path / "base")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((base / name).read_text())
        settings.pop("pad_token", None)
        settings.pop("pad_token_id", None)
        if name == "tokenizer_config.json":
            settings["pad_token"] = "</s>"
        (base / name).write_text(json.dumps(settings))
    loaded, reward_model = make_reward_model(tmp_path / "ours", base)
    assert loaded.tokenizer.pad_token_id == 2
    fuse(tmp_path, "--model", "ours", "--format", "classifier", "--save-path", "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["pad_token_id"] == 1  # BOS
    texts = [[1, 50, 60, 2], [1, 70, 2]]
    again = load_reward_model(tmp_path / "theirs")
    assert np.allclose(again.score(texts), reward_model.score(texts), atol=1e-5)
    assert again.source.tokenizer.pad_token_id == 1


@pytest.mark.torch
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_classifiers_score_the_same_here(tmp_path, family):
    """Random classifiers of transformers, sharded; batches padded on the right."""
    torch = pytest.importorskip("torch")
    import transformers

    prefix = {"llama": "Llama", "mistral": "Mistral"}.get(family, family.capitalize())
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=469,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        initializer_range=0.3,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{prefix}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    digits = load_model().path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / name).write_bytes((digits / name).read_bytes())
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 469, n).tolist() + [2] for n in (3, 9, 5, 30)]
    padded, _ = pad_rows(texts)
    with torch.no_grad():
        expected = model(torch.tensor(padded.astype(np.int64))).logits[:, 0].numpy()
    ours = load_reward_model(tmp_path / "theirs", dtype="float32")
    assert np.abs(np.array(ours.score(texts)) - expected).max() < 1e-4
    assert np.std(expected) > 0.1
    assert ours.source.config["model_type"] == family


def test_positions_that_transformers_5_nests(tmp_path):
    """mlx-lm reads them unnested and would take its default base of 10000."""
    folder = tiny_model_folder(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    before = load_model(folder)
    for theta, same in ((10000.0, True), (500.0, False)):
        del config["rope_theta"]
        nested = {**config, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
        (folder / "config.json").write_text(json.dumps(nested))
        config["rope_theta"] = theta
        after = load_model(folder)
        texts = [before.tokenizer.encode("what is the answer to the question")]
        ours, theirs = (np.array(m.model(mx.array(texts))) for m in (before, after))
        assert (np.abs(ours - theirs).max() < 1e-6) == same
    (tmp_path / "written").mkdir()
    write_model(tmp_path / "written", after)  # now mlx-lm itself reads it right
    from mlx_lm import load as mlx_lm_load

    model, _ = mlx_lm_load(str(tmp_path / "written"))
    assert np.abs(np.array(model(mx.array(texts))) - theirs).max() < 1e-6


@pytest.mark.torch
@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_our_reward_models_score_the_same_in_transformers(tmp_path, bias):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    loaded, reward_model = make_reward_model(tmp_path / "ours", bias=bias)
    out = fuse_process(
        tmp_path, "--model", "ours", "--format", "classifier", "--save-path", "theirs"
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert model.num_labels == 1
    given = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model(**given).logits[:, 0].numpy()
    expected = reward_model.score([loaded.tokenizer.encode(text) for text in TEXTS])
    assert np.abs(found + bias - expected).max() < 1e-4  # the constant is left out, and said
    assert ("-3 away" in out) == bool(bias)


# ------------------------------------------------------------------------------ GGUF


def test_gguf_is_written_and_read_back(tmp_path):
    loaded, _ = make_adapter(tmp_path / "a.npz", "lora")
    out = fuse(tmp_path, "--adapter-file", "a.npz", "--format", "gguf", "--save-path", "m.gguf")
    assert "largest change of a weight in the GGUF file: 0.0" in out and "llama-cli" in out
    arrays, metadata = mx.load(str(tmp_path / "m.gguf"), return_metadata=True)
    assert arrays["blk.1.ffn_down.weight"].shape == (64, 176)
    assert metadata["tokenizer.ggml.model"] == "gpt2" and metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert len(metadata["tokenizer.ggml.tokens"]) == 469
    assert metadata["tokenizer.ggml.token_type"].dtype == mx.int32  # else llama.cpp refuses it
    assert metadata["tokenizer.ggml.token_type"][:4].tolist() == [3, 3, 3, 1]  # control, normal
    assert metadata["general.file_type"].item() == 0  # every weight is float32
    assert "tokenizer.chat_template" not in metadata  # the model has none
    assert metadata["tokenizer.ggml.merges"][0] == "Ġ 0"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "m.gguf"]
    err = fuse(
        tmp_path, "--adapter-file", "a.npz", "--format", "gguf", "--save-path", "m.gguf", status=2
    )
    assert "exists already" in err
    fuse(tmp_path, "--adapter-file", "a.npz", "--format", "gguf", "--save-path", "folder")
    names = {p.name for p in (tmp_path / "folder").iterdir()}
    assert names == {"model.gguf", "README.md"}


def test_gguf_refusals(tmp_path):
    config = json.loads((load_model().path / "config.json").read_text())

    def refused(name, **changes):
        loaded = load_model(dtype="stored")
        loaded.config.update(changes)
        from models.gguf import check_gguf

        with pytest.raises(UserError) as caught:
            check_gguf(loaded)
        return str(caught.value)

    assert config["model_type"] == "llama"
    assert "type qwen2" in refused("a", model_type="qwen2")
    assert "add --dequantize" in refused("b", quantization={"bits": 4})
    assert "heads 16 wide" in refused("c", head_dim=16)
    assert "llama3" in refused("d", rope_scaling={"rope_type": "llama3"})
    make_reward_model(tmp_path / "reward")
    words = ("--model", "reward", "--format", "gguf", "--save-path", "x.gguf")
    assert "reward head" in fuse(tmp_path, *words, status=2)
    assert not list(tmp_path.glob("x*"))


@pytest.mark.torch
def test_transformers_reads_the_gguf_file(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    loaded, _ = make_adapter(tmp_path / "a.npz", "lora")
    fuse(tmp_path, "--adapter-file", "a.npz", "--format", "gguf", "--save-path", "m.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    for text, expected in zip(
        TEXTS, logits(loaded.model, loaded.tokenizer, (), TEXTS), strict=True
    ):
        with torch.no_grad():
            found = model(torch.tensor([loaded.tokenizer.encode(text)])).logits[0].numpy()
        assert np.abs(found - expected).max() < 1e-4


def test_descriptions_of_peft_adapters(tmp_path):
    write_peft(
        tmp_path / "a",
        peft_arrays({"0.self_attn.q_proj": (4, 64, 64)}),
        use_dora=True,
        base_model_name_or_path="USER/NAME",
    )
    assert read_adapter(tmp_path / "a") == ({}, {"fine_tune_type": "dora", "model": "USER/NAME"})
