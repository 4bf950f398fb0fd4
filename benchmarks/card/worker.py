"""A process that `children.py` leads: ``python -m benchmarks.card.worker KIND ARGUMENTS``."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings


def reason_of(error: BaseException) -> str:
    """Returns an error in one line."""
    text = (str(error).splitlines() or [""])[0][:300]
    # torch has an error of its own for it, libraries with kernels of their own have not.
    return f"out of memory: {text}" if "out of memory" in text.lower() else f"{type(error).__name__}: {text}"


def main(kind: str, arguments: str) -> int:
    """Runs `stages` of the file called `kind`: each answer that it yields ends a stage."""
    # Libraries print what they like; only answers may reach the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")

    def send(answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        stages = importlib.import_module(f"benchmarks.card.{kind}").stages
        for answer in stages(**json.loads(arguments)):
            send(answer)
            if not answer.get("more") and not sys.stdin.readline():
                return 0
    except Exception as error:  # whatever a peer raises is a line in the report, not the end of it
        traceback.print_exc()
        send({"failed": reason_of(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
