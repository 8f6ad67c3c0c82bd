"""Files of checkpoints that are damaged, hostile or elsewhere: archives, pickles, safetensors, indexes, the hub."""

import gzip
import io
import json
import pickle
import tarfile
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoint_cases import (
    FILES,
    TITLES,
    WORDS,
    assert_holds,
    original,
    pack,
    weights_of,
    write,
)
from huggingface_hub.errors import LocalEntryNotFoundError

from luke_kernels.heads import (
    LukeForMaskedLM,
)
from luke_kernels.model import LukeModel
from luke_kernels.tokenizer import LukeTokenizer


def member(name, content=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, content


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("/etc/evil"), "must hold relative paths, got '/etc/evil'"),
        (member("../evil"), "must hold relative paths, got '../evil'"),
        (member("luke/../../evil", b"x"), "must hold relative paths, got 'luke/../../evil'"),
        (member("evil", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "no links or devices, got 'evil'"),
        (member("evil", type=tarfile.LNKTYPE, linkname="config.json"), "no links or devices, got 'evil'"),
        (member("evil", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "no links or devices, got 'evil'"),
        (member("evil", type=tarfile.BLKTYPE), "no links or devices, got 'evil'"),
        (member("evil", type=tarfile.FIFOTYPE), "no links or devices, got 'evil'"),
        (member("zeros", bytes(10_000_000)), "must unpack to at most 20 times its size, got more at 'zeros'"),
    ],
    ids=["absolute", "up", "deep up", "symlink", "hard link", "device", "block", "fifo", "bomb"],
)
def test_refused_archives(tmp_path, temporary, monkeypatch, bad, message):
    archive = tmp_path / "luke.tar.gz"
    with tarfile.open(archive, "w:gz") as members:
        members.addfile(bad[0], io.BytesIO(bad[1]))
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda *_: pytest.fail("content was read"))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        LukeForMaskedLM.from_pretrained(archive)
    assert set(tmp_path.rglob("*")) == before


def test_two_members_of_one_name_are_refused(tmp_path, temporary, masked_lm):
    """Folders are dropped in unpacking; the second would silently replace the first."""
    directory = original(tmp_path / "m", masked_lm, TITLES)
    with tarfile.open(tmp_path / "luke.tar.gz", "w:gz") as members:
        members.add(directory, arcname="a")
        members.addfile(member("b/metadata.json", b"{}")[0], io.BytesIO(b"{}"))
    with pytest.raises(ValueError, match=r"luke.tar.gz must .*metadata.json"):
        LukeForMaskedLM.from_pretrained(tmp_path / "luke.tar.gz")
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *((kind, damage) for kind in ("gz", "bz2", "xz", "") for damage in ("truncated", "text", "empty")),
        *((kind, "flipped") for kind in ("gz", "bz2", "xz")),  # a plain tar has no checksum of its contents
    ],
)
def test_damaged_archives(tmp_path, temporary, kind, damage):
    directory = original(tmp_path / "m", weights_of(LukeForMaskedLM, vocab_size=5000), TITLES, vocab_size=5000)
    archive = pack(directory, tmp_path / f"luke.tar.{kind}".rstrip("."), f"w:{kind}")
    whole = archive.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    damaged = {"truncated": whole[:half], "flipped": flipped, "text": b"no archive at all\n" * 100, "empty": b""}
    archive.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"luke.tar.* must be a whole archive, got: "):
        LukeForMaskedLM.from_pretrained(archive)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("kind", ["pax", "long name", "after the end", "many members"])
def test_archives_that_unpack_to_too_much_outside_of_files(tmp_path, temporary, kind):
    """Extended headers of megabytes, which tarfile reads whole, and for minutes; what follows the last file."""
    block = tarfile.BLOCKSIZE
    if kind == "pax":
        content = b"30000000 hdrcharset=" + b"0" * 30_000_000
        parts = [member("x", content, type=tarfile.XHDTYPE)[0].tobuf(tarfile.USTAR_FORMAT), content]
    elif kind == "long name":
        content = b"a" * 30_000_000
        parts = [member("x", content, type=tarfile.GNUTYPE_LONGNAME)[0].tobuf(tarfile.USTAR_FORMAT), content]
    elif kind == "after the end":
        parts = [bytes(30_000_000)]
    else:
        parts = [member(f"{n}")[0].tobuf(tarfile.USTAR_FORMAT) for n in range(60_000)]
    data = b"".join(parts)
    archive = tmp_path / "luke.tar.gz"
    archive.write_bytes(gzip.compress(data + bytes(-len(data) % block + 2 * block)))
    begin = time.process_time()
    with pytest.raises(ValueError, match="must unpack to at most 20 times its size"):
        LukeForMaskedLM.from_pretrained(archive)
    assert time.process_time() - begin < 5
    assert not list(temporary.iterdir())


