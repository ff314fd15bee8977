"""What the tests of the chat share."""

import pytest
from adapters import LORA, PROMPT, randomised, write_adapter
from tiny import tiny_model_folder

from models.adapter_files import attach, save_adapter, save_head
from models.load import load_model
from models.reward_model import RewardModel


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with models, adapters, a reward model and a reward function."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_model_folder(folder / "chatty", template="chatml", bos=False)
    write_adapter(folder / "lora.npz", LORA)
    write_adapter(folder / "soft.safetensors", PROMPT)
    loaded = load_model()
    reward_model = RewardModel(loaded.model, tuning=randomised(attach(loaded.model, LORA)))
    save_adapter(folder / "reward.npz", reward_model.tuning, loaded)
    save_head(
        folder / "reward.npz", "reward_head", reward_model.head_arrays(), reward_model.description()
    )
    code = "def words(prompts, responses):\n    return [len(r.split()) for r in responses]\n"
    (folder / "rewards.py").write_text(code, encoding="utf-8")
    return folder
