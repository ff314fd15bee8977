"""A model that replies: streaming by mlx-lm or by beam search, its KV cache kept between turns."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx

from chat.conversation import Prompting
from chat.settings import Settings
from command_line.conditioning_flags import wanted
from models.adapter_files import load_adapter, read_adapter
from models.beam_search import beam_search
from models.decoding import Sampling, make_cache
from models.limits import find_limits
from models.load import DEFAULT_MODEL, LoadedModel, load_model, resolve_path
from models.parts import refuse_lost_base
from models.trunk import vocabulary_size
from models.tuning import Tuning


@dataclass
class Reply:
    """One reply and what it took."""

    prompt_tokens: list[int]  # without virtual tokens
    prompt: str | list[dict]  # as it was said: the last text, or a conversation
    prompt_text: str  # as the model was given it
    tokens: list[int]  # EOS included where it was written
    text: str  # as it continues the prompt, leading space and all; no EOS
    ended: str  # "stop": by EOS, "length": by --max-tokens, "interrupted"
    seconds: float  # for all tokens after the first
    first_seconds: float  # to the first token
    extras: dict = field(default_factory=dict)  # tools and documents that the template was given

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first, which waits for the prompt to be read."""
        if len(self.tokens) > 1:
            return (len(self.tokens) - 1) / max(self.seconds, 1e-9)
        return len(self.tokens) / max(self.first_seconds, 1e-9)


