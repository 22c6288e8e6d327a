"""A sample of a corpus's texts, from all over it: the plan is chosen by it."""

import bisect
import os
import random
from collections import Counter
from itertools import accumulate
from typing import Any, Iterator, List, Sequence, Tuple

from .readers import Item, Reader, UnreadableError
from .shards import Shard

WHOLE = 16 << 20  # a corpus of fewer bytes than this is read from end to end


def draw_texts(
    shards: Sequence[Shard], size: int, seed: int, text_field: str = "text", limit: int = 10_000
) -> List[str]:
    """Draw texts at random from all shards.

    A small corpus (16 MB) is read whole, and every document is as likely as any other. Of a larger one, shards are drawn by
    their bytes, and of these alone texts are read: lines at random places of uncompressed JSONL and text files, a random
    choice from all of any other file. So a document there is the likelier the longer it is, and the longer the one before it.

    shards (Sequence[Shard]): What there is; shards that cannot be read, and malformed lines, are left out.
    size (int): How many texts; fewer if there are fewer. Empty ones are left out.
    seed (int): Decides which.
    limit (int): Characters kept of a long text.
    RETURNS (List[str]): The texts in random order.
    """
    random_ = random.Random(seed)
    sizes = [shard.size() for shard in shards]
    if sum(sizes) <= WHOLE:
        found = _reservoir((text for shard in shards for text in _texts(shard, text_field)), size, random_)
    else:
        found = [
            text
            for shard, n in _share_out(shards, sizes, size, random_)
            for text in _some(shard, n, text_field, random_)
        ]
    random_.shuffle(found)
    return [text[:limit] for text in found[:size]]


def _share_out(shards: Sequence[Shard], sizes: List[int], n: int, random_: random.Random) -> List[Tuple[Shard, int]]:
    """How many texts of which shards."""
    ends = list(accumulate(sizes))
    chosen = Counter(bisect.bisect_right(ends, random_.randrange(ends[-1])) for _ in range(n))
    return [(shards[index], chosen[index]) for index in sorted(chosen)]


def _some(shard: Shard, n: int, text_field: str, random_: random.Random) -> List[str]:
    if shard.kind == "files":
        names = random_.sample(shard.files, min(n, len(shard.files)))
        shard = Shard(shard.key, shard.path, shard.kind, files=tuple(names))
    elif shard.kind in ("jsonl", "txt") and shard.suffix in (".jsonl", ".txt"):
        return _lines_at_random(shard, n, text_field, random_)
    return _reservoir(_texts(shard, text_field), n, random_)


def _lines_at_random(shard: Shard, n: int, text_field: str, random_: random.Random) -> List[str]:
    """The first text behind each of some places; a place whose text was drawn before is drawn again, a few times."""
    start, end = shard.part or (0, os.path.getsize(shard.path))
    found: dict = {}
    for _ in range(4 * n):
        place = random_.randrange(start, end)
        behind = Shard(shard.key, shard.path, shard.kind, part=(place, end))
        text = next(_texts(behind, text_field), None)
        if text is not None:
            found[text] = None
        if len(found) == n:
            break
    return list(found)


def _texts(shard: Shard, text_field: str) -> Iterator[str]:
    """The texts of a shard, up to where it can be read."""
    vocab = _vocab() if shard.kind == "spacy" else None
    try:
        for item in Reader(shard, text_field=text_field, vocab=vocab):
            if isinstance(item, Item) and item.text.strip():
                yield item.text
    except UnreadableError:
        return


def _vocab() -> Any:
    import spacy

    return spacy.blank("xx").vocab


def _reservoir(texts: Iterator[str], n: int, random_: random.Random) -> List[str]:
    """Some of a stream of unknown length, all equally likely."""
    kept: List[str] = []
    for number, text in enumerate(texts):
        if number < n:
            kept.append(text)
        elif (place := random_.randrange(number + 1)) < n:
            kept[place] = text
    return kept
