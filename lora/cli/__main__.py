"""The entry point of `python -m lora.cli`.

Requirements: R25.
"""

from lora.cli import main

if __name__ == "__main__":
    main()
