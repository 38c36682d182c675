"""python train.py --config configs/my_style.yaml [key=value ...]"""

import sys

from lora_scripts.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
