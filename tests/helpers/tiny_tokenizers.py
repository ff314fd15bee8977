"""Tiny byte-level tokenizers for tests: with and without BOS, with several chat templates."""

from functools import cache

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]

_TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
_HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "chatml": "{% for m in messages %}" + _TURN + "{% endfor %}" + _HEADER,
    # As chatml, but without a generation prompt.
    "no_header": "{% for m in messages %}" + _TURN + "{% endfor %}",
    # As Llama 3: the BOS in the template, turns ended by a token that is not the EOS.
    "llama3": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}",
    # As Mistral: no header at all, the EOS after each answer.
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    " {{ m['content'] }}{{ eos_token }}{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %}{{ raise_exception('no role ' + m['role']) }}{% endif %}{% endfor %}",
    # As Qwen 3: thoughts of all but the last turn are dropped.
    "thinking": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}"
    "{% endif %}<|im_end|>\n{% endfor %}" + _HEADER,
}


@cache
def tiny_tokenizer(
    bos: bool = True, template: str | None = None, eos: str = "</s>", wrapped: bool = False
):
    """A byte-level BPE tokenizer with a few merges.

    `bos`: encode() writes <s> first. `template`: a name in TEMPLATES. `wrapped`: in mlx-lm's
    TokenizerWrapper instead of plain.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["what is the answer to the question of the hello world"] * 4, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token="<pad>"
    )
    if template:
        made.chat_template = TEMPLATES[template]
    return TokenizerWrapper(made) if wrapped else made


@cache
def metaspace_tokenizer():
    """As Llama 2's: spaces are "▁", one is put before every text that is encoded on its own."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=[*SPECIAL, "<unk>"], show_progress=False
    )
    core.train_from_iterator(["what is the answer to the question of the hello world"] * 4, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
