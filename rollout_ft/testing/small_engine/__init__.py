"""A small model server that speaks SGLang's HTTP protocol: `python -m rollout_ft.testing.small_engine --help`.

Owns the place of the package and of the model directory it is shipped with. Importing it costs nothing: torch is
imported by the transformer alone, and only when a server with that model starts.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODEL_DIR"]

MODEL_DIR = Path(__file__).parent / "model"
"""The model directory shipped with the package: a tokenizer, a chat template and a config, no weights."""
