"""The bundled model: a small Llama that answers questions about facts scattered in a document."""

from pathlib import Path

from xkv.tiny.documents import Document, Fact, make_document

CHECKPOINT_DIR = Path(__file__).parent / "checkpoint"

__all__ = ["CHECKPOINT_DIR", "Document", "Fact", "make_document"]
