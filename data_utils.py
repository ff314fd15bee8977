"""Data: read any record format, check it, template it, tokenise it, make batches.

Pure Python and numpy; the tokenizer may be Hugging Face's or mlx-lm's wrapper of it. Anything a
person can put right raises errors.UserError, `FILE:LINE: what is wrong`. In the usual order:

    records = load_data(data="data", data_base="increasing_mult_2_")["train"]
    rows = tokenise_sft(records, tokenizer, max_length=512)
    print(data_report("train", records, rows), preview(rows[0], tokenizer, colour=False))
    plan = BatchPlan(rows.lengths, batch_size=32, seed=0)
    for batch in BatchIterator(rows.rows, plan):  # without end; .state_dict() is the position
        ...
"""

from data_loading.batching import (
    BatchIterator,  # batches without end, from any (epoch, index)
    BatchPlan,  # which rows in which batch of which epoch; padding_efficiency()
    epoch_batches,  # the batches of one epoch, for evaluation
    prompt_batch,  # which prompts a PPO step takes
)
from data_loading.collate import (
    PreferenceBatch,  # all responses in one array, its mask, pairs (better, worse), margins
    ScalarBatch,  # tokens, lengths, rewards
    TextBatch,  # tokens, mask, lengths
    UnpairedBatch,  # answers with labels, and each prompt with another row's answer
    make_batch,  # rows of one kind to padded arrays
    pack_rows,  # several rows into rows of constant length
    wrap_rows,  # all rows as one text, cut into such
)
from data_loading.conditioning import (
    Conditioning,  # how a score is written before a prompt
    check_template,
    conditioned,  # a row with its score
    put_before,  # a prompt with words before it
)
from data_loading.conversion import (
    Converted,
    to_instructions,  # {instruction, context, response}
    to_pairs,  # {instruction, chosen, rejected}
    to_prompts,  # {prompt}
)
from data_loading.critiques import (
    CRITIQUE,  # asks for a critique
    REVISION,  # asks for an answer that heeds it
    check_critique_template,
    critiques,  # rows of reasons for scores
)
from data_loading.curriculum import (
    Curriculum,  # which rows are open at an update
    chosen_prompts,  # which prompts a step takes
    counted_tokens,  # what of a row a model is asked about, to find out how hard it is
    easy_first,  # a plan of batches with a curriculum
    hard_by_length,  # difficulties of rows
    hard_by_score,
)
from data_loading.fields import (
    REWARDS,  # fields of a row's score
    extras_of,  # tools, documents of a row, for a chat template
)
from data_loading.files import DATA_SUFFIXES  # names of files that hold rows
from data_loading.formats import ALIASES, FORMATS, KNOWN_FORMATS  # names for --format
from data_loading.labels import (
    label_edges,  # quintiles of the rewards
    label_of,  # of a row, for the contrastive loss
    refuse_unlabelled,
    rejected_answers,  # rows of the worst answers
)
from data_loading.messages import BadRow  # what is wrong with one row
from data_loading.preferences import put_soft_labels  # how certain pairs are, into their rows
from data_loading.records import Record, Records  # one row; rows with what was refused
from data_loading.report import data_report, histogram, preview, use_colour  # strings to print
from data_loading.rows import (
    PreferenceRow,
    PromptRow,
    ScalarRow,
    TextRow,
    Tokenised,
    UnpairedRow,
    ranked_pairs,  # (better, worse, weight, group) among the responses to each prompt
)
from data_loading.sources import (  # rows of a file, of a data set
    folder_file,  # the file of a split in a folder
    load_data,  # train, valid and test rows from the choices of the command line
    mix_records,  # several data sets as one, by weights
    raw_rows,  # rows of a file or a data set, of whatever kind
    read_dataset,
    read_records,
    split_records,  # a percentage for validation
)
from data_loading.template_date import (
    asks_for_date,  # whether a chat template reads the date
    now,  # the date to record
    read_date,  # a recorded date, checked
    use_date,  # let a chat template see a recorded date
)
from data_loading.templates import TOKEN_FORMATS, Template  # prompts and conversations to text
from data_loading.tokenise import (
    answer_encoder,  # a row with its answer as tokens, of any length
    columns_of,  # columns for a reward function
    encode_prompt,  # one prompt, text or messages, as a script gives it to the model
    first_words,  # the prompt in a plain text
    not_for_sft,  # why rows of a kind are not for supervised fine-tuning
    tokenise_preferences,  # chosen and rejected, for reward models
    tokenise_prompts,  # prompts for PPO
    tokenise_scalar,  # text and reward, for reward models
    tokenise_sft,  # tokens and loss mask
)
from data_loading.tokenise_answers import (
    tokenise_pairs,  # chosen and rejected, for preference training
    tokenise_unpaired,  # answers with a label
)
from data_loading.values import RawRow, value_problem  # a row as it was read; what is no text
from padding import pad_rows  # token lists to (B, L) and lengths

__all__ = [
    "ALIASES",
    "CRITIQUE",
    "DATA_SUFFIXES",
    "FORMATS",
    "KNOWN_FORMATS",
    "TOKEN_FORMATS",
    "BadRow",
    "BatchIterator",
    "BatchPlan",
    "Conditioning",
    "Converted",
    "Curriculum",
    "REVISION",
    "REWARDS",
    "PreferenceBatch",
    "PreferenceRow",
    "PromptRow",
    "RawRow",
    "Record",
    "Records",
    "ScalarBatch",
    "ScalarRow",
    "Template",
    "TextBatch",
    "TextRow",
    "Tokenised",
    "UnpairedBatch",
    "UnpairedRow",
    "answer_encoder",
    "asks_for_date",
    "check_critique_template",
    "check_template",
    "chosen_prompts",
    "columns_of",
    "conditioned",
    "counted_tokens",
    "critiques",
    "data_report",
    "easy_first",
    "encode_prompt",
    "epoch_batches",
    "extras_of",
    "first_words",
    "folder_file",
    "hard_by_length",
    "hard_by_score",
    "histogram",
    "label_edges",
    "label_of",
    "load_data",
    "make_batch",
    "mix_records",
    "not_for_sft",
    "now",
    "pack_rows",
    "pad_rows",
    "preview",
    "put_soft_labels",
    "prompt_batch",
    "put_before",
    "ranked_pairs",
    "raw_rows",
    "read_dataset",
    "read_date",
    "read_records",
    "refuse_unlabelled",
    "rejected_answers",
    "split_records",
    "to_instructions",
    "to_pairs",
    "to_prompts",
    "tokenise_pairs",
    "tokenise_preferences",
    "tokenise_prompts",
    "tokenise_scalar",
    "tokenise_sft",
    "tokenise_unpaired",
    "use_colour",
    "use_date",
    "value_problem",
    "wrap_rows",
]
