#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Generate data, train from scratch, evaluate and draw predictions, in minutes on two CPU cores."""

import argparse

from mmeformer import quickstart


def main() -> None:
    """Run one task's quickstart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(quickstart.TASKS))
    parser.add_argument("--work-dir", help="default: work_dirs/quickstart-TASK")
    args = parser.parse_args()
    quickstart.run(args.task, args.work_dir)


if __name__ == "__main__":
    main()
