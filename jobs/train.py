"""Train and evaluate an experiment: `ray job submit --working-dir . -- python jobs/train.py EXPERIMENT.yaml`.

The same as `mobula run`; see docs/cluster.md for the token and the runtime environment a job needs.
"""

import sys

from mobula.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
