"""Faithfulness by a natural-language-inference classifier: does the prompt entail a sentence?"""

from collections.abc import Callable, Sequence

from errors import UserError
from models.encoder_reward import EncoderReward, Pair, is_encoder


class EntailmentModel(EncoderReward):
    """An encoder with three labels, or two, one of which is named entailment."""

    def check_labels(self, labels: int) -> None:
        names = {str(name).lower(): int(i) for name, i in self._model.config.label2id.items()}
        found = [i for name, i in names.items() if name == "entailment"]
        if labels < 2 or len(found) != 1:
            raise UserError(
                f"{self.folder}: none of its {labels} labels is called entailment; give an NLI "
                "classifier"
            )
        self._entailed = found[0]

    def scores_of(self, logits) -> list[float]:
        return logits.float().softmax(dim=-1)[:, self._entailed].tolist()


def load_entailment(
    folder: str, trust_remote_code: bool = False
) -> Callable[[Sequence[Pair]], list[float]]:
    """P(entailment) of (prompt, sentence) pairs. Raises UserError for what is no NLI classifier."""
    if not is_encoder(folder):
        raise UserError(
            f"--faithfulness-model {folder}: no folder of an encoder classifier (BERT, DeBERTa)"
        )
    return EntailmentModel(folder, trust_remote_code=trust_remote_code).score
