"""Makes the helper modules here importable, in spawned workers too (they get sys.path)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
