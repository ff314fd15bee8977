"""Upload and download through a hub on this machine, with faults injected."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
import yaml
from fuse_setup import fuse, fuse_process, largest, logits, make_adapter
from hub_server import TOKEN, Hub, Repo

from errors import UserError
from models.load import load_model
from models.reward_model import RewardModel, load_reward_model, save_reward_head
from publishing.card import MARK
from publishing.hub import Upload, files_to_upload, upload_folder

NAME = "someone/my-model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running hub that this process takes for the real one, with a login."""
    from huggingface_hub import constants

    with Hub() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def environment(hub, folder) -> dict:
    """The same for a process of its own."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an adapter, a run that made it, and the fused model."""
    folder = tmp_path_factory.mktemp("made")
    make_adapter(folder / "a.npz", "lora")
    write_run(folder / "runs" / "sft-1", folder / "a.npz")
    fuse(folder, "--adapter-file", "a.npz", "--save-path", "fused", "--license", "apache-2.0")
    return folder


def write_run(folder, adapter, **options):
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "loss.png").write_bytes(b"\x89PNG\r\n")
    described = {
        "script": "sft",
        "versions": {"mlx": "0.32.4"},
        "options": {
            "save_file": str(adapter),
            "data": "/home/alice/secret-project/data",
            "learning_rate": 0.003,
            "iters": 20,
            "api_key": "abc",
            "epochs": None,
            "lora_rank": 4,
            **options,
        },
    }
    (folder / "config.json").write_text(json.dumps(described))
    rows = [{"step": 1, "train/loss": 3.0}, {"step": 20, "train/loss": 1.25, "valid/loss": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


# ------------------------------------------------------------------------------ it works


def test_fuse_upload_and_download_again_as_a_person_does(tmp_path, hub):
    """Two processes, HF_ENDPOINT, a private repository, a branch, a message."""
    loaded, _ = make_adapter(tmp_path / "a.npz", "lora")
    expected = logits(loaded.model, loaded.tokenizer)
    env = environment(hub, tmp_path)
    out = fuse_process(
        tmp_path,
        "--adapter-file",
        "a.npz",
        "--save-path",
        "fused",
        "--upload-repo",
        NAME,
        "--private",
        "--commit-message",
        "First try",
        env=env,
    )
    assert f"uploaded to {hub.endpoint}/{NAME}" in out and TOKEN not in out
    repo = hub.repos[NAME]
    assert repo.private and repo.messages == [("main", "First try")]
    names = {path.name for path in (tmp_path / "fused").iterdir()}
    assert repo.branches["main"].keys() == names
    for name, data in repo.branches["main"].items():
        assert (tmp_path / "fused" / name).read_bytes() == data
    # Another person's machine: by name, through the hub, into a fused model of a fused model.
    make_adapter(tmp_path / "zero.npz", "lora", scale=0.0)
    elsewhere = {**env, "HF_HOME": str(tmp_path / "other")}
    fuse_process(
        tmp_path,
        "--model",
        NAME,
        "--adapter-file",
        "zero.npz",
        "--any-base",
        "--save-path",
        "again",
        env=elsewhere,
    )
    again = load_model(tmp_path / "again")
    assert largest(expected, logits(again.model, again.tokenizer)) < 1e-4
    card = (tmp_path / "again" / "README.md").read_text()
    assert metadata(card)["base_model"] == NAME and metadata(card)["license"] == "mit"


def test_branches_and_existing_repositories(made, hub):
    fuse(made, "--model", "fused", "--upload-repo", NAME)
    fuse(made, "--model", "fused", "--upload-repo", NAME, "--revision", "trial")
    repo = hub.repos[NAME]
    assert not repo.private and set(repo.branches) == {"main", "trial"}
    assert [branch for branch, _ in repo.messages] == ["main", "trial"]
    assert repo.branches["trial"].keys() == repo.branches["main"].keys()
    fuse(made, "--model", "fused", "--upload-repo", NAME, "--revision", "trial")
    # --private does not make a public repository private, and must not pretend to.
    err = fuse(made, "--model", "fused", "--upload-repo", NAME, "--private", status=2)
    assert "is public, so nothing was uploaded" in err


def test_load_model_from_the_hub(made, hub):
    upload_folder(made / "fused", Upload(NAME, private=True))
    hub.repos[NAME].branches["main"]["evil.py"] = b"raise SystemExit"
    loaded = load_model(NAME)
    assert loaded.config["vocab_size"] == 469
    assert not (loaded.path / "evil.py").exists()  # code is not even downloaded
    assert load_model(NAME, trust_remote_code=True).path.joinpath("evil.py").exists()
    assert load_model(NAME, revision="main").config["vocab_size"] == 469
    before = len(hub.requests("GET", "resolve"))
    load_model(NAME)
    assert len(hub.requests("GET", "resolve")) == before  # from the cache


def test_adapters_and_reward_models_travel_too(tmp_path, hub):
    loaded, tuning = make_adapter(tmp_path / "a.npz", "lora")
    reward_model = RewardModel(loaded.model, tuning=tuning, gain=2.0, offset=1.0)
    save_reward_head(tmp_path / "a.npz", reward_model)
    texts = [[1, 20, 30], [1, 40]]
    expected = reward_model.score(texts)
    fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "reward", "--upload-repo", NAME)
    assert np.allclose(load_reward_model(NAME).score(texts), expected, atol=1e-4)
    card = hub.repos[NAME].branches["main"]["README.md"].decode()
    assert metadata(card)["pipeline_tag"] == "text-classification"
    assert "reward-model" in metadata(card)["tags"] and "load_reward_model" in card
    for form in ("adapter", "peft"):
        make_adapter(tmp_path / "b.npz", "lora")
        fuse(
            tmp_path,
            "--adapter-file",
            "b.npz",
            "--format",
            form,
            "--save-path",
            form,
            "--upload-repo",
            f"someone/{form}",
        )
        files = hub.repos[f"someone/{form}"].branches["main"]
        weights = "adapters.safetensors" if form == "adapter" else "adapter_model.safetensors"
        assert {weights, "adapter_config.json", "README.md"} == files.keys()
        found = metadata(files["README.md"].decode())
        assert found["library_name"] == ("mlx" if form == "adapter" else "peft")
        assert "lora" in found["tags"]


# ------------------------------------------------------------------------------ it fails


@pytest.mark.parametrize(
    "method, path, status, why",
    [
        ("POST", "/api/repos/create", 401, "does not know this login (401)"),
        ("POST", "/api/repos/create", 500, "the hub answered 500"),
        ("POST", "preupload", 403, "forbids this (403)"),
        ("POST", "/commit/", 409, "changed or is in use meanwhile (409)"),
        ("POST", "/commit/", 500, "the hub answered 500"),
        ("POST", "/commit/", "drop", "Error"),
        ("PUT", "/lfs/", 500, "the hub answered 500"),
        ("PUT", "/lfs/", "drop", "Error"),
    ],
)
def test_a_failed_upload_leaves_the_model_and_says_how_to_go_on(
    made, hub, method, path, status, why
):
    before = {p.name: p.read_bytes() for p in (made / "fused").iterdir() if p.is_file()}
    hub.fail(method, path, status)
    err = fuse(made, "--model", "fused", "--upload-repo", NAME, "--private", status=2)
    assert why in err and TOKEN not in err
    command = err.split("to try again: ")[1].split()
    assert command[:2] == ["python", "fuse.py"]
    assert {p.name: p.read_bytes() for p in (made / "fused").iterdir() if p.is_file()} == before
    hub.faults.clear()
    sent = len(hub.requests("PUT", "/lfs/")) - (2 if method == "PUT" else 0)
    fuse(made, *command[2:])  # word for word
    assert hub.repos[NAME].branches["main"].keys() >= {"model.safetensors", "README.md"}
    if path == "/commit/":  # what the hub has already is not sent again
        assert len(hub.requests("PUT", "/lfs/")) == sent


@pytest.mark.parametrize("status", [500, 503, "drop"])
def test_passing_faults_are_got_over(made, hub, status):
    hub.fail("PUT", "/lfs/", status, times=2)
    hub.fail("POST", "objects/batch", status, times=1)
    fuse(made, "--model", "fused", "--upload-repo", NAME)
    stored = hub.repos[NAME].branches["main"]["model.safetensors"]
    assert stored == (made / "fused" / "model.safetensors").read_bytes()


def test_a_failure_in_a_process_of_its_own(tmp_path, hub):
    make_adapter(tmp_path / "a.npz", "lora")
    env = {**environment(hub, tmp_path), "HF_TOKEN": "hf_aWrongOneThatIsSecret"}
    err = fuse_process(
        tmp_path,
        "--adapter-file",
        "a.npz",
        "--save-path",
        "fused",
        "--upload-repo",
        NAME,
        status=2,
        env=env,
    )
    assert "(401)" in err and "hf auth login" in err and "hf_aWrong" not in err
    assert (tmp_path / "fused" / "model.safetensors").exists() and not hub.repos


def test_no_login_and_bad_names(made, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    err = fuse(made, "--model", "fused", "--upload-repo", NAME, status=2)
    assert "no login found" in err and not hub.log
    for name in ("name", "a/b/c", "some one/x", "../x"):
        assert "USER/NAME" in fuse(made, "--model", "fused", "--upload-repo", name, status=2)
    err = fuse(made, "--model", made / "runs", "--upload-repo", NAME, status=2)
    assert "no model or adapter folder" in err


def test_downloads_that_fail(hub, made):
    with pytest.raises(UserError, match="not found"):
        load_model("someone/absent")
    hub.repos["someone/hidden"] = Repo(private=True)
    hub.fail("GET", "/api/models/someone/hidden", 401)
    with pytest.raises(UserError, match="not to be had from the hub"):
        load_model("someone/hidden")
    upload_folder(made / "fused", Upload(NAME))
    hub.fail("GET", "model.safetensors", "drop", times=1)  # the first try; the next goes through
    assert load_model(NAME).config["vocab_size"] == 469
    with pytest.raises(UserError, match="no-such-branch|not found"):
        load_model(NAME, revision="no-such-branch")


def test_dry_run_contacts_nobody(made, hub):
    out = fuse(made, "--model", "fused", "--upload-repo", NAME, "--private", "--dry-run")
    assert "would upload" in out and "model.safetensors" in out and "private" in out
    assert not hub.log
    size = (made / "fused" / "model.safetensors").stat().st_size
    assert f"{size:,}" in out


def test_only_the_folder_is_uploaded(made, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", ".env", "notes.txt"):
        (folder / name).write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "big.safetensors").write_bytes(b"")
    assert [str(f) for f in files_to_upload(folder)] == ["config.json", "notes.txt"]
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="leads out of its folder"):
        files_to_upload(folder)


# ------------------------------------------------------------------------------ the card


@pytest.mark.parametrize(
    "options, data, held",
    [
        ({}, "data", "data"),
        ({"train_file": ["/home/a/pairs.jsonl", "more.jsonl"]}, "pairs.jsonl, more.jsonl", None),
        ({"train_file": "own.jsonl", "validation_file": "/home/a/v.jsonl"}, "own.jsonl", "v.jsonl"),
        ({"dataset": ["some/rows"], "train_file": None}, "some/rows", None),
        (
            {"dataset": ["a/rows", "b/rows"], "validation_file": ["v.jsonl"]},
            "a/rows, b/rows",
            "v.jsonl",
        ),
        ({"dataset": "some/rows", "train_file": None}, "some/rows", None),  # of an older run
    ],
)
def test_card_names_the_rows_that_were_trained_on(tmp_path, options, data, held):
    make_adapter(tmp_path / "a.npz", "lora")
    write_run(tmp_path / "runs" / "r", tmp_path / "a.npz", **options)
    fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "fused", "--license", "apache-2.0")
    card = (tmp_path / "fused" / "README.md").read_text()
    assert f"\n- Data: {data}\n" in card and "/home" not in card
    assert metadata(card).get("datasets") == (data.split(", ") if "dataset" in options else None)
    [result] = metadata(card)["model-index"][0]["results"]
    assert result["dataset"]["name"] == f"held-out rows of {held or data}"


