"""Conversions against transformers, 4.57 and 5: what is written loads there, and encoders keep their states."""

import json
import shutil

import checkpoint_cases
import pytest
import torch
from torch import nn

from luke_kernels import heads
from luke_kernels.convert import convert
from luke_kernels.model import LukeModel
from luke_kernels.tokenizer import BUNDLED, LukeTokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about itself

TEXTS = ["Ada Lovelace met <mask> in London.", "  It   rained, naïve\u2028café!"]
PAIRS = ["Where?", "In <mask> Vienna."]
ENCODERS = [
    ("Roberta", "Model"),
    ("Roberta", "ForMaskedLM"),
    ("XLMRoberta", "ForMaskedLM"),
    ("Bert", "Model"),
    ("Bert", "ForMaskedLM"),
    ("Bert", "ForPreTraining"),
]


def word_pieces():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "@", "#", ",", ".", "?", "!", "ada", "met", "london", "in"]
    tokens += ["love", "##lace", "it", "rain", "##ed", "naive", "cafe", "vienna", "where"]
    return tokens + [chr(letter) for letter in range(ord("a"), ord("z") + 1)]


def encoder(directory, kind, head, **changes):
    """Write an encoder of transformers with random weights and its tokenizer's files; return both."""
    sizes = {key: value for key, value in checkpoint_cases.SIZES.items() if not key.startswith("entity")}
    sizes |= {"max_position_embeddings": 64}
    if kind == "Bert":
        sizes |= {"vocab_size": len(word_pieces()), "type_vocab_size": 2}
    else:
        sizes |= {"vocab_size": 4000, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    model = getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**{**sizes, **changes}))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        if "position_embeddings" in name and kind != "Bert":
            parameter.data[1] = 0
    model.save_pretrained(directory)
    if kind == "Bert":
        (directory / "vocab.txt").write_text("\n".join(word_pieces()) + "\n", encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 62}))
        tokenizer = transformers.BertTokenizerFast.from_pretrained(directory)
    else:
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(BUNDLED / file, directory)
        vocabulary = json.loads((directory / "vocab.json").read_text())
        assert vocabulary.keys() >= {"@", "#"}
        # As 4 makes it by itself.
        mask = transformers.AddedToken("<mask>", lstrip=True)
        tokenizer = transformers.RobertaTokenizerFast.from_pretrained(directory, mask_token=mask)
    return model.eval(), tokenizer


@pytest.fixture
def titles(tmp_path):
    path = tmp_path / "titles.tsv"
    path.write_text("".join(f"{title}\t1\n" for title in ("[PAD]", "[UNK]", "[MASK]", "Ada Lovelace", "Vienna")))
    return path


def as_texts(texts, kind):
    return [text.replace("<mask>", "[MASK]") for text in texts] if kind == "Bert" else texts


