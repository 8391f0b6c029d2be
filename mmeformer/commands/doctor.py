# SPDX-License-Identifier: Apache-2.0
"""Print versions, operators and GPUs, and every problem of the installation with its fix.

Examples:
    mmeformer doctor
"""

import argparse

# Nothing else of this project: this command has to work where the others do not.
from mmeformer import doctor


def main(argv=None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    return doctor.main()
