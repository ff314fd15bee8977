"""Sectioned ``.conf`` files (General, Dataset, Training) of another RLHF workflow, as our flags.

Four ways of writing them are read: one dictionary of sections, the same without the outer braces,
``Section = {...}``, and ``[Section]`` or ``Section:`` above lines of ``key = value``. Values are
Python literals; ``None`` means "not set". Nothing is evaluated but literals.
"""

import ast
import os
import re
from argparse import Action
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from command_line.values import Setting, refuse_doubles
from distributed.place import place
from errors import UserError

# Our flag names for each of theirs, in order of preference; a script has one of them or none.
FLAGS_FOR = {
    "model": "base_model base_model_name base_model_path model_name model_name_or_path",
    "dtype": "mixed_precision torch_dtype",
    "reward-model": "reward_model_name reward_model_path rm_name rm_path",
    "fused-dir": "checkpoint_dir",
    "output-dir": "output_path save_dir save_path",
    "train-file data": "train_data train_path training_file",
    "validation-file": "valid_file val_file eval_file validation_path",
    "test-file": "test_path",
    "validation-split-percentage": "val_split_percentage validation_split",
    "dataset": "dataset_name dataset_name_or_path",
    "split": "dataset_split",
    "max-seq-length max-length": "max_seq_len max_length block_size sequence_length",
    "prompt-template": "template prompt_format",
    "mask-prompt": "train_on_completions_only completion_only",
    "optimizer": "optim optimizer_name optimizer_type",
    "learning-rate": "lr",
    "lr-schedule": "lr_scheduler lr_scheduler_type scheduler scheduler_type",
    "num-cycles": "lr_num_cycles lr_scheduler_num_cycles",
    "warmup-steps": "num_warmup_steps lr_warmup_steps",
    "max-grad-norm": "grad_clip gradient_clipping clip_grad_norm",
    "epochs": "num_epochs num_train_epochs max_epochs total_epochs",
    "iters num-steps steps": "max_steps max_train_steps total_steps num_iters training_iteration "
    "training_iterations training_steps",
    "batch-size": "train_batch_size per_device_train_batch_size experience_batch_size",
    "mini-batch-size": "ppo_mini_batch_size minibatch_size",
    "gradient-accumulation-steps": "accumulation_steps grad_accumulation_steps",
    "grad-checkpoint": "gradient_checkpointing enable_gradient_checkpointing",
    "init-kl-coef": "kl_coeff kl_coef kl_beta",
    "target": "kl_target target_kl_value",
    "cliprange": "eps_clip clip_range clip_epsilon",
    "cliprange-value": "value_clip clip_range_value vf_clip",
    "lam": "gae_lambda",
    "vf-coef": "vf_coeff value_loss_coef value_coeff",
    "ppo-epochs": "num_ppo_epochs",
    "max-new-tokens response-length max-tokens": "max_generate_tokens generation_max_length",
    "lora-rank": "lora_r",
    "lora-keys": "target_modules lora_target_modules",
    "save-every": "save_steps save_interval checkpoint_every",
    "eval-every steps-per-eval": "eval_steps eval_interval",
    "steps-per-report": "logging_steps log_interval",
    "log-with": "report_to",
    "num-training-workers": "num_training_workers",
    "cpus-per-worker": "resources_per_worker",
}
# Our own names count as theirs, so that max_seq_length finds --max-length.
OURS = {
    theirs: tuple(ours.split())
    for ours, names in FLAGS_FOR.items()
    for theirs in (*names.split(), *ours.replace("-", "_").split())
}
THEIRS = frozenset(name for names in FLAGS_FOR.values() for name in names.split())
NO_COUNTERPART = frozenset(
    "accelerate accelerate_mode bias dataloader_num_workers ddp deepspeed device "
    "device_map failure_config flash_attention fsdp gpt_base_model group inference_mode local_rank "
    "max_failures num_gpus num_proc num_workers pin_memory "
    "preprocessing_num_workers save_strategy shuffle task_type "
    "tokenizer_name use_auth_token use_deepspeed use_flash_attention".split()
)
# A trained model, which comes before the base model that other keys name.
TRAINED = {"model_pretrain": "model", "rm_pretrain": "reward-model"}
# Dictionaries inside a section whose entries count as the section's own, some under other names.
INNER = {
    "config": {},
    "lora_config": {"r": "lora_r"},
    "peft_config": {"r": "lora_r"},
    "resources_per_worker": {"CPU": "resources_per_worker", "GPU": "num_gpus"},
}
# Their keys that count the rows of one worker; ours count those of all.
PER_WORKER = ("batch_size", "per_device_train_batch_size")
OPTIMIZERS = ("adamw", "adafactor", "adam", "lion", "sgd", "muon")


