import fast_blas  # noqa: F401, I001  before anything imports mlx.core

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
