"""The base's model class: causal, encoder-decoder or tagger, as its config says."""

from typing import Any, Dict, Optional, Tuple

from .errors import SamError

TAGGER = "ForTokenClassification"


def auto_model(source: str, revision: Optional[str] = None, local_files_only: bool = False) -> Any:
    """The transformers class that loads a base.

    source (str): Folder or hub id.
    revision (Optional[str]): Of the hub id.
    local_files_only (bool): Never ask a hub.
    RETURNS (Any): `AutoModelForTokenClassification` for a tagger, `AutoModelForSeq2SeqLM` for an encoder-decoder, else
        `AutoModelForCausalLM`.
    RAISES: OSError or ValueError, as transformers does, if there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForTokenClassification

    config = AutoConfig.from_pretrained(source, revision=revision, local_files_only=local_files_only)
    if is_tagger(config):
        return AutoModelForTokenClassification
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def is_tagger(config: Any) -> bool:
    """Whether a transformers config is that of a tagger (see `generate.tagging`), which generates no text."""
    return any(name.endswith(TAGGER) for name in config.architectures or ())


def load_structure(source: str, revision: Optional[str] = None) -> Any:
    """A base without its weights, on the meta device: its layers, their names and shapes, and which of them are tied.

    source (str): Folder or hub id.
    revision (Optional[str]): Of the hub id.
    RETURNS (Any): The model that `auto_model(source).from_pretrained(source)` would load.
    RAISES: SamError S503 if there is no such model.
    """
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        with torch.device("meta"):
            model = auto_model(source, revision).from_config(config)
        model.tie_weights()
    except (OSError, ValueError) as error:
        raise SamError("S503", path=source, reason=str(error).splitlines()[0] if str(error) else repr(error)) from error
    return model


def model_shapes(source: str) -> Dict[str, Tuple[int, ...]]:
    """Shapes of a base's parameters by the names they have in the loaded model, tied ones under all their names."""
    parameters = load_structure(source).named_parameters(remove_duplicate=False)
    return {name: tuple(parameter.shape) for name, parameter in parameters}
