"""python run_dpr.py --model=DPR_SASRec --dataset=ml-1m [--key=value …]: the same as `recbole-dpr run`."""

import sys

from recbole_dpr.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
