"""Write tests/attacks/README.md again: `python -m tests.attacks`."""

from tests.attacks.readme import PATH, render

if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
