"""Loading and saving models without other libraries' bars and warnings."""

import warnings
from contextlib import contextmanager
from typing import Iterator


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No "Loading weights" bar of transformers: it would stand in the middle of the user's own progress.

    Nor what transformers and peft say to each other about their future.
    """
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if was_on:
            logging.enable_progress_bar()
