"""A reward that asks an HTTP service."""

import json
from collections.abc import Sequence

from errors import UserError
from rewards.http_client import Client, Failed
from rewards.user_function import quote_row, shorten


class HTTPReward(Client):
    """POST ``{"prompts": [...], "responses": [...], COLUMN: [...]}`` and read scores back.

    The reply is ``{"scores": [...]}`` or ``{"rewards": [...]}``, a number for each response, in
    order. `batch_size` rows go into a request; deadline, attempts and secrets are `Client`'s.
    """

    what = "reward service"

    def __init__(self, url: str, *, batch_size: int = 32, **options):
        """`options` are those of `Client`. Raises UserError as it does."""
        if batch_size < 1:
            raise UserError(f"reward service: batch size >= 1 is needed, got {batch_size}")
        super().__init__(url, **options)
        self.batch_size = batch_size

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], /, **columns: Sequence
    ) -> list[float]:
        """Scores as the service gave them, one for each response (values are not checked here).

        Raises UserError, with the rows of the failed request, when it has failed for good.
        """
        table = {"prompts": list(prompts), "responses": list(responses), **columns}
        scores: list[float] = []
        for start in range(0, len(responses), self.batch_size):
            stop = min(start + self.batch_size, len(responses))
            batch = {name: list(column[start:stop]) for name, column in table.items()}
            try:
                scores += self._scores(self.post(_encode(batch)), stop - start)
            except Failed as error:
                raise UserError(
                    f"reward service {self.shown_url}, rows {start} to {stop - 1}: "
                    f"{self.without_secrets(str(error))}; "
                    f"row {start}: {quote_row(prompts, responses, start)}"
                ) from None  # the cause may show the whole URL
        return scores

    def _scores(self, reply: bytes, count: int) -> list:
        try:
            answer = json.loads(reply)
        except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError
            start = shorten(repr(reply[:200].decode(errors="replace")))
            raise Failed(f"the reply is not JSON: {start}") from error
        found = [k for k in ("scores", "rewards") if isinstance(answer, dict) and k in answer]
        if len(found) != 1 or not isinstance(answer[found[0]], list):
            wanted = '{"scores": [...]} or {"rewards": [...]}'
            raise Failed(f"the reply is {shorten(repr(answer))}, {wanted} is needed")
        scores = answer[found[0]]
        if len(scores) != count:
            raise Failed(f"{len(scores)} {found[0]} came back for {count} responses")
        return scores


def _encode(batch: dict[str, list]) -> bytes:
    for name, column in batch.items():
        try:
            json.dumps(column, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Failed(f"column {name!r} cannot be sent as JSON: {error}") from error
    return json.dumps(batch).encode()
