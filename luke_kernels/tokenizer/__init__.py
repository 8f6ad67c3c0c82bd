"""Texts and the character spans of entities in them -> inputs of LUKE."""

from luke_kernels.entity_vocab import read_entity_vocab
from luke_kernels.tokenizer.encoding import LukeEncoding
from luke_kernels.tokenizer.luke import BUNDLED, LukeTokenizer

__all__ = ["BUNDLED", "LukeEncoding", "LukeTokenizer", "read_entity_vocab"]
