"""The bundled model: a small Llama that answers questions about facts scattered in a document."""

from pathlib import Path

from xkv.tiny.documents import Document, Fact, make_document

CHECKPOINT_DIR = Path(__file__).parent / "checkpoint"

SELECTION = {"chunk_size": 2, "landmark_bits": 4}
"""How selective attention suits this model: its retrieval heads look at single tokens, whose keys
a mean over 8 hides. Two tokens at 4 bits take the bytes of the paper's eight at 16 bits."""

__all__ = ["CHECKPOINT_DIR", "SELECTION", "Document", "Fact", "make_document"]
