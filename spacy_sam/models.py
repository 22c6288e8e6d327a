"""The base's model class: causal, encoder-decoder or tagger, as its config says."""

from typing import Any, Optional

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
