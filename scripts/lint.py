"""Run every linter, all of them even if one complains: ``make lint``. Their settings are in pyproject.toml."""

import subprocess
import sys

from setup_env import ROOT

CHECKS = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["pyright"],
    "spelling": ["codespell_lib", "."],
}


def main() -> int:
    failed = []
    for name, (module, *arguments) in CHECKS.items():
        print(f"[lint] {name}: {module} {' '.join(arguments)}", flush=True)
        if subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT).returncode:
            failed.append(name)
    print(f"[lint] {'failed: ' + ', '.join(failed) if failed else 'all clean'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
