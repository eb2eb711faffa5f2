"""Makes the helpers in tests/support importable by name, from any folder of tests."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

# No test may see images of another run; tests of the cache name a folder of their own.
os.environ["REDTEAM_CACHE"] = "off"
