"""Train one stage; this is what `accelerate launch` starts. `mmllm train` does the same.

accelerate launch train/train.py configs/mini/1_encoder_alignment.yaml [key=value …] [--resume]
"""

import sys

from mmllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
