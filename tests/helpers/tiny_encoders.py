"""A tiny BERT for tests with torch, and its scores by transformers alone."""

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] 0 1 2 3 4 5 6 7 8 9 10 12 14 16 18 20 22 24 26 28".split()


def tiny_bert(folder, *, labels=1, longest=64):
    """A random BertForSequenceClassification with a tokenizer, as transformers saves it."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=longest,
        num_labels=labels,
        initializer_range=0.5,
    )
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def transformers_scores(folder, pairs):
    """The logits as a model card's example computes them, one pair at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [
            model(**tokenizer(*(text for text in pair if text), return_tensors="pt")).logits.item()
            for pair in pairs
        ]