def test_card_tells_what_was_done(made):
    card = (made / "fused" / "README.md").read_text()
    found = metadata(card)
    assert found["license"] == "apache-2.0" and found["library_name"] == "mlx"
    assert found["pipeline_tag"] == "text-generation" and {"sft", "mlx-rlhf"} <= set(found["tags"])
    (index,) = found["model-index"]
    assert index["name"] in card
    (result,) = index["results"]
    assert result["task"] == {"type": "text-generation"}
    assert result["dataset"] == {"type": "local", "name": "held-out rows of data"}
    (metric,) = result["metrics"]  # held-out rows alone, not what training was on
    assert metric == {"type": "loss", "value": 1.5, "name": "loss"}
    assert "\nOptions:\n" in card  # a run from before it said which differ
    assert "base_model" not in found  # the embedded model is not on the hub
    assert "LoRA of rank 4, scale 2.0" in card and "supervised fine-tuning" in card
    assert "learning_rate: 0.003" in card and "`valid/loss` | 1.5 |" in card
    assert "| `train/loss` | 1.25 |" in card  # the last one, not the first
    assert "![loss](plots/loss.png)" in card
    assert (made / "fused" / "plots" / "loss.png").read_bytes() == b"\x89PNG\r\n"
    assert "from mlx_lm import generate, load" in card and "AutoModelForCausalLM" in card
    assert "mlx 0.32.4" in card and "Largest difference" in card
    assert "alice" not in card and "abc" not in card  # no path of the machine, no secret