def test_members_that_no_checkpoint_has_are_left_out(tmp_path, masked_lm, monkeypatch):
    directory = original(tmp_path / "m", masked_lm, TITLES)
    (directory / "notes.txt").write_text("x")
    opened = []
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path.name) or real_open(path, *a, **k))
    LukeForMaskedLM.from_pretrained(pack(directory, tmp_path / "luke.tar.gz"))
    assert "pytorch_model.bin" in opened
    assert "notes.txt" not in opened


@pytest.mark.parametrize("file", FILES)
def test_the_hub_gets_what_was_asked_for(tmp_path, monkeypatch, masked_lm, file):
    directory = write(tmp_path / "m", masked_lm, file)
    calls = []

    def snapshot_download(repo_id, **arguments):
        calls.append((repo_id, arguments.pop("allow_patterns"), arguments))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub = {"revision": "v1", "token": "hf_x", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    assert_holds(LukeForMaskedLM.from_pretrained("someone/luke", **hub), masked_lm)
    assert {repo_id for repo_id, _, _ in calls} == {"someone/luke"}
    assert all(arguments == hub for _, _, arguments in calls)
    patterns = [patterns for _, patterns, _ in calls]
    assert {"config.json", "model*.safetensors"} <= set(patterns[0])
    # Pickles only where there is nothing better.
    assert not any("bin" in pattern for pattern in patterns[0])
    assert len(patterns) == (2 if file.endswith("bin") else 1)
    calls.clear()
    LukeForMaskedLM.from_pretrained("someone/luke")
    assert calls[0][2] == {"revision": None, "token": None, "cache_dir": None, "local_files_only": False}


@pytest.mark.parametrize("name", ["someone/no-such-luke", "no/such/folder", "./nothing", "lu ke"])
def test_an_unknown_name_is_named(tmp_path, name):
    for load in (LukeModel.from_pretrained, lambda *a, **k: LukeModel.from_encoder(*a, entity_vocab_size=3, **k)):
        with pytest.raises(FileNotFoundError, match=f"^{name} must be a directory, an archive or an id on the hub"):
            load(name, cache_dir=tmp_path, local_files_only=True)


def test_a_file_that_is_no_archive_is_named(tmp_path, masked_lm):
    path = write(tmp_path / "m", masked_lm) / "model.safetensors"
    ends = r"must be a directory, an archive or an id on the hub, got a file whose name ends in none of \.tar\.gz, "
    with pytest.raises(FileNotFoundError, match=f"model.safetensors {ends}"):
        LukeModel.from_pretrained(path, local_files_only=True)
    with pytest.raises(
        FileNotFoundError, match=r"model.safetensors must be a directory or an id on the hub, got a file$"
    ):
        LukeTokenizer.from_pretrained(path, local_files_only=True)


def test_a_hub_out_of_reach_is_told_in_one_sentence(tmp_path, monkeypatch):
    def snapshot_download(*_, **__):
        cause = ConnectionError("[Errno -2] Name or service not known")
        raise LocalEntryNotFoundError(f"Got: ConnectError: {cause}\nCheck your connection.") from cause

    rule = "^nosuch must be a directory, an archive or an id on the hub, got no such directory or file here, and "
    with pytest.raises(FileNotFoundError, match=rule + r"the hub's cache does not hold it$"):
        LukeModel.from_pretrained("nosuch", cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    reason = r"the hub cannot be reached \(\[Errno -2\] Name or service not known\)$"
    with pytest.raises(FileNotFoundError, match=rule + reason):
        LukeModel.from_pretrained("nosuch")


@pytest.mark.parametrize("damage", ["truncated", "header", "garbage", "empty"])
def test_damaged_safetensors(tmp_path, masked_lm, damage):
    path = write(tmp_path / "m", masked_lm) / "model.safetensors"
    whole = path.read_bytes()
    damaged = {"truncated": whole[:-10], "header": whole[:100], "garbage": b"garbage " * 99, "empty": b""}
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"model.safetensors must be a whole safetensors file, got: "):
        LukeForMaskedLM.from_pretrained(tmp_path / "m")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "nested"])
