"""Run a sweep: `ray job submit --working-dir . -- python jobs/sweep.py SPACE.yaml`.

The same as `mobula sweep`; see docs/cluster.md for the token and the runtime environment a job needs.
"""

import sys

from mobula.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
