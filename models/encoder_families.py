"""Which models are encoders that transformers runs. Holds no MLX: the PyTorch baseline asks too."""

ENDING = "ForSequenceClassification"
ENCODERS = frozenset(
    "albert bert big_bird camembert convbert deberta deberta-v2 distilbert electra ernie "
    "eurobert longformer modernbert mpnet nystromformer rembert roberta roberta-prelayernorm "
    "roformer squeezebert xlm-roberta xlm-roberta-xl xlnet".split()
)
# Their position ids begin behind the padding token's id.
SHIFTED_POSITIONS = ("camembert", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")
