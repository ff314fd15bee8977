"""The tokenizer of a model with a fused soft prompt: it writes the virtual tokens by itself.

They go in front of everything, before BOS, where `SoftPrompt` has them. Texts get them from the
post-processor in tokenizer.json; conversations, which are encoded without it, from the template.
"""

import json
from pathlib import Path

from errors import UserError
from models.adapter_description import read_json
from models.array_files import write_json, write_text
from models.model_folders import GENERATION_CONFIG
from models.soft_vocabulary import token_names

WHOLE = "<|soft_prompt|>"  # stands for all virtual tokens in the post-processor
FILLER = "<|unused_{}|>"  # names for rows of the embedding that no token of the tokenizer uses


def add_soft_prompt(folder: Path, tokenizer, ids: list[int]) -> None:
    """Rewrite the tokenizer files in a model `folder` so that `ids` come first.

    `tokenizer` is the base model's. Raises UserError where it cannot be done.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            "the tokenizer has no tokenizer.json form, so a soft prompt cannot be made part of it"
        )
    backend = with_tokens(tokenizer.backend_tokenizer, ids)
    described = json.loads(backend.to_str())
    described["post_processor"] = with_prefix(described.get("post_processor"), ids)
    described["truncation"] = described["padding"] = None
    write_text(folder / "tokenizer.json", json.dumps(described, ensure_ascii=False))
    names = token_names(len(ids))
    _change_settings(folder / "tokenizer_config.json", backend, names)
    _change_templates(folder, "".join(names))
    _never_generate(folder / GENERATION_CONFIG, ids)


def with_tokens(backend, ids: list[int]):
    """A copy of a `tokenizers.Tokenizer` in which the virtual tokens have `ids`."""
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(backend.to_str())
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    if size > ids[0]:
        raise UserError(
            f"the tokenizer has {size} tokens and the embedding only {ids[0]} rows; "
            "a soft prompt cannot be fused into it"
        )
    names = [FILLER.format(i) for i in range(size, ids[0])] + token_names(len(ids))
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    if [backend.token_to_id(n) for n in names[-len(ids) :]] != ids:
        raise UserError("the tokenizer has holes in its vocabulary; a soft prompt cannot be fused")
    return backend


def with_prefix(processor: dict | None, ids: list[int]) -> dict:
    """The post-processor of a tokenizer.json with the virtual tokens in front."""
    if processor is None:
        return _in_front(_plain_template(), ids)
    kind = processor["type"]
    if kind == "TemplateProcessing":
        return _in_front(processor, ids)
    if kind == "ByteLevel":  # trims offsets, adds nothing
        return {"type": "Sequence", "processors": [processor, _in_front(_plain_template(), ids)]}
    if kind == "Sequence":
        parts = list(processor["processors"])
        for place, part in enumerate(parts):
            if part["type"] == "TemplateProcessing":
                parts[place] = _in_front(part, ids)
                return {**processor, "processors": parts}
        if all(part["type"] == "ByteLevel" for part in parts):
            return {**processor, "processors": [*parts, _in_front(_plain_template(), ids)]}
    raise UserError(f"the tokenizer's post-processor ({kind}) cannot take a soft prompt")


def _plain_template() -> dict:
    def piece(name: str) -> dict:
        return {"Sequence": {"id": name, "type_id": 0}}

    single, pair = [piece("A")], [piece("A"), piece("B")]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}}


def _in_front(template: dict, ids: list[int]) -> dict:
    piece = {"SpecialToken": {"id": WHOLE, "type_id": 0}}
    entry = {"id": WHOLE, "ids": list(ids), "tokens": token_names(len(ids))}
    return {
        **template,
        "single": [piece, *template["single"]],
        "pair": [piece, *template["pair"]],
        "special_tokens": {**template["special_tokens"], WHOLE: entry},
    }


def _change_settings(file: Path, backend, names: list[str]) -> None:
    """tokenizer_config.json: the class that keeps the post-processor, the new tokens named."""
    settings = read_json(file) if file.exists() else {}
    # In transformers 4 the class of a family (LlamaTokenizerFast) builds its own post-processor.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "added_tokens_decoder" in settings:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for name in names:
            entry = {"content": name, **flags, "special": True}
            settings["added_tokens_decoder"][str(backend.token_to_id(name))] = entry
    template = settings.get("chat_template")
    if isinstance(template, str):
        settings["chat_template"] = "".join(names) + template
    elif isinstance(template, list):
        for entry in template:
            entry["template"] = "".join(names) + entry["template"]
    write_json(file, settings)


def _change_templates(folder: Path, text: str) -> None:
    """Templates of conversations in files of their own, with the virtual tokens in front."""
    for file in (*folder.glob("chat_template.jinja"), *folder.glob("additional_chat_templates/*")):
        write_text(file, text + file.read_text(encoding="utf-8"))
    file = folder / "chat_template.json"
    if file.exists():
        settings = read_json(file)
        write_json(file, {**settings, "chat_template": text + settings["chat_template"]})


def _never_generate(file: Path, ids: list[int]) -> None:
    """transformers forbids these tokens outright; other programs rely on their output rows."""
    settings = read_json(file) if file.exists() else {}
    suppressed = sorted({*(settings.get("suppress_tokens") or []), *ids})
    write_json(file, {**settings, "suppress_tokens": suppressed})
