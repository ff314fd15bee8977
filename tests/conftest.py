import fast_blas  # noqa: F401, I001  before anything imports mlx.core

import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A background shell (`nohup make test &`) hands Ctrl-C down as ignored, to every child as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