def read_conf(
    path: Path, text: str, flags: Mapping[str, Action], typed: Container[str] = ()
) -> list[Setting]:
    """The settings of a ``.conf`` file under our names; prints what each was mapped to.

    Such a file asks for training, so it says --train too, unless the command line (`typed`: the
    names on it) says what to do.
    """
    found = opened(entries(path, text))
    settings = refuse_doubles([entry for entry in found if entry.value is not None])
    settings = [setting for setting in settings if not replaced(setting, settings)]
    keys = {setting.key for setting in settings}
    workers = workers_of(settings, flags)
    mapped, notes = [], []
    for setting in settings:
        name = choose_flag(setting, keys, flags)
        if name == "cpus-per-worker" and workers == 1 and "num_training_workers" not in typed:
            notes.append(f"{setting.key} is not used with one worker")
            continue
        if name is None:
            notes.append(f"{setting.key} is not used here")
            continue
        value, why = of_all_workers(setting, name, translate(name, setting.value), workers)
        mapped.append(Setting(name, value, setting.where))
        if "--" + name.replace("_", "-") in flags:  # else the parser refuses it
            notes.append(f"{setting.key} -> --{name} {value}{why}")
    notes += cap_minibatch(mapped) + adapt_to_target(mapped, flags, typed)
    if "--train" in flags and not any(name in typed for name in ("train", "test", "preview")):
        if not any(setting.key == "train" for setting in mapped):
            mapped.append(Setting("train", True, str(path)))
            notes.append("--train, which such a file asks for")
    mine = place()
    if notes and (mine is None or (mine.rank == 0 and not mine.started_here)):  # else it was said
        print(f"note: {path}: " + "; ".join(notes))
    return refuse_doubles(mapped)


def adapt_to_target(
    mapped: list[Setting], flags: Mapping[str, Action], typed: Container[str]
) -> list[str]:
    """Let the coefficient of a file that names a target follow it, as it does there; the note."""
    there = {setting.key for setting in mapped}
    if "target" not in there or "--adap-kl-ctrl" not in flags:
        return []
    if "adap-kl-ctrl" in there or "adap_kl_ctrl" in typed or "use_dynamic_kl" in typed:
        return []
    where = next(setting.where for setting in mapped if setting.key == "target")
    mapped.append(Setting("adap-kl-ctrl", True, where))
    return ["--adap-kl-ctrl, which a target asks for"]


