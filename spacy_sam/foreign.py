"""LoRA adapters made elsewhere: checked against the bank's base, given a card and a centroid, and added."""

import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence, Set, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .adapters import BASE_COPY, KEY_PREFIX, is_base_copy, read_adapter
from .bank import ExpertBank, hash_base
from .corpora import Dataset, Record, load_dataset, read_lines, read_texts
from .errors import SamError
from .lora_config import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from .models import load_structure
from .plan import Corpus, Expert
from .select.encoder import SentenceEncoder
from .select.similarity import make_centroid

CENTROID_TEXTS = 2000  # as in training


def import_adapter(
    bank: ExpertBank,
    name: str,
    adapter: Union[str, Path],
    *,
    domain: str,
    texts: Union[str, Path],
    labels: Sequence[str] = (),
    encoder: Optional[str] = None,
    n_texts: int = CENTROID_TEXTS,
    same_base: bool = False,
) -> Expert:
    """Add a PEFT LoRA adapter that was trained elsewhere to a bank.

    bank (ExpertBank): The bank. Its base must be the one that the adapter was trained on.
    name (str): The expert's name in it.
    adapter (Union[str, Path]): PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.
    domain (str): What it knows, in words.
    texts (Union[str, Path]): Texts of its domain, best those it was trained on: `.jsonl`, `.txt`, `.spacy` or `.conll`.
    labels (Sequence[str]): The types it knows; those annotated in `texts`, if there are any, by default.
    encoder (Optional[str]): Where the bank's sentence encoder is, if not under its name.
    n_texts (int): A random sample of at most so many texts makes the centroid.
    same_base (bool): The caller's word that it was trained on the bank's base, where the names do not say so.
    RETURNS (Expert): The card, as it is in the bank now.
    RAISES: SamError S109 or S114 for the name, S104, S106, S107, S118, S403 to S405 for an adapter that cannot be merged exactly,
        S119 if it may be for another base, S503 if the base cannot be read, S602 to S604 for the texts, S303 for the
        encoder. The bank is then unchanged.
    """
    from .train.run import sample_texts

    bank.check_new_name(name)
    source = Path(adapter)
    config = read_adapter_config(source, name)
    if not same_base:
        check_named_base(bank, config, source, name)
    corpus = _read_corpus(Path(texts), labels)
    with _without_base_copies(bank, source, name) as folder:
        check_against_structure(bank, folder, name)
        encode = SentenceEncoder(bank.encoder, path=encoder)
        centroid = make_centroid(encode(sample_texts([corpus], n_texts, seed=0)), encode.name)
        card = Expert(
            name=name,
            domain=domain,
            labels=corpus.labels,
            base_hash=bank.base_hash,
            corpora=(Corpus(corpus.name, len(corpus.records), corpus.labels),),
            lora=_lora_for_reading(config),
            centroid=centroid,
            training={"imported": True, "peft_version": config.get("peft_version")},
        )
        bank.add(name, folder, card)
    return bank[name]


def check_named_base(bank: ExpertBank, config: Mapping[str, Any], folder: Path, name: str) -> None:
    """Compare the base that an adapter's config names with the bank's: by content if both are folders here, else by name.

    RAISES: SamError S119 if it is another one, or nobody can say.
    """
    named = str(config.get("base_model_name_or_path") or "")
    source, revision = bank.base
    places = (folder / named, Path(named)) if named else ()
    local = next((path for path in places if any(path.glob("*.safetensors"))), None)
    if local and Path(source).is_dir():
        found, expected = hash_base(local), bank.base_hash
        same = found == expected
    else:
        known = _names_of_base(bank)
        found, expected = f"revision {config.get('revision') or 'main'}", f"revision {revision or 'main'}"
        same = found == expected and any(_same_name(named, each) for each in known)
        source = " or ".join(sorted(known)) or source
    if not same:
        raise SamError("S119", name=name, found=f"'{named}' ({found})", expected=f"'{source}' ({expected})")


