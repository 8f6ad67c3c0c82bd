"""Exported programs against the models they were made of, at sizes other than those that were traced."""

import copy
import functools
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from luke_cases import build
from torch import Tensor

import luke_kernels as lk
from luke_kernels import convert, export
from luke_kernels.export import export_onnx, export_program
from luke_kernels.tokenizer import BUNDLED

pytestmark = [
    # Of torch about itself, while it decomposes a program.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]
NEEDS_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)
PLAIN = {"use_entity_aware_attention": False}
# Class, whether there are entities, changes of the config. Between them the settings take all their values.
CASES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "model": (lk.LukeModel, True, {"num_hidden_layers": 2}),
    "model-plain": (lk.LukeModel, True, {**PLAIN, "entity_emb_size": 32}),
    "words": (lk.LukeModel, False, {"pad_token_id": 0}),
    "masked-lm": (lk.LukeForMaskedLM, True, {"vocab_size": 3001, "entity_vocab_size": 4001}),
    "entity": (lk.LukeForEntityClassification, True, {"entity_emb_size": 32}),
    "pair": (lk.LukeForEntityPairClassification, True, {**PLAIN, "num_labels": 3}),
    "span": (lk.LukeForEntitySpanClassification, True, {"num_labels": 4}),
    "sequence": (lk.LukeForSequenceClassification, True, {"hidden_act": "gelu_new"}),
    "token": (lk.LukeForTokenClassification, False, {}),
    "answer": (lk.LukeForQuestionAnswering, True, {"entity_emb_size": 32}),
    "choice": (lk.LukeForMultipleChoice, True, {}),
}
# B, W, E, M.
SIZES = [(1, 1, 2, 1), (3, 11, 4, 6), (5, 38, 9, 2)]
# ONNX takes seconds a model; these read all that heads read, but for the first words and entities.
FAST_ONNX = ("masked-lm", "span")


@functools.cache
def model(case: str, dtype: torch.dtype = torch.float32) -> lk.LukePreTrainedModel:
    cls, _, changes = CASES[case]
    return build(cls, dtype=dtype, **{"type_vocab_size": 1, "num_hidden_layers": 1, **changes})


@functools.cache
def program(case: str) -> torch.export.ExportedProgram:
    return export_program(model(case), entities=CASES[case][1])


def inputs(case: str, batch: int, words: int, entities: int, mention: int) -> dict[str, Tensor]:
    """Draw a batch with holes; what does not exist holds ids that no table has."""
    config, (cls, has_entities, _) = model(case).config, CASES[case]
    choices = 3 if cls is lk.LukeForMultipleChoice else 1
    rows = batch * choices
    word_mask, entity_mask = torch.rand(rows, words) < 0.7, torch.rand(rows, entities) < 0.6
    word_mask[:, -1] = entity_mask[:, -2:] = True
    columns = torch.multinomial(word_mask.float(), 2 * entities, replacement=True).sort(dim=1)[0]
    positions = torch.randint(0, words, (rows, entities, mention))
    positions[torch.rand(positions.shape) < 0.3] = -1
    drawn = {
        "input_ids": torch.randint(0, config.vocab_size, (rows, words)).where(word_mask, 10**6),
        "attention_mask": word_mask.long(),
    }
    if has_entities:
        drawn |= {
            "entity_ids": torch.randint(0, config.entity_vocab_size, (rows, entities)).where(entity_mask, 10**6),
            "entity_attention_mask": entity_mask.long(),
            "entity_position_ids": positions.where(entity_mask[..., None], 10**6),
        }
    if cls is lk.LukeForEntitySpanClassification:
        drawn["entity_start_positions"] = columns[:, :entities].where(entity_mask, -1)
        drawn["entity_end_positions"] = columns[:, entities:].where(entity_mask, 10**6)
    return {name: ids.unflatten(0, (batch, choices)) if choices > 1 else ids for name, ids in drawn.items()}


