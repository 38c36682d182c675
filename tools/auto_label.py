"""python tools/auto_label.py --input data/my_style --output data/my_style/metadata.csv"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

    from lora_scripts.cli import main

    main(["label", *sys.argv[1:]])