def workers_of(settings: Iterable[Setting], flags: Mapping[str, Action]) -> int:
    """How many workers share the batches of a file; 1 where a script has no such flag."""
    if (mine := place()) is not None and "--num-training-workers" in flags:
        return mine.size
    for setting in settings:
        if setting.key == "num_training_workers" and "--num-training-workers" in flags:
            if is_count(setting.value):
                return setting.value
    return 1  # the parser says what is wrong with another value


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def of_all_workers(setting: Setting, name: str, value: Any, workers: int) -> tuple[Any, str]:
    """(a value as ours counts it, what was done to it)."""
    if setting.key in PER_WORKER and workers > 1 and is_count(value):
        return value * workers, f" ({value} for each of {workers} workers)"
    if name == "cpus-per-worker" and is_count(value):
        cores = os.cpu_count() or 1
        share = max(1, cores // workers)
        if value > share:
            return share, f" (not {value}: there are {cores} cores for {workers} workers)"
    return value, ""


def cap_minibatch(mapped: list[Setting]) -> list[str]:
    """Lower a minibatch that is larger than the batch to that; what was done, for the note."""
    sizes = {setting.key.replace("_", "-"): setting for setting in mapped}
    batch, mini = sizes.get("batch-size"), sizes.get("mini-batch-size")
    if batch is None or mini is None or not (is_count(batch.value) and is_count(mini.value)):
        return []
    if mini.value <= batch.value:
        return []
    mapped[mapped.index(mini)] = Setting(mini.key, batch.value, mini.where)
    return [f"--mini-batch-size is {batch.value}, not {mini.value}: the batch has {batch.value}"]


def replaced(setting: Setting, settings: Iterable[Setting]) -> bool:
    """Whether a trained model is named that stands in the place of this one."""
    wanted = set(OURS.get(setting.key, ()))
    return any(
        TRAINED.get(other.key) in wanted and not is_adapter_file(other)
        for other in settings
        if other.key != setting.key and setting.key not in TRAINED
    )


def is_adapter_file(setting: Setting) -> bool:
    """Whether `model_pretrain` names an adapter, which goes on the base model."""
    path = Path(str(setting.value)).expanduser()
    there = (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()
    return setting.key == "model_pretrain" and (there or path.suffix in (".npz", ".safetensors"))


def choose_flag(setting: Setting, keys: set[str], flags: Mapping[str, Action]) -> str | None:
    """Our flag (no dashes in front) for a foreign key, or None when this script has no use for it.

    An unknown key comes back as it is, so that the parser names the nearest flag.
    """
    own = setting.key.replace("_", "-")
    wanted = OURS.get(setting.key, ())
    if setting.key in TRAINED:
        wanted = (TRAINED[setting.key],)
        if is_adapter_file(setting):
            wanted = ("resume-adapter-file", "resume-file")
    if "experience_batch_size" in keys and wanted == ("batch-size",):
        # In their PPO the experience is our batch, and their batch is our minibatch. Elsewhere
        # there is no experience, and a batch is a batch.
        is_experience = setting.key == "experience_batch_size"
        if "--mini-batch-size" not in flags:
            wanted = () if is_experience else wanted
        elif not is_experience:
            wanted, own = ("mini-batch-size",), ""
    # A name of theirs may be that of a flag here that means something else (kl_target).
    for name in (*wanted, own) if setting.key in THEIRS else (own, *wanted):
        action = flags.get("--" + name)
        # sft.py's --reward-model is a switch where ppo_training.py's is a path.
        if action and (action.type is not bool or isinstance(setting.value, bool | int)):
            return name
    known = (
        setting.key in OURS
        or setting.key in TRAINED
        or setting.key in NO_COUNTERPART
        or own in OTHER_NAMES
    )
    return None if known else setting.key


# Flags that both sides call alike and that not every script has.
OTHER_NAMES = {
    "adam-beta1",
    "adam-beta2",
    "adam-eps",
    "adap-kl-ctrl",
    "gamma",
    "ground-truth-reward",
    "horizon",
    "lora-alpha",
    "lora-dropout",
    "lora-layers",
    "lora-scale",
    "seed",
    "temperature",
    "reward-model",
    "top-k",
    "top-p",
    "weight-decay",
}


def translate(name: str, value: Any) -> Any:
    """A foreign value in our spelling, such as adamw for ``adamw_torch``."""
    if not isinstance(value, str):
        return list(value) if isinstance(value, tuple | set) else value
    word = value.strip().lower()
    if name == "optimizer":
        return next((known for known in OPTIMIZERS if known in word), word)
    if name == "dtype":
        short = {"no": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
        return short.get(word, word)
    if name == "lr-schedule":
        return {"constant_with_warmup": "constant", "cosine_annealing": "cosine"}.get(word, word)
    return value


# --------------------------------------------------------------------- reading


def entries(path: Path, text: str) -> Iterator[Setting]:
    """Key and value of every entry, whichever section it stands in."""
    for source in (text, "{" + text + "\n}"):
        try:
            body = ast.parse(source).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        sections = list(sections_of(body))
        if body and len(sections) == len(body):
            for section in sections:
                yield from members(path, section)
            return
    yield from lines(path, text)


def sections_of(body: list[ast.stmt]) -> Iterator[ast.Dict]:
    """The dictionaries that stand alone or are assigned to a section's name."""
    for statement in body:
        value = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
        if isinstance(value, ast.Tuple) and len(value.elts) == 1:
            value = value.elts[0]  # "Section = {...}," with a comma behind it
        if isinstance(value, ast.Dict):
            yield value


def members(path: Path, section: ast.Dict, depth: int = 0) -> Iterator[Setting]:
    """The entries of a dictionary; dictionaries on the first level are sections."""
    for key, value in zip(section.keys, section.values, strict=True):
        if isinstance(value, ast.Dict) and depth == 0:
            yield from members(path, value, 1)
            continue
        where = f"{path}:{value.lineno}"
        if key is None:
            raise UserError(f"{where}: ** does not belong in a config file")
        yield Setting(str(literal(key, where)), literal(value, where), where)


def opened(settings: Iterable[Setting]) -> Iterator[Setting]:
    """The same settings, with the entries of every dictionary of INNER in its place."""
    for setting in settings:
        names = INNER.get(setting.key)
        if names is None or not isinstance(setting.value, dict):
            yield setting
            continue
        for key, value in setting.value.items():
            yield Setting(names.get(key, str(key)), value, setting.where)


def literal(node: ast.expr | str, where: str) -> Any:
    """A Python literal; raises ``UserError`` for names, calls and all else that would run."""
    try:
        return ast.literal_eval(node)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        text = node if isinstance(node, str) else ast.unparse(node)
        raise UserError(
            f"{where}: {text.strip()[:60]!r} is not a Python literal; a text goes in quotes"
        ) from None


HEADER = re.compile(r"\[\s*(\w+)\s*\]|(\w+)\s*:\s*$")
ENTRY = re.compile(r"""["']?([\w-]+)["']?\s*[=:]\s*(.*)""", re.DOTALL)


def lines(path: Path, text: str) -> Iterator[Setting]:
    """Entries written one below the other; a value may go on until its brackets close."""
    pending, start = "", 0
    for at, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if not pending:
            if not bare or bare.startswith(("#", ";")) or HEADER.fullmatch(bare):
                continue
            start = at
        pending += line + "\n"
        match = ENTRY.match(pending.strip())
        if match is None:
            raise UserError(f"{path}:{start}: neither a [Section] nor `key = value`: {bare[:60]!r}")
        if not closed(match[2]):
            continue
        yield Setting(match[1], entry_value(match[2], f"{path}:{start}"), f"{path}:{start}")
        pending = ""
    if pending:
        raise UserError(f"{path}:{start}: this value is not closed before the file ends")


def closed(value: str) -> bool:
    """Whether every bracket that a value opens is closed again (strings are skipped)."""
    bare = re.sub(r"""("([^"\\\n]|\\.)*"|'([^'\\\n]|\\.)*'|\#[^\n]*)""", "", value)
    return sum(bare.count(mark) for mark in "([{") <= sum(bare.count(mark) for mark in ")]}")


def entry_value(text: str, where: str) -> Any:
    """The literal of one line, without the trailing comma that would make it a tuple."""
    try:
        tree = ast.parse(f"({text}\n)", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(
            f"{where}: {text.strip()[:60]!r} is not a Python literal; a text goes in quotes"
        ) from None
    if isinstance(tree, ast.Tuple) and len(tree.elts) == 1 and not text.startswith("("):
        tree = tree.elts[0]
    return literal(tree, where)