def test_pickles_are_not_executed(tmp_path, temporary, masked_lm, form):
    evil = Evil(str(tmp_path / "made"))
    path = write(tmp_path / "m", {}, "pytorch_model.bin") / "pytorch_model.bin"
    state = {**masked_lm, "evil": evil}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"evil": evil}, protocol=2))
    else:
        stored = {"module": state} if form == "nested" else state
        torch.save(stored, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(ValueError, match=r"pytorch_model.bin must be a whole pickle of tensors only, got: "):
        LukeForMaskedLM.from_pretrained(tmp_path / "m")
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(evil)).close()
    assert (tmp_path / "made").exists()  # it would have been


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.02, 0.1, 0.5, 0.99])
def test_truncated_pickles(tmp_path, masked_lm, zipped, kept):
    directory = write(tmp_path / "m", masked_lm, "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    path = directory / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=r"pytorch_model.bin must be a whole pickle of tensors only, got: "):
        LukeForMaskedLM.from_pretrained(directory)


GARBAGE = {
    "text": b"hello world\n" * 20,
    "page": b"<!DOCTYPE html><html></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "empty stack": b"\x80\x02.",
    "no memo": b"\x80\x02h\x05.",
    "not utf-8": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
    "half a number": b"\x80\x02J\x01",
    "zip of nothing": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_garbage_for_a_pickle(tmp_path, content):
    path = write(tmp_path / "m", {}, "pytorch_model.bin") / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model.bin must be a whole pickle of tensors only, got: "):
        LukeForMaskedLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("value", [[torch.ones(1)], torch.ones(1), None, {0: torch.ones(1)}], ids=type)
def test_pickles_of_something_else(tmp_path, value):
    write(tmp_path / "m", value, "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin must hold a dict of tensors"):
        LukeForMaskedLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(
    ("content", "message", "error"),
    [
        ({"weight_map": {"a": "../evil"}}, r"must name files beside it, got '\.\./evil'", ValueError),
        ({"weight_map": {"a": "/etc/passwd"}}, "must name files beside it, got '/etc/passwd'", ValueError),
        ({"weight_map": {"a": ".."}}, r"must name files .*, got '?\.\.", (ValueError, FileNotFoundError)),
        ({"weight_map": {"a": "gone.bin"}}, "must name files that exist, got gone.bin", FileNotFoundError),
        ({"metadata": {}}, "must hold an object weight_map, got None", ValueError),
        ({"weight_map": ["a"]}, r"must hold an object weight_map, got \['a'\]", ValueError),
        ([], "must hold a JSON object, got list", ValueError),
    ],
    ids=["up", "absolute", "dots", "gone", "none", "list", "no object"],
)
def test_refused_indexes(tmp_path, masked_lm, index, content, message, error):
    directory = write(tmp_path / "m", masked_lm, "unused.bin")
    torch.save(masked_lm, tmp_path / "evil")
    (directory / index).write_text(json.dumps(content))
    with pytest.raises(error, match=f"{index} {message}"):
        LukeForMaskedLM.from_pretrained(directory)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("other", [WORDS.removeprefix("luke."), "module." + WORDS, "roberta." + WORDS[5:]])
def test_two_names_of_one_tensor_are_refused(tmp_path, masked_lm, file, other):
    directory = write(tmp_path / "m", {**masked_lm, other: torch.zeros(40, 16)}, file)
    with pytest.raises(ValueError, match=f"m must hold each tensor once, got {WORDS} twice"):
        LukeForMaskedLM.from_pretrained(directory)


def test_a_directory_without_weights_is_named(tmp_path, masked_lm):
    directory = write(tmp_path / "m", masked_lm)
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"m must hold one of model.safetensors, .*, got none of them"):
        LukeForMaskedLM.from_pretrained(directory)
