"""Check and time the GPU path on this machine: `make gpu-check`. See docs/gpu-check.md.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --sections ceilings experts expert-times
    python benchmarks/gpu_check.py --smoke --out /tmp/smoke      without a GPU, no figures

Exit codes: 0 all that ran is right, 1 something is wrong, 2 there is no GPU, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from gpu_check.report import markdown, problems  # noqa: E402
from gpu_check.rows import Results, new_results, validate  # noqa: E402
from gpu_check.sections import SECTIONS  # noqa: E402
from gpu_check.supervise import ChildFailed, Supervisor  # noqa: E402
from serving.processes import adopt_orphans, exit_at_sigterm  # noqa: E402

NO_GPU_EXIT, INTERRUPTED_EXIT = 2, 130
LIMIT_S = 480.0


def main() -> int:
    """The exit code."""
    options = _options()
    why_not = "" if options.smoke else missing_gpu()
    if why_not:
        print(f"gpu-check: {why_not}. Without a GPU: --smoke --out FOLDER.", file=sys.stderr)
        return NO_GPU_EXIT
    exit_at_sigterm()
    adopt_orphans()
    results = new_results(options.smoke)
    supervisor = Supervisor(results, options.sections, time.monotonic() + options.limit)
    try:
        supervisor.run()
    except KeyboardInterrupt:
        print("gpu-check: interrupted; what was found is written", file=sys.stderr)
        return INTERRUPTED_EXIT
    except ChildFailed as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 1
    finally:
        if results["device"]:
            write(results, options.out)
    print(markdown(results))
    return 1 if problems(results) else 0


def missing_gpu() -> str:
    """Why there is nothing to measure on; empty if there is."""
    from experts.device import probe_cuda

    return probe_cuda().missing


def write(results: Results, folder: Path) -> None:
    """gpu-<device>.json and .md"""
    validate(results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{results['device']['slug']}"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    path.with_suffix(".md").write_text(markdown(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="[all]")
    add("--smoke", action="store_true", help="tiny shapes on the CPU; needs --out")
    add("--out", type=Path, help="folder of the results [benchmarks/results]")
    add("--limit", type=float, default=LIMIT_S, help=f"seconds in all [{LIMIT_S:.0f}]")
    options = parser.parse_args()
    if options.smoke and options.out is None:
        parser.error("--smoke measures nothing: name a folder of your own with --out")
    options.out = options.out or HERE / "results"
    return options


if __name__ == "__main__":
    sys.exit(main())
