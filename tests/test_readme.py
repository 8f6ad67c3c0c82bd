"""The examples of README.md and docs/ run as they stand, those of a page one after another."""

import json
import re
from pathlib import Path

import pytest
import torch
from luke_cases import build

from luke_kernels import LukeModel, LukeTokenizer
from luke_kernels.ops.backends import INTERPRETING, TABLE, cpu_kernels_missing
from luke_kernels.tokenizer import BUNDLED

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
    assert namespace["vectors"].entities.shape == (1, 768)
    assert namespace["out_words"].shape == (2, 128, 12, 64)
    assert namespace["attentions"].shape == (2, 12, 144, 144)
    assert namespace["packed_contexts"][1].shape[1] == 768


def test_links():
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "luke_kernels/ops/README.md",
    ]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
                anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
                assert anchor in anchors, f"{page.name}: {target}#{anchor}"


@pytest.mark.skipif(cpu_kernels_missing() is not None, reason=f"{cpu_kernels_missing()}")
def test_model():
    namespace = run_examples("docs/model.md", 2)
    assert namespace["logits"].shape == (3, 5)
    assert namespace["padded"].shape == (2, 2, 5)


def test_training():
    pytest.importorskip("accelerate")
    namespace = run_examples("docs/training.md", 3)
    assert namespace["labels"].shape == (6,)
    assert namespace["loss"].isfinite()
    assert {parameter.dtype for parameter in namespace["model"].parameters()} == {torch.float32}


def test_tokenizer():
    namespace = run_examples("docs/tokenizer.md", 2)
    assert namespace["inputs"]["entity_ids"].shape == (2, 2)
    assert len(namespace["windows"]["input_ids"]) > 3
    assert namespace["windows"].dropped_spans[0] == []


def test_transformers():
    pytest.importorskip("transformers", reason="transformers is not installed")
    namespace = run_examples("docs/transformers.md", 1)
    assert namespace["logits"].shape == (2, 2)
    assert type(namespace["model"].luke.encoder).__name__ == "LukeEncoder"


def test_backends(capsys):
    run_examples("docs/backends.md", 1)
    assert "sdpa" in capsys.readouterr().out
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|", (ROOT / "docs/backends.md").read_text(), flags=re.M)
    assert sorted(row[0] for row in rows) == sorted(TABLE)
    for name, devices, dtypes, head_dim in rows:
        support = TABLE[name]
        assert ("any device" in devices) == (support.devices is None)
        assert head_dim == ("any" if support.max_head_dim is None else f"up to {support.max_head_dim}")
        # Triton's interpreter takes fewer.
        assert {str(dtype).removeprefix("torch.") for dtype in support.dtypes} <= set(dtypes.split(", "))
        assert len(support.dtypes) == len(dtypes.split(", ")) - (name == "triton" and INTERPRETING)


def test_encode(tmp_path, monkeypatch):
    from luke_kernels.demo import sentences
    from luke_kernels.vector_files import encode_file

    monkeypatch.chdir(tmp_path)
    tokenizer = LukeTokenizer.from_pretrained(BUNDLED)
    build(LukeModel, vocab_size=len(tokenizer), max_position_embeddings=99).save_pretrained("model")
    tokenizer.save_pretrained("model")
    lines = [{"text": s["text"], "entity_spans": [[e["start"], e["end"]] for e in s["entities"]]} for s in sentences()]
    Path("texts.jsonl").write_text("\n".join(json.dumps(line | {"id": 17}) for line in lines), encoding="utf-8")
    encode_file("texts.jsonl", "vectors", "model")
    namespace = run_examples("docs/encode.md", 3)
    assert namespace["vectors"].entities.shape == (1, 768)
    assert [len(entities) for entities in namespace["entities"]] == [len(line["entity_spans"]) for line in lines]
    assert len(namespace["words"]) == len(lines)
    assert namespace["about"]["ids"] == [17] * len(lines)
