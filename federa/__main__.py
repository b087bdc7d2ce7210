"""python -m federa, which torchrun can start."""

from federa.cli import main

if __name__ == "__main__":
    main()
