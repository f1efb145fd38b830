"""Make the calibration that the bundled model ships with: on its own kind of documents.

    python -m scripts.calibrate_tiny

Documents are other ones than those of the evaluation, which begins at small seeds.
"""

from __future__ import annotations

import sys

from xkv.cli.engine import load_engine
from xkv.cli.terminal import ProgressBars
from xkv.config import XKVConfig
from xkv.planning.basis_file import basis_path
from xkv.planning.calibrate_model import calibrate_model
from xkv.planning.calibration import PIECE_TOKENS, pieces_of
from xkv.planning.profile import find_profile
from xkv.tiny import CHECKPOINT_DIR, make_document

FIRST_SEED, N_DOCUMENTS = 900_000, 24


def main() -> None:
    """Write the file beside the checkpoint."""
    engine = load_engine("torch", str(CHECKPOINT_DIR))
    profile = find_profile(str(CHECKPOINT_DIR))
    assert profile is not None
    subject = engine.subject(XKVConfig(groups=profile.groups))
    texts = [
        engine.encode(make_document(FIRST_SEED + i, PIECE_TOKENS).text) for i in range(N_DOCUMENTS)
    ]
    out = (
        CHECKPOINT_DIR.parent / "basis" / basis_path(subject.fingerprint, subject.plan.groups).name
    )
    with ProgressBars() as bars:
        done = calibrate_model(subject, lambda: pieces_of(texts), bars.update, True, out)
    print(f"{done.path}: weights {dict(done.basis.weights)}", file=sys.stderr)


if __name__ == "__main__":
    main()