def _names_of_base(bank: ExpertBank) -> Set[str]:
    """Names under which the bank's base may be known elsewhere. A folder inside the bank is named after nothing."""
    source = Path(bank.base[0])
    if not source.is_dir():
        return {bank.base[0]}
    names = set() if source.resolve().is_relative_to(bank.path.resolve()) else {source.resolve().name}
    config = source / "config.json"
    named = json.loads(config.read_text(encoding="utf8")).get("_name_or_path") if config.is_file() else None
    return names | ({named} if named else set())


def _same_name(first: str, second: str) -> bool:
    """Whether two hub ids are equal, or a hub id and a folder end alike."""
    parts = [name.replace("\\", "/").rstrip("/").lower().split("/") for name in (first, second)]
    are_ids = all(len(each) == 2 and each[0] not in ("", ".", "..", "~") for each in parts)
    return parts[0] == parts[1] if are_ids else parts[0][-1] == parts[1][-1] != ""


def check_against_structure(bank: ExpertBank, folder: Path, name: str) -> None:
    """Read an adapter and check that the base has what it changes, without the base's weights.

    RAISES: SamError S106 or S107 for the adapter, S403 (no such weight), S404 (a tied one), S503 if the base cannot be read.
    """
    from .merge.materialise import fit

    adapter = read_adapter(folder, name)
    source, revision = bank.base
    fit(load_structure(source, revision), adapter, name)


def _lora_for_reading(config: Mapping[str, Any]) -> Dict[str, Any]:
    more = {key: config[key] for key in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)}
    return {"rank": config["r"], "alpha": config["lora_alpha"], **more}


def _read_corpus(path: Path, labels: Sequence[str]) -> Dataset:
    """Texts with the types they are annotated for, or texts alone. RAISES: SamError S602 to S604."""
    if not labels and _is_annotated(path):
        return load_dataset(path)
    records = tuple(Record(text) for text in read_texts(path) if text.strip())
    if not records:
        raise SamError("S604", path=path)
    return Dataset(path.name.split(".")[0], records, tuple(sorted(set(labels))))


def _is_annotated(path: Path) -> bool:
    if path.suffix != ".jsonl" or not path.is_file():
        return path.suffix != ".txt"
    return any('"entities"' in line for _, line in read_lines(path))


@contextmanager
def _without_base_copies(bank: ExpertBank, source: Path, name: str) -> Iterator[Path]:
    """The adapter's folder; or, if peft saved weights of the base in it, a copy without them, where they are the base's own.

    RAISES: SamError S106 if they differ from the base's, S107 if the file is damaged.
    """
    try:
        with safe_open(source / WEIGHTS_FILE, framework="pt") as file:
            names = file.keys()
            copies = {key: file.get_tensor(key) for key in names if is_base_copy(key)}
    except (SafetensorError, OSError) as error:
        raise SamError("S107", name=name, problem=f"{WEIGHTS_FILE} cannot be read ({error})") from error
    if not copies:
        yield source
        return
    for key, tensor in copies.items():
        weight = key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".")
        own = _base_tensor(Path(bank.base[0]), weight)
        if own is None or own.shape != tensor.shape or not torch.equal(own, tensor.to(own.dtype)):
            why = "no such weight is in a file of the base here" if own is None else "it differs from the base's"
            raise SamError("S106", name=name, feature=f"its own copy of '{weight}'", reason=f"{BASE_COPY}, and {why}")
    with tempfile.TemporaryDirectory() as made:
        tensors = {key: tensor for key, tensor in load_file(source / WEIGHTS_FILE).items() if key not in copies}
        save_file(tensors, Path(made) / WEIGHTS_FILE, metadata={"format": "pt"})
        shutil.copyfile(source / CONFIG_FILE, Path(made) / CONFIG_FILE)
        yield Path(made)


def _base_tensor(base: Path, name: str) -> Optional[torch.Tensor]:
    """A tensor of a base in a folder, or nothing."""
    for path in sorted(base.glob("*.safetensors")) if base.is_dir() else ():
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if name in names:
                return file.get_tensor(name)
    return None