class Speaker:
    """A base model with a tuning switched on, or with none.

    `tunings` lists all that share the base's weights, so that the others can be switched off.
    """

    def __init__(
        self,
        name: str,
        loaded: LoadedModel,
        prompting: Prompting,
        tuning: Tuning | None = None,
        tunings: list[Tuning] | None = None,
    ):
        self.name, self.loaded, self.prompting, self.tuning = name, loaded, prompting, tuning
        self.tunings = tunings if tunings is not None else [tuning] if tuning else []
        self._cached: list[int] = []  # the tokens whose keys and values are in the cache
        self._cache = None
        self._vocabulary = vocabulary_size(loaded.model)

    @property
    def tokenizer(self):
        return self.loaded.tokenizer

    def step_forward(self) -> None:
        """Switch this speaker's tuning on and every other one on the same base off."""
        switch_off(t for t in self.tunings if t is not self.tuning)
        if self.tuning is not None and not self.tuning.active:
            self.tuning.activate()

    def reply(
        self,
        messages: list[dict],
        settings: Settings,
        *,
        extras: dict | None = None,
        show: Callable[[str], None] = lambda text: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Answer `messages`; `show` gets the text piece by piece as it is written.

        `extras` are tools and documents for the chat template.
        """
        self.step_forward()
        prompt, prompt_text = self.prompting.recent(messages, extras, settings.max_context)
        said = self.prompting.said(messages)
        prefix = self.tuning.prefix if self.tuning is not None else ()
        settings = self._fitting([*prefix, *prompt], settings)
        write = self._beams if settings.num_beams > 1 else self._stream
        started = time.perf_counter()
        first = started
        tokens, ended, shown = [], "length", False
        for token, piece in write([*prefix, *prompt], settings, should_stop):
            first = time.perf_counter() if not tokens else first
            tokens.append(token)
            if piece and not shown:  # detokenizers drop the blank before the first word
                known = continuation(self.tokenizer, prompt, tokens, self.loaded.eos_ids)
                piece = known[: len(known) - len(known.lstrip())] + piece.lstrip()
            shown = shown or bool(piece)
            show(piece)
        if tokens and tokens[-1] in self.loaded.eos_ids:
            ended = "stop"
        elif should_stop():
            ended = "interrupted"
        now = time.perf_counter()
        text = continuation(self.tokenizer, prompt, tokens, self.loaded.eos_ids)
        if settings.num_beams > 1:  # nothing comes before the search is over
            first = started
            show(text)
        return Reply(
            prompt,
            said,
            prompt_text,
            tokens,
            text,
            ended,
            now - first,
            first - started,
            extras or {},
        )

    def _fitting(self, prompt: list[int], settings: Settings) -> Settings:
        """`settings` whose default --max-tokens fits behind `prompt`; UserError where none does."""
        limits, wanted = find_limits(self.loaded.model), settings.max_tokens
        room = limits.room(len(prompt), wanted)
        if room < wanted == Settings.max_tokens:
            said = f"--max-tokens is {room}: the model has {limits.positions} positions"
            warnings.warn(said, stacklevel=2)
            settings = replace(settings, max_tokens=room)
        limits.check_one(prompt, "the conversation", settings.max_tokens)
        return settings

    # ----------------------------------------------------------------- ways to write

    def _stream(self, prompt: list[int], settings: Settings, should_stop) -> Iterator:
        """(token, text) one after the other."""
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        def stop_reading(*_):  # called between pieces of a long prompt
            if should_stop():
                raise _Stopped

        known = self._reuse_cache(prompt)
        penalty = settings.repetition_penalty
        processors = make_logits_processors(
            repetition_penalty=penalty if penalty != 1 else None,
            repetition_context_size=settings.repetition_context_size,
        )
        top_k = settings.top_k if settings.top_k < self._vocabulary else 0
        pieces = stream_generate(
            self.loaded.model,
            self.tokenizer,
            prompt[known:],
            max_tokens=settings.max_tokens,
            sampler=make_sampler(settings.temp, settings.top_p, settings.min_p, top_k=top_k),
            logits_processors=[self._over_all(p, prompt, known) for p in processors],
            prompt_cache=self._cache,
            prompt_progress_callback=stop_reading,
        )
        written = []
        try:
            for piece in pieces:
                written.append(piece.token)
                yield piece.token, piece.text
                if should_stop():
                    break
        except _Stopped:
            self._forget()
        except BaseException:
            self._forget()  # whatever has happened, the cache's contents are not known
            raise
        else:
            self._cached = prompt + written
        finally:
            pieces.close()

    def _beams(self, prompt: list[int], settings: Settings, should_stop) -> Iterator:
        """(token, "") of the best reply that a beam search finds."""
        from mlx_lm.sample_utils import make_repetition_penalty

        processor = None
        if settings.repetition_penalty != 1:
            penalise = make_repetition_penalty(
                settings.repetition_penalty, settings.repetition_context_size
            )

            def processor(tokens: list[int], logprobs: mx.array) -> mx.array:
                return penalise(self._real(tokens), logprobs)

        best = beam_search(
            self.loaded.model,
            prompt,
            num_beams=settings.num_beams,
            max_tokens=settings.max_tokens,
            eos_ids=self.loaded.eos_ids,
            length_penalty=settings.length_penalty,
            sampling=Sampling(settings.temp, settings.top_k, settings.top_p, settings.min_p),
            processor=processor,
            should_stop=should_stop,
        )[0]
        for token in best.tokens:
            yield token, ""

    def _over_all(self, processor, prompt: list[int], known: int):
        """`processor` on all tokens so far: mlx-lm knows neither cached nor virtual ones apart."""
        head = self._real(prompt)
        unread = len(prompt) - known

        def on_all(tokens: mx.array, logits: mx.array) -> mx.array:
            return processor(mx.concatenate([head, tokens[unread:].astype(head.dtype)]), logits)

        return on_all

    def _real(self, tokens: list[int]) -> mx.array:
        return mx.array([t for t in tokens if t < self._vocabulary], dtype=mx.uint32)

    # ----------------------------------------------------------------- cache

    def _reuse_cache(self, prompt: list[int]) -> int:
        """How many tokens of `prompt` the cache holds, after it has been cut back to those."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        known = 0
        # The last token is always read: its logits are the first that are needed.
        for here, there in zip(self._cached, prompt[:-1], strict=False):
            if here != there:
                break
            known += 1
        surplus = len(self._cached) - known
        if known and (not surplus or can_trim_prompt_cache(self._cache)):
            trim_prompt_cache(self._cache, surplus)
        else:
            self._cache, known = make_cache(self.loaded.model), 0
        self._cached = prompt[:known]
        return known

    def _forget(self) -> None:
        self._cache, self._cached = None, []


class _Stopped(Exception):
    """The person has stopped the reply while the prompt was still being read."""


def continuation(tokenizer, prompt: list[int], tokens: list[int], eos_ids: set[int]) -> str:
    """The text of `tokens` as it stands after the prompt's: a leading space is not lost."""
    if tokens and tokens[-1] in eos_ids:
        tokens = tokens[:-1]

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    head, whole = text(prompt), text(prompt + tokens)
    return whole[len(head) :] if whole.startswith(head) else text(tokens)


def switch_off(tunings: Iterable[Tuning]) -> None:
    """The base alone is left; a full fine-tuning replaced it and stays."""
    for tuning in tunings:
        if tuning.active and tuning.kind != "full":
            tuning.deactivate()


def is_adapter(path: str | Path) -> bool:
    """An adapter's file or folder, and not a model's folder."""
    path = Path(path)
    if path.is_dir():
        return (path / "adapter_config.json").exists() and not (path / "config.json").exists()
    return path.suffix in (".npz", ".safetensors")


# ------------------------------------------------------------------------------ from flags


class Loader:
    """Loads models with the same options, and each base only once."""

    def __init__(
        self,
        *,
        token_format: str,
        prompt_template: str | None,
        any_base: bool = False,
        target_score: float | None = None,
        **options,
    ):
        self._options, self._any_base = options, any_base  # options: of models.load.load_model
        self._prompting = {"token_format": token_format, "prompt_template": prompt_template}
        self._target_score = target_score
        self._bases: list[tuple[LoadedModel, list]] = []  # base, the tunings made on it

    def speaker(self, model: str | None, adapter: str | None = None) -> Speaker:
        """`model` with `adapter` on it, if there is one.

        None means the model that the adapter names, if it is there; else the embedded one.
        """
        description = read_adapter(adapter)[1] if adapter is not None else {}
        named = description.get("model")
        if model is None and isinstance(named, str) and Path(named).is_dir():
            model = named
        elif model is None and isinstance(named, str) and adapter is not None:
            refuse_lost_base(adapter, named)
        loaded, tunings = self._base(model, alone=description.get("fine_tune_type") == "full")
        switch_off(tunings)
        tuning, own = None, dict(loaded.config)
        if adapter is not None:
            tuning = load_adapter(loaded, adapter, any_base=self._any_base)
            tunings.append(tuning)
        scores = wanted(loaded.config, self._target_score)
        loaded.config = own  # of the base, which another adapter may share
        loaded.model.eval()
        name = loaded.path.name + (f" + {Path(adapter).name}" if adapter is not None else "")
        prefix = "" if scores is None else scores.prefix()
        prompting = Prompting(loaded.tokenizer, **self._prompting, prefix=prefix)
        prompting.stop_at_turn_end()
        return Speaker(name, loaded, prompting, tuning, tunings)

    def other(self, name: str, model: str | None) -> Speaker:
        """What --compare names: an adapter for `model`, or another model."""
        if is_adapter(name):
            return self.speaker(model, name)
        return self.speaker(name)

    def _base(self, name: str | None, alone: bool) -> tuple[LoadedModel, list]:
        """`alone`: its weights will be replaced, so nobody else may use them."""
        name = name if name is not None else str(DEFAULT_MODEL)
        path = resolve_path(name).resolve()
        for loaded, tunings in self._bases:
            replaced = any(tuning.kind == "full" for tuning in tunings)
            if loaded.path.resolve() == path and not alone and not replaced:
                return loaded, tunings
        self._bases.append((load_model(name, **self._options), []))
        return self._bases[-1]
