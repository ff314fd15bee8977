"""From the command line to the one or two models that reply, with as few copies as will do."""

from pathlib import Path

from chat.prompting import Prompting
from chat.scoring import is_adapter, switch_off
from chat.speaker import Speaker
from models.adapter_files import load_adapter, read_adapter
from models.load import LoadedModel, load_model, resolve_path


class Loader:
    """Loads models with the same options, and each base only once."""

    def __init__(self, *, token_format: str, prompt_template: str | None, **options):
        self._options = options  # of models.load.load_model
        self._prompting = {"token_format": token_format, "prompt_template": prompt_template}
        self._bases: list[tuple[LoadedModel, list]] = []  # base, the tunings made on it

    def speaker(self, model: str | None, adapter: str | None = None) -> Speaker:
        """The model `model` (None: the embedded one) with `adapter` on it, if there is one."""
        full = adapter is not None and read_adapter(adapter)[1].get("fine_tune_type") == "full"
        loaded, tunings = self._base(model, alone=full)
        switch_off(tunings)
        tuning = load_adapter(loaded.model, adapter) if adapter is not None else None
        tunings += [tuning] if tuning is not None else []
        loaded.model.eval()
        name = loaded.path.name + (f" + {Path(adapter).name}" if adapter is not None else "")
        prompting = Prompting(loaded.tokenizer, **self._prompting)
        return Speaker(name, loaded, prompting, tuning, tunings)

    def other(self, name: str, model: str | None) -> Speaker:
        """What --compare names: an adapter for `model`, or another model."""
        if is_adapter(Path(name)):
            return self.speaker(model, name)
        return self.speaker(name)

    def _base(self, name: str | None, alone: bool) -> tuple[LoadedModel, list]:
        """`alone`: its weights will be replaced, so nobody else may use them."""
        if name is not None:
            name = str(resolve_path(name))
        for loaded, tunings in self._bases:
            same = loaded.path == Path(name) if name is not None else loaded.is_default
            if same and not alone and not any(t.kind == "full" for t in tunings):
                return loaded, tunings
        self._bases.append((load_model(name, **self._options), []))
        return self._bases[-1]
