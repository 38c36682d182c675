"""python tools/check_data.py --config configs/my_style.yaml"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

    from lora_scripts.cli import main

    main(["check", *sys.argv[1:]])
