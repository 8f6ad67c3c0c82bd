import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_examples_run_one_after_another():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["out_words"].shape == (2, 128, 12, 64)
    assert namespace["attentions"].shape == (2, 12, 144, 144)
    assert namespace["packed_contexts"][1].shape[1] == 768
