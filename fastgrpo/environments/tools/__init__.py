# SPDX-License-Identifier: Apache-2.0
"""What environments let a model do: look closer, compute, search. None of it runs model text."""
