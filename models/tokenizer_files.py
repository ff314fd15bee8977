"""Files of a tokenizer, copied from one model folder to another. No array library."""

from pathlib import Path

from safe_files import check_inside, copy_file

# What a tokenizer may be made of; weights and config.json are written anew.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "*.tiktoken",
    "tiktoken.model",
    "chat_template.*",
    "additional_chat_templates/*",
)
GENERATION_CONFIG = "generation_config.json"


def copy_tokenizer(
    source: Path, folder: Path, *, with_code: bool = False, of_model: bool = True
) -> None:
    """Copy the files of the tokenizer and, of its model, generation_config.json as they are."""
    patterns = (*TOKENIZER_FILES, *((GENERATION_CONFIG,) if of_model else ()))
    patterns += ("*.py",) if with_code else ()
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            check_inside(file, source)
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            copy_file(file, target)