def test_the_code_in_the_card_runs(made, tmp_path, monkeypatch):
    card = (made / "fused" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(made)
    exec(code.replace("max_tokens=100", "max_tokens=3"), {})


def test_a_card_of_ones_own_is_left_alone(made, tmp_path, hub):
    import shutil

    folder = shutil.copytree(made / "fused", tmp_path / "mine")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMy words.\n")
    fuse(tmp_path, "--model", "mine", "--upload-repo", NAME)
    assert hub.repos[NAME].branches["main"]["README.md"] == (folder / "README.md").read_bytes()
    err = fuse(tmp_path, "--model", "mine", "--upload-repo", NAME, "--license", "mit", status=2)
    assert "left as it is" in err
    (folder / "README.md").unlink()
    write_run(tmp_path / "ppo", "x.npz")
    fuse(tmp_path, "--model", "mine", "--upload-repo", NAME, "--run", "ppo", "--license", "mit")
    card = (folder / "README.md").read_text()
    assert MARK in card and "| `valid/loss` | 1.5 |" in card and metadata(card)["license"] == "mit"
    err = fuse(tmp_path, "--model", "mine", "--upload-repo", NAME, "--run", "nowhere", status=2)
    assert "not a run folder" in err


def test_secrets_of_the_environment_stay_out(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "a-long-secret-value")
    make_adapter(tmp_path / "a.npz", "lora")
    write_run(tmp_path / "runs" / "r", tmp_path / "a.npz", note="it is a-long-secret-value")
    fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "fused")
    card = (tmp_path / "fused" / "README.md").read_text()
    assert "note: it is" in card and "a-long-secret-value" not in card


def test_weights_survive_the_way_there_and_back(made, hub):
    upload_folder(made / "fused", Upload(NAME))
    ours = mx.load(str(made / "fused" / "model.safetensors"))
    theirs = mx.load(str(load_model(NAME).path / "model.safetensors"))
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
