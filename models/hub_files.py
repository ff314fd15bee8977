"""Model and adapter names: local folders, or repositories on the Hugging Face hub."""

from pathlib import Path

from errors import UserError

# What a model, a reward model or an adapter is made of; nothing else is downloaded.
WANTED = (
    "*.json",
    "model*.safetensors",
    "reward_head.safetensors",
    "adapters.safetensors",
    "adapter_model.safetensors",
    "soft_prompt.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jinja",
    "README.md",
)
CODE = "*.py"  # downloaded only where it is trusted


def looks_like_hub_name(name: str) -> bool:
    """USER/NAME, and no path that is there or was meant to be."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/")


def download(name: str, revision: str | None = None, *, with_code: bool = False) -> Path:
    """The local snapshot of the hub repository `name`. Raises UserError where it is not to be had.

    What was downloaded before is used again; without a network the last snapshot serves.
    """
    from huggingface_hub import snapshot_download

    patterns = [*WANTED, CODE] if with_code else list(WANTED)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub raises many kinds; each means "not to be had"
        raise UserError(
            f"{name}: no such folder, and not to be had from the hub: "
            f"{reason(error)} (as a relative path it is looked for in {Path.cwd()})"
        ) from error


def reason(error: BaseException) -> str:
    """Why a request to the hub failed, in one line that says what would help."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "access has to be asked for first, on its page on the hub"
    if status == 401 or isinstance(error, errors.LocalTokenNotFoundError):
        return "the hub does not know this login (401); `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "the hub forbids this (403); the token may lack the right for it"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return "not found (404); is the name right, and the repository public or yours?"
    if status == 409:
        return "the repository changed or is in use meanwhile (409)"
    if status is not None:
        return f"the hub answered {status}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"
