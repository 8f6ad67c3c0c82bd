"""Train the small byte-level BPE that the package ships, on sentences of our own: python scripts/train_bpe.py

Its conventions are RoBERTa's, its files those that LukeTokenizer of transformers 4.57 saves, byte for byte.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

ROOT = Path(__file__).parents[1]
SENTENCES = ROOT / "scripts/sentences.txt"
ANNOTATED = ROOT / "luke_kernels/data/sentences.jsonl"
TOKENIZER = ROOT / "luke_kernels/data/tokenizer"

VOCABULARY = 4000  # a round number below the 5,289 that MIN_FREQUENCY would allow
MIN_FREQUENCY = 2  # a pair seen once teaches nothing
FIRST = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}  # ids 0 to 3
SPECIAL = FIRST | {"cls": "<s>", "sep": "</s>", "mask": "<mask>"}
MARKERS = ["<ent>", "<ent2>"]  # set around the mentions a task asks about
ENTITY_SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]", "mask2": "[MASK2]"}


def train(texts: list[str]) -> tuple[dict[str, int], list[list[str]]]:
    """Return the vocabulary, the mask last, and the merges in order."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 1,
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(FIRST.values()),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"] | {SPECIAL["mask"]: len(model["vocab"])}, model["merges"]


def number(tokens: list[str], start: int = 0) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens, start)}


def added(token: str) -> dict:
    # RoBERTa's mask takes in the space before it.
    return {"content": token, "lstrip": token == "<mask>", "normalized": True, "rstrip": False, "single_word": False}


def to_json(value: dict) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def build() -> dict[str, str]:
    """Return the text of each file by its name."""
    annotated = [json.loads(line) for line in ANNOTATED.read_text(encoding="utf-8").splitlines()]
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    vocabulary, merges = train(sentences + [sentence["text"] for sentence in annotated])
    markers = number(MARKERS, start=len(vocabulary))
    counts = Counter(entity["title"] for sentence in annotated for entity in sentence["entities"])
    *before, last = ENTITY_SPECIAL.values()
    titles = sorted(counts, key=lambda title: (-counts[title], title))
    ids = vocabulary | markers
    config: dict = {f"{name}_token": token for name, token in SPECIAL.items()}
    config |= {f"entity_{name}_token": token for name, token in ENTITY_SPECIAL.items()}
    config |= {f"entity_token_{i}": token for i, token in enumerate(MARKERS, 1)}
    config |= {"additional_special_tokens": MARKERS, "extra_special_tokens": {}, "tokenizer_class": "LukeTokenizer"}
    config |= {"add_prefix_space": False, "clean_up_tokenization_spaces": False, "errors": "replace", "task": None}
    # As in LUKE's checkpoints: RoBERTa's positions, and the tokenizer's defaults.
    config |= {"model_max_length": 512, "max_entity_length": 32, "max_mention_length": 30}
    config["added_tokens_decoder"] = {ids[t]: added(t) | {"special": True} for t in [*SPECIAL.values(), *MARKERS]}
    special: dict = {f"{name}_token": added(token) for name, token in SPECIAL.items()}
    special["additional_special_tokens"] = [added(token) for token in MARKERS]
    return {
        "vocab.json": to_json(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]),
        "entity_vocab.json": to_json(number([*before, *titles, last])),
        "tokenizer_config.json": to_json(config),
        "special_tokens_map.json": to_json(special),
        "added_tokens.json": to_json(markers),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the BPE of luke_kernels/data/tokenizer.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the committed files differ")
    check = parser.parse_args().check
    for name, text in build().items():
        path = TOKENIZER / name
        if not check:
            TOKENIZER.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
        elif not path.exists() or path.read_bytes() != text.encode():
            sys.exit(f"error: {name} must be what training gives, got other bytes; run python scripts/train_bpe.py")
