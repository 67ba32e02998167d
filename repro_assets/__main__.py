"""`python -m repro_assets` is `repro`."""

from repro_assets.cli import main

if __name__ == "__main__":
    main()