@pytest.mark.parametrize(("kind", "head"), ENCODERS)
def test_an_encoder_becomes_a_luke_and_comes_back(tmp_path, titles, kind, head):
    theirs, their_tokenizer = encoder(tmp_path / "m", kind, head)
    conversion = convert(tmp_path / "m", tmp_path / "luke", entity_vocab=titles)
    name = "LukeModel" if head == "Model" else "LukeForMaskedLM"
    assert conversion.architecture == name
    luke = (LukeModel if head == "Model" else heads.LukeForMaskedLM).from_pretrained(tmp_path / "luke")
    tokenizer = LukeTokenizer.from_pretrained(tmp_path / "luke")
    inputs = tokenizer(as_texts(TEXTS, kind), padding=True, return_tensors="pt")
    expected = their_tokenizer(as_texts(TEXTS, kind), padding=True, return_tensors="pt")
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(inputs[key], expected[key]), key

    conversion = convert(tmp_path / "luke", tmp_path / "back", to="encoder")
    back = getattr(transformers, conversion.architecture)
    assert back.__name__ == ("RobertaModel" if head == "Model" else "RobertaForMaskedLM")
    back, info = back.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    assert all("pooler" in key for key in info["unexpected_keys"])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        states = [theirs(**expected)[0], luke(**inputs), back.eval()(**{**expected, "token_type_ids": None})[0]]
        if kind == "Bert" and head == "ForPreTraining":
            states[0] = theirs(**expected).prediction_logits
    states[1] = states[1].last_hidden_state if head == "Model" else states[1].logits[..., : states[0].shape[-1]]
    for state in states[1:]:
        torch.testing.assert_close(state[real], states[0][real], rtol=1e-5, atol=1e-5)

    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert len(again) == len(their_tokenizer)
    for texts, pairs in ((TEXTS, None), (TEXTS, PAIRS)):
        arguments = (as_texts(texts, kind), None if pairs is None else as_texts(pairs, kind))
        ours, expected = (t(*arguments, return_offsets_mapping=True) for t in (again, their_tokenizer))
        assert dict(ours) == dict(expected)
    assert again.mask_token_id == their_tokenizer.mask_token_id
    if kind == "Roberta":
        tensors, stored = theirs.state_dict(), back.state_dict()
        assert all(torch.equal(tensors[key], stored[key]) for key in tensors if "position_ids" not in key)
    # And starts a LUKE again, with the same words.
    convert(tmp_path / "back", tmp_path / "luke2", entity_vocab=titles)
    assert LukeTokenizer.from_pretrained(tmp_path / "luke2")(as_texts(TEXTS, kind)) == tokenizer(as_texts(TEXTS, kind))


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize("lower", [True, False])
def test_words_of_bert(tmp_path, titles, file, lower):
    encoder(tmp_path / "m", "Bert", "Model")
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path / "m")
    if file == "tokenizer.json":
        theirs.save_pretrained(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", entity_vocab=titles)
    ours = LukeTokenizer.from_pretrained(tmp_path / "out")
    for text in ("Ada met, LONDON[MASK].", "Naïve café lovelace 東京 rained!"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    pair = ours("Where?", "In Vienna.", return_token_type_ids=True)
    expected = theirs("Where?", "In Vienna.")
    assert (pair["input_ids"], pair["token_type_ids"]) == (expected["input_ids"], expected["token_type_ids"])


@pytest.mark.parametrize("name", ["LukeModel", "LukeForMaskedLM", "LukeForEntityClassification"])
def test_transformers_loads_what_came_from_an_original(tmp_path, name):
    sizes = {"vocab_size": 4002, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    state = checkpoint_cases.weights_of(LukeModel if name == "LukeModel" else getattr(heads, name), **sizes)
    checkpoint_cases.original(tmp_path / "m", state, checkpoint_cases.TITLES, architectures=[name], **sizes)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(BUNDLED / file, tmp_path / "m")
    assert convert(tmp_path / "m", tmp_path / "out").architecture == name
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = (LukeModel if name == "LukeModel" else getattr(heads, name)).from_pretrained(tmp_path / "out")
    inputs = LukeTokenizer.from_pretrained(tmp_path / "out", task="entity_classification")(
        ["Ada Lovelace was here."], entity_spans=[[(0, 12)]], return_tensors="pt"
    )
    their_tokenizer = transformers.LukeTokenizer.from_pretrained(tmp_path / "out", task="entity_classification")
    expected = their_tokenizer("Ada Lovelace was here.", entity_spans=[(0, 12)], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["entity_ids"], expected["entity_ids"])
    with torch.no_grad():
        results, outputs = ours(**inputs), theirs.eval()(**inputs)
    for key in outputs:
        torch.testing.assert_close(results[key], outputs[key], rtol=1e-5, atol=1e-5)


def test_a_word_decoder_of_its_own_goes_along(tmp_path, masked_lm):
    masked_lm["lm_head.decoder.weight"] = torch.randn_like(masked_lm[checkpoint_cases.WORDS]) * 0.2
    checkpoint_cases.write(tmp_path / "m", masked_lm, config={"tie_word_embeddings": False})
    convert(tmp_path / "m", tmp_path / "out", to="encoder")
    back, info = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    luke = heads.LukeForMaskedLM.from_pretrained(tmp_path / "m")
    ids = torch.tensor([[0, 5, 6, 7, 2]])
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(ids).logits, luke(ids).logits, rtol=1e-5, atol=1e-5)
