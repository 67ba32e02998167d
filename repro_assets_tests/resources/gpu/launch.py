"""The worker with the tests' program beside it: what `python -m resources.gpu.worker` is in production."""

import os
import sys

from resources.gpu import worker

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    sys.exit(worker.run(sys.argv[1], os.environ, {"probe": "probe"}))
