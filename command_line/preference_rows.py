"""The rows that preference training asks for, and what is wrong with them. Loads no MLX."""

from typing import Any

import numpy as np

from command_line.data_flags import (
    cut_test_rows,
    data_sources,
    settle_date,
    tokenising,
    warn_of_model,
)
from command_line.row_preview import show_row
from command_line.sft_rows import encode_samples
from data_utils import (
    BatchPlan,
    Tokenised,
    data_report,
    load_data,
    put_soft_labels,
    tokenise_pairs,
    tokenise_unpaired,
)
from errors import UserError
from run_folder.secrets import tell

LONGER = 4 / 3  # chosen answers longer than the rejected ones by this factor are worth a word


def load_rows(args, tokenizer) -> dict[str, Any]:
    """Tokenised rows by split: train and valid when training, test when testing."""
    settle_date(args, tokenizer)
    splits = (["train", "valid"] if args.train or args.preview else []) + ["test"] * args.test
    rows, found = {}, load_data(splits=splits, **data_sources(args))
    for records in found.values():
        warn_of_model(args, records, tokenizer)
    for split, records in found.items():
        kinds = set(records.kinds)
        judged = all(row.kind == "preference" or row.label is not None for row in records)
        check_kinds(args, kinds, judged)
        if args.algorithm == "kto":
            rows[split] = tokenise_unpaired(
                records,
                tokenizer,
                desirable_from=args.desirable_from,
                **tokenising(args),
            )
        else:
            rows[split] = tokenise_pairs(records, tokenizer, **tokenising(args))
            if args.soft_labels:
                put_soft_labels(records, rows[split].rows)
        print(data_report(split, records, rows[split]))
        if args.algorithm == "kto" and "preference" in kinds:
            print("  note: of pairs, the chosen answers are wanted and the rejected ones are not")
        check_rows(args, split, rows[split])
        if split == "train":
            for warning in (kto_warnings if args.algorithm == "kto" else pair_warnings)(
                args, rows[split]
            ):
                tell(f"warning: {warning}")
            if args.sample_prompts:
                rows["samples"] = encode_samples(args, tokenizer, False)
    if args.test:
        cut_test_rows(args, rows["test"])
    if args.preview:
        show_row(rows["train"][0], tokenizer)
    return rows


def check_kinds(args, kinds: set[str], judged: bool) -> None:
    """Refuse rows that the algorithm cannot use, with what could; `judged`: all have a label, or
    are pairs."""
    if args.algorithm != "kto" and "unpaired" in kinds:
        raise UserError(
            f"--algorithm {args.algorithm} compares chosen with rejected answers, and "
            "these rows have a label each: use --algorithm kto"
        )
    if "desirable_from" in args.changed and judged:
        raise UserError("--desirable-from has no effect on rows with a label or with pairs")


def check_rows(args, split: str, rows: Tokenised) -> None:
    """Refuse rows that the chosen loss is not defined for."""
    if args.algorithm == "kto":
        if len(rows) < 2:
            raise UserError(f"{rows[0].where}: KTO needs two or more {split} rows")
        return
    lists = [row for row in rows.rows if len(row.responses) > 2]
    if lists and {"aot", "aot_unpaired"} & {*args.loss_type}:
        raise UserError(
            f"{lists[0].where}: aot sorts the pairs of a batch, which of ranked lists "
            "do not count alike; give pairs, or another --loss-type"
        )


def pair_warnings(args, rows: Tokenised) -> list[str]:
    """What the data will teach besides what it is meant to."""
    lengths = np.array([[sum(row.masks[0]), sum(row.masks[-1])] for row in rows.rows]).mean(axis=0)
    if lengths[0] < LONGER * lengths[1]:
        return []
    return [
        f"chosen answers have {lengths[0]:.1f} tokens, rejected ones {lengths[1]:.1f}: length "
        "may be what is learned; --loss-type sigmoid_norm, --ld-alpha or --algorithm simpo "
        "weaken that"
    ]


def kto_warnings(args, rows: Tokenised) -> list[str]:
    """Weights far from the labels' balance (Ethayarajh et al. 2024, eq. 9: 1 to 4/3)."""
    good = sum(row.label for row in rows.rows)
    bad = len(rows) - good
    if not good or not bad:
        return [
            f"all {len(rows)} rows are {'' if good else 'un'}wanted: KTO has nothing to compare"
        ]
    if good == bad:
        return []
    ratio = args.desirable_weight * good / max(args.undesirable_weight * bad, 1e-12)
    if 1 <= ratio <= 4 / 3:
        return []
    low = args.undesirable_weight * bad / good
    return [
        f"{good} wanted and {bad} unwanted rows: with these weights the wanted ones count "
        f"{ratio:.3g} times as much; --desirable-weight {low:.3g} to {low * 4 / 3:.3g} would "
        "balance them"
    ]


def least_rows(args) -> int:
    """Of a batch: KTO compares the rows of one."""
    return 2 if args.algorithm == "kto" else 1


def make_plan(args, rows: Tokenised, **options: Any) -> BatchPlan:
    """Batches of rows; KTO's have two or more, so that there is another row to compare with."""
    return BatchPlan(rows.lengths, args.batch_size, least=least_rows(args), **options)
