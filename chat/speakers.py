"""From the command line to the one or two models that reply, with as few copies as will do."""

from pathlib import Path

from chat.prompting import Prompting
from chat.speaker import Speaker, is_adapter, switch_off
from command_line.conditioning_flags import wanted
from models.adapter_files import load_adapter, read_adapter
from models.load import DEFAULT_MODEL, LoadedModel, load_model, resolve_path
from models.parts import refuse_lost_base


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