def run_onnx(path: Path, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert [put.name for put in session.get_inputs()] == list(batch)
    for put in session.get_inputs():
        assert [name for name in put.shape if name != "choices"] == list(export.SHAPES[put.name])
    names = [put.name for put in session.get_outputs()]
    arrays = session.run(names, {name: ids.numpy() for name, ids in batch.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def assert_equal(outputs: dict[str, Tensor], expected: Any) -> None:
    assert list(outputs) == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_program_gives_what_the_model_gives(case):
    exported = program(case).module()
    for sizes in SIZES:
        batch = inputs(case, *sizes)
        with torch.no_grad():
            assert_equal(exported(**batch), model(case)(**batch))


@NEEDS_ONNX
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in FAST_ONNX else pytest.mark.slow) for c in CASES])
def test_onnx_gives_what_the_model_gives(case, tmp_path, monkeypatch):
    from torch.onnx._internal.exporter import _onnx_program

    is_large = case == "span"
    if is_large:
        monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
    monkeypatch.setattr(export, "export_program", lambda *_, **__: program(case))
    path = tmp_path / "new" / f"{case}.onnx"
    export_onnx(model(case), path, entities=CASES[case][1])
    for sizes in SIZES:
        batch = inputs(case, *sizes)
        with torch.no_grad():
            assert_equal(run_onnx(path, batch), model(case)(**batch))
    files = [path, path.with_name(f"{case}.onnx.data")] if is_large else [path]
    assert sorted(path.parent.iterdir()) == files
    # The graph itself takes some 60 kB; each of the tied tables more than that.
    weights = {p.data_ptr(): p.numel() * 4 for p in model(case).parameters()}
    assert sum(file.stat().st_size for file in files) < sum(weights.values()) + 90_000
    assert b"/export.py" not in path.read_bytes()


@pytest.mark.parametrize("case", ["model", "model-plain", "words", "masked-lm", "sequence", "answer"])
def test_a_sequence_without_tokens(case):
    batch = inputs(case, 3, 6, 3, 2)
    for name in batch.keys() & {"attention_mask", "entity_attention_mask"}:
        batch[name][1] = 0
    with torch.no_grad():
        assert_equal(program(case).module()(**batch), model(case)(**batch))


def test_a_program_shares_the_weights_and_leaves_the_model_as_it_is():
    shared, (cls, _, changes) = program("masked-lm").state_dict, CASES["masked-lm"]
    ours, untouched = (
        model("masked-lm"),
        build(cls, dtype=torch.float32, type_vocab_size=1, num_hidden_layers=1, **changes),
    )
    assert {p.data_ptr() for p in shared.values()} == {p.data_ptr() for p in ours.parameters()}
    for (name, module), (same, other) in zip(ours.named_modules(), untouched.named_modules(), strict=True):
        assert (name, type(module)) == (same, type(other))
    for name, tensor in untouched.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    ours, batch = model("entity", dtype), inputs("entity", 3, 11, 4, 2)
    with torch.no_grad():
        outputs = export_program(ours).module()(**batch)["logits"], ours(**batch).logits
        expected = copy.deepcopy(ours).double()(**batch).logits
    assert outputs[0].dtype == dtype
    error, own = (float((logits.double() - expected).abs().max()) for logits in outputs)
    assert error <= 2 * own + torch.finfo(dtype).eps * float(expected.abs().max())


def test_a_batch_that_is_too_long_is_refused():
    most = model("model").config.max_words
    with pytest.raises(AssertionError, match=f"<= {most}"):
        program("model").module()(**inputs("model", 2, most + 1, 3, 1))


@pytest.mark.parametrize("cls", [lk.LukeForEntityClassification, lk.LukeForEntitySpanClassification])
def test_heads_of_entities_need_entities(cls):
    with pytest.raises(ValueError, match=f"entities must be True for {cls.__name__}, got False"):
        export_program(build(cls), entities=False)


