"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    PYTHONPATH=load_tests python -m faults.sanitizers [--seconds 1800] [-k EXPRESSION]

Compiles `server/engine/cpu_kernels.c` with both and runs the tests that call the kernels, in a process that has gcc's
libasan loaded before Python. The first access beyond a tensor, or the first arithmetic that C leaves undefined, ends
the run with the sanitizer's report. Says what ran, and that it was clean, or the report; exits 1 unless all of it ran
clean. Needs gcc with its sanitizers: Debian's gcc brings them (`apt-get install gcc libc6-dev`), Fedora's are `libasan
libubsan`. clang has other names for its libraries and is not looked for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = tuple(f"tests/engine/test_{name}.py" for name in ("cpu_kernels", "quantized_weights"))
# -O1, or gcc takes minutes. A float beyond an int's range is apart: -fsanitize=undefined leaves it out.
CHECKS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"
REPORT = ("runtime error:", "AddressSanitizer")
CONTEXT = 20  # lines of a report


def sanitized_compiler(folder: Path) -> Path:
    """A compiler to be named in CC: gcc, with the sanitizers behind the options that it is given."""
    path = folder / "cc"
    path.write_text(f'#!/bin/sh\nexec gcc "$@" {CHECKS}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def library(name: str) -> Path:
    """gcc's own `name`. Ends the program where it has none."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():  # it repeats the name of a library that it does not have
        sys.exit(f"expected gcc to have {name}, it has none: apt-get install gcc libc6-dev (Fedora: libasan libubsan)")
    return path.resolve()


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "CC": str(sanitized_compiler(folder)),
        # Loaded after it, the C++ of torch would throw past the sanitizer's own throw, which it holds for a fault.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        # Python and torch leave memory to the process's end; torch's allocator is not this test's to judge.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "PYTHONMALLOC": "malloc",
    }


def report_of(output: str) -> str | None:
    """The sanitizer's lines in what a run wrote."""
    lines = output.splitlines()
    at = next((number for number, line in enumerate(lines) if any(mark in line for mark in REPORT)), None)
    return None if at is None else "\n".join(lines[at : at + CONTEXT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="after which it is given up")
    parser.add_argument("-k", dest="expression", help="of pytest: some of the tests")
    arguments = parser.parse_args()
    if shutil.which("gcc") is None:
        sys.exit("expected gcc, found none: apt-get install gcc libc6-dev")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--capture=sys", *TESTS]
    command += ["-k", arguments.expression] if arguments.expression else []
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["timeout", "-k", "10", str(arguments.seconds), *command],
            cwd=ROOT,
            env=environment(Path(folder)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    report = report_of(done.stdout)
    print("ran:", *TESTS, *(["-k", arguments.expression] if arguments.expression else []))
    print(f"with: gcc {CHECKS}")
    if report is not None:
        print(report)
    elif done.returncode:
        print(done.stdout[-3000:])
    else:
        print(f"clean: {done.stdout.strip().splitlines()[-1]}")
    sys.exit(done.returncode != 0 or report is not None)


if __name__ == "__main__":
    main()
