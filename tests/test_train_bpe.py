"""The tokenizer that the package ships is what its script trains on sentences fit for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SENTENCES = REPOSITORY / "scripts/sentences.txt"

pytest.importorskip("tokenizers", reason="training needs the tokenizers library")
pytestmark = pytest.mark.skipif(not SENTENCES.exists(), reason="scripts/ is absent: it comes with the repository only")


def check(root: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, root / "scripts/train_bpe.py", "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_training_gives_the_committed_files():
    result = check(REPOSITORY)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "entity_vocab.json", "tokenizer_config.json"])
def test_check_names_a_file_that_differs(name, tmp_path):
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
    shutil.copytree(REPOSITORY / "luke_kernels/data", tmp_path / "luke_kernels/data")
    with (tmp_path / "luke_kernels/data/tokenizer" / name).open("a", encoding="utf-8") as file:
        file.write("\n")
    result = check(tmp_path)
    assert result.returncode == 1
    assert f"error: {name} must be what training gives" in result.stderr


def test_sentences_are_unique_and_none_is_shorter_than_four_words():
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    assert len(set(sentences)) == len(sentences) > 1000
    assert min(len(sentence.split()) for sentence in sentences) >= 4
