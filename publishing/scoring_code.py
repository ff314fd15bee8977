"""Code for a card that scores a text in transformers exactly as this program does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.adapter_description import read_json
from models.array_files import write_json
from models.model_folders import tokenizer_of
from models.reading import Reading, template_tail
from rewards.reader import Reader

PROMPT, RESPONSE = "What is 2 + 2?", "4"
TURNS = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]
SHOWN = f"""[
    {{"role": "user", "content": "{PROMPT}"}},
    {{"role": "assistant", "content": "{RESPONSE}"}},
]"""
RENDERED = "tokenizer.apply_chat_template(messages, tokenize=False)"
Way = tuple[str, Callable[[Any], list[int]]]  # code that makes `inputs`, and the ids it makes


def scoring_code(folder: Path, reading: Reading) -> str:
    """Lines of Python that make `inputs` of a prompt and a response, for the tokenizer in `folder`.

    The first way that gives the ids that this program scores; the ids themselves where none does.
    """
    tokenizer = tokenizer_of(folder)
    wanted = our_ids(tokenizer, reading)
    for code, make in ways(tokenizer, wanted):
        if make(tokenizer) == wanted:
            return code
    return f'inputs = {{"input_ids": torch.tensor([{wanted}])}}  # of {PROMPT!r}, {RESPONSE!r}'


def our_ids(tokenizer: Any, reading: Reading) -> list[int]:
    """What this program scores for the prompt and the response of the card."""
    reader = Reader(tokenizer, reading)
    return reader([PROMPT], [RESPONSE], [[]], [True], {})[0]


def ways(tokenizer: Any, wanted: list[int]) -> list[Way]:
    """From the plainest to the most explicit."""
    found: list[Way] = []
    if template_tail(tokenizer) is not None:
        chat = f"messages = {SHOWN}\n"
        found = [
            (
                chat + "inputs = tokenizer.apply_chat_template(\n"
                '    messages, return_tensors="pt", return_dict=True\n)',
                lambda t: list(t.apply_chat_template(TURNS, return_dict=True)["input_ids"]),
            ),
            (
                chat + f'inputs = tokenizer({RENDERED}, return_tensors="pt")',
                lambda t: t(rendered(t))["input_ids"],
            ),
            (
                chat + f"text = {RENDERED}.rstrip() + tokenizer.eos_token\n"
                'inputs = tokenizer(text, return_tensors="pt")',
                lambda t: t(rendered(t).rstrip() + t.eos_token)["input_ids"],
            ),
        ]
    found.append(
        (
            f'text = "{PROMPT}" + "{RESPONSE}" + tokenizer.eos_token\n'
            'inputs = tokenizer(text, return_tensors="pt")',
            lambda t: t(PROMPT + RESPONSE + (t.eos_token or ""))["input_ids"],
        )
    )
    for special in ("True", "False"):
        text = tokenizer.decode(wanted, clean_up_tokenization_spaces=False)
        text = text.removeprefix(tokenizer.bos_token or "") if special == "True" else text
        found.append(
            (
                f"text = {json.dumps(text, ensure_ascii=False)}\n"
                f'inputs = tokenizer(text, add_special_tokens={special}, return_tensors="pt")',
                lambda t, s=special, x=text: t(x, add_special_tokens=s == "True")["input_ids"],
            )
        )
    return found


def rendered(tokenizer: Any) -> str:
    return tokenizer.apply_chat_template(TURNS, tokenize=False)


def write_bos(folder: Path, reading: Reading) -> None:
    """Let the chat template in `folder` write the BOS that scored texts begin with.

    apply_chat_template adds none of its own, and others score texts through it.
    """
    tokenizer = tokenizer_of(folder)
    if template_tail(tokenizer) is None or tokenizer.bos_token_id is None:
        return
    made = list(tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"])
    if our_ids(tokenizer, reading) != [tokenizer.bos_token_id, *made]:
        return
    file, begin = folder / "chat_template.jinja", "{{ bos_token }}"
    if file.exists():
        file.write_text(begin + file.read_text(encoding="utf-8"), encoding="utf-8")
        return
    file = folder / "tokenizer_config.json"
    settings = read_json(file)
    if isinstance(settings.get("chat_template"), str):
        write_json(file, {**settings, "chat_template": begin + settings["chat_template"]})
