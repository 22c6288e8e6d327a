"""The spaCy factory `sam_ner`."""

from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

from spacy.language import Language

from .bank import ExpertBank
from .component import SamNer
from .plan import Plan
from .select.base import SelectionContext
from .settings import DEFAULT_CONFIG


@Language.factory(
    "sam_ner",
    assigns=["doc.ents", "doc.spans", "token.ent_iob", "token.ent_type"],
    default_config=DEFAULT_CONFIG,
    default_score_weights={"ents_f": 1.0, "ents_p": 0.0, "ents_r": 0.0, "ents_per_type": None},
)
def make_sam_ner(
    nlp: Language,
    name: str,
    bank: Optional[Union[str, Path]],
    labels: Union[List[str], Dict[str, str]],
    strategy: Callable[[SelectionContext], Plan],
    engine: Callable[[ExpertBank], Any],
    selection: str,
    look_ahead: int,
    min_docs: int,
    encoder: Optional[str],
    window_size: int,
    window_overlap: int,
    batch_size: int,
    threshold: float,
    calibrated: bool,
    spans_key: Optional[str],
    annotate_ents: bool,
    ents_filter: Optional[Callable],
    overwrite: bool,
    save_bank: bool,
    scorer: Optional[Callable],
) -> SamNer:
    """Build the component; see `SamNer`."""
    return SamNer(
        nlp.vocab,
        name,
        bank=bank,
        labels=labels,
        strategy=strategy,
        engine=engine,
        selection=selection,
        look_ahead=look_ahead,
        min_docs=min_docs,
        encoder=encoder,
        window_size=window_size,
        window_overlap=window_overlap,
        batch_size=batch_size,
        threshold=threshold,
        calibrated=calibrated,
        spans_key=spans_key,
        annotate_ents=annotate_ents,
        ents_filter=ents_filter,
        overwrite=overwrite,
        save_bank=save_bank,
        scorer=scorer,
    )
