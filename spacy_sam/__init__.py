"""Zero-shot NER for spaCy: select domain experts for a corpus, merge them, annotate with the union (SaM, arXiv 2506.22813)."""

__version__ = "0.1.0"