def test_what_is_no_model_in_evaluation_mode_is_refused(tmp_path):
    with pytest.raises(TypeError, match="model must be a LukeModel or one of the heads on it, got Linear"):
        export_program(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    ours = build(lk.LukeModel)
    ours.encoder.train()
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        export_program(ours)
    assert ours.encoder.training


@NEEDS_ONNX
def test_no_file_is_overwritten_or_left_behind(tmp_path, monkeypatch):
    for taken in ("model.onnx", "model.onnx.data"):
        (tmp_path / taken).write_text("mine")
        with pytest.raises(ValueError, match=f"path must be a new file, got .*{taken}, which exists"):
            export_onnx(model("model"), tmp_path / "model.onnx")
        assert (tmp_path / taken).read_text() == "mine"
        (tmp_path / taken).unlink()

    class Full:
        class model:
            graph = ()

        @staticmethod
        def save(path: Path) -> None:
            path.write_text("half")
            raise OSError("no space left")

    monkeypatch.setattr(export, "export_program", lambda *_, **__: program("model"))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Full)
    with pytest.raises(OSError, match="no space left"):
        export_onnx(model("model"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_told(package, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name) or True)
    with pytest.raises(RuntimeError, match=f"onnx and onnxscript must be installed .*, got no {package}$"):
        export_onnx(model("model"), tmp_path / "model.onnx")


# Of from_pretrained, which drops those queries.
@pytest.mark.filterwarnings("ignore:.*weights unexpected, left out:UserWarning")
@pytest.mark.parametrize("entity_aware", [True, False])
def test_a_checkpoint_becomes_an_onnx_file_beside_its_tokenizer(entity_aware, tmp_path, monkeypatch):
    """mLUKE's checkpoints hold queries that their configs turn off."""
    source, target = tmp_path / "source", tmp_path / "target"
    ours = build(
        lk.LukeForMaskedLM,
        dtype=torch.float32,
        vocab_size=len(lk.LukeTokenizer.from_pretrained(BUNDLED)),
        type_vocab_size=1,
    )
    ours.save_pretrained(source)
    ours.config.use_entity_aware_attention = entity_aware
    (source / "config.json").write_text(json.dumps(ours.config.to_dict()))
    shutil.copytree(BUNDLED, source, dirs_exist_ok=True)
    written = []

    def keep(model: lk.LukePreTrainedModel, path: Path) -> None:
        written.append(model)
        path.write_bytes(b"a program")

    monkeypatch.setattr(convert, "export_onnx", keep)
    conversion = convert.convert(source, target, to="onnx")
    assert (target / "model.onnx").read_bytes() == b"a program"
    assert conversion.sizes_bytes.keys() >= {"model.onnx", "config.json", "vocab.json", "entity_vocab.json"}
    assert json.loads((target / "config.json").read_text())["architectures"] == ["LukeForMaskedLM"]
    assert len(lk.LukeTokenizer.from_pretrained(target)) == ours.config.vocab_size
    batch = inputs("model", 2, 7, 3, 2)
    with torch.no_grad():
        expected = lk.LukeForMaskedLM.from_pretrained(source)(**batch)
        assert torch.equal(written[0](**batch).entity_logits, expected.entity_logits)
    assert not any(module.training for module in written[0].modules())


def test_a_conversion_to_onnx_makes_a_directory(tmp_path):
    with pytest.raises(ValueError, match=r"output must be a directory, .*, got .*model\.onnx"):
        convert.convert(tmp_path, tmp_path / "model.onnx", to="onnx")


@pytest.mark.parametrize("blocks", [1, pytest.param(2, marks=[pytest.mark.slow, NEEDS_ONNX])])
def test_the_examples_of_the_docs(blocks, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/export.md").read_text(encoding="utf-8")
    examples, names = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL), {}
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    for example in examples[:blocks]:
        exec(example, names)
    expected = names["model"](**names["inputs"]).logits
    torch.testing.assert_close(names["logits"], expected, rtol=1e-5, atol=1e-5)
    if blocks == 2:
        torch.testing.assert_close(torch.from_numpy(names["onnx_logits"]), expected.detach(), rtol=1e-5, atol=1e-5)
