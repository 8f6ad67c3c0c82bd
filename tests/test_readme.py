"""The examples of README.md and docs/ run as they stand, those of a page one after another."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_examples(page: str, count: int) -> dict:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == count
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    return namespace


def test_readme():
    namespace = run_examples("README.md", 4)
    assert namespace["outputs"].entity_last_hidden_state.shape == (2, 2, 768)
    assert namespace["packed_outputs"].entity_last_hidden_state.shape == (3, 768)
    assert namespace["out_words"].shape == (2, 128, 12, 64)
    assert namespace["attentions"].shape == (2, 12, 144, 144)
    assert namespace["packed_contexts"][1].shape[1] == 768


def test_model():
    namespace = run_examples("docs/model.md", 1)
    assert namespace["logits"].shape == (3, 5)
    assert namespace["padded"].shape == (2, 2, 5)


def test_training():
    namespace = run_examples("docs/training.md", 1)
    assert namespace["labels"].shape == (6,)
    assert namespace["loss"].isfinite()


def test_tokenizer():
    namespace = run_examples("docs/tokenizer.md", 2)
    assert namespace["inputs"]["entity_ids"].shape == (2, 2)
    assert len(namespace["windows"]["input_ids"]) > 3
    assert namespace["windows"].dropped_spans[0] == []
