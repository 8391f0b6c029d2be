# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set: found before it is trained on."""
