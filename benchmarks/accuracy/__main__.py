"""`lpt sweep` on the suites of this folder, with results in `results/NAME.json` and runs in `runs/accuracy/NAME`.

python -m benchmarks.accuracy --suite phase2 --seeds 0,1,2 data.root=... backbone.weights=...
python -m benchmarks.accuracy --suite phase2 --compare lpt-4+2 phase1-6
"""

import sys
from pathlib import Path

from lpt import cli

HERE = Path(__file__).parent


def main() -> None:
    if "--suite" not in sys.argv[:-1]:
        suites = ", ".join(sorted(path.stem for path in (HERE / "suites").glob("*.yaml")))
        sys.exit(f"python -m benchmarks.accuracy needs --suite NAME, one of {suites}; `lpt sweep --help` has the rest")
    at = sys.argv.index("--suite")
    name, rest = Path(sys.argv[at + 1]).stem, [*sys.argv[1:at], *sys.argv[at + 2 :]]
    places = ["--results", str(HERE / "results" / f"{name}.json"), "--runs", f"runs/accuracy/{name}"]
    sys.argv = ["lpt", "sweep", str(HERE / "suites" / f"{name}.yaml"), *places, *rest]
    cli.main()


if __name__ == "__main__":
    main()
