"""python -m lora_scripts …: the same as the `lora-scripts` command."""

from lora_scripts.cli import main

if __name__ == "__main__":
    main()
