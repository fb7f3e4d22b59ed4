"""Starts experiments/pretrain.py again and again, each time as a fork of a process that has imported it.

    python fork_server.py     reads one line of JSON per life from stdin: {"argv": [...], "output": file}
                              writes {"pid": ...} when it has begun and {"code": ...} when it has ended

A life then costs what the run itself does, not the imports. Nothing here touches a device of JAX: its threads
would not outlive the fork.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import sys
import traceback
import warnings

import tensorboardX  # noqa: F401
import tiny_model  # noqa: F401  the model of the runs
from absl import app

import scjax.loader.iterator  # noqa: F401  what else is imported only when it is needed

file = pathlib.Path(__file__).parent.parent / "experiments" / "pretrain.py"
spec = importlib.util.spec_from_file_location("pretrain", file)
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)


def live(argv: list[str], output: str) -> None:
    """One life, in the child; does not return."""
    code = 1
    try:
        with open(output, "a") as to:
            os.dup2(to.fileno(), 1)
            os.dup2(to.fileno(), 2)
        sys.argv = [str(file), *argv]  # where ml_collections looks, too
        app.run(pretrain.main)
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:  # noqa: BLE001  it must not go on as the server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    warnings.filterwarnings("ignore", message=".*fork.. may lead to deadlocks", category=DeprecationWarning)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            live(**request)
        print(json.dumps({"pid": child}), flush=True)
        status = os.waitpid(child, 0)[1]
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
