"""The long form of the tests: how long, and how much (tests/run.sh --soak MINUTES)."""

import os
from typing import Final

SOAK: Final = os.environ.get("DRSYNC_SOAK") == "1"
"""Property tests play ten times as many examples."""
SEED: Final = os.environ.get("DRSYNC_SEED", "")
"""As --seed, for those who can't give an option."""
_MINUTES: Final = float(os.environ.get("DRSYNC_SOAK_MINUTES", "0"))
STRESS_S: Final = _MINUTES * 30
"""The stress goes on for so long: half of the time that was asked for."""
FUZZ_S: Final = _MINUTES * 15
"""Each of the two that fuzz has a quarter of it."""
SOAK_TIMEOUT_S: Final = 3600 + _MINUTES * 60
"""How long any test may take then, whatever is said of its short form."""
